"""Where relevance is wanted: floating inputs, and embeddings in the place of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Container

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.capture import is_explained
from lrpfx.ops import HELD, live_names, reachable, varying

aten = torch.ops.aten


def find_starts(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes that relevance is wanted for, each with the placeholder it belongs to.

    Floating inputs are their own start. Integer inputs have none, but where they index an
    embedding, its output stands for them; also if they have been moved or renumbered before.
    Inputs that are held, as ``wrt=`` leaves them out, have none.
    """
    changing = varying(graph)
    starts = {}
    for node in graph.nodes:
        if node.op == "placeholder" and HELD in node.meta:
            continue
        if node.op == "placeholder" and is_explained(node.meta.get("val")):
            starts[node] = node
        elif node.target is aten.embedding.default:
            source = _path(node, changing)[-1]
            known = source.op == "placeholder" and HELD not in source.meta
            if known and isinstance(source.meta.get("val"), Tensor):
                starts[node] = source
    return starts


def unplaced(graph: fx.Graph, starts: Container[fx.Node]) -> list[fx.Node]:
    """Embeddings of what is computed from the inputs, but not entry by entry from one of them."""
    changing = varying(graph)
    embeddings = [n for n in graph.nodes if n.target is aten.embedding.default]
    unknown = [n for n in embeddings if n.args[1] in changing and n not in starts]
    return [n for n in unknown if any(is_open(source) for source in reachable([n]))]


def is_open(node: fx.Node) -> bool:
    """Whether a node is an input that is not left out by ``wrt=``."""
    return node.op == "placeholder" and HELD not in node.meta


def _path(embedding: fx.Node, changing: Container[fx.Node]) -> list[fx.Node]:
    """From the index of an embedding back to where it comes from, step by step."""
    index = embedding.args[1]
    assert isinstance(index, fx.Node)
    path = [index]
    while (before := _step_before(path[-1], changing)) is not None:
        path.append(before)
    return path


def _step_before(node: fx.Node, changing: Container[fx.Node]) -> fx.Node | None:
    """The tensor whose entries the node moves, or computes its own from one by one."""
    if (renumbered := _renumbered(node, changing)) is not None:
        return renumbered
    inputs = _inputs(node, changing)
    return inputs[0] if len(inputs) == 1 and _moves(node, inputs) else None


def _inputs(node: fx.Node, changing: Container[fx.Node]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n in changing]


#: Elementwise ops that PyTorch has no such tag for.
_POINTWISE = {aten.floor_divide.default, aten.floor_divide.Scalar, aten.detach.default}
_POINTWISE |= {aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Tensor}
_POINTWISE |= {aten.to.dtype, aten._to_copy.default}


def _renumbered(node: fx.Node, changing: Container[fx.Node]) -> fx.Node | None:
    """The one tensor of the node's shape that it is computed from elementwise, if there is one.

    ``where(ids < 0, 0, ids)``, for instance, is so from ids.
    """
    shape = node.meta["val"].shape
    frontier = {node}
    while frontier:
        last = max(frontier)
        if last.meta["val"].shape != shape:
            return None
        if len(frontier) == 1 and last is not node:
            return last
        tags = getattr(last.target, "tags", ())
        if torch.Tag.pointwise not in tags and last.target not in _POINTWISE:
            return None
        frontier = (frontier - {last}).union(_inputs(last, changing))
    return None


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
        place of the ids, and returns the positions as they index the embedding. Ids that the
        model puts in between, as padding does, stay what they are.
    """
    changing = varying(module.graph)
    graph = fx.Graph()
    copied = {n: graph.node_copy(n) for n in module.graph.nodes if n.op == "placeholder"}

    def copy(node: fx.Node) -> fx.Node:
        for n in node.all_input_nodes:  # sizes that may vary, and constants
            if n not in copied:
                copied[n] = copy(n)
        return graph.node_copy(node, copied.__getitem__)

    path = _path(start, changing)
    for before, node in itertools.pairwise(reversed(path)):
        place = copied[before]
        copied[node] = place if _renumbered(node, changing) is before else copy(node)
    graph.output(copied[path[0]])
    return fx.GraphModule(module, graph)
