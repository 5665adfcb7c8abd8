"""Exponentials over a common sum -> parts of one exponential, of which a softmax can be made."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.hold import is_inverse, live_values
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured, between
from lrpfx.canonize.same import Same
from lrpfx.canonize.softmaxes.proportional import PROPORTIONAL
from lrpfx.canonize.softmaxes.scores import SHIFT, find_scores, without_influence
from lrpfx.ops import HELD, live_names, output_leaves, precision, reachable

aten = torch.ops.aten


#: What is merged where it is computed twice: exponentials and what is subtracted in them.
_TWICE = {aten.exp.default, aten.amax.default, aten.max.default, aten.max.dim, operator.getitem}


def one_exponential_each(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a - max(a)) / sum(exp(a - max(a)))`` with exponential and maximum once."""
    if sum(node.target in _TWICE for node in module.graph.nodes) < 2:
        return module
    same = Same(module.graph)
    for node in module.graph.nodes:
        if node.target in _TWICE and same.first(node) is not node:
            node.replace_all_uses_with(same.first(node))
    return module


def join_exponentials(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a) / (exp(a) + exp(b))`` -> a part of ``exp([a, b])`` over the sum of its parts.

    So of scores in chunks, ``(exp(a) @ v + exp(b) @ w) / (sum(exp(a)) + sum(exp(b)))``: what
    competes stands in one tensor then, as ``whole_softmaxes`` wants it.
    """
    graph = module.graph
    if sum(n.target is aten.exp.default for n in graph.nodes) < 2:
        return module
    live = live_values(graph)
    finest = max(map(precision, output_leaves(graph)), default=0)
    measured = Measured(module)
    groups: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
    steady = set[fx.Node]()
    for end, below in quotients_of(graph, live):
        own = _without_influence(end, below, live, measured)
        found = _summed(below, live - own)
        if len(found) > 1 and precision(end) == finest and _dimension(found) is not None:
            groups.setdefault(found, []).append(end)
            steady |= own
    for exponentials, ends in groups.items():
        _join(exponentials, ends, steady, measured, live)
    return module


def quotients_of(graph: fx.Graph, live: Container[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Quotients, also by an inverse, and what they divide by."""
    for node in graph.nodes:
        if node not in live or node.target not in (aten.div.Tensor, aten.mul.Tensor):
            continue
        if node.target is aten.div.Tensor:
            if isinstance(node.args[1], fx.Node) and node.args[1] in live:
                yield node, node.args[1]
        else:
            yield from ((node, n) for n in node.all_input_nodes if n in live and is_inverse(n))


def _without_influence(
    end: fx.Node, below: fx.Node, live: set[fx.Node], measured: Measured
) -> set[fx.Node]:
    """What is subtracted in exponentials and does not matter, and what depends on that alone.

    So are running maxima, and the factors exp(m - n) by which sums go over to a new one.
    """
    before = {n for n in reachable([below]) if n in live}
    is_free = without_influence(measured, [end])
    found = set[fx.Node]()
    for node in before:
        if node.target is aten.exp.default:
            scores = find_scores(node.all_input_nodes[0], live, is_free)
            shifts: Any = (total.args[place] for total, place in scores.free.items())
            found.update(n for n in shifts if isinstance(n, fx.Node) and n in live)
    for node in sorted(before) if found else ():
        inputs = {n for n in node.all_input_nodes if n in live}
        if inputs and inputs <= found:
            found.add(node)
    return found


def _summed(below: fx.Node, live: Container[fx.Node]) -> tuple[fx.Node, ...]:
    """The exponentials that a node is a sum of; none if it is anything else besides."""
    found, seen, pending = [], {below}, [below]
    while pending:
        node = pending.pop()
        if node.target is aten.exp.default:
            found.append(node)
            continue
        if not (is_inverse(node) if node is below else False) and not is_sum(node, live):
            return ()
        inputs = {n for n in node.all_input_nodes if n in live} - seen
        seen |= inputs
        pending += inputs
    return tuple(sorted(found))


def is_sum(node: fx.Node, live: Container[fx.Node]) -> bool:
    """Whether a node is proportional to its live inputs together, or moves them."""
    op = ops.find(node.target, frozenset(live_names(node, live)))
    return op is not None and (op.family in ("move", "select") or op.kind in PROPORTIONAL)


def _dimension(exponentials: tuple[fx.Node, ...]) -> int | None:
    """Along which they can be put side by side: of a new one, -1, if all have the same shape."""
    shapes = [tuple(map(str, n.meta["val"].shape)) for n in exponentials]
    if len(set(shapes)) == 1:
        return -1
    if len({len(shape) for shape in shapes}) > 1:
        return None
    apart = [d for d, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    sizes = [n.meta["val"].shape[apart[0]] for n in exponentials]
    whole = all(isinstance(size, int) for size in sizes)
    return apart[0] if len(apart) == 1 and whole else None


def _join(
    exponentials: tuple[fx.Node, ...],
    ends: list[fx.Node],
    steady: set[fx.Node],
    measured: Measured,
    live: set[fx.Node],
) -> None:
    """Let the quotients be computed of one exponential, and of what is steady as of constants."""
    with ends[0].graph.inserting_before(ends[0]):
        parts = _parts(exponentials, ends, measured, live)
    copies = dict(zip(exponentials, parts, strict=True))
    for end in ends:
        with end.graph.inserting_before(end):
            for operand in list(end.all_input_nodes):
                way = {n for e in exponentials for n in between(e, operand)}
                for node in sorted((way & live) - {*copies} - steady):
                    for beside in steady.intersection(node.all_input_nodes) - {*copies}:
                        copies[beside] = insert(end, aten.alias.default, (beside,))
                        copies[beside].meta[HELD] = SHIFT
                    copies[node] = copied(node, copies, end)
                    live.add(copies[node])
                end.replace_input_with(operand, copies.get(operand, operand))


def _parts(
    exponentials: tuple[fx.Node, ...], ends: list[fx.Node], measured: Measured, live: set[fx.Node]
) -> list[fx.Node]:
    """The exponentials as parts of one; what is subtracted for the range stands beside."""
    like, dim = ends[0], _dimension(exponentials)
    assert dim is not None

    def joined(nodes: list[fx.Node]) -> fx.Node:
        target = aten.stack.default if dim == -1 else aten.cat.default
        return insert(like, target, (nodes, dim))

    is_free = without_influence(measured, ends)
    written = [find_scores(n.all_input_nodes[0], live, is_free).write(like) for n in exponentials]
    scores = joined([x for x, _ in written])
    new = [scores]
    if any(shift is not None for _, shift in written):
        spread = [
            insert(like, aten.zeros_like.default, (x,))
            if shift is None
            else insert(like, aten.expand_as.default, (shift, x))
            for x, shift in written
        ]
        shift = insert(like, aten.alias.default, (joined(spread),))
        shift.meta[HELD] = SHIFT
        scores = insert(like, aten.sub.Tensor, (scores, shift))
        new.append(scores)
    whole = insert(like, aten.exp.default, (scores,))
    places: list[Any] = []
    begin = 0
    for i, node in enumerate(exponentials):
        size = node.meta["val"].shape[dim] if node.meta["val"].ndim else 1
        places.append((whole, -1, i) if dim == -1 else (whole, dim, begin, begin + size))
        begin += size if isinstance(size, int) else 0
    target = aten.select.int if dim == -1 else aten.slice.Tensor
    parts = [insert(like, target, place) for place in places]
    live.update([*(x for x, _ in written), *new, whole, *parts])
    return parts
