"""Exponentials in whose exponent a logarithm of sums of exponentials stands -> quotients."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.final import LOG_SOFTMAXES
from lrpfx.canonize.hold import live_values
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured, alike
from lrpfx.canonize.softmaxes.joined import is_sum
from lrpfx.ops import SHAPED, bound_arguments, live_names, output_leaves, precision

aten = torch.ops.aten

#: Logarithms: what e to the power of a result is more than the argument, and to which power.
_LOGARITHMS: dict[Any, tuple[int, float]] = {
    aten.log.default: (0, 1.0),
    aten.log1p.default: (1, 1.0),
    aten.log2.default: (0, 1 / math.log(2)),
    aten.log10.default: (0, 1 / math.log(10)),
}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_SHIFTS = {*_SUMS, aten.rsub.Scalar}
_SCALES = {aten.mul.Tensor, aten.div.Tensor}
#: So many steps before an exponential a logarithm is looked for.
_STEPS = 12


class _Term(NamedTuple):
    """A logarithm in an exponent.

    Args:
        way: From the exponent to the logarithm, both included.
        times: What it is multiplied by.
    """

    way: tuple[fx.Node, ...]
    times: float

    @property
    def logarithm(self) -> fx.Node:
        """The logarithm."""
        return self.way[-1]


def open_exponentials(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a - log(sum(exp(a))))`` -> ``exp(a) / sum(exp(a))``, moved and scaled as it was.

    So is a softmax that is taken through its logarithm, such as over groups of edges:
    ``exp(a - log(sums)[index])``. The exponential of a sum is a product, and that of a logarithm is
    its argument. What is left, exp(a), is taken from the sum if it is there in other words, which
    is measured.
    """
    graph = module.graph
    if not any(node.target in {*_LOGARITHMS, *LOG_SOFTMAXES} for node in graph.nodes):
        return module
    opened = _Opened(Measured(module), live_values(graph))
    finest = max(map(precision, output_leaves(graph)), default=0)
    for node in [n for n in graph.nodes if n.target is aten.exp.default and n in opened.live]:
        if precision(node) >= finest:
            opened.open(node)
    graph.eliminate_dead_code()
    return module


class _Opened:
    """Opens exponentials.

    Args:
        measured: See ``Measured``.
        live: What relevance may come through; what is written is added.
    """

    def __init__(self, measured: Measured, live: set[fx.Node]) -> None:
        self.measured, self.live = measured, live

    def open(self, exponential: fx.Node) -> None:
        """Write the exponential as a product, if a logarithm of a sum of such stands in it."""
        for _ in range(_STEPS):
            if (term := self._term(exponential.args[0])) is None:
                return
            with exponential.graph.inserting_before(exponential):
                rest = self._split(exponential, term)
            if rest is None:
                return
            exponential = rest

    def _term(self, t: Any) -> _Term | None:
        """A logarithm of a sum of exponentials that stands in an exponent, scaled by a number."""
        pending = [_Term((t,), 1.0)]
        for _ in range(10 * _STEPS):
            if not pending:
                break
            way, times = pending.pop()
            node = way[-1]
            if node.target in LOG_SOFTMAXES:
                return _Term(way, times)
            if node.target in _LOGARITHMS:
                if self._exponentials(node.all_input_nodes[0]):
                    return _Term(way, times * _LOGARITHMS[node.target][1])
            elif len(way) < _STEPS:
                for n in self._inputs(node):
                    if factor := self._factor(node, n):
                        pending.append(_Term((*way, n), times * factor))
        return None

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        read = node.all_input_nodes[:1] if node.target in SHAPED else node.all_input_nodes
        return [n for n in read if n in self.live]

    def _factor(self, node: fx.Node, operand: fx.Node) -> float:
        """What an operand is multiplied by in a sum, a scale or a move; 0 if it does more."""
        number: Any = node.args[1] if len(node.args) > 1 else None
        if node.kwargs:
            return 0
        if node.target in _SUMS:
            twice = node.args[0] is node.args[1]
            return 0 if twice else -1 if node.target is aten.sub.Tensor and number is operand else 1
        if node.target in (aten.rsub.Scalar, aten.neg.default):
            return -1
        if node.target in _SCALES:
            known = isinstance(number, (int, float)) and number != 0
            return 0 if not known else 1 / number if node.target is aten.div.Tensor else number
        return float(self._is_move(node))

    def _is_move(self, node: fx.Node) -> bool:
        """Whether a node moves its one input, also by a matrix of zeros and ones."""
        op, inputs = (
            ops.find(node.target, frozenset(live_names(node, self.live))),
            self._inputs(node),
        )
        if op is None or len(inputs) != 1:
            return False
        return op.family == "move" or (
            op.kind in ("linear", "matmul") and self.measured.commutes(node, inputs[0], torch.log)
        )

    def _exponentials(self, node: fx.Node) -> list[fx.Node]:
        """The exponentials that are summed up in a node, with moves, scales and guards."""
        found, seen, pending = list[fx.Node](), set[fx.Node](), [node]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.target is aten.exp.default:
                found.append(node)
            elif is_sum(node, self.live):
                pending += self._inputs(node)
        return found

    def _write(self, target: Any, *args: Any) -> fx.Node:
        new = insert(self._like, target, args)
        self.live.add(new)
        return new

    def _split(self, exponential: fx.Node, term: _Term) -> fx.Node | None:
        """Write the exponential without the term, which is returned, times the power that it was.

        At the insert point.
        """
        self._like, write = exponential, self._write
        base: Any = term.logarithm.args[0]
        if term.logarithm.target in LOG_SOFTMAXES:
            dim = bound_arguments(term.logarithm)["dim"]
            base = write(aten.softmax.int, base, dim, exponential.meta["val"].dtype)
        elif one := _LOGARITHMS[term.logarithm.target][0]:
            base = write(aten.add.Tensor, base, one)
        rest: fx.Node | None = None
        way = term.way[::-1]
        for i, (inner, node) in enumerate(pairwise(way)):
            if node.target in _SHIFTS:
                if rest is None:
                    rest = self._spread(node.args[1 - node.args.index(inner)], node)
                    first = node.target is aten.sub.Tensor and node.args[0] is inner
                    rest = write(aten.neg.default, rest) if first else rest
                else:
                    rest = copied(node, {inner: rest}, exponential)
                if any(map(_moves, way[i + 2 :])):
                    base = self._spread(base, node)
            else:
                rest = None if rest is None else copied(node, {inner: rest}, exponential)
                base = copied(node, {inner: base}, exponential) if _moves(node) else base
            self.live.update(n for n in (rest, base) if n is not None)
        power = round(term.times) if abs(term.times - round(term.times)) < 1e-6 else term.times
        own = None if rest is None else self._own(rest, term.logarithm.all_input_nodes[0])
        if own is not None and power == -1:
            whole = write(aten.div.Tensor, own, base)
        else:
            whole = base if power == 1 else write(aten.pow.Tensor_Scalar, base, power)
            whole = whole if own is None else write(aten.mul.Tensor, own, whole)
        exponential.replace_all_uses_with(whole)
        return own if own is not None and own.target is aten.exp.default else None

    def _own(self, exponent: fx.Node, sums: fx.Node) -> fx.Node:
        """The exponential of an exponent, by one that is summed up if that is a multiple of it."""
        for e in self._exponentials(sums):
            if alike(e, exponent):
                more = self.measured.excess(exponent, e.all_input_nodes[0])
                if more is not None:
                    return e if more == 0 else self._write(aten.mul.Tensor, e, math.exp(more))
        return self._write(aten.exp.default, exponent)

    def _spread(self, x: Any, node: fx.Node) -> fx.Node:
        """A summand in the form of the sum that it is part of."""
        if not isinstance(x, fx.Node):
            return self._write(aten.full_like.default, node, x)
        return x if alike(x, node) else self._write(aten.expand_as.default, x, node)


def _moves(node: fx.Node) -> bool:
    """Whether a node on a way is neither a sum nor a scale."""
    return node.target not in {*_SHIFTS, *_SCALES, aten.neg.default}
