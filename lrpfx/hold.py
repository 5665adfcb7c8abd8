"""What counts as a constant for relevance: statistics of norms written by hand, and divisors."""

from __future__ import annotations

import torch
from torch import fx

from lrpfx.functionalize import insert
from lrpfx.graph import HELD, varying

aten = torch.ops.aten

#: Why a divisor is held.
DIVISOR = "divisor of a live tensor"

_STATISTICS = {aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction}
_STATISTICS |= {aten.std.dim, aten.std.default, aten.linalg_vector_norm.default}
_MEANS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList}
_STEPS = {aten.add.Tensor, aten.clamp_min.default, aten.mul.Tensor, aten.div.Tensor}
_STEPS |= {aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default}
_STEPS |= {
    aten.pow.Tensor_Scalar,
    aten.mean.dim,
    aten.expand.default,
    aten.expand_as.default,
    aten.to.dtype,
}


def hold_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """Marks ``rsqrt(mean(x * x) + eps)`` and its like as constants, as in layer norm.

    So a norm written by hand, ``x * rsqrt(mean(x * x) + eps)``, is a constant factor on x. The
    graph computes as before, and derivatives of the relevance still run through the statistic.
    What is no factor in the end (a norm that is itself the output) stays live.
    """
    for node in module.graph.nodes:
        if _is_statistic(node) and _only_scales(node):
            node.meta[HELD] = "statistic of a normalisation"
    return module


def _is_statistic(node: fx.Node) -> bool:
    """Whether the node is a variance, a standard deviation, a norm, or a mean of squares."""
    if node.target in _STATISTICS:
        return True
    if node.target not in _MEANS:
        return False
    squared = node.all_input_nodes[0]
    if squared.target is aten.pow.Tensor_Scalar:
        return bool(squared.args[1] == 2)
    is_square = squared.target is aten.mul.Tensor and len(squared.all_input_nodes) == 1
    return is_square or squared.target is aten.square.default


def _only_scales(node: fx.Node) -> bool:
    """Whether the node's value, roots and constants aside, ends as a factor or divisor only."""
    for user in node.users:
        others = [n for n in user.all_input_nodes if n is not node and n.op != "get_attr"]
        if user.target in (aten.mul.Tensor, aten.div.Tensor) and others:
            continue
        if user.target not in _STEPS or not _only_scales(user):
            return False
    return bool(node.users)


def hold_divisors(module: fx.GraphModule) -> fx.GraphModule:
    """``x / y`` -> ``x / held(y)``, and ``c / y`` -> ``reciprocal(y) * c``, for y no constant.

    The divisor of a live tensor is a constant factor on it, like the standard deviation of a norm:
    routing weights over their sum, linear attention over its normaliser.
    """
    changing = varying(module.graph)
    for node in [n for n in module.graph.nodes if n.target is aten.div.Tensor]:
        x, y = node.args
        if y not in changing or HELD in y.meta:
            continue
        with module.graph.inserting_before(node):
            if x in changing:
                held = insert(node, aten.alias.default, (y,))
                held.meta[HELD] = DIVISOR
                node.args = (x, held)
                continue
            inverse = insert(node, aten.reciprocal.default, (y,))
            node.replace_all_uses_with(insert(node, aten.mul.Tensor, (inverse, x)))
        module.graph.erase_node(node)
    return module
