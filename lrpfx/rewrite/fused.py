"""Where the parts of an attention are run fused again, and how: a matter of the fast form."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from lrpfx.canonize import FUSED, SDPA
from lrpfx.ops import HELD, bound_arguments, reachable
from lrpfx.plan import Assignment
from lrpfx.rules import Carry

aten = torch.ops.aten
SIZE = aten.sym_size.int


@dataclass(frozen=True)
class Fused:
    """Parts of an attention that a fused kernel can stand for.

    Args:
        call: The call of the kernel.
        shares: By slot of the live ones of queries, keys and values: what each gets of its
            gradient. 1/4 for queries and keys and 1/2 for values, 1 for values alone.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.1 and 3.3, composed.
    """

    call: fx.Node
    shares: Mapping[int, float]

    @property
    def mask(self) -> fx.Node | None:
        """What is added to the scores, or says which of them count."""
        mask: fx.Node | None = bound_arguments(self.call)["attn_mask"]
        return mask


def is_of_sizes(mask: fx.Node) -> bool:
    """Whether a mask is the same for all inputs of the same sizes."""
    read = reachable([mask], lambda n: [] if n.target is SIZE else n.all_input_nodes)
    return all(n.op == "call_function" for n in read)


class Mask(NamedTuple):
    """What fused attention gets for its mask.

    Args:
        added: What is added to the scores; None if the mask is just causal.
        low: Whether the kernel cannot be used, as all that some query sees may lie far below zero.
            Its backward pass computes exp(s - log sum exp s), and of two numbers near -1e9 the
            difference is lost.
    """

    added: Tensor | None
    low: bool = False


#: What is added to some score of each query is not below this, as far as the kernel is trusted.
_LOW = -16.0


def mask_for_kernel(mask: Tensor, dtype: torch.dtype, of_sizes: bool) -> Mask:
    """The mask as the kernel, at each call, would make and keep it.

    In models that leave a causal mask to the kernel torch.export sees one that is written out,
    which takes the kernel half as long again.

    Args:
        mask: Shape (..., T, T).
        dtype: Of the scores.
        of_sizes: Whether it depends on sizes only. Then, and only then, the answer may be written
            down for inputs of one form.
    """
    if of_sizes:
        with disable_proxy_modes_tracing():
            if _is_causal(mask):
                return Mask(None)
    if mask.dtype != torch.bool:
        if get_proxy_mode() is not None and not of_sizes:  # values are not known
            return Mask(mask, low=True)
        with disable_proxy_modes_tracing():
            return Mask(mask, bool((mask.amax(-1) < _LOW).any()))
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return Mask(torch.where(mask, zero, float("-inf")))


def _is_causal(mask: Tensor) -> bool:
    tokens = mask.shape[-1]
    if tokens == 1 or mask.shape[-2:] != (tokens, tokens):
        return False
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == seen).all())
    hidden = mask <= torch.finfo(mask.dtype).min
    return bool(((mask == 0) == seen).all() and (hidden == ~seen).all())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *_: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention in evaluation mode with what ``mask_for_kernel`` returned."""
    if mask.low and mask.added is not None:
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = (t.repeat_interleave(times, -3) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.mT * scale + mask.added
        weights: Tensor = aten._safe_softmax(scores, -1)
        return weights @ value
    attended: Tensor = SDPA(
        query,
        key,
        value,
        mask.added,
        is_causal=mask.added is None,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return attended


def find_fused(
    graph: fx.Graph,
    plan: Mapping[str, Assignment],
    live: Container[fx.Node],
    carriers: Mapping[fx.Node, Carry],
) -> dict[fx.Node, Fused]:
    """The attentions whose parts, under their rules, amount to the kernel's own backward pass.

    That is where no part divides by anything and all edges between them carry multipliers.
    """
    found = {}
    for node in graph.nodes:
        if node not in carriers or FUSED not in node.meta:
            continue
        call = node.meta[FUSED]
        arguments = bound_arguments(call)
        if arguments["attn_mask"] in live:  # a bias that gets its share, too
            continue
        qkv = tuple(arguments[name] for name in ("query", "key", "value"))
        inside = _between(node, {*qkv, arguments["attn_mask"]})
        if any(HELD in n.meta for n in inside):  # an inverse, which is a constant in the product
            continue
        parts = [n for n in inside if n in live]
        if not all(
            _is_plain(n, plan, carriers) and (n is node or carriers[n].takes) for n in parts
        ):
            continue
        ways = {n: len(plan[n.name].record.site.live) for n in parts}
        scores = [n for n in parts if n is not node and plan[n.name].record.kind == "matmul"]
        through = ways[node] * (ways[scores[0]] if scores else 1)
        shares = (1 / through, 1 / through, 1 / ways[node])
        # By slot: what is a constant as a query may be live as a value.
        weighed = any(plan[n.name].record.kind == "softmax" for n in parts)
        slots = enumerate(zip(qkv, shares, (weighed, weighed, True), strict=True))
        found[node] = Fused(call, {i: s for i, (n, s, yes) in slots if yes and n in live})
    return found


def _between(end: fx.Node, bounds: Container[Any]) -> set[fx.Node]:
    """The nodes from ``bounds`` to ``end``, without the bounds themselves."""
    inside, stack = set(), [end]
    while stack:
        node = stack.pop()
        if node not in inside and node not in bounds:
            inside.add(node)
            stack.extend(node.all_input_nodes)
    return inside


def _is_plain(
    node: fx.Node, plan: Mapping[str, Assignment], carriers: Mapping[fx.Node, Carry]
) -> bool:
    """Whether the node's multiplier is its Jacobian's, up to a number."""
    if node not in carriers:
        return False
    assignment = plan[node.name]
    return assignment.rule.gradient_shares(assignment.record.site) is not None
