"""Sparse softmaxes in any words -> ``entmax``, found by what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import INPUTS
from lrpfx.ops import entmax, precision, varying

aten = torch.ops.aten

#: What a search for a threshold sorts by, and what it bisects by.
_SORTS = {aten.sort.default, aten.sort.stable, aten.topk.default, aten.cumsum.default}
_BISECTS = {aten.where.self}
_BISECTIONS = 10
#: What a sparse softmax may end with: it cuts off, takes a power, or divides by the sum.
_ENDS = {aten.clamp.default, aten.clamp_min.default, aten.relu.default, aten.maximum.default}
_ENDS |= {aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor, aten.div.Tensor}
_ENDS |= {aten.where.self, aten.where.ScalarOther}
#: More nodes than a search by fifty bisections has; more entries than may stand before one.
_LONGEST, _FARTHEST = 1000, 8


def whole_entmax(module: fx.GraphModule) -> fx.GraphModule:
    """``clamp(x - t(x), min=0)`` -> ``entmax(x)``, where t makes it sum to one; so of its square.

    Whether a region is one is measured: it is run on random numbers, and what comes out must be the
    nearest point of the simplex (sparsemax), or an entmax, along some dimension. Its parts,
    a sort, sums and a threshold, have rules of their own that would make relevance explode.

    Source: Martins and Astudillo 2016 (arXiv 1602.02068); Peters et al. 2019 (arXiv 1905.05702).
    """
    if not _searches(list(module.graph.nodes)):
        return module
    changing, gone = varying(module.graph), set[fx.Node]()
    for end in reversed(list(module.graph.nodes)):
        if end in gone or end.target not in _ENDS or end not in changing or not precision(end):
            continue
        found = _entmax_of(module, end, changing)
        if found is None:
            continue
        x, dim, power, region = found
        with module.graph.inserting_before(end):
            end.replace_all_uses_with(insert(end, entmax, (x, dim, power)))
        for node in sorted(region, reverse=True):
            if not node.users:
                module.graph.erase_node(node)
                gone.add(node)
    return module


def _searches(nodes: list[fx.Node]) -> bool:
    """Whether some of the nodes may look for a threshold."""
    targets = [node.target for node in nodes]
    sorts = any(target in _SORTS for target in targets)
    return sorts or sum(target in _BISECTS for target in targets) >= _BISECTIONS


def _entmax_of(
    module: fx.GraphModule, end: fx.Node, changing: set[fx.Node]
) -> tuple[fx.Node, int, float, set[fx.Node]] | None:
    """The x, dimension and power that ``end`` is the entmax of, and all that computes it.

    Of several x that differ by what is the same for all entries it is the farthest.
    """
    found = None
    for x, region in _regions(end, changing):
        if not _searches(list(region)):
            continue
        measured = _measure(module, x, end, region)
        if measured is None and found is not None:
            break
        if measured is not None:
            found = (x, *measured, region)
    return found


def _regions(end: fx.Node, changing: set[fx.Node]) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Regions that end in ``end`` and that one value of its shape enters, the nearest first."""
    form, region, frontier, entries = str(end.meta["val"].shape), set[fx.Node](), {end}, 0
    while frontier and len(region) < _LONGEST and entries < _FARTHEST:
        node = max(frontier)
        if len(frontier) == 1 and region and isinstance(node.meta.get("val"), Tensor):
            entries += 1
            if str(node.meta["val"].shape) == form:
                yield node, set(region)
        if node.op != "call_function":
            return
        region.add(node)
        frontier = (frontier - {node}) | {n for n in node.all_input_nodes if n in changing}


def _measure(
    module: fx.GraphModule, entry: fx.Node, end: fx.Node, region: set[fx.Node]
) -> tuple[int, float] | None:
    """Dimension and power of the entmax that a region computes, None if it is none."""
    like: Tensor = entry.meta["val"]
    sizes = [size if isinstance(size, int) else size.node.hint for size in like.shape]
    run = _body(module, entry, end, region)
    if run is None or None in sizes:
        return None
    given = next(t for t in module.meta[INPUTS] if isinstance(t, Tensor))
    device = given.device if like.is_meta else like.device
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(*sizes, generator=generator, dtype=like.dtype, device=device)
    tolerance = 1e-8 if like.dtype == torch.float64 else 1e-4
    with torch.no_grad():
        try:
            pairs = [(x, run(x.clone())) for x in (drawn, 4 * drawn)]
        except Exception:  # made for other sizes than those that were taken here
            return None
        if any(y.shape != x.shape for x, y in pairs):  # it sees them as such, too
            return None
        for dim in range(like.ndim):
            for power in (1, 2, *_powers(*pairs[0], dim)) if sizes[dim] > 1 else ():
                near = ((y - entmax(x, dim, power)).abs().max() for x, y in pairs)
                if all(error <= tolerance for error in near):
                    return dim, power
    return None


def _powers(x: Tensor, y: Tensor, dim: int) -> list[float]:
    """The power of the entmax that takes x to y, if it is one; rounded, too, as it was found.

    Of two entries that are left, c = alpha - 1 solves (y1 ** c - y2 ** c) / c = x1 - x2, of which
    the left side falls with c.
    """
    two = y.movedim(dim, -1).reshape(-1, y.shape[dim]).double().topk(2)
    row = int(two.values[:, 1].argmax())
    y1, y2 = two.values[row].tolist()
    at = x.movedim(dim, -1).reshape(-1, x.shape[dim]).double()[row, two.indices[row]].tolist()
    if not 1 > y1 > y2 > 0:
        return []
    low, high = 0.0, 4.0
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (y1**c - y2**c) / c > at[0] - at[1] else (low, c)
    return [1 / c for c in (round(high, 4), high) if 0.01 < c < 4]


def _body(
    module: fx.GraphModule, entry: fx.Node, end: fx.Node, region: set[fx.Node]
) -> fx.GraphModule | None:
    """The region as a function of its entry; None if it depends on another input."""
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {entry: graph.placeholder("x")}

    def copy(node: fx.Node) -> bool:
        if node in copied:
            return True
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            copied[node] = value.node.hint
            return value.node.hint is not None
        if node.op == "placeholder" or not all(map(copy, node.all_input_nodes)):
            return False
        copied[node] = graph.node_copy(node, copied.__getitem__)
        return True

    if not all(map(copy, sorted(region))):
        return None
    graph.output(copied[end])
    return fx.GraphModule(module, graph)
