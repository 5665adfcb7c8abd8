"""What a softmax reads, without what is subtracted of all alike for the range alone."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured, alike
from lrpfx.ops import HELD, is_floating, live_names, nodes_in

aten = torch.ops.aten

#: Why what is subtracted is held.
SHIFT = "shift of a softmax"

#: By op what its two operands count.
_SIGNS: dict[Any, tuple[int, int]] = {
    aten.add.Tensor: (1, 1),
    aten.sub.Tensor: (1, -1),
    aten.rsub.Scalar: (-1, 1),
}
_DIVISIONS = {aten.div.Tensor}
_SCALES = {aten.mul.Tensor, aten.neg.default, *_DIVISIONS}
#: So many steps before an exponential a shift is looked for.
_STEPS = 12


@dataclass
class Scores:
    """Scores t = L(a - c), L of scales, moves and summands.

    Args:
        t: As they are.
        free: The sums in which something is subtracted that has no influence, and its place there.
        after: What leads from them to ``t``, each with the operand on the way.
    """

    t: fx.Node
    free: dict[fx.Node, int] = field(default_factory=dict)
    after: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self, before: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """Nodes for L(a), and for what that is more than t, a constant; at the insert point.

        Args:
            before: Whose provenance they have.
        """
        x, shift = self._without(self.t, before)
        if shift is None:
            return x, None
        held = insert(before, aten.alias.default, (shift,))
        held.meta[HELD] = SHIFT
        return x, held

    def _without(self, node: fx.Node, like: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        def times(sign: int, value: fx.Node) -> fx.Node:
            return value if sign == 1 else insert(like, aten.neg.default, (value,))

        if node not in self.after:
            return node, None
        operand = self.after[node]
        x, shift = self._without(operand, like)
        signs = _SIGNS.get(node.target)
        sign = 1 if signs is None else signs[node.args.index(operand)]
        shift = None if shift is None else times(sign, shift)
        if node in self.free:
            place = self.free[node]
            given: Any = node.args[place]
            if not isinstance(given, fx.Node) or not is_floating(given.meta["val"]):
                given = insert(like, aten.new_full.default, (x, [], given))
            assert signs is not None
            own = times(-signs[place], given)
            both = own if shift is None else insert(like, aten.add.Tensor, (own, shift))
            return times(sign, x), both
        above = copied(node, {operand: x}, like)
        if shift is None or signs is not None or _fills(node):
            return above, shift
        spread = insert(like, aten.expand_as.default, (shift, operand))
        return above, copied(node, {operand: spread}, like)


#: Whether what a sum has at a place has no influence.
IsFree = Callable[[fx.Node, int], bool]


def without_influence(measured: Measured, ends: Sequence[fx.Node]) -> IsFree:
    """Whether all of ``ends``, of which each is a softmax, stay where a summand is moved."""
    softmax = ends[0] if isinstance(ends[0].args[1], int) else None
    straight = set() if softmax is None else _entrywise(softmax)

    def is_free(total: fx.Node, place: int) -> bool:
        shift: Any = total.args[place]
        value = shift.meta["val"] if isinstance(shift, fx.Node) else shift
        if isinstance(shift, fx.Node) and shift.meta.get(HELD) == SHIFT:
            return True
        number = not isinstance(value, Tensor)
        if not number and not is_floating(value):
            return False
        if softmax is not None and total in straight:  # there is no need to measure
            return number or _is_one_along(shift, _dimension(softmax))
        if number:  # added to a factor it has influence
            return all(measured.ignores_number(end, total) for end in ends)
        source: fx.Node | None = shift
        while source is not None:
            if all(measured.ignores(end, source) for end in ends):
                # Of a mask that is filled again little may be left of what it was before.
                return source is shift or measured.moves(shift, source)
            source = _moved(source)
        return False

    return is_free


def find_scores(t: fx.Node, live: Container[fx.Node], is_free: IsFree) -> Scores:
    """The scores that ``t`` is but for summands without influence.

    Args:
        t: What is exponentiated, or what a softmax reads.
        live: What relevance may come through.
        is_free: Whether a summand has no influence.
    """
    found = Scores(t)
    ways = [[t]]
    for _ in range(_STEPS):
        if not ways:
            break
        *before, node = ways.pop(0)
        operands = [n for n in dict.fromkeys(nodes_in(node.args)) if n in live]
        if node.target in _SIGNS and not node.kwargs and len(set(node.args)) == 2:
            own = [n for n in operands if alike(n, node)]
            pairs = [(n, 1 - node.args.index(n)) for n in own]
            free = next(((n, i) for n, i in pairs if is_free(node, i)), None)
            if free is not None:
                found.free[node] = free[1]
                ways = [[*before, node, free[0]]]
                found.after.update(pairwise(ways[0]))
                continue
        elif not _is_linear(node, live):
            continue
        ways += [[*before, node, n] for n in operands]
    return found


def _entrywise(softmax: fx.Node) -> set[fx.Node]:
    """The sums and scales of its shape that a softmax is computed from one by one.

    Factors are the same for all entries that compete, so that what is so before them stays so.
    """
    found: set[fx.Node] = set()
    dim = _dimension(softmax)
    pending = softmax.all_input_nodes[:1]
    while pending:
        node = pending.pop()
        if node in found or not alike(node, softmax):
            continue
        inputs = node.all_input_nodes
        if node.target in _SCALES:
            inputs = [n for n in inputs if not _is_one_along(n, dim)]
            if len(inputs) > 1 or inputs != nodes_in(node.args[:1]) and node.target in _DIVISIONS:
                continue
        elif node.target not in _SIGNS:
            continue
        found.add(node)
        pending += inputs
    return found


def _dimension(softmax: fx.Node) -> int:
    """The dimension that its entries compete along, counted from the last."""
    rank = softmax.meta["val"].ndim
    dim: Any = softmax.args[1]
    return int(dim % rank - rank)


def _is_one_along(node: fx.Node, dim: int) -> bool:
    """Whether a node has but one entry along a dimension that is counted from the last."""
    shape = node.meta["val"].shape
    return -dim > len(shape) or (isinstance(shape[dim], int) and shape[dim] == 1)


def _is_linear(node: fx.Node, live: Container[fx.Node]) -> bool:
    """Whether a node scales or moves its live operands, each by itself."""
    op = ops.find(node.target, frozenset(live_names(node, live)))
    return op is not None and (op.family == "move" or op.kind in ("scale", "product"))


def _moved(node: fx.Node) -> fx.Node | None:
    """The one tensor that a node scales or moves, detached maybe."""
    inputs = [n for n in node.all_input_nodes if is_floating(n.meta.get("val"))]
    if len(inputs) != 1:
        return None
    detached = node.target is aten.detach.default
    return inputs[0] if detached or _is_linear(node, inputs) else None


def _fills(node: fx.Node) -> bool:
    """Whether a node puts constants in the place of some entries."""
    op = ops.find(node.target, frozenset(["self"]))
    return op is not None and op.kind == "where"
