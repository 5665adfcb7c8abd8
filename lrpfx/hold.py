"""What counts as a constant for relevance: statistics of norms written by hand, and divisors."""

from __future__ import annotations

import operator

import torch
from torch import fx

from lrpfx import ops
from lrpfx.functionalize import insert
from lrpfx.graph import HELD, is_floating, live_names, varying

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
#: Of these only the first argument's values are read.
_SHAPED = {aten.expand_as.default}


def hold_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """Marks ``rsqrt(mean(x * x) + eps)`` and its like as constants, as in layer norm.

    So a norm written by hand, ``x * rsqrt(mean(x * x) + eps)``, is a constant factor on x. The
    graph computes as before, and derivatives of the relevance still run through the statistic.
    What is no factor in the end (a norm that is itself the output), or multiplies without being
    divided by (an energy as a gate), stays live.
    """
    changing = varying(module.graph)
    statistical: set[fx.Node] = set()  # computed from statistics and constants alone
    for node in module.graph.nodes:
        read = node.all_input_nodes[:1] if node.target in _SHAPED else node.all_input_nodes
        read = [n for n in read if n in changing]
        if _is_statistic(node) or (node.target in _STEPS and read and statistical.issuperset(read)):
            statistical.add(node)
    for node in module.graph.nodes:
        if _is_statistic(node) and _only_scales(node, statistical, inverted=False):
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


def _only_scales(node: fx.Node, statistical: set[fx.Node], inverted: bool) -> bool:
    """Whether what becomes of a statistic ends as a divisor of, or a factor on, something else.

    Args:
        node: The statistic, or what has been computed from it.
        statistical: What is computed from statistics and constants alone.
        inverted: Whether something has been divided by a statistic on the way.
    """
    for user in node.users:
        if user in statistical:
            if not _only_scales(user, statistical, inverted or _inverts(user, statistical)):
                return False
        elif user.target is aten.div.Tensor:
            if inverted or user.args[0] is node:
                return False
        elif user.target is not aten.mul.Tensor or not inverted:
            return False
    return bool(node.users)


def _inverts(node: fx.Node, statistical: set[fx.Node]) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], (int, float)) and node.args[1] < 0
    if node.target is aten.div.Tensor:
        return node.args[1] in statistical
    return node.target in (aten.rsqrt.default, aten.reciprocal.default)


def hold_divisors(module: fx.GraphModule) -> fx.GraphModule:
    """``x / y`` -> ``x / held(y)``, and ``c / y`` -> ``reciprocal(y) * c``, for y no constant.

    The divisor of a live tensor is a constant factor on it, like the standard deviation of a norm:
    routing weights over their sum, linear attention over its normaliser.
    """
    live = _live(module.graph)
    for node in [n for n in module.graph.nodes if n.target is aten.div.Tensor]:
        x, y = node.args
        if y not in live:
            continue
        with module.graph.inserting_before(node):
            if x in live:
                held = insert(node, aten.alias.default, (y,))
                held.meta[HELD] = DIVISOR
                node.args = (x, held)
                continue
            inverse = insert(node, aten.reciprocal.default, (y,))
            node.replace_all_uses_with(insert(node, aten.mul.Tensor, (inverse, x)))
        module.graph.erase_node(node)
    return module


def _live(graph: fx.Graph) -> set[fx.Node]:
    """What relevance may come through: computed from floating inputs or embeddings."""
    changing, live = varying(graph), set[fx.Node]()
    for node in graph.nodes:
        if HELD in node.meta or not is_floating(node.meta.get("val")):
            continue
        names = live_names(node, live)
        op = ops.find(node.target, frozenset(names))
        ends = node.target is aten.detach.default or (op is not None and op.family == "constant")
        begins = node.op == "placeholder" or (
            node.target is aten.embedding.default and node.args[1] in changing
        )
        picks = node.target is operator.getitem and node.args[0] in live
        if begins or picks or (names and not ends):
            live.add(node)
    return live
