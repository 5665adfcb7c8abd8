"""Fused attention -> its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx.functionalize import insert
from lrpfx.graph import bound_arguments

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
