"""Reductions over groups of entries -> sums over groups, and the selections among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.writer import Writer
from lrpfx.errors import UnsupportedOpError
from lrpfx.ops import source_line

aten = torch.ops.aten

#: Adds values to what they are written into.
Add = Callable[[Any, Any], fx.Node]


def cut(op: Writer, self: Any, dim: int, index: Any, src: Any, **rest: Any) -> fx.Node | None:
    """Cuts ``src`` to what ``index`` reads of it, which PyTorch's own derivative fails to do."""
    source = _read(op, index, src)
    return None if source is src else op(op.node.target, self, dim, index, source)


def _read(op: Writer, index: Any, src: Any) -> Any:
    for d, (size, read) in enumerate(
        zip(src.meta["val"].shape, index.meta["val"].shape, strict=True)
    ):
        if isinstance(size, int) and isinstance(read, int) and size != read:
            src = op(aten.slice.Tensor, src, d, 0, read)
    return src


def scatter_reduce(
    op: Writer,
    self: Any,
    dim: int,
    index: Any,
    src: Any,
    reduce: str,
    include_self: bool = True,
) -> fx.Node | None:
    """A sum, or mean, over what is written to one place; extremes are left whole."""
    src = _read(op, index, src)
    if reduce in ("amax", "amin"):
        given = (self, dim, index, src, reduce)
        same = src in op.node.args
        return None if same else op(aten.scatter_reduce.two, *given, include_self=include_self)

    def add(into: Any, values: Any) -> fx.Node:
        return op(aten.scatter_add.default, into, dim, index, values)

    return _reduced(op, self, src, reduce, include_self, add)


def scatter_by_name(
    op: Writer, self: Any, dim: int, index: Any, src: Any, reduce: str
) -> fx.Node | None:
    """``scatter(..., reduce="add")``."""
    name = {"add": "sum", "multiply": "prod"}[reduce]
    return scatter_reduce(op, self, dim, index, src, name)


def index_reduce(
    op: Writer, self: Any, dim: int, index: Any, source: Any, reduce: str, include_self: bool
) -> fx.Node | None:
    """Likewise, along one dimension."""
    if reduce in ("amax", "amin"):
        return None

    def add(into: Any, values: Any) -> fx.Node:
        return op(aten.index_add.default, into, dim, index, values)

    return _reduced(op, self, source, reduce, include_self, add)


def _reduced(
    op: Writer, self: Any, src: Any, reduce: str, include_self: bool, add: Add
) -> fx.Node | None:
    if reduce == "prod":
        if not op.changes(self, src):
            return None
        raise UnsupportedOpError(
            "a product over groups of entries has no relevance rule.",
            where=[f"{op.node.target}   {source_line(op.node)}"],
            fix="take the exponential of the sum of logarithms, if the entries are positive.",
        )
    ones = op(aten.ones_like.default, src)
    if not include_self:  # what nothing is written to keeps its value
        written = add(op(aten.zeros_like.default, self), ones)
        empty = op(aten.eq.Scalar, written, 0)
        self = op(aten.where.ScalarOther, empty, self, 0.0)
    total = add(self, src)
    if reduce == "sum":
        return total
    held = op(aten.ones_like.default if include_self else aten.zeros_like.default, self)
    number = op(aten.clamp_min.default, add(held, ones), 1)
    return op.div(total, number)


def segment_reduce(
    op: Writer,
    data: Any,
    reduce: str,
    lengths: Any,
    indices: Any,
    offsets: Any,
    axis: int,
    unsafe: bool,
    initial: Any,
) -> fx.Node | None:
    """Of segments that follow each other along the first dimension, by their lengths."""
    if offsets is not None:
        lengths = op(aten.diff.default, offsets)
    if lengths is None or lengths.meta["val"].ndim != 1 or axis != 0 or initial is not None:
        return None
    ids = op(aten.repeat_interleave.Tensor, lengths, output_size=op.size(data, 0))
    form = [op.size(lengths, 0), *(op.size(data, d) for d in range(1, data.meta["val"].ndim))]
    name, empty = _SEGMENTS[reduce]
    into = op(aten.new_full.default, data, form, empty)
    given = (into, 0, ids, data, name)
    found = index_reduce(op, *given, include_self=False)
    return found or op(aten.index_reduce.default, *given, include_self=False)


#: What a reduction is called elsewhere, and what it makes of an empty segment.
_SEGMENTS = {
    "sum": ("sum", 0.0),
    "mean": ("mean", math.nan),
    "max": ("amax", -math.inf),
    "min": ("amin", math.inf),
    "prod": ("prod", 1.0),
}


def put(op: Writer, self: Any, index: Any, source: Any, accumulate: bool) -> fx.Node:
    """``put(x, i, y)`` -> ``index_put`` of the entries one after the other."""
    flat = op(aten.reshape.default, self, [-1])
    values = op(aten.reshape.default, source, [-1])
    places = [op(aten.reshape.default, index, [-1])]
    target = aten._unsafe_index_put.default if accumulate else aten.index_put.default
    written = op(target, flat, places, values, accumulate)
    return op(aten.reshape_as.default, written, self)
