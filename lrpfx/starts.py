"""Where relevance is wanted: floating inputs, and embeddings in the place of token ids."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.graph import is_floating, live_names, nodes_in

aten = torch.ops.aten


def find_starts(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes that relevance is wanted for, each with the placeholder it belongs to.

    Floating inputs are their own start. Integer inputs have none, but where they index an
    embedding, its output stands for them.
    """
    starts = {}
    for node in graph.nodes:
        if node.op == "placeholder" and is_floating(node.meta.get("val")):
            starts[node] = node
        elif node.target is aten.embedding.default:
            source = node.args[1]
            while (before := _step_before(source)) is not None:
                source = before
            if source.op == "placeholder" and isinstance(source.meta.get("val"), Tensor):
                starts[node] = source
    return starts


#: What may happen to token ids on the way to their embedding besides being moved.
_RENUMBERED = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.clamp.default}
_RENUMBERED |= {aten.clamp_min.default, aten.clamp_max.default, aten.remainder.Scalar}
_RENUMBERED |= {aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}
_RENUMBERED |= {aten.detach.default, aten.bitwise_and.Scalar}


def _step_before(node: fx.Node) -> fx.Node | None:
    """The one tensor whose values the node moves or renumbers, each by itself."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if node.op != "call_function" or len(tensors) != 1:
        return None
    return tensors[0] if node.target in _RENUMBERED or _moves(node, tensors) else None


def _moves(node: fx.Node, tensors: Container[fx.Node]) -> bool:
    op = ops.find(node.target, frozenset(live_names(node, tensors)))
    return op is not None and op.family == "move"


def index_places(module: fx.GraphModule, start: fx.Node, source: fx.Node) -> fx.GraphModule:
    """A graph that tells which of the token ids each vector of an embedding belongs to.

    Args:
        module: A canonized graph.
        start: The embedding.
        source: The placeholder of the token ids.

    Returns:
        A GraphModule that takes what ``module`` takes, flat, with the ids' own positions in the
        place of the ids, and returns the positions as they index the embedding.
    """
    graph = fx.Graph()
    copied = {n: graph.node_copy(n) for n in module.graph.nodes if n.op == "placeholder"}
    (index, *_) = nodes_in(start.args[1:])
    chain = [index]
    while chain[-1] is not source:
        before = _step_before(chain[-1])
        assert before is not None
        chain.append(before)
    for node in reversed(chain[:-1]):
        before = _step_before(node)
        assert before is not None
        if not _moves(node, [before]):
            copied[node] = copied[before]
            continue
        for size in node.all_input_nodes:  # sizes that may vary, of any input
            if size not in copied:
                copied[size] = graph.node_copy(size, copied.__getitem__)
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[chain[0]])
    return fx.GraphModule(module, graph)
