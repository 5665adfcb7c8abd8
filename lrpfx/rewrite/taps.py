"""Module paths -> places in the graph whose relevance and activation are returned."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import fx

from lrpfx.errors import SelectorError
from lrpfx.ops import ModuleCall, module_calls, used_nodes
from lrpfx.rewrite.modules import Tap


def find_taps(
    graph: fx.Graph, live: set[fx.Node], patterns: Sequence[str], prefix: str
) -> dict[str, list[Tap]]:
    """For every module path that matches a pattern, the outputs of its calls in order.

    Args:
        graph: A canonized, annotated graph.
        live: Nodes that carry relevance.
        patterns: Module paths or globs.
        prefix: What to strip from module paths.

    Raises:
        SelectorError: A pattern matches no module that has one relevance of its own.
    """
    used = used_nodes(graph)
    # Constants that are computed from a tensor, such as the statistics of a norm, are no way out.
    seen = (used & live) | {n for n in graph.nodes if n.op == "output"}
    inside: dict[ModuleCall, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in live and node in used and node.op == "call_function":
            folded = _stripped(node.meta.get("folded_calls", ()), prefix)
            for call in dict.fromkeys((*module_calls(node, prefix), *folded)):
                inside.setdefault(call, []).append(node)
    paths = list(dict.fromkeys(call.path for call in inside))
    found: dict[str, list[Tap]] = {}
    for pattern in patterns:
        matched = fnmatch.filter(paths, pattern)
        if not matched:
            raise _no_match(pattern, paths)
        refused: list[SelectorError] = []
        for path in matched:
            calls = sorted((c for c in inside if c.path == path), key=lambda c: c.call)
            try:
                found[path] = [_tap(call, inside[call], seen, prefix) for call in calls]
            except SelectorError as error:
                refused.append(error)
        if len(refused) == len(matched):  # of several that match, those that have one serve
            raise refused[0]
    return found


def _no_match(pattern: str, paths: Sequence[str]) -> SelectorError:
    near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.5)
    more = f", and {len(paths) - 12} more" if len(paths) > 12 else ""
    fix = f"module paths here: {', '.join(paths[:12])}{more}; '*' is all of them"
    if near:
        fix = f"did you mean {', '.join(map(repr, near))}?"
    elif not pattern:
        fix = "of the model itself leave it out: explanation.seed is the relevance at its output."
    return SelectorError(
        f"layers: {pattern!r} matches no module that has an op of its own on the way from input to "
        "output.",
        fix=fix,
    )


def _stripped(calls: Sequence[ModuleCall], prefix: str) -> list[ModuleCall]:
    return [ModuleCall(c.path.removeprefix(prefix), c.call) for c in calls]


def _tap(call: ModuleCall, nodes: Sequence[fx.Node], seen: set[fx.Node], prefix: str) -> Tap:
    within = set(nodes)
    leaving = [n for n in nodes if any(u not in within and u in seen for u in n.users)]
    if len(leaving) != 1:
        raise SelectorError(
            f"layers: module {call.path!r} hands on {len(leaving)} tensors, not one.",
            fix="name a module inside it.",
        )
    node = leaving[0]
    stages = [n for n in node.meta.get("stages", (node,)) if call in module_calls(n, prefix)]
    if not stages and call in _stripped(node.meta.get("folded_ahead", ()), prefix):
        raise SelectorError(
            f"layers: batch norm {call.path!r} was folded into the layer after it and has no "
            "relevance of its own.",
            fix=f"name {module_calls(node, prefix)[-1].path!r}.",
        )
    # A conv that a batch norm was folded into shares the pair's relevance; its own activation is
    # what it computes before the batch norm.
    last = not stages or stages[-1] is node.meta.get("stages", (node,))[-1]
    return Tap(node if last else stages[-1], node)
