"""plan -> GraphModule: the graph with its twins, for users and as ``explain`` runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from lrpfx.canonize import BatchStatistics, batch_statistics
from lrpfx.ops import explained_leaves, nodes_in, output_leaves
from lrpfx.plan import Assignment
from lrpfx.rewrite.freeze import freeze
from lrpfx.rewrite.masks import UNCHANGED, Edits
from lrpfx.rewrite.shortcuts import FastStreams
from lrpfx.rewrite.statistics import Follows, Running
from lrpfx.rewrite.streams import Streams
from lrpfx.rewrite.twins import Join


@dataclass(frozen=True)
class Tap:
    """A place whose activation and relevance are returned beside the output.

    Args:
        activation: Node whose clean value is returned.
        relevance: Node whose phantom is returned.
    """

    activation: fx.Node
    relevance: fx.Node


def rewrite(
    module: fx.GraphModule,
    plan: Mapping[str, Assignment],
    live: set[fx.Node],
    running: Sequence[Running] = (),
    prefix: str = "",
) -> fx.GraphModule:
    """The canonized graph with its twins: forward is the model's, backward is relevance.

    Args:
        module: A canonized, annotated graph.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        running: The buffers that follow batch norms of training mode.
        prefix: What stands before their names in the graph.

    Returns:
        A GraphModule that takes what the model takes, returns what it returns (a dict for a
        dataclass), and whose ordinary backward puts relevance into the inputs' ``.grad``.
    """
    graph = fx.Graph()
    graph.set_codegen(copy.copy(module.graph._codegen))
    leaves, explained = output_leaves(module.graph), explained_leaves(module.graph)
    own = [n for n in live if n.op == "placeholder"]
    streams = Streams(graph, plan, live, {}, own)
    found = batch_statistics(module.graph)
    streams.run(module.graph, nodes_in([*leaves, *explained, *((s.mean, s.var) for s in found)]))

    def joined(node: fx.Node, explained: fx.Node) -> fx.Node:
        clean = streams.clean[node]
        if explained not in streams.phantoms:
            return clean
        join = Join(f"output_{node.name}", arity=1, reads_output=False)
        return streams.beside(join, clean, [streams.phantoms[explained]])

    pairs = zip(leaves, explained, strict=True)
    outputs = tuple(joined(n, e) if isinstance(n, fx.Node) else n for n, e in pairs)
    for number, (one, statistics) in enumerate(zip(running, found, strict=True)):
        module.add_module(f"follows_{number}", Follows(one))
        names = [prefix + name for name in (*one.buffers, one.batches) if name]
        values = _values(graph, statistics, streams.clean.__getitem__)
        graph.call_module(f"follows_{number}", (values, [graph.get_attr(n) for n in names]))
    graph.output(outputs)
    _ask_for_sizes(graph)
    return _finish(module, graph, fx.GraphModule)


def instrument(
    module: fx.GraphModule,
    plan: Mapping[str, Assignment],
    live: set[fx.Node],
    starts: Sequence[fx.Node],
    taps: Sequence[Tap] = (),
    *,
    edits: Edits = UNCHANGED,
    fast: bool = False,
    frozen: bool = False,
    fused: bool = True,
) -> fx.GraphModule:
    """The graph as ``explain`` runs it, with the two streams apart.

    Args:
        module: A canonized, annotated graph.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        starts: Nodes whose relevance is wanted.
        taps: Further places whose relevance and activation are wanted.
        edits: What conditions change.
        fast: Let edges carry multipliers where they can. Then no ledger is kept, and the relevance
            has no derivatives; its values are the same up to round-off.
        frozen: With ``fast``: the parameters stay as they are, and what depends on them only is
            computed once.
        fused: With ``fast``: whether attention may be run by a fused kernel.

    Returns:
        A GraphModule that takes the flat inputs and a ledger (or None), and returns lists: clean
        output leaves, the clean leaves that are explained (logits for probabilities), their
        phantoms (None where no relevance can start), the phantoms of the starts (None where no
        output depends on it), (activation, phantom, phantom behind the masks) per tap, the weights
        of the masks and of the gates, (activation, phantom) of where the edits begin, and what
        batch norms of training mode find: mean, variance and number of elements.
    """
    graph = fx.Graph()
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    copied = {n: graph.node_copy(n) for n in inputs}
    names, name = {n.name for n in inputs}, "ledger"
    while name in names:  # an argument of the model's own may be called that
        name += "_"
    ledger = graph.placeholder(name)
    leaves, explained = output_leaves(module.graph), explained_leaves(module.graph)
    streams: Streams
    if fast:
        tapped = {node for tap in taps for node in (tap.relevance, tap.activation)}
        tapped |= edits.touched
        streams = FastStreams(
            module.graph, graph, plan, live, copied, starts, tapped, frozen, fused, edits
        )
    else:
        streams = Streams(graph, plan, live, copied, ledger=ledger, edits=edits)
    found = batch_statistics(module.graph)
    ends = nodes_in([*leaves, *explained, *((s.mean, s.var) for s in found)])
    streams.run(module.graph, [*ends, *(tap.activation for tap in taps)])
    clean, phantoms = streams.result, streams.phantoms
    begun = [
        streams.seeded.get(n, phantoms.get(n)) if isinstance(n, fx.Node) else None
        for n in explained
    ]
    begin = [] if edits.begin is None else [(clean(edits.begin), phantoms[edits.begin])]
    graph.output(
        (
            [clean(n) if isinstance(n, fx.Node) else n for n in leaves],
            [clean(n) if isinstance(n, fx.Node) else n for n in explained],
            begun,
            [streams.own_phantom(n) for n in starts],
            [
                (clean(t.activation), phantoms[t.relevance], streams.own_phantom(t.relevance))
                for t in taps
            ],
            *streams.conditions.weights(),
            begin,
            [_values(graph, statistics, clean) for statistics in found],
        )
    )
    finished = _finish(module, graph, _LazyGraphModule)  # its code may never be run
    return freeze(finished) if frozen and fast else finished


def _ask_for_sizes(graph: fx.Graph) -> None:
    """``sym_size(x, 0)`` -> ``x.size(0)``, which transforms such as ``vmap`` know."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target is torch.ops.aten.sym_numel.default:
            node.op, node.target = "call_method", "numel"


def _values(
    graph: fx.Graph, found: BatchStatistics, clean: Callable[[fx.Node], fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Mean and variance of a batch, and the number of elements that they are of."""
    measured = clean(found.mean.all_input_nodes[0])
    count = graph.call_function(torch.ops.aten.sym_numel.default, (measured,))
    return clean(found.mean), clean(found.var), count


def _finish(module: fx.GraphModule, graph: fx.Graph, kind: type[fx.GraphModule]) -> fx.GraphModule:
    graph.owning_module = module  # which knows the modules that are called for what they do
    graph.eliminate_dead_code()  # which lints it, too
    rewritten = _unpicklable(kind(module, graph))
    rewritten.train(module.training)
    return rewritten


def _unpicklable(module: fx.GraphModule) -> fx.GraphModule:
    """The module with pickling refused, for its copies too.

    fx gives every GraphModule a class of its own, and pickles its code without what that calls.
    """

    def refuse(self: fx.GraphModule, *protocol: Any) -> Any:
        raise TypeError(
            "a rewritten graph cannot be pickled: the rules would be lost on loading. "
            "Save the model, and make the Explainer again from it."
        )

    def copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
        return _unpicklable(fx.GraphModule.__deepcopy__(self, memo))

    type(module).__reduce_ex__ = refuse  # type: ignore[method-assign,assignment]
    type(module).__deepcopy__ = copied  # type: ignore[method-assign]
    return module
