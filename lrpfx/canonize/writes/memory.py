"""Ops that write into memory -> ops that compute anew what later ops read there."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.insert import insert
from lrpfx.ops import argument_names, bound_arguments

aten = torch.ops.aten

#: What shows the same elements in the same order.
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_RESHAPES |= {aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default}
_RESHAPES |= {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default}
_RESHAPES |= {aten.reshape_as.default, aten.alias.default, aten.detach.default}
_RESHAPES |= {aten.contiguous.default, aten.dropout.default}
#: What undoes itself.
_SWAPS = {aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default}
_SWAPS |= {aten.swapaxes.default, aten.swapdims.default}
_MOVES = {aten.movedim.int, aten.movedim.intlist}
_PARTS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_PIECES = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}
_PIECES |= {aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices}


class Memory:
    """Which nodes of a graph share memory, and what each of them stands for as ops write.

    Args:
        graph: The graph; the fake tensors of a trace share memory where the real ones do.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._source: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            address = storage(node)
            sharing = [n for n in node.all_input_nodes if address and storage(n) == address]
            if node.target is operator.getitem and sharing and sharing[0] not in self._source:
                continue  # one of several results, of which none is a view
            if sharing:
                self._source[node] = sharing[0]
        self._writes = dict.fromkeys(node for node in graph.nodes if writes(node))
        #: What holds a node's value, and after which write into its memory that was so.
        self._now: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._viewed: dict[fx.Node, fx.Node] = {}
        self._times: dict[int | None, int] = {}
        self._made: list[fx.Node] = []

    @property
    def known(self) -> bool:
        """Whether every view that is written into is one that can be written back."""
        roots: dict[int | None, int] = {}
        for node in self._graph.nodes:
            if node not in self._source and isinstance(node.meta.get("val"), Tensor):
                roots[storage(node)] = roots.get(storage(node), 0) + 1
        written = {storage(node) for node in self._writes}
        if any(n.target is aten.as_strided.default and storage(n) in written for n in self._source):
            return False
        for node in self._writes:
            target = node.args[0] if node.args else None
            if not isinstance(target, fx.Node) or not _writes_first(node):
                return False
            if self._source.get(node) is not target or roots[storage(node)] != 1:
                return False
            while target in self._source:
                whole = self._whole(target)
                if whole is None:
                    return False
                target = whole
        return True

    def renew(self) -> None:
        """``relu_(x)`` -> ``x = relu(x)``; ``x[0].add_(1)`` -> ``x = select_scatter(x, ...)``."""
        for node in list(self._graph.nodes):
            with self._graph.inserting_before(node):
                for argument in node.all_input_nodes:
                    if (now := self._current(argument)) is not argument:
                        node.replace_input_with(argument, now)
                if node in self._writes:
                    self._write(node)
                    continue
                self._now[node] = node, self._times.get(storage(node), 0)
                if node in self._source:
                    self._viewed[node] = self._current(self._source[node])
        for node in [*reversed(self._made), *reversed(self._writes)]:
            if not node.users:
                self._graph.erase_node(node)

    def _current(self, node: fx.Node) -> fx.Node:
        """What holds a node's value at this place of the graph."""
        now, time = self._now[node]
        latest = self._times.get(storage(node), 0)
        if node not in self._source or time == latest:
            return now
        source = self._current(self._source[node])
        if node in self._viewed:  # taken anew
            other = {self._viewed[node]: source}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: other.get(n, n))
            source = self._insert(node, node.target, args, kwargs)
        self._now[node] = source, latest
        return source

    def _write(self, node: fx.Node) -> None:
        """Compute what is written, and put it into all that the written tensor is a view of."""
        target = self._source[node]
        value = self._computed(node)
        new = {node: value, target: value}
        while target in self._source:
            whole = self._whole(target)
            assert whole is not None
            value = self._put(node, target, self._current(whole), value)
            new[whole], target = value, whole
        time = self._times[storage(node)] = self._times.get(storage(node), 0) + 1
        self._now.update((one, (value, time)) for one, value in new.items())

    def _computed(self, node: fx.Node) -> fx.Node:
        """``relu_(x)`` -> ``relu(x)``."""
        op = functional(node.target)  # type: ignore[arg-type]
        assert op is not None
        names = argument_names(op)
        required = [a for a in op._schema.arguments if not a.has_default_value()]
        enough = len(node.args) + len(node.kwargs) >= len(required)
        if names[0] == "input" or (enough and names == argument_names(node.target)):
            new = self._insert(node, op, node.args, node.kwargs)
        else:  # polygamma has its tensor last, and some take by default what others must be given
            new = self._insert(node, op, (), bound_arguments(node))
        dtype = node.meta["val"].dtype
        if new.meta["val"].dtype != dtype:  # in-place ops keep their dtype
            new = self._insert(node, aten.to.dtype, (new, dtype))
        return new

    def _whole(self, view: fx.Node) -> fx.Node | None:
        """The tensor that a view is one of, if what is put into the view can be put there."""
        source = self._source[view]
        if view.target is operator.getitem:
            known = source.target is aten.unbind.int or source.target in _PIECES
            return self._source.get(source) if known and _starts(source) is not None else None
        target = view.target
        if target is aten.narrow.default:
            known = all(isinstance(bound_arguments(view)[n], int) for n in ("start", "length"))
        else:
            known = target in _RESHAPES or target in _SWAPS or target in _PARTS
            known = known or target in (aten.permute.default, *_MOVES)
        return source if known or writes(view) else None

    def _put(self, like: fx.Node, view: fx.Node, whole: fx.Node, value: fx.Node) -> fx.Node:
        """The whole with a value in the place of a view of it."""
        if writes(view):
            return value
        target: Any = view.target
        if target is operator.getitem:
            return self._put_piece(like, view, whole, value)
        given: dict[str, Any] = bound_arguments(view)
        if target in _RESHAPES:
            if str(value.meta["val"].shape) == str(whole.meta["val"].shape):
                return value
            return self._insert(like, aten.reshape_as.default, (value, whole))
        if target in _SWAPS:
            return self._insert(like, target, (value, *list(given.values())[1:]))
        if target is aten.permute.default:
            n = len(given["dims"])
            back = sorted(range(n), key=lambda i: given["dims"][i] % n)
            return self._insert(like, target, (value, back))
        if target in _MOVES:
            return self._insert(like, target, (value, given["destination"], given["source"]))
        if target in _PARTS:
            return self._insert(like, _PARTS[target], (whole, value, *list(given.values())[1:]))
        start = given["start"]
        place = given["dim"], start, start + given["length"]
        return self._insert(like, aten.slice_scatter.default, (whole, value, *place))

    def _put_piece(self, like: fx.Node, piece: fx.Node, whole: fx.Node, value: fx.Node) -> fx.Node:
        source, index = self._source[piece], piece.args[1]
        dim, starts = bound_arguments(source)["dim"], _starts(source)
        assert isinstance(index, int) and starts is not None
        if source.target is aten.unbind.int:
            return self._insert(like, aten.select_scatter.default, (whole, value, dim, index))
        place = dim, starts[index], starts[index + 1]
        return self._insert(like, aten.slice_scatter.default, (whole, value, *place))

    def _insert(self, like: fx.Node, *call: Any) -> fx.Node:
        new = insert(like, *call)
        self._made.append(new)
        return new


def storage(node: fx.Node) -> int | None:
    """The memory of what a node computes, of several tensors that of the first."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _starts(pieces: fx.Node) -> list[int] | None:
    """Where each piece of a tensor begins, and where the last ends; None if that may vary."""
    if pieces.target is aten.unbind.int:
        return []
    dim: Any = bound_arguments(pieces)["dim"]
    sizes = [value.shape[dim] for value in pieces.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return list(itertools.accumulate(sizes, initial=0))


def _writes_first(node: fx.Node) -> bool:
    """Whether an op writes its first argument only, and returns it in the form that it had."""
    target, value = node.args[0], node.meta.get("val")
    op: Any = node.target
    written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    return (
        written == [True] + [False] * (len(written) - 1)
        and functional(op) is not None
        and isinstance(value, Tensor)
        and str(value.shape) == str(target.meta["val"].shape)  # type: ignore[union-attr]
    )


def writes(node: fx.Node) -> bool:
    """Whether the op changes memory that it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``relu_.default`` -> ``relu.default``, which takes the same arguments; None without such.

    The overload's name tells nothing: ``pow_.Scalar`` is ``pow.Tensor_Scalar``.
    """
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    given = _arguments(target._schema)
    for overload in packet.overloads() if packet is not None and given else ():
        other = getattr(packet, overload)
        if _arguments(other._schema) == given and not other._schema.is_mutable:
            found: torch._ops.OpOverload = other
            return found
    return None


def _arguments(schema: Any) -> dict[str, str]:
    """Type of each, in any order; what is written is ``self`` or ``input``. Empty for lists."""
    named = {"self" if a.name == "input" else a.name: str(a.type) for a in schema.arguments}
    return named if "Tensor" in map(str, (r.type for r in schema.returns)) else {}
