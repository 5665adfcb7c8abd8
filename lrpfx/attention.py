"""Fused attention -> its parts; statistics of norms written by hand -> constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx.functionalize import insert
from lrpfx.graph import HELD, bound_arguments

aten = torch.ops.aten


def open_attention(module: fx.GraphModule) -> fx.GraphModule:
    """``sdpa(q, k, v)`` -> ``softmax(scale * q k' + mask) v``, for rules of its parts.

    The fused kernel has no second derivative, and its parts have different rules.
    """
    for node in [
        n for n in module.graph.nodes if n.target is aten.scaled_dot_product_attention.default
    ]:
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(_attention(node))
        module.graph.erase_node(node)
    return module


def _attention(node: fx.Node) -> fx.Node:
    a = bound_arguments(node)
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    query = q.meta["val"]

    def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert(node, target, args, kwargs)

    if a["enable_gqa"]:
        times = query.shape[-3] // k.meta["val"].shape[-3]
        k, v = (op(aten.repeat_interleave.self_int, t, times, -3) for t in (k, v))
    scale = a["scale"] if a["scale"] is not None else query.shape[-1] ** -0.5
    scores = op(
        aten.mul.Tensor, op(aten.matmul.default, q, op(aten.transpose.int, k, -2, -1)), scale
    )
    if a["is_causal"]:
        mask = op(aten.tril.default, op(aten.ones_like.default, scores, dtype=torch.bool))
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = op(aten.where.ScalarOther, mask, scores, float("-inf"))
    elif mask is not None:
        scores = op(aten.add.Tensor, scores, mask)
    # The fused kernel gives a row that is masked whole zeros, a plain softmax gives it NaN.
    softmax = aten.softmax.int if mask is None else aten._safe_softmax.default
    return op(aten.matmul.default, op(softmax, scores, -1), v)


_STATISTICS = {aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction}
_STATISTICS |= {aten.std.dim, aten.std.default, aten.linalg_vector_norm.default}
_MEANS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList}
_STEPS = {aten.add.Tensor, aten.clamp_min.default, aten.mul.Tensor, aten.div.Tensor}
_STEPS |= {aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default}
_STEPS |= {aten.pow.Tensor_Scalar, aten.expand.default, aten.expand_as.default, aten.to.dtype}


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
