"""Passes that gather what users write out of primitives into one node that a rule needs whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.call import Composed, product
from lrpfx.functionalize import insert
from lrpfx.graph import op_name, varying
from lrpfx.hold import live_values

aten = torch.ops.aten

_ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_ARITHMETIC |= {aten.rsub.Scalar, aten.neg.default, aten.to.dtype}
#: More primitives than any activation in use has; a search that runs longer found none.
_LONGEST = 24


def whole_activations(module: fx.GraphModule) -> fx.GraphModule:
    """``x * sigmoid(x)``, ``0.5 * x * (1 + tanh(...))`` -> one activation of x.

    Taken is the nearest elementwise region with a nonlinearity that a single value enters, so a
    constant added before it stays outside, where it can absorb its share. Rules for products and
    sums on the region's parts would give other relevance than the same activation in one op.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.1 is about f as a whole.
    """
    changing = varying(module.graph)
    for node in list(module.graph.nodes):
        found = (
            _region(node, changing) if node.target in (aten.mul.Tensor, aten.div.Tensor) else None
        )
        if found is None:
            continue
        entry, region = found
        with module.graph.inserting_before(node):
            new = _call_composed(module, node, entry, region)
        changing.add(new)
        node.replace_all_uses_with(new)
        for old in sorted(region, reverse=True):
            module.graph.erase_node(old)
    return module


def flat_products(module: fx.GraphModule) -> fx.GraphModule:
    """``mul(mul(a, b) / 2, c)`` -> ``product([[[a, b], 0.5], c])``, so that no factor counts less.

    Source: pairwise shares depend on the association, arXiv 2510.18810.
    """
    live = live_values(module.graph)
    for node in list(module.graph.nodes):
        if not _is_product(node, live) or _is_factor(node, live):
            continue
        inner: list[fx.Node] = []
        factors = [_tree(factor, live, inner) for factor in node.args]
        if not inner or node.args[0] is node.args[1]:
            continue
        with module.graph.inserting_before(node):
            new = module.graph.call_function(product, (factors,))
        new.meta = dict(node.meta)
        live.add(new)
        node.replace_all_uses_with(new)
        for old in (node, *inner):
            module.graph.erase_node(old)
    return module


def _is_product(node: fx.Node, live: set[fx.Node]) -> bool:
    return node.target is aten.mul.Tensor and len(_operands(node, live)) == 2


def _is_factor(node: fx.Node, live: set[fx.Node]) -> bool:
    """Whether the node is used as a factor of another product and nowhere else."""
    (user, *others) = node.users or (node,)
    if others or user is node:
        return False
    if _is_product(user, live):
        return user.args[0] is not user.args[1]
    return _is_scaled(user, live) and _is_factor(user, live)


def _is_scaled(node: fx.Node, live: set[fx.Node]) -> bool:
    """Whether the node is a live one, times or over a constant."""
    if node.target is aten.div.Tensor and (node.args[1] in live or node.args[1] in (0, 0.0)):
        return False
    scales = node.target in (aten.mul.Tensor, aten.div.Tensor, aten.neg.default)
    return scales and len(_operands(node, live)) == 1


def _tree(node: Any, live: set[fx.Node], inner: list[fx.Node]) -> Any:
    """A factor, or the factors of the product that it is; ``inner`` gets the nodes left over.

    The nodes come before those that they use.
    """
    if not isinstance(node, fx.Node) or node not in live or len(node.users) > 1:
        return node
    if _is_product(node, live) and node.args[0] is not node.args[1]:
        inner.append(node)
        return [_tree(factor, live, inner) for factor in node.args]
    if not _is_scaled(node, live):
        return node
    (scaled,) = _operands(node, live)
    found = [node]
    below = _tree(scaled, live, found)
    if below is scaled:  # no product
        return node
    inner += found
    if node.target is aten.neg.default:
        return [below, -1]
    if node.target is aten.div.Tensor:
        return [below, _inverse(node)]
    return [below if factor is scaled else factor for factor in node.args]


def _inverse(quotient: fx.Node) -> Any:
    divisor: Any = quotient.args[1]
    if not isinstance(divisor, fx.Node):
        return 1 / divisor
    with quotient.graph.inserting_before(quotient):
        if divisor.meta["val"].dtype != (dtype := quotient.meta["val"].dtype):
            divisor = insert(quotient, aten.to.dtype, (divisor, dtype))
        return insert(quotient, aten.reciprocal.default, (divisor,))


def _operands(node: fx.Node, among: set[fx.Node]) -> list[fx.Node]:
    """The inputs of a node that are among the given ones, as often as they are used."""
    return [n for n in node.args if isinstance(n, fx.Node) and n in among]


def _region(end: fx.Node, changing: set[fx.Node]) -> tuple[fx.Node, set[fx.Node]] | None:
    """The nearest region that ends in ``end`` and that one value enters, and that value."""
    if len(_operands(end, changing)) != 2:
        return None
    region = {end}
    frontier = set(_operands(end, changing))
    while len(frontier) > 1:
        node = max(frontier)
        if len(region) > _LONGEST or not _is_elementwise(node, end):
            return None
        region.add(node)
        frontier = (frontier - {node}) | set(_operands(node, changing))
    if not frontier:
        return None
    inside = all(user in region for node in region - {end} for user in node.users)
    curved = len(set(_operands(end, changing))) == 1 or any(_is_activation(node) for node in region)
    return (frontier.pop(), region) if inside and curved else None


def _is_activation(node: fx.Node) -> bool:
    if isinstance(node.target, Composed):
        return True
    row = ops.find(node.target, frozenset(["self"]))
    return row is not None and row.family == "activation"


def _is_elementwise(node: fx.Node, end: fx.Node) -> bool:
    """Whether the node is an elementwise op of the shape of ``end``."""
    known = node.target in _ARITHMETIC or _is_activation(node)
    return known and bool(node.meta["val"].shape == end.meta["val"].shape)


def _call_composed(
    module: fx.GraphModule, end: fx.Node, entry: fx.Node, region: set[fx.Node]
) -> fx.Node:
    body = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {entry: body.placeholder("x")}
    constants: list[fx.Node] = []
    for node in sorted(region):
        for value in node.all_input_nodes:
            if value not in copied:  # everything varying is in the region, or is the entry
                copied[value] = body.placeholder(f"c{len(constants)}")
                constants.append(value)
        copied[node] = body.node_copy(node, copied.__getitem__)
    body.output(copied[end])
    cores = [op_name(n.target) for n in sorted(region) if _is_activation(n)]
    function = fx.GraphModule(module, body)
    vanishes = not constants and _vanishes(function)
    composed = Composed(function, cores[-1] if cores else "square", vanishes)
    new = module.graph.call_function(composed, (entry, constants))
    new.meta = dict(end.meta)
    return new


def _vanishes(function: fx.GraphModule) -> bool:
    """Whether f(0) = 0 and the slope there is finite, so that f(x) / x settles near 0."""
    x = torch.tensor([0.0, 1e-8, 1e-6], dtype=torch.float64)
    values: list[float] = function(x).tolist()
    first, second = values[1] / 1e-8, values[2] / 1e-6
    return values[0] == 0 and abs(first - second) <= 1e-3 * abs(first) + 1e-5
