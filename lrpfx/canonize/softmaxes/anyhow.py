"""Exponentials that are softmaxes by what they compute, whatever is in their exponent."""

from __future__ import annotations

import torch
from torch import fx

from lrpfx.canonize.forms import Region, normalised
from lrpfx.canonize.hold import live_values
from lrpfx.canonize.measure import Measured, alike, between
from lrpfx.canonize.whole import compose
from lrpfx.ops import precision

aten = torch.ops.aten

_LOGARITHMS = {aten.log.default, aten.logsumexp.default, aten.log2.default, aten.log1p.default}
_LOGARITHMS |= {aten.logaddexp.default, aten.logcumsumexp.default}
#: More nodes than lie between scores and weights.
_LONGEST = 200


def whole_weights(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a - L(a))`` -> one op of the kind of softmaxes, if that is what it is.

    Such as ``exp(a - stack([logsumexp(group) for group in groups])[index])``. It is measured, and
    comes last: other passes find plain softmaxes, and keep what can be kept of the formula.
    """
    graph = module.graph
    logarithms = [n for n in graph.nodes if n.target in _LOGARITHMS]
    if not logarithms or not any(n.target is aten.exp.default for n in graph.nodes):
        return module
    live, measured = live_values(graph), Measured(module)
    found = False
    for node in [n for n in graph.nodes if n.target is aten.exp.default and n in live]:
        (t,) = node.all_input_nodes
        for a in [n for n in t.all_input_nodes if n in live and alike(n, node)]:
            inside = between(a, node)
            if len(inside) > _LONGEST or {*inside}.isdisjoint(logarithms):
                continue
            beside = {n for m in inside for n in m.all_input_nodes} - {a, *inside}
            if (
                beside.isdisjoint(live)
                and precision(a) > 2
                and normalised(measured, Region(node, [a], inside))
            ):
                with graph.inserting_before(node):
                    compose(module, node, a, inside, "softmax")
                found = True
                break
    if found:
        graph.eliminate_dead_code()
    return module
