"""A softmax or sigmoid at the output -> left out: what is explained are its logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured, alike
from lrpfx.ops import (
    FINAL,
    Composed,
    Final,
    hardsigmoid,
    is_floating,
    live_names,
    nodes_in,
    output_leaves,
)

aten = torch.ops.aten

SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
LOG_SOFTMAXES = {aten.log_softmax.int, aten._log_softmax.default}
_ENTRYWISE: dict[Any, str] = {
    aten.sigmoid.default: "sigmoid",
    aten.log_sigmoid.default: "log-sigmoid",
    hardsigmoid: "sigmoid",
    aten.special_ndtr.default: "normal distribution function",
}
#: Ops of numbers that may stand behind one, such as a guard and a logarithm: larger stays larger.
_RISING = {"scale", "shift", "clamp", "log"}
#: No number that is added for the range is larger.
_GUARD = 1e-3


def leave_out_final(module: fx.GraphModule) -> fx.GraphModule:
    """``view(softmax(z))`` at the output -> marked with ``view(z)``, where relevance starts.

    Classes compete in a softmax: their logits are what the network computed about each. A sigmoid
    turns the sign of a negative logit. The graph computes as before.
    """
    graph, measured = module.graph, Measured(module)
    output = next(iter(reversed(graph.nodes)))
    for leaf, way in ways_to_final(graph).items():
        ends = [node for node in sorted(way) if _name(node)]
        copies: dict[fx.Node, Any] = {end: end.args[0] for end in ends}
        falls = False
        with graph.inserting_before(output):
            for node in sorted(way):
                if node in copies:
                    continue
                if (slope := _slope(node)) > 0:
                    copies[node] = copies[node.all_input_nodes[0]]
                elif slope < 0:
                    falls, x = True, copies[node.all_input_nodes[0]]
                    copies[node] = insert(node, aten.neg.default, (x,))
                else:
                    copies[node] = copied(node, copies, node)
        logits, again, last = copies[leaf], None, ends[0]
        behind = [_call_of(node) for node in sorted(way) if node is not last and _slope(node)]
        if len(ends) > 1 or falls:
            pass  # each is of its own logits only, or of their negatives
        elif last.target in _ENTRYWISE:
            once = partial(_called, [(last.target, (), {}), *behind])
            again = once if len(way) == 1 or measured.equals(leaf, once, logits) else None
        elif len(way) == 1 and not isinstance(last.target, Composed):
            again = partial(_called, [_call_of(last)])
        else:
            softmax = aten.log_softmax.int if last.target in LOG_SOFTMAXES else aten.softmax.int
            ways = (
                partial(_called, [(softmax, (dim,), {}), *behind])
                for dim in range(leaf.meta["val"].ndim)
            )
            again = next((one for one in ways if measured.equals(leaf, one, logits)), None)
        name = " and ".join(dict.fromkeys(map(_name, ends))) + " with its sign turned" * falls
        leaf.meta[FINAL] = Final(name, logits, again)
    return module


def ways_to_final(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """The way of each output that is made of softmaxes or sigmoids back to these, these too."""
    live = _live(graph)
    leaves = dict.fromkeys(leaf for leaf in output_leaves(graph) if leaf in live)
    ways = {leaf: _way_to_final(leaf, live) for leaf in leaves}
    return {leaf: way for leaf, way in ways.items() if way}


def _way_to_final(leaf: fx.Node, live: set[fx.Node]) -> set[fx.Node]:
    """From an output back to the softmaxes or sigmoids that it is made of, these too.

    Between stand moves, guards, logarithms and scales, and beside them constants. Empty if it is
    made of anything else, or if something that relevance may come from reads one.
    """
    way, pending = set[fx.Node](), [leaf]
    while pending:
        node = pending.pop()
        if node in way:
            continue
        way.add(node)
        if _name(node):
            continue
        inputs = [n for n in node.all_input_nodes if n in live]
        op = ops.find(node.target, frozenset(live_names(node, inputs)))
        picks = getattr(node.target, "__name__", "") == "getitem"
        if not inputs or not (picks or _slope(node) or (op is not None and op.family == "move")):
            return set()
        pending += inputs
    for node in way:
        for reader in node.users:
            is_output = reader.op == "output"
            if is_output and node is not leaf:
                return set()
            if not is_output and reader not in way and is_floating(reader.meta.get("val")):
                return set()
    return way


def _name(node: fx.Node) -> str:
    """What a node is called if it may be left out, else ""."""
    if isinstance(node.target, Composed):
        same = alike(node.all_input_nodes[0], node)
        return "softmax" if node.target.family == "softmax" and same else ""
    if node.target in SOFTMAXES:
        return "softmax"
    return "log-softmax" if node.target in LOG_SOFTMAXES else _ENTRYWISE.get(node.target, "")


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The floating nodes that depend on the inputs, but by what is constant between its steps."""
    live = set[fx.Node]()
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in live]
        op = ops.find(node.target, frozenset(live_names(node, inputs))) if inputs else None
        ends = op is not None and op.family == "constant"
        if node.op == "placeholder" or (inputs and not ends):
            if is_floating(node.meta.get("val")):
                live.add(node)
    return live


def _slope(node: fx.Node) -> int:
    """1 for an op of one tensor and numbers by which larger entries stay larger, -1 for smaller."""
    inputs, target = nodes_in((node.args, node.kwargs)), node.target
    op = ops.find(target, frozenset(live_names(node, inputs)))
    if op is None or op.kind not in _RISING or len(inputs) != 1 or node.args[0] is not inputs[0]:
        return 0
    x = torch.tensor([1e-4, 0.1, 0.5, 0.9], dtype=torch.float64)
    y = _called([_call_of(node)], x)
    if bool((y.diff() < 0).all()):
        return -1
    rises = bool((y.diff() > 0).all())
    return int(rises and (op.kind != "shift" or bool((y - x).max() < _GUARD)))


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _call_of(node: fx.Node) -> _Call:
    return node.target, tuple(node.args[1:]), dict(node.kwargs)


def _called(calls: Sequence[_Call], x: Any) -> Any:
    for target, args, kwargs in calls:
        x = target(x, *args, **kwargs)
    return x
