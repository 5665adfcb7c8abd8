"""Factors and outputs that are sigmoids by what they compute -> ``sigmoid``, however written."""

from __future__ import annotations

from collections.abc import Iterator

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

    So are gates, and outputs. Whether a node is C sigmoid(c x) is measured, with numbers that are
    drawn for x. Its parts would hand relevance to their constants: 1 - sigmoid(x) more than all of
    it where the gate is open, though it is the gate of -x.
    """
    graph = module.graph
    live, measured = varying(graph), Measured(module)
    finest = max(map(precision, output_leaves(graph)), default=0)
    found = False
    for node in dict.fromkeys(_candidates(graph, live)):
        if not precision(node) or not is_pointwise(node) or node.target is aten.sigmoid.default:
            continue
        for entries, inside in pointwise_regions(node, live):
            if len(entries) > 1 or len(inside) == 1 or precision(entries[0]) != precision(node):
                continue
            if (numbers := sigmoid(measured, node, entries[0])) is not None:
                with graph.inserting_before(node.next):
                    live.add(replace(node, _written(node, entries[0], *numbers), finest))
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


def _written(like: fx.Node, x: fx.Node, scale: float, power: float) -> fx.Node:
    if power == -1:
        x = insert(like, aten.neg.default, (x,))
    elif power != 1:
        x = insert(like, aten.mul.Tensor, (x, power))
    new = insert(like, aten.sigmoid.default, (x,))
    return new if scale == 1 else insert(like, aten.mul.Tensor, (new, scale))
