"""What products are made of, which activations gate them, and what a softmax reads."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import fx

from lrpfx.ops import SHAPED, Op, bound_arguments, comes_from

aten = torch.ops.aten


def find_scores(graph: fx.Graph, known: Mapping[fx.Node, Op | str]) -> set[fx.Node]:
    """What a softmax reads, and what that is computed from one by one."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        op = known.get(node)
        if not isinstance(op, Op):
            if node in found:  # one of several outputs
                found.update(n for n in node.all_input_nodes if n in known)
            continue
        passes = op.family in ("move", "product", "activation")
        passes = passes or op.kind in ("shift", "scale", "sum", "reduction")
        if op.family == "softmax" or (node in found and passes):
            found.update(n for n in node.all_input_nodes if n in known)
    return found


def _nested(factor: fx.Node, known: Mapping[fx.Node, Op | str]) -> fx.Node | None:
    """The product that a factor of another is, moved or scaled maybe, if nothing else uses it."""
    inner: fx.Node | None = factor
    while inner is not None and _is_read_once(inner, known):
        if _is_kind(known[inner], "product"):
            return inner if len(set(inner.args)) == 2 else None
        inner = _before(inner, known, ("scale",))
    return None


def _before(
    node: fx.Node, known: Mapping[fx.Node, Op | str], kinds: Sequence[str]
) -> fx.Node | None:
    """What a node moves, or does one of ``kinds`` to, if that is a single one; else None."""
    if node.target is operator.getitem and node.args[0] in known:
        (several,) = node.all_input_nodes
        return several if _before(several, known, kinds) is not None else None
    op = known[node]
    if not isinstance(op, Op) or (op.family != "move" and op.kind not in kinds):
        return None
    inputs = [n for n in node.all_input_nodes if n in known]
    return inputs[0] if len(inputs) == 1 or node.target in SHAPED else None


def _is_read_once(node: fx.Node, known: Mapping[fx.Node, Op | str]) -> bool:
    """Whether relevance comes to a node from one other, and not for its shape."""
    users = [user for user in node.users if user in known]
    return sum(user.target not in SHAPED or user.args[0] is node for user in users) == 1


def factors_of(product: fx.Node, known: Mapping[fx.Node, Op | str]) -> list[list[fx.Node]]:
    """By operand of a product, the factors that it stands for, see ``rules.Uniform``."""
    found = []
    for operand in (n for n in product.args if isinstance(n, fx.Node) and n in known):
        inner = _nested(operand, known)
        found.append([operand] if inner is None else list(chain(*factors_of(inner, known))))
    return found


def _is_kind(op: Op | str, kind: str) -> bool:
    return isinstance(op, Op) and op.kind == kind


def find_gates(known: Mapping[fx.Node, Op | str]) -> dict[fx.Node, set[fx.Node]]:
    """The activations that gate each product: those of one factor, if one stands out.

    Moves, and constant factors and summands, as in ``2 * sigmoid(x)`` or ``1 - sigmoid(x)``, aside.
    Of several factors it is the only sigmoid, as in an LSTM's ``sigmoid(i) * tanh(g)``, or all if
    one factor is none; then the only clamp between 0 and a number, then the only one that does not
    just clamp. Picked, pooled and added sigmoids are sigmoids. What another factor is computed from
    is the signal, as y is in ``y * tanh(attn(y))``. Beside a softmax nothing is a gate.
    """
    products = [node for node, op in known.items() if _is_kind(op, "product")]
    inner = {_nested(n, known) for node in products for n in node.all_input_nodes}
    found = {}
    for node in products:
        if node in inner:
            continue
        factors = list(chain(*factors_of(node, known)))
        if not any(_is_softmaxed(factor, known) for factor in factors):
            found[node] = set(_gate(factors, known))
    return found


def is_bounded(node: fx.Node, known: Mapping[fx.Node, Op | str]) -> bool:
    """Whether a node is a sigmoid, a hard one, or a clamp between 0 and a number."""
    return _is_sigmoid(node, known) or _is_from_zero(node)


def _is_sigmoid(node: fx.Node, known: Mapping[fx.Node, Op | str]) -> bool:
    """Whether a node is a sigmoid or a hard one, which a clamp between 0 and 1 is, too."""
    unit = _is_from_zero(node) and list(bound_arguments(node).values())[2] == 1
    return unit or _kind(node, known) in ("sigmoid", "hardsigmoid")


def _gate(factors: Sequence[fx.Node], known: Mapping[fx.Node, Op | str]) -> Iterable[fx.Node]:
    """The activations of the factor that gates the others."""
    ends = {factor: _ends(factor, known) for factor in factors}
    bent = {tuple(end): factor for factor, end in ends.items() if end}
    sigmoids = [end for end in bent if all(_is_sigmoid(n, known) for n in end)]
    if len(sigmoids) > 1 and len(sigmoids) == len({*map(tuple, ends.values())}) - 1:
        return list(chain(*sigmoids))
    if len(sigmoids) != 1:
        bent = {end: factor for end, factor in bent.items() if not _is_signal(factor, ends)}
    ranks = (
        [end for end in bent if end in sigmoids],
        [end for end in bent if all(map(_is_from_zero, end))],
        [end for end in bent if not any(_kind(n, known) == "clamp" for n in end)],
        list(bent),
    )
    first = next((rank for rank in ranks if rank), [])
    return first[0] if len(first) == 1 else ()


def _is_signal(factor: fx.Node, ends: Mapping[fx.Node, Sequence[fx.Node]]) -> bool:
    """Whether the activations of a factor are what another is computed from."""
    own = set(ends[factor])
    others = [n for n, end in ends.items() if set(end) != own]
    return any(comes_from(other, n) for other in others for n in own)


def _is_from_zero(clamp: fx.Node) -> bool:
    """Whether a node is a clamp between 0 and a number."""
    if clamp.target not in (aten.clamp.default, aten.hardtanh.default):
        return False
    _, low, high = bound_arguments(clamp).values()
    return low == 0 and isinstance(high, (int, float))


def _kind(node: fx.Node, known: Mapping[fx.Node, Op | str]) -> str:
    op = known[node]
    return op.kind if isinstance(op, Op) else ""


def _is_softmaxed(factor: fx.Node, known: Mapping[fx.Node, Op | str]) -> bool:
    """Whether a factor is made of weights by a softmax: moved, picked, summed up or scaled."""
    seen, stack = set[fx.Node](), [factor]
    while stack:
        node = stack.pop()
        op = known[node]
        if node in seen:
            continue
        seen.add(node)
        if isinstance(op, Op) and op.family == "softmax":
            return True
        through = not isinstance(op, Op) or op.family in ("move", "select")
        if through or _kind(node, known) in ("scale", "shift", "clamp", "reduction"):
            stack += [n for n in node.all_input_nodes if n in known]
    return False


def _ends(factor: fx.Node, known: Mapping[fx.Node, Op | str]) -> list[fx.Node]:
    """The activations that a factor is but for moves and the like; none if there is more to it."""
    clamp: list[fx.Node] = []
    while (before := _before(factor, known, ("scale", "shift", "clamp"))) is not None:
        clamp = clamp or [factor] if _is_kind(known[factor], "clamp") else clamp
        factor = before
    op = known[factor]
    if isinstance(op, Op) and op.family == "activation":
        return [factor]
    inputs = [n for n in factor.all_input_nodes if n in known]
    if _is_kind(op, "cat"):
        parts = [_ends(n, known) for n in inputs]
        return list(chain(*parts)) if all(parts) else clamp
    picks = not isinstance(op, Op) or op.family == "select"
    if inputs and (picks or _kind(factor, known) in ("reduction", "avg_pool", "sum")):
        parts = [_ends(n, known) for n in inputs]
        if all(part and all(_is_sigmoid(n, known) for n in part) for part in parts):
            return list(chain(*parts))
    return clamp
