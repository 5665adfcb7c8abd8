"""Canonized graph -> the same with a record for every node that carries relevance.

Which nodes depend on a start (liveness), which outputs are proven non-negative (sign), and which
layers are the first.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx import ops
from lrpfx.errors import UnsupportedOpError
from lrpfx.ops import (
    HELD,
    KEPT,
    KEY,
    ModuleCall,
    Op,
    Paired,
    Record,
    Site,
    Slot,
    bound_arguments,
    explained_leaves,
    is_floating,
    letters_of,
    live_names,
    module_calls,
    nodes_in,
    op_name,
    record,
    source_line,
    why_not,
    zero_padding,
)
from lrpfx.plan.factors import factors_of, find_gates, find_scores
from lrpfx.plan.places import find_places

_COMPLEX = " of complex numbers"


@dataclass(frozen=True)
class Unknown:
    """A node that relevance comes to, and whose op has no row in the op table that serves.

    Args:
        name: The node's name in the graph.
        target: The ATen overload.
        live: Names of the arguments that depend on the input.
        modules: As in ``Record``, like the fields that follow.
        source: Line of the user's code.
        inputs: Names of the nodes it reads.
        shape: Shape of the output.
        complex: Whether the op is known, but not for complex numbers, which are its output.
    """

    name: str
    target: Any
    live: tuple[str, ...]
    modules: tuple[ModuleCall, ...]
    source: str
    inputs: tuple[str, ...]
    shape: tuple[int | str, ...]
    complex: bool

    @property
    def call(self) -> str:
        """The overload, and its live arguments if there are several."""
        which = f" with live {' and '.join(self.live)}" if len(self.live) > 1 else ""
        return f"{self.target}{which}" + (_COMPLEX if self.complex else "")

    def __str__(self) -> str:
        """Op, path, shape and source, as the error lists it."""
        path = self.modules[-1].path if self.modules else "(the model)"
        place = f"{self.call} at {path}, [{', '.join(map(str, self.shape))}]"
        more = {"source": self.source, "why": self.reason}
        return place + "".join(f"\n         {k}: {v}" for k, v in more.items() if v)

    @property
    def reason(self) -> str:
        """Why the op has no rule, "" if that is not known."""
        return why_not(self.target)


def annotate(
    graph: fx.Graph,
    starts: Container[fx.Node],
    prefix: str,
    held: Container[str] = (),
    by_gradient: bool = False,
) -> set[fx.Node]:
    """Give every node that carries relevance its record; return all of them.

    Besides the recorded nodes these are the starts and the getitem nodes that pick one of several
    outputs.

    Args:
        graph: A canonized graph.
        starts: The nodes that relevance is wanted for, see ``starts.find_starts``.
        prefix: What to strip from module paths.
        held: Names of nodes that count as constants.
        by_gradient: Whether ops need no row in the op table, as all rules follow the gradient.

    Raises:
        UnsupportedOpError: Listing all such nodes that the op table does not know.
    """
    carrying, unknown = annotate_known(graph, starts, prefix, held, by_gradient)
    if unknown:
        raise UnsupportedOpError(
            f"{len(unknown)} operation(s) that depend on the explained input have no relevance "
            "rule.",
            where=[str(u) for u in unknown],
            fix=repair([u.call for u in unknown]),
        )
    if reshaped := [r for n in graph.nodes if (r := record(n)) and _changes_shape(n, r, carrying)]:
        raise UnsupportedOpError(
            f"{len(reshaped)} activation(s) have an output of another shape than their input.",
            where=[f"{r}   {r.source}".rstrip() for r in reshaped],
            fix='broadcast before the op; one that is registered may be "affine" or "select".',
        )
    return carrying


def _changes_shape(node: fx.Node, known: Record, carrying: set[fx.Node]) -> bool:
    """Whether an activation is none of one entry each."""
    if known.family != "activation":
        return False
    (x,) = (n for n in dict.fromkeys(node.all_input_nodes) if n in carrying)
    return str(x.meta["val"].shape) != str(node.meta["val"].shape)


def repair(calls: Sequence[str]) -> str:
    """What to do about ops without a rule, given as by ``Unknown.call``."""
    real = [call.split(" ")[0] for call in calls if not call.endswith(_COMPLEX)]
    if not real:
        return "write real and imaginary parts as real tensors: relevance is defined for these."
    op = real[0]
    kind = op.partition(".")[2].partition(".")[0]
    return (
        f'lrpfx.register_op(torch.ops.{op}, "{kind}", family), where the family is "affine" if '
        'it is linear, "activation", "move", "select" or "constant"; or explain a wrapper module '
        "that leaves it out."
    )


def annotate_known(
    graph: fx.Graph,
    starts: Container[fx.Node],
    prefix: str,
    held: Container[str] = (),
    by_gradient: bool = False,
) -> tuple[set[fx.Node], list[Unknown]]:
    """As ``annotate``, but return also what the op table does not know, in execution order."""
    letters = letters_of(graph)
    known = _liveness(graph, starts, held, by_gradient)
    carrying = _carrying(graph, known)
    unknown = [
        _unknown(node, known[node] is not _UNKNOWN, carrying, prefix, letters)
        for node in graph.nodes
        if node in carrying and (known[node] is _UNKNOWN or _is_complex(node))
    ]
    flowing = {node: known[node] for node in carrying}
    gates = set().union(*find_gates(flowing).values())
    scores = find_scores(graph, flowing)
    # Where a node stands does not change by what rules hold constant.
    whole = _liveness(graph, starts, (), by_gradient) if held else known
    whole = {node: whole[node] for node in _carrying(graph, whole)}
    places = find_places(graph, whole, [n for n in whole if n in starts])
    nonneg: set[fx.Node] = set()
    mixed: set[fx.Node] = set()  # what some conv or linear layer stands before
    for node in graph.nodes:
        node.meta.pop(KEY, None)
        if node not in carrying or node in starts:
            continue
        op = known[node]
        before = any(n in mixed for n in node.all_input_nodes)
        if isinstance(op, Op):
            node.meta[KEY] = replace(
                _record(node, op, carrying, nonneg, prefix, letters),
                first=not before,
                gate=node in gates,
                recurrent=node in places.recurrent,
                attending=node in places.attending,
                tokenwise=node in places.tokenwise,
                preparing=node in places.preparing,
            )
            counts: tuple[int, ...] = ()
            if op.kind == "product":
                counts = tuple(len(factors) for factors in factors_of(node, flowing))
            site = replace(node.meta[KEY].site, factors=counts, scores=node in scores)
            node.meta[KEY] = replace(node.meta[KEY], site=site)
        elif op is _PICK and node.args[0] in nonneg:
            nonneg.add(node)
        if (r := record(node)) is not None and r.nonneg:
            nonneg.add(node)
        if before or (r is not None and r.kind in ("conv", "linear")):
            mixed.add(node)
    return carrying, unknown


_UNKNOWN = "not in the op table"
_PICK = "getitem or start"


def _liveness(
    graph: fx.Graph,
    starts: Container[fx.Node],
    held: Container[str],
    by_gradient: bool,
) -> dict[fx.Node, Op | str]:
    """The nodes that depend on a start, each with what is known of it."""
    live: dict[fx.Node, Op | str] = {}
    for node in graph.nodes:
        if node in starts:
            live[node] = _PICK
            continue
        if node.op != "call_function" or not is_floating(node.meta.get("val")):
            continue
        if node.name in held or HELD in node.meta:
            continue
        if not any(n in live for n in node.all_input_nodes):
            continue
        if getattr(node.target, "__name__", "") == "getitem":
            live[node] = _PICK
            continue
        names = frozenset(live_names(node, live))
        op = ops.find(node.target, names)
        if op is None and by_gradient:
            op = Op(op_name(node.target), "normalize", (names,))
        if op is None or op.family != "constant":
            live[node] = op or _UNKNOWN
    return live


def _carrying(graph: fx.Graph, live: Container[fx.Node]) -> set[fx.Node]:
    """The live nodes from which a live output is reached through live nodes.

    What is only used detached is live, but no relevance ever comes to it.
    """
    carrying = {node for node in nodes_in(explained_leaves(graph)) if node in live}
    for node in reversed(graph.nodes):
        if node in carrying:
            carrying.update(n for n in node.all_input_nodes if n in live)
    return carrying


def _record(
    node: fx.Node,
    op: Op,
    carrying: set[fx.Node],
    nonneg: set[fx.Node],
    prefix: str,
    letters: Mapping[str, str],
) -> Record:
    signed = [n for n in _values_in(node) if not _is_boolean(n.meta.get("val"))]
    folded = node.meta.get("folded_calls", ())
    return Record(
        name=node.name,
        target=node.target,
        op=op,
        modules=module_calls(node, prefix),
        folded=tuple(ModuleCall(c.path.removeprefix(prefix), c.call) for c in folded),
        kept=node.meta.get(KEPT, ""),
        source=source_line(node),
        inputs=_live_inputs(node, carrying),
        shape=_shape(node.meta["val"], letters),
        dtype=_first_tensor(node.meta["val"]).dtype,
        first=False,
        gate=False,
        recurrent=False,
        attending=False,
        tokenwise=False,
        preparing=False,
        nonneg=op.nonneg(bound_arguments(node), all(n in nonneg for n in signed)),
        site=_site(op, node, carrying, nonneg),
    )


#: Arguments that say where values go, and are none themselves.
_PLACES = ("index", "indices", "repeats")


def _values_in(node: fx.Node) -> list[fx.Node]:
    """The tensors that the values of the output may come from."""
    given = {k: v for k, v in bound_arguments(node).items() if k not in _PLACES}
    return [n for n in nodes_in(given) if isinstance(n.meta.get("val"), (Tensor, tuple, list))]


def _is_complex(node: fx.Node) -> bool:
    """Whether a value is complex, for which no rule is defined."""
    return any(
        isinstance(t, Tensor) and t.is_complex() for t in pytree.tree_leaves(node.meta["val"])
    )


def _is_boolean(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _live_inputs(node: fx.Node, carrying: Container[fx.Node]) -> tuple[str, ...]:
    """Names of the nodes that carry the node's relevance on; what getitem picks from, for that."""
    names = []
    for n in node.all_input_nodes:
        while n in carrying and n.target is operator.getitem:
            n = n.all_input_nodes[0]
        if n in carrying:
            names.append(n.name)
    return tuple(dict.fromkeys(names))


def _site(op: Op, node: fx.Node, carrying: set[fx.Node], nonneg: set[fx.Node]) -> Site:
    """The op with every node among its arguments replaced by a slot, as ``slot_nodes`` lists."""
    slots: list[fx.Node] = []

    def take(n: fx.Node) -> Any:
        slots.append(n)
        return Slot(len(slots) - 1)

    template = fx.node.map_arg(bound_arguments(node), take)
    padding = fx.node.map_arg(zero_padding(node), take)
    live_slots = tuple(i for i, n in enumerate(slots) if n in carrying)
    return Site(
        op=op,
        target=node.target,
        arguments=template,
        live=live_slots,
        live_names=live_names(node, carrying),
        nonneg=all(slots[i] in nonneg for i in live_slots),
        several_outputs=not isinstance(node.meta["val"], Tensor),
        padding=padding,
    )


def _unknown(
    node: fx.Node, known: bool, carrying: set[fx.Node], prefix: str, letters: Mapping[str, str]
) -> Unknown:
    return Unknown(
        name=node.name,
        target=node.target,
        live=live_names(node, carrying),
        modules=module_calls(node, prefix),
        source=source_line(node),
        inputs=_live_inputs(node, carrying),
        shape=_shape(node.meta.get("val"), letters),
        complex=known or isinstance(node.target, Paired),
    )


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return next(_first_tensor(v) for v in value if is_floating(v))


def _shape(value: Any, letters: Mapping[str, str]) -> tuple[int | str, ...]:
    if not is_floating(value):
        return ()
    sizes = _first_tensor(value).shape
    return tuple(size if isinstance(size, int) else _symbol(size, letters) for size in sizes)


def _symbol(size: torch.SymInt, letters: Mapping[str, str]) -> str:
    """The batch as "N", and what is folded into it as "4*N"."""
    return re.sub(r"s\d+", lambda found: letters.get(found.group(), found.group()), str(size))
