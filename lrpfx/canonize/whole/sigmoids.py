"""Factors and outputs that are sigmoids by what they compute -> ``sigmoid``, however written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from lrpfx.canonize.forms import sigmoid
from lrpfx.canonize.insert import insert, replace
from lrpfx.canonize.measure import Measured
from lrpfx.canonize.whole.regions import is_pointwise, pointwise_regions, sources
from lrpfx.ops import output_leaves, precision, varying

aten = torch.ops.aten


def whole_sigmoids(module: fx.GraphModule) -> fx.GraphModule:
    """``y * (1 + tanh(x)) / 2``, ``y * (1 - sigmoid(x))`` -> ``y * sigmoid(2 x)``, and so on.

    So are gates, and outputs, and ``exp(a - logaddexp(a, b))``, of a - b. Whether a node is
    C sigmoid(c x) is measured, with numbers that are drawn for x. Its parts would hand relevance to
    their constants: 1 - sigmoid(x) more than all of it where the gate is open, though it is the
    gate of -x.
    """
    graph = module.graph
    live, measured = varying(graph), Measured(module)
    finest = max(map(precision, output_leaves(graph)), default=0)
    found = False
    for node in dict.fromkeys(_candidates(graph, live)):
        if not precision(node) or not is_pointwise(node) or node.target is aten.sigmoid.default:
            continue
        for region in pointwise_regions(node, live, measured.same):
            entries = region.entries
            coarse = any(precision(n) != precision(node) for n in entries)
            if len(entries) > 2 or len(region.inside) == 1 or coarse:
                continue
            if (numbers := sigmoid(measured, region)) is not None:
                with graph.inserting_before(node.next):
                    live.add(replace(node, _written(node, entries, *numbers), finest))
                found = True
                break
    if found:
        graph.eliminate_dead_code()
    return module


def _candidates(graph: fx.Graph, live: set[fx.Node]) -> Iterator[fx.Node]:
    """What gates another tensor, or is an output, but for moves and factors that are numbers."""
    for node in graph.nodes:
        if node.target is aten.mul.Tensor and len(live.intersection(node.all_input_nodes)) > 1:
            yield from sources(node.all_input_nodes, live)
    yield from sources([n for n in output_leaves(graph) if isinstance(n, fx.Node)], live)


def _written(
    like: fx.Node, entries: Sequence[fx.Node], scale: float, powers: Sequence[float]
) -> fx.Node:
    total: fx.Node | None = None
    for x, power in sorted(zip(entries, powers, strict=True), key=lambda pair: pair[1] < 0):
        first = total is None
        if power == -1 and first:
            x = insert(like, aten.neg.default, (x,))
        elif power != 1 and (first or power != -1):
            x = insert(like, aten.mul.Tensor, (x, power if first else abs(power)))
        target = aten.sub.Tensor if power < 0 else aten.add.Tensor
        total = x if total is None else insert(like, target, (total, x))
    new = insert(like, aten.sigmoid.default, (total,))
    return new if scale == 1 else insert(like, aten.mul.Tensor, (new, scale))
