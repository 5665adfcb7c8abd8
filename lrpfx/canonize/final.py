"""A softmax or sigmoid at the output -> left out: what is explained are its logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.insert import copied
from lrpfx.canonize.measure import Measured, alike
from lrpfx.ops import FINAL, Composed, Final, is_floating, live_names, output_leaves

aten = torch.ops.aten

_SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_LOG_SOFTMAXES = {aten.log_softmax.int, aten._log_softmax.default}
_ENTRYWISE: dict[Any, str] = {
    aten.sigmoid.default: "sigmoid",
    aten.log_sigmoid.default: "log-sigmoid",
}


def leave_out_final(module: fx.GraphModule) -> fx.GraphModule:
    """``view(softmax(z))`` at the output -> marked with ``view(z)``, where relevance starts.

    Classes compete in a softmax: their logits are what the network computed about each. A sigmoid
    turns the sign of a negative logit. The graph computes as before.
    """
    graph, measured = module.graph, Measured(module)
    output = next(iter(reversed(graph.nodes)))
    for leaf in output_leaves(graph):
        if not (way := way_to_final(leaf)):
            continue
        last, again = way[-1], None
        logits: Any = last.args[0]
        with graph.inserting_before(output):
            for before, node in zip(reversed(way), reversed(way[:-1]), strict=False):
                logits = copied(node, {before: logits}, node)
        if last.target in _ENTRYWISE:
            again = partial(_called, last.target, (), {})
        elif len(way) == 1 and not isinstance(last.target, Composed):
            again = partial(_called, last.target, last.args[1:], dict(last.kwargs))
        else:
            softmax = aten.log_softmax.int if last.target in _LOG_SOFTMAXES else aten.softmax.int
            ways = (partial(softmax, dim=dim) for dim in range(leaf.meta["val"].ndim))
            again = next((one for one in ways if measured.equals(leaf, one, logits)), None)
        leaf.meta[FINAL] = Final(_name(last), logits, again)
    return module


def way_to_final(leaf: Any) -> list[fx.Node]:
    """From an output back over moves to the softmax or sigmoid that it is, [] if it is none.

    Nothing else that relevance may come from reads these nodes.
    """
    way: list[fx.Node] = []
    while isinstance(leaf, fx.Node) and is_floating(leaf.meta.get("val")):
        readers = [n for n in leaf.users if n.op == "output" or is_floating(n.meta.get("val"))]
        if len(readers) > 1:
            return []
        way.append(leaf)
        if _name(leaf):
            return way
        inputs = [n for n in leaf.all_input_nodes if is_floating(n.meta.get("val"))]
        op = ops.find(leaf.target, frozenset(live_names(leaf, inputs)))
        picks = getattr(leaf.target, "__name__", "") == "getitem"
        if len(inputs) != 1 or not (picks or (op is not None and op.family == "move")):
            return []
        leaf = inputs[0]
    return []


def _name(node: fx.Node) -> str:
    """What a node is called if it may be left out, else ""."""
    if isinstance(node.target, Composed):
        same = alike(node.all_input_nodes[0], node)
        return "softmax" if node.target.family == "softmax" and same else ""
    if node.target in _SOFTMAXES:
        return "softmax"
    return "log-softmax" if node.target in _LOG_SOFTMAXES else _ENTRYWISE.get(node.target, "")


def _called(target: Any, args: Any, kwargs: dict[str, Any], x: Any) -> Any:
    return target(x, *args, **kwargs)
