"""Graph -> where relevance ends though values go on: one note per kind, with the lines."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.errors import some
from lrpfx.ops import (
    HELD,
    bound_arguments,
    is_floating,
    live_names,
    nodes_in,
    reachable,
    record,
    source_line,
    used_nodes,
    varying,
)

aten = torch.ops.aten

_DETACHED = "does not follow what detach() or torch.no_grad() makes a constant"
_STEPS = "does not follow comparisons, signs and rounding, which are constant between their steps"
_READ = "does not follow numbers that are read from tensors, as by item()"
_LOOKED_UP = "does not follow ids that index a table or are compared one by one, as in one-hot rows"
_KINDS = (_DETACHED, _STEPS, _READ, _LOOKED_UP)

_ITEMS = {aten.item.default, aten._local_scalar_dense.default}
_TABLES = {aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default}
#: Kinds of ops that give a summand, or a part, its own share.
_SUMMING = {"sum", "shift", "cat", "where", "scatter"}
#: Arguments that choose between values, and are none.
_CHOOSING = {"condition", "mask", "index", "indices"}


def end_notes(graph: fx.Graph, starts: Container[fx.Node]) -> Iterator[str]:
    """A note for each kind of node behind which values go on, and relevance does not.

    Factors are left out where they take nothing: of ``x * (x > 0)`` all relevance is that of x.

    Args:
        graph: Canonized and annotated.
        starts: The nodes that relevance is wanted for.
    """
    flowing = _flowing(graph, starts)
    changing, used = varying(graph), used_nodes(graph)
    found: dict[str, dict[str, None]] = {kind: {} for kind in _KINDS}
    for node in graph.nodes:
        if node in used and node.op == "call_function" and node not in flowing:
            kind = _kind(node, flowing, changing)
            if kind in (_DETACHED, _READ) or (kind and _sums(node, flowing, used)):
                found[kind][source_line(node) or str(node)] = None
    for kind, lines in found.items():
        if lines:
            yield f"relevance {kind}: {'; '.join(some(list(lines), 3))}"


def _ends(node: fx.Node, flowing: Container[fx.Node]) -> bool:
    if node.target is aten.detach.default or node.target in _ITEMS:
        return True
    op = ops.find(node.target, frozenset(live_names(node, flowing)))
    return op is not None and op.family == "constant"


def _flowing(graph: fx.Graph, starts: Container[fx.Node]) -> set[fx.Node]:
    """The nodes that relevance could come through, whether any does or not."""
    flowing: set[fx.Node] = set()
    for node in graph.nodes:
        if node in starts:
            flowing.add(node)
        elif HELD not in node.meta and is_floating(node.meta.get("val")):
            if not flowing.isdisjoint(node.all_input_nodes) and not _ends(node, flowing):
                flowing.add(node)
    return flowing


def _kind(node: fx.Node, flowing: set[fx.Node], changing: Container[fx.Node]) -> str:
    """What kind of end a node is, "" if it is none."""
    if HELD in node.meta or node.target in ops.SHAPE_ONLY:
        return ""
    read = node.all_input_nodes[:1] if node.target in ops.SHAPED else node.all_input_nodes
    if not flowing.isdisjoint(read):
        if node.target is aten.detach.default:
            return _DETACHED
        if node.target in _ITEMS:
            return _READ
        return _STEPS if isinstance(node.meta.get("val"), (Tensor, tuple, list)) else ""
    return _LOOKED_UP if _looks_up(node, changing) else ""


def _looks_up(node: fx.Node, changing: Container[fx.Node]) -> bool:
    """Whether integers of the inputs choose rows of constants, or are told from several numbers."""
    ids = [n for n in node.all_input_nodes if n in changing]
    if not ids or any(is_floating(n.meta.get("val")) for n in ids) or not _tells(node, changing):
        return False
    sources = [n for n in reachable(ids) if n.op == "placeholder"]
    return not any(HELD in n.meta or is_floating(n.meta.get("val")) for n in sources)


def _tells(node: fx.Node, changing: Container[fx.Node]) -> bool:
    """Whether an op of integers tells by them, if they are ids, which one each is."""
    first = next(iter(nodes_in(node.args)))
    if node.target in _TABLES:
        return first not in changing and is_floating(node.meta.get("val"))
    if node.target is aten.eq.Tensor:
        others = [n for n in node.all_input_nodes if n not in changing]
        return any(n.meta["val"].numel() > 2 for n in others)
    named = node.target is aten.one_hot.default
    return named or (str(node.target).startswith("aten.scatter") and first not in changing)


def _sums(end: fx.Node, flowing: Container[fx.Node], used: Container[fx.Node]) -> bool:
    """Whether what follows from a node comes to be a summand, or a part, beside live values."""
    seen, stack = {end}, [end]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in used and user not in flowing and user not in seen:
                seen.add(user)
                stack.append(user)
            elif (known := record(user)) is not None and known.kind in _SUMMING:
                arguments = bound_arguments(user).items()
                if any(node in nodes_in(v) for name, v in arguments if name not in _CHOOSING):
                    return True
    return False
