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
        ends = [node for node in sorted(way) if _name(node)]
        copies: dict[fx.Node, Any] = {end: end.args[0] for end in ends}
        with graph.inserting_before(output):
            for node in sorted(way):
                if node not in copies:
                    copies[node] = copied(node, copies, node)
        logits, again, last = copies[leaf], None, ends[0]
        if len(ends) > 1:
            pass  # each is of its own logits only
        elif last.target in _ENTRYWISE:
            again = partial(_called, last.target, (), {})
        elif len(way) == 1 and not isinstance(last.target, Composed):
            again = partial(_called, last.target, last.args[1:], dict(last.kwargs))
        else:
            softmax = aten.log_softmax.int if last.target in _LOG_SOFTMAXES else aten.softmax.int
            ways = (partial(softmax, dim=dim) for dim in range(leaf.meta["val"].ndim))
            again = next((one for one in ways if measured.equals(leaf, one, logits)), None)
        leaf.meta[FINAL] = Final(" and ".join(dict.fromkeys(map(_name, ends))), logits, again)
    return module


def way_to_final(leaf: Any) -> set[fx.Node]:
    """From an output back over moves to the softmaxes or sigmoids that it is made of, these too.

    Empty if it is made of anything else, or if something that relevance may come from reads one.
    """
    way, pending = set[fx.Node](), [leaf]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or not is_floating(node.meta.get("val")):
            return set()
        if node in way:
            continue
        way.add(node)
        if _name(node):
            continue
        inputs = [n for n in node.all_input_nodes if is_floating(n.meta.get("val"))]
        op = ops.find(node.target, frozenset(live_names(node, inputs)))
        picks = getattr(node.target, "__name__", "") == "getitem"
        if not inputs or not (picks or (op is not None and op.family == "move")):
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
    if node.target in _SOFTMAXES:
        return "softmax"
    return "log-softmax" if node.target in _LOG_SOFTMAXES else _ENTRYWISE.get(node.target, "")


def _called(target: Any, args: Any, kwargs: dict[str, Any], x: Any) -> Any:
    return target(x, *args, **kwargs)
