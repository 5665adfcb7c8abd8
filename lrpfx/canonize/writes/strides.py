"""Reads of memory by strides -> reads of a tensor that is laid out as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.writer import Writer
from lrpfx.ops import bound_arguments, strided, strided_scatter

aten = torch.ops.aten


def places_of_strides(module: fx.GraphModule) -> fx.GraphModule:
    """``as_strided(x, ...)`` -> the same of x brought into the order that it had in memory.

    Left as it is where it reads more than what is x's: gaps, or what lies before or behind it.
    """
    for node in list(module.graph.nodes):
        if node.target not in (aten.as_strided.default, aten.as_strided_scatter.default):
            continue
        given = bound_arguments(node)
        x: Any = given["self"]
        order = _order(x.meta["val"])
        first = x.meta["val"].storage_offset()
        offset = given["storage_offset"]
        offset = 0 if offset is None else offset - first
        if order is None or not _within(x.meta["val"], given, offset):
            continue
        with module.graph.inserting_before(node):
            op = Writer(node, module)
            place = given["size"], given["stride"], offset
            moved = order != sorted(order)
            x = op(aten.permute.default, x, order) if moved else x
            if node.target is aten.as_strided.default:
                new = op(strided, x, *place)
            else:
                new = op(strided_scatter, x, given["src"], *place)
                back = [order.index(d) for d in range(len(order))]
                new = op(aten.permute.default, new, back) if moved else new
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module


def _order(x: Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, None if there are gaps or entries lie in one place."""
    order = sorted(range(x.ndim), key=lambda d: x.stride()[d], reverse=True)
    filled: Any = 1
    for d in reversed(order):
        if x.shape[d] != 1 and x.stride(d) != filled:
            return None
        filled = filled * x.shape[d]
    return order


def _within(x: Tensor, given: dict[str, Any], offset: Any) -> bool:
    """Whether all that is read is x's."""
    sizes = [s.meta["val"] if isinstance(s, fx.Node) else s for s in given["size"]]
    strides = [s.meta["val"] if isinstance(s, fx.Node) else s for s in given["stride"]]
    if not isinstance(offset, int) or offset < 0:
        return False
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return bool(last < x.numel())
