"""Names -> places in the graph: module paths, calls of modules, nodes of the report."""

from __future__ import annotations

import difflib
import glob
import operator
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lrpfx.conditions.fields import Box, receptive_field
from lrpfx.errors import SelectorError
from lrpfx.ops import bound_arguments, record
from lrpfx.rewrite import Tap, find_taps

aten = torch.ops.aten
#: Ops whose channels are in dimension 1, and those whose channels are in the last.
_SECOND = {"conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool"}
_LAST = {"linear", "layer_norm", "rms_norm"}
#: Families of ops that leave channels where they are.
_KEEP = {"activation", "affine", "product", "normalize"}
#: Ops that part a tensor along a dimension.
_PARTS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default}


@dataclass(frozen=True)
class Place:
    """One place of relevance.

    Args:
        name: As it was given.
        tap: Where its activation and its relevance are.
        channels: The dimension of its channels, None where that is not clear.
    """

    name: str
    tap: Tap
    channels: int | None


class Places:
    """Finds places by name.

    Args:
        graph: A canonized, annotated graph.
        live: The nodes that carry relevance.
        prefix: What to strip from module paths.
    """

    def __init__(self, graph: fx.Graph, live: set[fx.Node], prefix: str) -> None:
        self.graph, self.live, self._prefix = graph, live, prefix
        self._nodes = {n.name: n for n in graph.nodes if n in live and record(n) is not None}

    def known(self, name: str) -> Place | None:
        """The place of this name, None if there is none or there are several."""
        try:
            return self.find(name)
        except SelectorError:
            return None

    def behind(self, name: str) -> str:
        """The name of the nonlinearity that all of a place goes into; its own if there is none."""
        node = self.find(name).tap.relevance
        users = [user for user in node.users if user in self.live]
        known = record(users[0]) if len(users) == 1 else None
        return users[0].name if known is not None and known.family == "activation" else name

    def receptive_field(self, name: str, position: int) -> Box | None:
        """The part of the input that a position of a place can depend on; see ``fields``."""
        return receptive_field(self.find(name).tap.relevance, position)

    def find(self, name: str) -> Place:
        """The place of this name.

        Raises:
            SelectorError: There is none, or there are several.
        """
        path, at, call = name.partition("@")
        try:
            calls = find_taps(self.graph, self.live, [glob.escape(path)], self._prefix)[path]
        except SelectorError as error:
            if name in self._nodes:
                node = self._nodes[name]
                return Place(name, Tap(node, node), channels_of(node, self.live))
            if "hands on" in error.what or "folded" in error.what:
                raise
            raise self._unknown(name) from error
        if not at and len(calls) > 1:
            raise SelectorError(
                f"module {path!r} is called {len(calls)} times.",
                fix=f"name a call: {path}@0 to {path}@{len(calls) - 1}.",
            )
        if at and not (re.fullmatch(r"\d+", call) and int(call) < len(calls)):
            raise SelectorError(
                f"{name!r}: module {path!r} is called {len(calls)} times.",
                fix=f"name a call from {path}@0 on.",
            )
        tap = calls[int(call or 0)]
        return Place(name, tap, channels_of(tap.relevance, self.live))

    def _unknown(self, name: str) -> SelectorError:
        paths = {c.path for n in self._nodes.values() if (r := record(n)) for c in r.modules}
        known = [*sorted(paths), *self._nodes]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        return SelectorError(
            f"{name!r} is neither a module on the way from input to output nor a node of the "
            "report.",
            fix=f"did you mean {', '.join(map(repr, near))}?"
            if near
            else f"places here: {', '.join(known[:12])}",
        )


def channels_of(node: fx.Node, live: Collection[fx.Node]) -> int | None:
    """The dimension of a node's channels, by the layers that it comes from; None if unclear."""
    told: dict[fx.Node, int | None] = {}

    def tell(node: fx.Node) -> int | None:
        if node not in told:
            told[node] = _own_channels(node)
            known = record(node)
            before = [n for n in dict.fromkeys(node.all_input_nodes) if n in live]
            if node.target is operator.getitem and before[0].target in _PARTS:
                told[node] = tell(before[0].all_input_nodes[0])
            elif told[node] is None and known is not None:
                if known.family in _KEEP:
                    found = {tell(n) for n in before if _alike(n, node)}
                else:
                    found = {_moved(node, n, tell(n)) for n in before}
                found -= {None}  # of what is put together, one that is clear tells of all
                told[node] = found.pop() if len(found) == 1 else None
        return told[node]

    return tell(node)


def _own_channels(node: fx.Node) -> int | None:
    value, known = node.meta.get("val"), record(node)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    if value.ndim == 2 or (known is not None and known.kind in _SECOND):
        return 1
    last = node.target is aten.embedding.default
    return value.ndim - 1 if last or (known is not None and known.kind in _LAST) else None


def _moved(node: fx.Node, before: fx.Node, dim: int | None) -> int | None:
    """Where a move takes the dimension of the channels of what it reads, if it keeps them whole."""
    old, new = before.meta["val"], node.meta.get("val")
    if dim is None or not isinstance(new, Tensor):
        return None
    given = bound_arguments(node)
    if node.target in (aten.permute.default, aten.transpose.int):
        order = list(range(old.ndim))
        if node.target is aten.transpose.int:
            a, b = given["dim0"] % old.ndim, given["dim1"] % old.ndim
            order[a], order[b] = order[b], order[a]
        else:
            order = [d % old.ndim for d in given["dims"]]
        return int(order.index(dim))
    if node.target in (aten.stack.default, aten.unsqueeze.default):
        return dim + int(given["dim"] % new.ndim <= dim)
    if node.target in (aten.view.default, aten.reshape.default, aten.flatten.using_ints):
        last = dim == old.ndim - 1 and statically_known_true(old.shape[-1] == new.shape[-1])
        return new.ndim - 1 if last else None
    return dim if node.target in (aten.cat.default, aten.slice.Tensor) else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.ndim == other.ndim
