"""Exponentials over their own sum -> softmaxes; what is subtracted for the range alone is let go.

What all spellings of a softmax share: exp(a - c) is divided by a sum of exp(a - c). The division
may stand behind a product with values, the sum may be over groups of edges and have a mask and a
guard in it, and c may be anything that is the same for all of a sum, as then it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.final import LOG_SOFTMAXES, SOFTMAXES, ways_to_final
from lrpfx.canonize.hold import DIVISOR, live_values
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured, alike, between
from lrpfx.canonize.softmaxes.groups import handed_back
from lrpfx.canonize.softmaxes.proportional import NORM, SUMS, exponent_of, kind_of, powers_of
from lrpfx.canonize.softmaxes.scores import Scores, find_scores, without_influence
from lrpfx.canonize.whole import compose
from lrpfx.ops import (
    HELD,
    bound_arguments,
    output_leaves,
    precision,
)

aten = torch.ops.aten

#: Why what a softmax divides by is held.
NORMALISER = "normaliser of a softmax"

_EXPONENTIALS = {*SOFTMAXES, aten.exp.default}
#: What takes parts that stand side by side.
_PARTS = {aten.select.int, aten.slice.Tensor}


def whole_softmaxes(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a - c) / sum(exp(a - c))`` -> ``softmax(a)``; ``c + log(sum(exp(a - c)))`` without c.

    What is no plain softmax over a dimension becomes one op of its kind that holds the formula as
    it is written. Where values are multiplied before the division, ``(exp(a - c) @ v) / d``, the
    exponentials become ``(exp(a - c) / d) * d`` with the second d a constant, so that there is such
    an op again. That c has no influence on a result is measured. A log-softmax that is not at the
    output is the logarithm of a softmax.
    """
    graph, measured = module.graph, Measured(module)
    if not any(node.target in {*_EXPONENTIALS, *LOG_SOFTMAXES} for node in graph.nodes):
        return module
    finest = max(map(precision, output_leaves(graph)), default=0)
    live = live_values(graph)
    for node in [n for n in graph.nodes if n in live]:
        if node.target in SOFTMAXES:
            scores = find_scores(node.args[0], live, without_influence(measured, [node]))
            if scores.free:
                with graph.inserting_before(node):
                    node.update_arg(0, scores.write(node)[0])
        if node.target in _EXPONENTIALS:
            # In a coarser type more may change than the round-off of what the model returns.
            _Exponential(module, node, measured, live, precision(node) < finest).make_whole()
    graph.eliminate_dead_code()
    final = set[fx.Node]().union(*ways_to_final(graph).values())
    for node in [n for n in graph.nodes if n.target in LOG_SOFTMAXES and n in live]:
        if node not in final:
            _open_log_softmax(module, node)
    return module


def _open_log_softmax(module: fx.GraphModule, node: fx.Node) -> None:
    """``log_softmax(x)`` -> the logarithm of ``softmax(x)``, as it is where that is too small."""
    x, dim, *_ = bound_arguments(node).values()
    with module.graph.inserting_before(node):
        kept = _held(node, insert(node, node.target, node.args, node.kwargs), NORMALISER)
        weights = insert(node, aten.softmax.int, (x, dim, node.meta["val"].dtype))
        logarithm = insert(node, aten.log.default, (weights,))
        there = insert(node, aten.gt.Scalar, (weights, 0))
        new = insert(node, aten.where.self, (there, logarithm, kept))
        node.replace_all_uses_with(compose(module, new, weights, [logarithm, there, new]))
    module.graph.erase_node(node)


class _Exponential:
    """``exp(t)``, or a softmax that is masked and divided again, and what becomes of it.

    Args:
        module: What the graph belongs to.
        node: The exponential.
        measured: See ``Measured``.
        live: What relevance may come through; what is written here is added.
        coarse: Whether no other formula of the same value will do.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        node: fx.Node,
        measured: Measured,
        live: set[fx.Node],
        coarse: bool,
    ) -> None:
        self.module, self.node, self.measured, self.live = module, node, measured, live
        self.coarse = coarse
        self.t = node.all_input_nodes[0]
        #: By what power of a factor on the exponential what depends on it grows.
        self.powers = powers_of(node)

    def make_whole(self) -> None:
        """Rewrite what the exponential is part of: a softmax, or a logarithm of a sum."""
        if self.node.target is aten.exp.default and self._is_over_logarithm():
            return
        quotients = {n: p for n in self.powers if (p := self._parts(n)) is not None}
        if quotients:
            scores = find_scores(
                self.t, self.live, without_influence(self.measured, list(quotients))
            )
            for end, (above, below) in quotients.items():
                if self._weigh(end, above, scores) or self._share(end, above, below, scores):
                    continue
                self._in_range(end, above, scores)
        sums = list(self._sums_with_logarithm())
        if any(alike(end, self.node) and self._is_log_softmax(end) for end, _ in sums):
            return
        for end, logarithm in sums:
            is_free = partial(self.measured.adds_again, end, logarithm, self.node)
            scores = find_scores(self.t, self.live, is_free)
            if scores.free:
                self._add_again(end, self._in_range(end, logarithm, scores))
                break

    # -- exp(a - log(sum(exp(a)))) ----------------------------------------------------------------

    def _is_over_logarithm(self) -> bool:
        """Make ``exp(log_softmax(a))``, however that is written, a softmax, if it is one."""
        spread = any(not alike(n, self.t) for n in self.t.all_input_nodes)
        if self.coarse or not (spread or self.t.target in LOG_SOFTMAXES):
            return False
        for a in (n for n in self.t.all_input_nodes if n in self.live and alike(n, self.t)):
            if (dim := self._dimension(self.node, aten.softmax.int, a)) is not None:
                self._write_softmax(self.node, aten.softmax.int, a, dim)
                return True
        return False

    def _is_log_softmax(self, end: fx.Node) -> bool:
        """Make ``a - log(sum(exp(a)))`` one."""
        if self.coarse:
            return False
        for a in (n for n in end.all_input_nodes if n in self.live and alike(n, end)):
            if (dim := self._dimension(end, aten.log_softmax.int, a)) is not None:
                self._write_softmax(end, aten.log_softmax.int, a, dim)
                return True
        return False

    def _write_softmax(self, end: fx.Node, target: Any, of: fx.Node, dim: int) -> None:
        with end.graph.inserting_before(end):
            new = insert(end, target, (of, dim))
        self._replace(end, new)
        scores = find_scores(of, self.live, without_influence(self.measured, [new]))
        with end.graph.inserting_before(new):
            new.update_arg(0, scores.write(new)[0])

    def _dimension(self, end: fx.Node, target: Any, of: fx.Node) -> int | None:
        """The dimension over which a node is a softmax of another, None if it is over none."""
        for dim in range(of.meta["val"].ndim):
            if self.measured.equals(end, partial(target, dim=dim), of):
                return dim
        return None

    # -- exp(a) / sum(exp(a)) ---------------------------------------------------------------------

    def _parts(self, end: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Of a quotient of what is proportional to the exponential both, or their inverse."""
        if self.powers[end] != 0 or end.target not in (aten.div.Tensor, aten.mul.Tensor):
            return None
        for a, b in (end.args, end.args[::-1])[: 1 if end.target is aten.div.Tensor else 2]:
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                if (self.powers.get(a) or 0) > 0 and b in self.powers:
                    one = self._total(b) is None  # a group of one, whose weight is 1
                    return None if one and not self.measured.ignores(end, self.node) else (a, b)
        return None

    def _way(self, end: fx.Node) -> list[fx.Node]:
        """The nodes on the way from the exponential."""
        return [n for n in between(self.node, end) if n in self.powers]

    def _total(self, end: fx.Node) -> fx.Node | None:
        """The first node on the way that sums exponentials up, with nothing live beside them."""
        for node in self._way(end):
            if not self.live.isdisjoint({*node.all_input_nodes} - {self.node, *self.powers}):
                return None
            if self._kind(node) in SUMS or node.target is NORM:
                return node
        return None

    def _is_entrywise(self, node: fx.Node) -> bool:
        """Whether a node is the exponential, times constants, to a power, in other types maybe."""
        while node is not self.node:
            cast = node.target in (aten.to.dtype, aten._to_copy.default)
            (before, *more) = (n for n in node.all_input_nodes if n in self.powers)
            beside = {*node.all_input_nodes} - {before}
            scaled = cast or self._kind(node) == "scale" or exponent_of(node) is not None
            if more or not scaled or not self.live.isdisjoint(beside):
                return False
            if not alike(before, node):
                return False
            node = before
        return True

    def _weigh(self, end: fx.Node, above: fx.Node, scores: Scores) -> bool:
        """Make a quotient of exponentials a softmax: one entry for each of theirs."""
        if not self._is_entrywise(above) or not alike(end, self.node):
            return False
        way = self._way(end)
        with end.graph.inserting_before(end):
            dim = self._dimension(end, aten.softmax.int, self.t) if self._is_plain(way) else None
            if dim is not None:
                new = insert(end, aten.softmax.int, (scores.write(end)[0], dim))
            else:
                written, entry, copies = self._written(way, scores, end)
                new = compose(self.module, copies[end], entry, written, "softmax")
        self._replace(end, new)
        return True

    def _is_plain(self, way: Sequence[fx.Node]) -> bool:
        """Whether there is but a sum on the way, and no mask or guard."""
        sums = [n for n in way if n.target is aten.sum.dim_IntList]
        rest = {self._kind(n) for n in way if n not in sums}
        return (
            not self.coarse
            and len(sums) == 1
            and rest <= {"reshape", "reciprocal", "pow", "product", ""}
        )

    def _written(
        self, way: Sequence[fx.Node], scores: Scores, before: fx.Node
    ) -> tuple[list[fx.Node], fx.Node, dict[fx.Node, fx.Node]]:
        """Copies of the exponential and the nodes on a way, with all they read beside constant."""
        x, shift = scores.write(before)
        new = [x if shift is None else insert(before, aten.sub.Tensor, (x, shift))]
        new.append(copied(self.node, {self.t: new[0]}, before))
        copies = {self.node: new[1]}
        for node in way:
            for beside in [n for n in node.all_input_nodes if n not in copies]:
                copies[beside] = beside
                if beside in self.live:
                    copies[beside] = _held(before, beside, DIVISOR)
            copies[node] = copied(node, copies, before)
            new.append(copies[node])
        return [n for n in new if n is not x], x, copies

    # -- (exp(a) @ v) / sum(exp(a)) ---------------------------------------------------------------

    def _share(self, end: fx.Node, above: fx.Node, below: fx.Node, scores: Scores) -> bool:
        """Put a softmax in the place of exponentials that are divided later."""
        if self.coarse or self.powers[above] != 1:
            return False
        way = [n for n in self._way(below) if self.powers[n] == 1]
        total = self._total(below)
        first = way.index(total) if total in way else len(way)
        is_exp = self.node.target is aten.exp.default
        if total is not None and all(alike(n, self.node) for n in way[:first]):
            way, rest = way[: first + 1], way[first + 1 :]
            for node in rest:  # guards
                if not alike(node, total) or self._kind(node) == "reshape":
                    break
                way.append(node)
        elif is_exp or all(alike(n, self.node) or n.target in _PARTS for n in way[:first]):
            total = below  # parts are picked or summed up, and then their sums
        else:  # the best of a softmax, such as a router has it
            return False
        last = way[-1] if way else self.node
        with end.graph.inserting_before(end):
            groups = handed_back(total, last, self.node, end)
            fits = (g for g in groups if self.measured.ignores_scale(end, self.node, last, g))
            if (spread := next(fits, None)) is None:
                return False
            written, entry, copies = self._written(way, scores, end)
            own = copies[last] if spread is last else copied(spread, {last: copies[last]}, end)
            empty = insert(end, aten.eq.Scalar, (own, 0))
            sums = insert(end, aten.add.Tensor, (own, empty))
            weights = insert(end, aten.div.Tensor, (copies[self.node], sums))
            whole = insert(end, aten.mul.Tensor, (weights, _held(end, spread, NORMALISER)))
            written = list(dict.fromkeys([*written, own, empty, sums, weights, whole]))
            new = compose(self.module, whole, entry, written, "softmax")
            self.live.add(new)
            end.replace_input_with(below, _held(end, below, NORMALISER))
            self._again(end, above, new)
        return True

    def _again(self, end: fx.Node, operand: fx.Node, new: fx.Node) -> fx.Node:
        """Let an operand of ``end`` be computed from ``new`` in the place of the exponential."""
        copies = {self.node: new}
        for node in [n for n in between(self.node, operand) if n in self.live]:
            copies[node] = copied(node, copies, end)
            self.live.add(copies[node])
        end.replace_input_with(operand, copies[operand])
        return copies[operand]

    def _in_range(self, end: fx.Node, operand: fx.Node, scores: Scores) -> fx.Node:
        """Let what is subtracted for the range go, where nothing else is to be done."""
        if not scores.free:
            return operand
        with end.graph.inserting_before(end):
            written, entry, copies = self._written([], scores, end)
            new = compose(self.module, copies[self.node], entry, written)
            self.live.add(new)
            return self._again(end, operand, new)

    # -- c + log(sum(exp(a - c))) -----------------------------------------------------------------

    def _sums_with_logarithm(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Sums of something and the logarithm of a sum, moved or scaled maybe, and the latter."""
        for node in [n for n in self.powers if n.target is aten.log.default and self._total(n)]:
            while len(node.users) == 1:
                (user,) = node.users
                if user.target in (aten.add.Tensor, aten.sub.Tensor) and not user.kwargs:
                    yield user, node
                elif kind_of(user, [node]) not in ("scale", "reshape"):
                    break
                node = user

    def _add_again(self, end: fx.Node, logarithm: fx.Node) -> None:
        """Make what is added to a logarithm a constant, without a share of its own.

        It is added before other summands, such as -log(n) of a mean: these have theirs.
        """
        operand, summands = logarithm, list[fx.Node]()
        first = end.target is aten.add.Tensor or end.args[0] is logarithm
        while first and len(operand.all_input_nodes) == 1:
            (before,) = operand.all_input_nodes
            if kind_of(operand, [before]) != "shift":
                break
            summands.append(operand)
            operand = before
        with end.graph.inserting_before(end):
            held = {n: _held(end, n, NORMALISER) for n in end.all_input_nodes if n is not logarithm}
            new = copied(end, {**held, logarithm: operand}, end)
            whole = compose(self.module, new, operand, [new])
            for summand in reversed(summands):
                (before,) = summand.all_input_nodes
                whole = copied(summand, {before: whole}, end)
            self._replace(end, whole)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.live.add(new)

    def _kind(self, node: fx.Node) -> str:
        return kind_of(node, self.powers)


def _held(before: fx.Node, constant: fx.Node, why: str) -> fx.Node:
    held = insert(before, aten.alias.default, (constant,))
    held.meta[HELD] = why
    return held
