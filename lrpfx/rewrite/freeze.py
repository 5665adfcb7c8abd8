"""What depends on parameters only -> computed once, for models whose parameters stay."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.ops import reachable


def freeze(module: fx.GraphModule) -> fx.GraphModule:
    """``conv(x, w * scale)`` -> ``conv(x, w')``: what no input enters is computed once.

    Folded batch norms, masks and tables of positions become buffers of the graph.
    """
    graph = module.graph
    constant = set[fx.Node]()
    for node in graph.nodes:
        is_op = isinstance(node.target, torch._ops.OpOverload)
        if node.op == "get_attr" or (is_op and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    # What is written into has to be made anew for each call.
    constant -= reachable(n for node in graph.nodes for n in written(node) if n in constant)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif node in constant and all(n in values for n in node.all_input_nodes):
            args, kwargs = (
                fx.node.map_arg(a, values.__getitem__) for a in (node.args, node.kwargs)
            )
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node in list(values):
        value = values[node]
        if node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if all(user in values for user in node.users):
            continue
        name = f"frozen_{node.name}"
        module.register_buffer(name, value.detach(), persistent=False)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an in-place op writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return [
        given
        for argument, given in zip(node.target._schema.arguments, node.args, strict=False)
        if argument.is_write and isinstance(given, fx.Node)
    ]
