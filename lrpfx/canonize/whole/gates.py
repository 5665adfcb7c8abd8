"""Products with a sigmoid and with what is left of it, multiplied out -> one product for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.forms import Gated, Region, gated
from lrpfx.canonize.insert import copied, insert, replace
from lrpfx.canonize.measure import Measured, alike, between
from lrpfx.canonize.same import Same
from lrpfx.canonize.whole.regions import is_curved, pointwise_regions
from lrpfx.ops import (
    KEPT_NOTE,
    hardsigmoid,
    live_names,
    module_calls,
    nodes_in,
    output_leaves,
    precision,
    source_line,
    varying,
)

aten = torch.ops.aten

#: Of these what is left to 1 is the same of the negative.
_SIGMOIDS = {aten.sigmoid.default, hardsigmoid}
_SHIFTS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar}
_ARITHMETIC = {*_SHIFTS, aten.mul.Tensor, aten.div.Tensor}

#: Of the line where it is.
_KEPT = (
    "a gate stays multiplied out, as a module returns a part of it, and what it gates counts "
    "twice: {}"
)


def whole_gates(module: fx.GraphModule) -> fx.GraphModule:
    """``x - x * z`` -> ``x * (1 - z)``, ``x + z * (h - x)`` -> ``(1 - z) * x + z * h``, and so on.

    Here z is a sigmoid, moved maybe, or written out: ``(x + h * exp(a)) / (1 + exp(a))`` is one of
    these, too. What is measured is that a node is linear in each signal, and that what it is
    multiplied by is a number or a sigmoid. Multiplied out, a signal would count twice, once with
    either sign, and relevance grow. What a module returns stays as it is, with a note.
    """
    graph = module.graph
    live, measured = varying(graph), Measured(module)
    if not any(is_curved(node, live) for node in graph.nodes if node in live):
        return module
    finest = max(map(precision, output_leaves(graph)), default=0)
    found = False
    for node in [n for n in graph.nodes if n in live and n.target in _ARITHMETIC]:
        if precision(node) and _make_whole(node, measured, live, finest):
            found = True
    if found:
        graph.eliminate_dead_code()
    return module


class _Gated:
    """A region that may be products with a sigmoid, and what is left of it.

    Args:
        region: The region.
        same: What computes the same.
        live: What relevance may come through; what is written is added.
    """

    def __init__(self, region: Region, same: Same, live: set[fx.Node]) -> None:
        self.end, self.entries, self.inside = region
        self.same, self.live = same, live

    def is_of_one_module(self) -> bool:
        """Whether no module returns a part of the arithmetic."""
        own = module_calls(self.end)
        return all(module_calls(n) == own for n in self.inside if n.target in _ARITHMETIC)

    def is_multiplied_out(self, gate: fx.Node) -> bool:
        """Whether a signal enters twice, or is divided, or a gate is more than sigmoids."""
        if any(n.target is aten.div.Tensor and n.args[1] in self.live for n in self.inside):
            return True
        nodes = [n for node in self.inside for n in nodes_in(node.args) if n in self.live]
        read = [self.same.first(n) for n in nodes]
        again = [n for n in self.entries if read.count(n) > 1]
        return again not in ([], [gate]) or (
            gate in again
            and any(is_curved(n, self.live) and n.target not in _SIGMOIDS for n in self.inside)
        )

    def has_shift(self) -> bool:
        """Whether there is a constant summand, as in ``1 - z``."""
        shifts = (n for n in self.inside if n.target in _SHIFTS)
        return any(len(self._inputs(n)) == 1 for n in shifts)

    def sigmoids(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Entries that are sigmoids, with the sigmoid that each moves."""
        for entry in self.entries:
            node: fx.Node | None = entry
            while node is not None and node.target not in _SIGMOIDS:
                node = self.moved(node)
            if node is not None:
                yield entry, node

    def bent(self) -> Iterator[fx.Node]:
        """Entries that functions such as exp and tanh are taken of."""
        before: dict[fx.Node, set[fx.Node]] = {}
        found = set[fx.Node]()
        for node in self.inside:
            inputs = {self.same.first(n) for n in self._inputs(node)}
            before[node] = set().union(*(before.get(n, {n}) for n in inputs))
            if is_curved(node, self.live):
                found |= before[node]
        yield from sorted(found)

    def moved(self, node: fx.Node) -> fx.Node | None:
        """The one node that a node moves."""
        op = ops.find(node.target, frozenset(live_names(node, self.live)))
        inputs = self._inputs(node)
        return inputs[0] if op is not None and op.family == "move" and len(inputs) == 1 else None

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.live]

    def write(self, target: Any, *args: Any) -> fx.Node:
        """A call; at the insert point, as all that is written."""
        new = insert(self.end, target, args)
        self.live.add(new)
        return new

    def left(self, gate: fx.Node, sigmoid: fx.Node) -> fx.Node:
        """``1 - gate``: the sigmoid of the negative, moved as the gate is."""
        new = self.write(sigmoid.target, self.write(aten.neg.default, sigmoid.args[0]))
        copies = {sigmoid: new}
        for node in between(sigmoid, gate) if gate is not sigmoid else ():
            copies[node] = copied(node, copies, self.end)
            self.live.add(copies[node])
        return copies[gate]

    def coefficient(self, summand: Gated, summands: Sequence[Gated], gate: fx.Node) -> fx.Node:
        """What a summand's signals are multiplied by, computed from constants.

        It is the end's value where these signals are one and all others zero, less that of
        summands that have some of these signals only.
        """
        own = summand.signals
        rest = any({*s.signals} < {*own} for s in summands)
        signals = [n for n in self.entries if n is not gate]
        total: fx.Node | None = None
        for size in range(0 if rest else len(own), len(own) + 1):
            target = aten.sub.Tensor if (len(own) - size) % 2 else aten.add.Tensor
            for ones in combinations(own, size):
                numbers = dict.fromkeys(self.entries, 0)
                numbers |= dict.fromkeys((signals[i] for i in ones), 1)
                numbers[gate] = int(summand.shape == "as it is")
                value = self._value_for(numbers)
                if total is None and target is aten.sub.Tensor:
                    value = insert(self.end, aten.neg.default, (value,))
                total = value if total is None else insert(self.end, target, (total, value))
        assert total is not None
        twice = summand.shape == "open"
        return insert(self.end, aten.mul.Tensor, (total, 2)) if twice else total

    def _value_for(self, numbers: dict[fx.Node, int]) -> fx.Node:
        copies: dict[fx.Node, fx.Node] = {}
        for n, number in numbers.items():
            full = insert(self.end, aten.full_like.default, (n, number))
            copies |= dict.fromkeys(self.same.group(n), full)
        for node in self.inside:
            copies |= dict.fromkeys(self.same.group(node), copied(node, copies, self.end))
        return copies[self.end]


def _make_whole(node: fx.Node, measured: Measured, live: set[fx.Node], finest: int) -> bool:
    for found in pointwise_regions(node, live, measured.same, curved=False):
        if len(found.entries) < 2 or len(found.inside) < 2:
            continue
        region = _Gated(found, measured.same, live)
        for gate, sigmoid in [*region.sigmoids(), *((n, None) for n in region.bent())]:
            left = sigmoid is not None and region.has_shift()
            if not left and not region.is_multiplied_out(gate):
                continue
            summands = gated(measured, found, found.entries.index(gate), sigmoid is None)
            if summands is not None and any(s.shape in ("open", "shut") for s in summands):
                if not region.is_of_one_module():  # what a module returns stays as it is
                    node.meta[KEPT_NOTE] = (_KEPT.format(source_line(node)), node)
                    return False
                with node.graph.inserting_before(node.next):
                    live.add(replace(node, _written(region, summands, gate, sigmoid), finest))
                return True
    return False


def _written(
    region: _Gated, summands: Sequence[Gated], gate: fx.Node, sigmoid: fx.Node | None
) -> fx.Node:
    """The summands, each a product, added up; at the insert point."""
    write, signals = region.write, [n for n in region.entries if n is not gate]
    factors: dict[tuple[str, float], fx.Node] = {("as it is", 0.0): gate}
    total: fx.Node | None = None
    for s in summands:
        key = s.shape, s.power
        if s.shape == "shut" and key not in factors:
            assert sigmoid is not None
            factors[key] = region.left(gate, sigmoid)
        elif s.shape == "open" and key not in factors:
            x = gate if s.power == 1 else write(aten.mul.Tensor, gate, s.power)
            factors[key] = write(aten.sigmoid.default, x)
        own = [*(signals[i] for i in s.signals), *([factors[key]] if key in factors else [])]
        scale: Any = s.scale
        if scale is None or not own:
            scale = region.coefficient(s, summands, gate)
        term = own[0] if own else scale
        for n in own[1:]:
            term = write(aten.mul.Tensor, term, n)
        if own and scale != 1:
            term = write(aten.mul.Tensor, term, scale)
        total = term if total is None else write(aten.add.Tensor, total, term)
    assert total is not None
    if alike(total, region.end):
        return total
    like = insert(region.end, aten.zeros_like.default, (region.end,))
    return write(aten.expand_as.default, total, like)
