"""A node -> the regions of pointwise ops that end in it, from the smallest on."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.forms import Region
from lrpfx.canonize.hold import is_inverse
from lrpfx.canonize.same import Same
from lrpfx.ops import hardsigmoid, live_names

aten = torch.ops.aten

#: More nodes, and more values that enter, than the formulas in use have.
_LONGEST, _MOST = 8, 4
_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor}
_ARITHMETIC |= {aten.neg.default, aten.div.Tensor}
#: Kinds of which none grows otherwise than its input.
_STRAIGHT = {"clamp", "max", "where", "abs", "relu", "sqrt", "square", "pow"}


def pointwise_regions(
    end: fx.Node,
    live: Collection[fx.Node],
    same: Same | None = None,
    curved: bool = True,
) -> Iterator[Region]:
    """Regions of pointwise ops, from the smallest on.

    Args:
        end: What they end in.
        live: The nodes that are followed; all else is constant.
        same: What computes the same is one value then, that of the first.
        curved: Whether only regions with a curved function, such as exp or tanh, are wanted.
    """

    def inputs(node: fx.Node) -> set[fx.Node]:
        return {same.first(n) if same else n for n in node.all_input_nodes if n in live}

    inside, bent = {end}, not curved or is_curved(end, live)
    entries = inputs(end)
    while len(inside) <= _LONGEST:
        if bent and len(entries) <= _MOST:
            yield Region(end, sorted(entries), sorted(inside))
        if not (pointwise := list(filter(is_pointwise, entries))):
            return
        last = max(pointwise)
        inside.add(last)
        bent = bent or is_curved(last, live)
        entries = (entries - {last}) | inputs(last)


def sources(
    nodes: Iterable[fx.Node], live: Collection[fx.Node], kinds: Collection[str] = ("scale",)
) -> Iterator[fx.Node]:
    """What nodes move, or do one of some kinds of ops to."""
    pending, seen = [n for n in nodes if n in live], set[fx.Node]()
    while pending:
        node = pending.pop()
        op = ops.find(node.target, frozenset(live_names(node, live)))
        picks = node.target is operator.getitem
        if not picks and (op is None or (op.family != "move" and op.kind not in kinds)):
            yield node
        elif node not in seen:
            seen.add(node)
            pending += [n for n in node.all_input_nodes if n in live]


def is_pointwise(node: fx.Node) -> bool:
    """Whether each number of the result is computed from those at its place."""
    target: Any = node.target
    if target is hardsigmoid:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def is_curved(node: fx.Node, live: Collection[fx.Node]) -> bool:
    """Whether a node is a function other than powers, of which no exponential can be made."""
    if node.target in _ARITHMETIC:
        return False
    names = live_names(node, live)
    op = ops.find(node.target, frozenset(names))
    if op is None or op.family != "activation" or is_inverse(node):
        return False
    return op.kind not in _STRAIGHT or "exponent" in names
