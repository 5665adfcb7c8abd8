"""Passes: activations written out of primitives -> one node, as their rule needs them whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.canonize.same import Same
from lrpfx.ops import Composed, op_name, varying

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
    changing, same = varying(module.graph), Same(module.graph)
    ends = [n for n in module.graph.nodes if n.target in (aten.mul.Tensor, aten.div.Tensor)]
    shared = False
    for node in ends:
        if (found := _region(node, changing, same)) is None:
            continue
        entry, region = found
        merged = same.merge(region)
        with module.graph.inserting_before(node):
            new = compose(module, node, entry, region)
        changing.add(new)
        if merged:
            same, shared = Same(module.graph), True
    if shared:
        module.graph.eliminate_dead_code()
    return module


def whole_quantisation(module: fx.GraphModule) -> fx.GraphModule:
    """``fake_quantize(x, ...)`` -> one activation of x: rounding to a grid counts as identity.

    That is how such models are trained. Some of these ops return a mask and statistics, too.
    """
    for node in list(module.graph.nodes):
        if not any(name in str(node.target) for name in ("fake_quantize_per", "obs_fq_helper")):
            continue
        several = not isinstance(node.meta["val"], Tensor)
        for end in [n for n in node.users if n.args[1] == 0] if several else [node]:
            with module.graph.inserting_before(end):
                compose(module, end, node.args[0], {node, end}, name="fake_quantize")
    return module


def _region(
    end: fx.Node, changing: set[fx.Node], same: Same
) -> tuple[fx.Node, set[fx.Node]] | None:
    """The nearest region that ends in ``end`` and that one value enters, and that value.

    What computes the same is one value.
    """

    def operands(node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that change, as often as they are used."""
        return [same.first(n) for n in node.args if isinstance(n, fx.Node) and n in changing]

    if len(operands(end)) != 2:
        return None
    region = {end}
    frontier = set(operands(end))
    while len(frontier) > 1:
        node = max(frontier)
        if len(region) > _LONGEST or not _is_elementwise(node, end):
            return None
        region.add(node)
        frontier = (frontier - {node}) | set(operands(node))
    if not frontier:
        return None
    inner = {n for node in region - {end} for n in same.group(node)}
    inside = all(same.first(user) in region | {same.first(end)} for n in inner for user in n.users)
    curved = len(set(operands(end))) == 1 or any(_is_activation(node) for node in region)
    return (frontier.pop(), region) if inside and curved else None


def _is_activation(node: fx.Node) -> bool:
    if isinstance(node.target, Composed):
        return node.target.family == "activation"
    rows = (ops.find(node.target, frozenset([name])) for name in ("self", "x"))  # x of ops of ours
    return any(row is not None and row.family == "activation" for row in rows)


def _is_elementwise(node: fx.Node, end: fx.Node) -> bool:
    """Whether the node is an elementwise op of the shape of ``end``."""
    known = node.target in _ARITHMETIC or _is_activation(node)
    return known and bool(node.meta["val"].shape == end.meta["val"].shape)


def compose(
    module: fx.GraphModule,
    end: fx.Node,
    entry: fx.Node,
    region: Collection[fx.Node],
    family: Literal["activation", "softmax"] = "activation",
    name: str = "",
) -> fx.Node:
    """A call in the place of a region that one value enters; what else it reads are constants.

    Args:
        module: What the graph belongs to.
        end: The node of the region that the rest of the graph reads.
        entry: The value that enters.
        region: The nodes to be replaced.
        family: What the whole is.
        name: What it is called, its last nonlinearity by default.
    """
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
    last = "square" if end.target is aten.mul.Tensor else op_name(end.target)
    name = family if family == "softmax" else name or (cores[-1] if cores else last)
    vanishes = family == "activation" and not constants and _vanishes(function)
    composed = Composed(function, name, vanishes, family)
    new = module.graph.call_function(composed, (entry, constants))
    new.meta = dict(end.meta)
    end.replace_all_uses_with(new)
    for old in sorted(region, reverse=True):
        if not old.users:
            module.graph.erase_node(old)
    return new


def _vanishes(function: fx.GraphModule) -> bool:
    """Whether f(0) = 0 and the slope there is finite, so that f(x) / x settles near 0."""
    x = torch.tensor([0.0, 1e-8, 1e-6], dtype=torch.float64)
    values: list[float] = function(x).tolist()
    first, second = values[1] / 1e-8, values[2] / 1e-6
    return values[0] == 0 and abs(first - second) <= 1e-3 * abs(first) + 1e-5
