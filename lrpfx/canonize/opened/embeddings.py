"""Embeddings, in whatever words -> ``embedding`` of ids, and what is done to its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx.canonize.writer import Writer
from lrpfx.errors import UnsupportedOpError
from lrpfx.ops import source_line

aten = torch.ops.aten


def bag(
    op: Writer,
    weight: Any,
    indices: Any,
    offsets: Any,
    mode: int,
    per_sample_weights: Any,
    padding_idx: Any,
    **rest: Any,
) -> None:
    """Replaces the bags' first output by an embedding and its sum, mean or maximum over a bag."""
    if not op.changes(indices):
        return None
    step = offsets.args[2] if offsets.target is aten.arange.start_step else None
    padded = padding_idx is not None and padding_idx >= 0
    if not isinstance(step, int) or padded:
        raise UnsupportedOpError(
            "token ids enter an embedding bag whose bags "
            + ("leave out a padding index." if padded else "differ in size or have offsets."),
            where=[f"{op.node.target}   {source_line(op.node)}"],
            fix="give ids of shape (N, T) without padding_idx, or use nn.Embedding and a sum.",
        )
    ids = op(aten.reshape.default, indices, [-1, step])
    vectors = op(aten.embedding.default, weight, ids)
    if per_sample_weights is not None:
        shares = op(aten.reshape.default, per_sample_weights, [-1, step, 1])
        vectors = op(aten.mul.Tensor, vectors, shares)
    reduction = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
    bags = op(reduction, vectors, [1])
    for user in list(op.node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(bags)
    return None


def embedding(op: Writer, weight: Any, indices: Any, **rest: Any) -> fx.Node | None:
    """Rows that are picked, where the table itself depends on the input."""
    if getattr(weight.target, "__name__", "").startswith("embedding_renorm"):
        raise UnsupportedOpError(
            "an embedding rescales its table in forward(), by max_norm.",
            where=[f"{op.node.target}   {source_line(op.node)}"],
            fix="rescale the table once, and set max_norm to None.",
        )
    return op(aten.index.Tensor, weight, [indices]) if op.changes(weight) else None


def index(op: Writer, self: Any, indices: Any) -> fx.Node | None:
    """An embedding, where integers from the input pick rows of a parameter."""
    if len(indices) != 1 or not op.is_parameter(self):
        return None
    (ids,) = indices
    if ids.meta["val"].dtype not in (torch.int32, torch.int64) or not op.changes(ids):
        return None
    rows = self.meta["val"].shape[0]
    from_end = op(aten.add.Tensor, ids, rows)
    ids = op(aten.where.self, op(aten.lt.Scalar, ids, 0), from_end, ids)
    return _rows(op, self, ids)


def index_select(op: Writer, self: Any, dim: int, index: Any) -> fx.Node | None:
    """Likewise."""
    first = dim in (0, -self.meta["val"].ndim)
    if not first or not op.is_parameter(self) or not op.changes(index):
        return None
    return _rows(op, self, index)


def _rows(op: Writer, table: fx.Node, ids: fx.Node) -> fx.Node:
    """``table[ids]`` as an embedding, whose tables have two dimensions."""
    rows, *form = table.meta["val"].shape
    if len(form) == 1:
        return op(aten.embedding.default, table, ids)
    vectors = op(aten.embedding.default, op(aten.reshape.default, table, [rows, -1]), ids)
    return op(aten.unflatten.int, vectors, -1, form) if form else op(aten.squeeze.dim, vectors, -1)
