"""Passes that gather what users write out of primitives into one node that a rule needs whole."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.call import Composed
from lrpfx.functionalize import insert
from lrpfx.graph import op_name, varying

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


def whole_softmaxes(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(x) / sum(exp(x))`` -> ``softmax(x)``, ``1 / (1 + exp(-x))`` -> ``sigmoid(x)``.

    So is ``1 / (1 + exp(x))``, that of ``-x``, and ``exp(x) / (1 + exp(x))``.

    A maximum of x that is subtracted first is left out: it changes nothing but the range.
    """
    widest = max((_precision(node) for node in module.graph.nodes), default=0)
    for node in list(module.graph.nodes):
        if _calls(node, aten.softmax.int) and _is_in_range(*node.args[:2]):
            node.update_arg(0, node.args[0].args[0])
        if _precision(node) < widest:
            continue  # what is rounded more than the rest would change by more than round-off
        with module.graph.inserting_before(node):
            found = _softmax_of(node) or _sigmoid_of(node)
            if found is None:
                continue
            new = insert(node, *found)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module


def _softmax_of(node: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Of exponentials over their sum the softmax, and its arguments."""
    above, below = _quotient(node)
    below = _reached(below, aten.expand.default, aten.expand_as.default)
    places = None
    if _calls(below, aten.unsqueeze.default):
        below, places = below.args
    if not _calls(above, aten.exp.default) or not _calls(below, aten.sum.dim_IntList):
        return None
    summed, dims, *kept = below.args
    rank = above.meta["val"].ndim
    twice = _calls(summed, aten.exp.default) and summed.args == above.args
    if not (summed is above or twice) or len(dims) != 1 or below.kwargs:
        return None
    x, form = above.args[0], str(above.meta["val"].shape)
    if _precision(x) != _precision(above) or str(node.meta["val"].shape) != form:
        return None
    dim = dims[0] % rank
    if (places is None) is not (kept == [True]) or (places is not None and places % rank != dim):
        return None
    return aten.softmax.int, (x.args[0] if _is_in_range(x, dim) else x, dim)


def _sigmoid_of(node: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Of ``1 / (1 + exp(-x))``, or ``exp(x) / (1 + exp(x))``, the sigmoid, and its argument."""
    above, below = (
        (None, node.args[0]) if _calls(node, aten.reciprocal.default) else _quotient(node)
    )
    if not _calls(below, aten.add.Tensor) or below.kwargs:
        return None
    power = next((p for p, one in (below.args, below.args[::-1]) if one == 1), None)
    if not _calls(power, aten.exp.default) or _precision(power) != _precision(power.args[0]):
        return None
    (x,) = power.args
    if above is not None:
        same = _calls(above, aten.exp.default) and above.args == power.args
        return (aten.sigmoid.default, (x,)) if same else None
    if _calls(x, aten.neg.default) or (_calls(x, aten.mul.Tensor) and x.args[1] == -1):
        return aten.sigmoid.default, x.args[:1]
    return aten.sigmoid.default, (insert(node, aten.neg.default, (x,)),)


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _reached(node: Any, *through: Any) -> Any:
    """What a node is the first argument's form of."""
    while _calls(node, *through):
        node = node.args[0]
    return node


def _quotient(node: Any) -> tuple[Any, Any]:
    """Of ``a / b``, or ``a * (1 / b)``, a and b."""
    if node.target is aten.div.Tensor:
        return node.args[0], node.args[1]
    if node.target is aten.mul.Tensor:
        for a, inverse in (node.args, node.args[::-1]):
            while _calls(inverse, aten.mul.Tensor) and inverse.args[1] == 1:  # 1 / b is 1 * (1 / b)
                inverse = inverse.args[0]
            if _calls(inverse, aten.reciprocal.default):
                return a, inverse.args[0]
    return None, None


def _precision(node: Any) -> int:
    """Bytes of a floating number in it; 0 for integers."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.itemsize if isinstance(value, Tensor) and value.is_floating_point() else 0


def _is_in_range(node: Any, dim: int) -> bool:
    """Whether a node is some x less its maximum along a dimension."""
    if not _calls(node, aten.sub.Tensor) or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    x, shift = node.args
    return _is_maximum(shift, x, dim % node.meta["val"].ndim) and _precision(x) == _precision(node)


def _is_maximum(node: Any, x: Any, dim: int) -> bool:
    """Whether a node is the maximum of x along a dimension, or its value there."""
    node = _reached(node, aten.expand.default, aten.expand_as.default, aten.detach.default)
    if _calls(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]
    if not _calls(node, aten.amax.default, aten.max.dim) or node.args[0] is not x:
        return False
    given, *kept = node.args[1:]
    dims = given if isinstance(given, (list, tuple)) else [given]
    return kept == [True] and [d % x.meta["val"].ndim for d in dims] == [dim]


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
