"""Sums over groups -> each sum handed back to the entries of its group."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import fx

from lrpfx.canonize.insert import insert
from lrpfx.ops import bound_arguments

aten = torch.ops.aten


def handed_back(total: fx.Node, end: fx.Node, entries: fx.Node, like: fx.Node) -> Iterator[fx.Node]:
    """Nodes that may hand to each entry the sum that it is part of, in a shape that broadcasts.

    Args:
        total: What sums up.
        end: The sums, with guards maybe.
        entries: What is summed up.
        like: Whose provenance they have.
    """
    arguments = bound_arguments(total)
    if total.target is aten.scatter_add.default:
        yield insert(like, aten.gather.default, (end, arguments["dim"], arguments["index"]))
    elif total.target is aten.index_add.default:
        yield insert(like, aten.index_select.default, (end, arguments["dim"], arguments["index"]))
    elif total.target is aten._unsafe_index_put.default:
        yield insert(like, aten.index.Tensor, (end, arguments["indices"]))
    else:
        rank, sizes = entries.meta["val"].ndim, end.meta["val"].shape
        if all(isinstance(size, int) and size == 1 for size in sizes):
            yield insert(like, aten.reshape.default, (end, [])) if len(sizes) > rank else end
            return
        for places in combinations(range(rank), len(sizes)):
            spread = end
            for dim in sorted({*range(rank)} - {*places}):
                spread = insert(like, aten.unsqueeze.default, (spread, dim))
            yield spread
