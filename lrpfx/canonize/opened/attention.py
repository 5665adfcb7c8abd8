"""Fused attention -> its parts, which have rules of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lrpfx.canonize.insert import insert
from lrpfx.ops import bound_arguments

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_RESHAPES = {aten.reshape.default, aten.view.default, aten.flatten.using_ints}
#: On the last of the parts: the call that they stand for.
FUSED = "lrpfx_fused"


def group_heads(module: fx.GraphModule) -> fx.GraphModule:
    """``sdpa(q, repeated(k), repeated(v))`` -> ``sdpa(q, k, v, enable_gqa=True)``.

    Heads that share keys and values need no copies of them.
    """
    for node in [n for n in module.graph.nodes if n.target is SDPA]:
        q, *repeated = node.args[:3]
        k, v = (_once(t) for t in repeated)
        if k is None or v is None or node.kwargs.get("enable_gqa"):
            continue
        heads = [t.meta["val"].shape[-3] for t in (q, *repeated)]  # a query's may be broadcast
        if heads[0] == heads[1] == heads[2] and k.meta["val"].shape[1] == v.meta["val"].shape[1]:
            node.args = (q, k, v, *node.args[3:])
            node.update_kwarg("enable_gqa", True)
    module.graph.eliminate_dead_code()
    return module


def _once(repeated: Any) -> fx.Node | None:
    """``t`` of ``reshape(expand(unsqueeze(t)))``, each head of (N, H, T, D) several times."""
    steps = [repeated]
    for target in (_RESHAPES, {aten.expand.default}, {aten.unsqueeze.default}):
        if steps[-1].target not in target:
            return None
        steps.append(steps[-1].all_input_nodes[0])
    form, spread, grown, once = (step.meta["val"].shape for step in steps)
    if len(once) != 4 or len(spread) != 5:
        return None
    n, heads, tokens, size = once
    times = spread[2]
    expected = [n, heads, 1, tokens, size, n, heads, times, tokens, size]
    expected += [n, heads * times, tokens, size]
    same = zip((*grown, *spread, *form), expected, strict=True)
    return steps[-1] if all(statically_known_true(a == b) for a, b in same) else None


def open_attention(module: fx.GraphModule) -> fx.GraphModule:
    """``sdpa(q, k, v)`` -> ``softmax(scale * q k' + mask) v``, for rules of its parts.

    The fused kernel has no second derivative, and its parts have different rules. The call itself
    stays in the graph, unused: where relevance is computed fast it may be put back.
    """
    for node in [n for n in module.graph.nodes if n.target is SDPA]:
        with module.graph.inserting_before(node):
            whole = _attention(node)
        node.replace_all_uses_with(whole)
        whole.meta[FUSED] = node
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
