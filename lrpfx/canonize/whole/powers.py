"""Factors that are inverse powers by what they compute -> powers, however they are written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lrpfx.canonize.forms import Power, power
from lrpfx.canonize.hold import DIVISOR, PRODUCTS
from lrpfx.canonize.insert import insert, replace
from lrpfx.canonize.measure import Measured
from lrpfx.canonize.whole.regions import pointwise_regions, sources
from lrpfx.ops import HELD, output_leaves, precision, varying

aten = torch.ops.aten

#: What another spelling of an inverse power ends in.
_ENDS = {aten.exp.default, aten.pow.Tensor_Tensor, aten.div.Tensor, aten.mul.Tensor}


def whole_inverses(module: fx.GraphModule) -> fx.GraphModule:
    """``y * exp(-0.5 * log(v))``, ``y * (sqrt(v) / v)`` -> ``y * rsqrt(v)``, and so on.

    So is whatever is k v ** p for positive numbers v, p below zero: it divides, and what divides
    counts as a constant, as in a norm by hand.
    """
    graph = module.graph
    live, measured = varying(graph), Measured(module)
    finest = max(map(precision, output_leaves(graph)), default=0)
    found = False
    for node in dict.fromkeys(_factors(graph, live)):
        if node.target not in _ENDS or not precision(node):
            continue
        for region in pointwise_regions(node, live, measured.same, curved=False):
            entries = region.entries
            single = len(region.inside) == 1 and node.target is not aten.pow.Tensor_Tensor
            if len(entries) != 1 or single or precision(entries[0]) != precision(node):
                continue
            formula = power(measured, region)
            if formula is not None and formula.power < 0:
                with graph.inserting_before(node.next):
                    if precision(node) < finest:  # a rounded power is no power
                        new = insert(node, aten.alias.default, (node,))
                        new.meta[HELD] = DIVISOR
                    else:
                        new = _written(node, entries[0], formula)
                    replace(node, new)
                found = True
                break
    if found:
        graph.eliminate_dead_code()
    return module


def _factors(graph: fx.Graph, live: set[fx.Node]) -> Iterator[fx.Node]:
    """What is multiplied by another tensor, but for moves and scales."""
    for node in graph.nodes:
        if node.target in PRODUCTS and len(live.intersection(node.all_input_nodes)) > 1:
            yield from sources(node.all_input_nodes, live, ("scale", "clamp"))


def _written(like: fx.Node, x: fx.Node, formula: Power) -> fx.Node:
    if formula.power == -1:
        new = insert(like, aten.reciprocal.default, (x,))
    elif formula.power == -0.5:
        new = insert(like, aten.rsqrt.default, (x,))
    else:
        new = insert(like, aten.pow.Tensor_Scalar, (x, formula.power))
    return new if formula.scale == 1 else insert(like, aten.mul.Tensor, (new, formula.scale))
