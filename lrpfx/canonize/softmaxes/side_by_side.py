"""Products with operands side by side, taken apart again -> a product with each."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.insert import insert
from lrpfx.ops import bound_arguments

aten = torch.ops.aten

_CATS = {aten.cat.default, aten.concat.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
_SLICES = {aten.slice.Tensor, aten.narrow.default, aten.select.int}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default}


def products_with_parts(module: fx.GraphModule) -> fx.GraphModule:
    """``(a @ cat([v, w], -1))[..., :n]`` -> ``a @ v``, if n is the number of columns of v.

    Exact, as columns of a product are products with columns. A column of ones among the values of
    attention is its normaliser, and no value.
    """
    graph = module.graph
    for node in [n for n in graph.nodes if n.target in _PRODUCTS]:
        values = node.args[1]
        if not isinstance(values, fx.Node) or values.target not in _CATS:
            continue
        bounds = _bounds(values)
        taken = {user: _taken(user, node) for user in node.users}
        if not bounds or not all(places and set(places) <= {*bounds} for places in taken.values()):
            continue
        products: dict[tuple[int, int], fx.Node] = {}
        for user, places in taken.items():
            for place in places or ():
                if place not in products:
                    with graph.inserting_after(node):
                        products[place] = insert(node, node.target, (node.args[0], bounds[place]))
            _replace(user, [products[place] for place in places or ()])
        graph.erase_node(node)
    return module


def _bounds(cat: fx.Node) -> dict[tuple[int, int], fx.Node]:
    """First and last column of what is put side by side along the last dimension."""
    arguments, rank = bound_arguments(cat), cat.meta["val"].ndim
    found: dict[tuple[int, int], fx.Node] = {}
    begin = 0
    for part in arguments["tensors"] if arguments["dim"] % rank == rank - 1 else ():
        size = part.meta["val"].shape[-1]
        if not isinstance(size, int) or part.meta["val"].ndim != rank:
            return {}
        found[begin, begin + size] = part
        begin += size
    return found


def _taken(user: fx.Node, product: fx.Node) -> list[tuple[int, int]] | None:
    """The columns that a node takes of a product, in parts; None if it does anything else."""
    value = product.meta["val"]
    size, last = value.shape[-1], value.ndim - 1
    if user.target not in _SLICES | _SPLITS or not isinstance(size, int):
        return None
    arguments = bound_arguments(user)
    if arguments["dim"] % value.ndim != last:
        return None
    if user.target in _SPLITS:
        sizes = [part.shape[-1] for part in user.meta["val"]]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        only = all(n.target is operator.getitem for n in user.users)
        return [(e - s, e) for s, e in zip(sizes, ends, strict=True)] if only else None
    if user.target is aten.select.int:
        index = arguments["index"]
        return [(index % size, index % size + 1)] if isinstance(index, int) else None
    if user.target is aten.narrow.default:
        start, length = arguments["start"], arguments["length"]
        fixed = isinstance(start, int) and isinstance(length, int)
        return [(start % size, start % size + length)] if fixed else None
    begin, end, step = (arguments[name] for name in ("start", "end", "step"))
    if not all(isinstance(v, int) or v is None for v in (begin, end)) or step != 1:
        return None
    begin, end, _ = slice(begin, end).indices(size)
    return [(begin, end)]


def _replace(user: fx.Node, products: list[fx.Node]) -> None:
    if user.target in _SPLITS:
        for part in list(user.users):
            index: Any = part.args[1]
            part.replace_all_uses_with(products[index])
            user.graph.erase_node(part)
    elif user.target is aten.select.int:
        with user.graph.inserting_before(user):
            user.replace_all_uses_with(insert(user, aten.squeeze.dim, (products[0], -1)))
    else:
        user.replace_all_uses_with(products[0])
    user.graph.erase_node(user)
