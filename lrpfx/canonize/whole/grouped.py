"""Products of several factors -> those that are computed from one tensor multiplied first."""

from __future__ import annotations

import torch
from torch import fx

from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import alike
from lrpfx.canonize.same import Same
from lrpfx.canonize.whole.regions import pointwise_regions
from lrpfx.ops import precision, varying

aten = torch.ops.aten


def factors_of_one_tensor(module: fx.GraphModule) -> fx.GraphModule:
    """``(y * x) * sigmoid(x)`` -> ``(x * sigmoid(x)) * y``.

    So x * sigmoid(x) is one activation, as it is where it is written first, and counts once beside
    y. The order in which numbers are multiplied makes no difference but for rounding.
    """
    changing, same = varying(module.graph), Same(module.graph)
    products = [n for n in module.graph.nodes if n.target is aten.mul.Tensor and n in changing]
    inner = {n for node in products for n in _nested(node, changing) if n is not node}
    for node in products:
        if node in inner or len(nest := _nested(node, changing)) < 2:
            continue
        factors = [a for n in nest for a in n.args if a not in nest]
        live = [
            n for n in factors if isinstance(n, fx.Node) and n in changing and _is_like(n, node)
        ]
        for x in dict.fromkeys(live):
            own = [n for n in live if n is x or _is_of(n, x, changing, same)]
            if len(set(own)) == 1 or len(own) == len(live) or _is_one(nest, own, changing):
                continue
            first, *more = own
            with module.graph.inserting_before(node):
                for factor in [*more, *(n for n in factors if n not in own)]:
                    first = insert(node, aten.mul.Tensor, (first, factor))
                    changing.add(first)
            node.replace_all_uses_with(first)
            for old in nest:  # from the last on
                module.graph.erase_node(old)
            break
    return module


def _nested(product: fx.Node, changing: set[fx.Node]) -> list[fx.Node]:
    """A product, and those of its factors that are products of its form and used nowhere else."""
    found = [product]
    for node in found:
        for n in node.all_input_nodes:
            is_product = n.target is aten.mul.Tensor and n in changing
            if is_product and len(n.users) == 1 and _is_like(n, product):
                found.append(n)
    return found


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    return alike(node, other) and precision(node) == precision(other)


def _is_of(node: fx.Node, x: fx.Node, changing: set[fx.Node], same: Same) -> bool:
    """Whether a node is a function of ``x``, number by number."""
    regions = pointwise_regions(node, changing, same)
    return any(region.entries == [same.first(x)] for region in regions)


def _is_one(nest: list[fx.Node], own: list[fx.Node], changing: set[fx.Node]) -> bool:
    """Whether one of the products in a nest is of these factors, and constants, alone."""
    return any(_live_factors(node, nest, changing) == set(own) for node in nest)


def _live_factors(node: fx.Node, nest: list[fx.Node], changing: set[fx.Node]) -> set[fx.Node]:
    found = set[fx.Node]()
    for n in node.all_input_nodes:
        found |= _live_factors(n, nest, changing) if n in nest else {n} & changing
    return found
