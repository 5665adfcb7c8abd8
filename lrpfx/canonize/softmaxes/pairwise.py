"""Sums of exponentials of differences that are inverses of a softmax -> the softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.forms import Region, softmax
from lrpfx.canonize.hold import live_values
from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import Measured, alike, between
from lrpfx.canonize.softmaxes.joined import is_sum
from lrpfx.canonize.whole import sources
from lrpfx.ops import live_names, output_leaves, precision

aten = torch.ops.aten

_INVERSES = {aten.reciprocal.default, aten.pow.Tensor_Scalar}
_DIFFERENCES = ("sum", "scale", "shift", "logsumexp")
#: So many nodes before an exponential what it is of is looked for.
_STEPS = 12


def whole_inverse_softmaxes(module: fx.GraphModule) -> fx.GraphModule:
    """``1 / sum_j exp(y_j - y_i)`` -> ``softmax(y)``; ``v / sum_j ...`` -> ``v * softmax(y)``.

    That a sum is the inverse of a softmax is measured, with numbers that are drawn for y. Its
    logarithm is that of the softmax, but for the sign.
    """
    graph = module.graph
    if not any(node.target is aten.exp.default for node in graph.nodes):
        return module
    live, measured = live_values(graph), Measured(module)
    finest = max(map(precision, output_leaves(graph)), default=0)
    found = False
    for node in [n for n in graph.nodes if n in live and precision(n) >= finest]:
        if (of := _power_of(node, live)) is None:
            continue
        sums, power = of
        for y in _scores(sums, live):
            if (dim := softmax(measured, Region(sums, [y], between(y, sums)), power)) is not None:
                with graph.inserting_before(node):
                    end, new = _written(node, y, dim)
                end.replace_all_uses_with(new)
                live.add(new)
                found = True
                break
    if found:
        graph.eliminate_dead_code()
    return module


def _power_of(node: fx.Node, live: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """What may be a softmax, or, with -1, the inverse of one, and is divided by or left so."""
    of: Any = None
    if node.target is aten.exp.default:
        return node, 1
    if node.target is aten.div.Tensor:
        of = node.args[1]
    elif node.target is aten.log.default or (
        node.target in _INVERSES and node.args[1:] in ((), (-1,), (-1.0,))
    ):
        of = node.args[0]
    return (of, -1) if isinstance(of, fx.Node) and of in live else None


def _written(node: fx.Node, y: fx.Node, dim: int) -> tuple[fx.Node, fx.Node]:
    """What is replaced, and what by: the softmax, times something maybe, or its logarithm."""
    if node.target is aten.log.default:
        new = insert(node, aten.log_softmax.int, (y, dim))
        negative = [n for n in node.users if n.target is aten.neg.default]
        if len(negative) == len(node.users) == 1:
            return negative[0], new
        return node, insert(node, aten.neg.default, (new,))
    new = insert(node, aten.softmax.int, (y, dim))
    if node.target is aten.div.Tensor:
        new = insert(node, aten.mul.Tensor, (new, node.args[0]))
    return node, new


def _scores(sums: fx.Node, live: set[fx.Node]) -> Iterator[fx.Node]:
    """What the exponentials that a node sums up over a dimension may be of differences of."""
    pending, seen = [(sums, False, False, 0)], set[fx.Node]()
    while pending:
        node, inside, summed, steps = pending.pop()
        if node in seen or steps > _STEPS:
            continue
        seen.add(node)
        if inside and alike(node, sums) and precision(node) == precision(sums):
            yield node
        op = ops.find(node.target, frozenset(live_names(node, live)))
        kind = "" if op is None else op.kind
        inputs = [n for n in node.all_input_nodes if n in live]
        if inside:
            follows = kind in _DIFFERENCES or (op is not None and op.family == "move")
        elif node.target is aten.exp.default:
            # Of an exponential that is no summand it may be the sum under a logarithm.
            inside = follows = summed or (node is sums and _is_of_logsumexp(node, live))
        else:
            follows = is_sum(node, live)
            summed |= any(not alike(n, node) for n in inputs)
        if follows:
            pending += [(n, inside, summed, steps + inside) for n in inputs]


def _is_of_logsumexp(node: fx.Node, live: set[fx.Node]) -> bool:
    """Whether an exponent is a logarithm of a sum of exponentials, moved or scaled maybe."""
    found = sources(node.all_input_nodes, live, ("scale", *_DIFFERENCES[:-1]))
    return any(n.target is aten.logsumexp.default for n in found)
