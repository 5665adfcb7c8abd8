"""Where a node stands: at the gates of a recurrent layer, beside attention, as a layer of tokens.

The same op needs another rule there, and so the default composite asks; see ``composites.Auto``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lrpfx.ops import LIFTED, Op, bound_arguments, explained_leaves, nodes_in, reachable
from lrpfx.plan.factors import find_gates, is_bounded

aten = torch.ops.aten

#: The nodes that carry relevance, each with what is known of it.
Known = Mapping[fx.Node, Op | str]


@dataclass(frozen=True)
class Places:
    """The nodes of a graph that stand at a place of their own.

    Args:
        recurrent: Gates of recurrent layers.
        attending: What some attention stands before or behind.
        tokenwise: Convolutions that are linear layers of tokens: patch embeddings, and pointwise
            ones of a transformer.
        preparing: Shifts and scales of an input's channels that its first layers read.
    """

    recurrent: set[fx.Node]
    attending: set[fx.Node]
    tokenwise: set[fx.Node]
    preparing: set[fx.Node]


def find_places(graph: fx.Graph, known: Known, starts: Iterable[fx.Node]) -> Places:
    """Where the nodes stand, by what they are computed from and what is computed from them.

    Args:
        graph: A canonized graph.
        known: See ``Known``.
        starts: The nodes that relevance is wanted for.
    """
    attending = _attending(graph, known)
    recurrent = _recurrent(graph, known)
    if not _leaves_a_way(graph, known, starts, recurrent):
        recurrent = set()
    tokenwise = _tokenwise(graph, known, attending)
    return Places(recurrent, attending, tokenwise, _preparing(graph, known, starts))


def _kind(node: fx.Node, known: Known) -> str:
    op = known.get(node)
    return op.kind if isinstance(op, Op) else ""


def _passes(node: fx.Node, known: Known, *kinds: str) -> bool:
    """Whether a node moves or normalises what it reads, picks an output, or is of ``kinds``."""
    op = known[node]
    return not isinstance(op, Op) or op.family in ("move", "normalize") or op.kind in kinds


# -- attention


def _attending(graph: fx.Graph, known: Known) -> set[fx.Node]:
    """What a softmax stands before or behind that a product of matrices stands before or behind."""
    matmuls = {node for node in known if _kind(node, known) == "matmul"}
    softmaxes = {node for node in known if _kind(node, known) in ("softmax", "entmax")}
    softmaxes &= _on_a_way(graph, known, matmuls)
    return _on_a_way(graph, known, softmaxes)


def _on_a_way(graph: fx.Graph, known: Known, through: set[fx.Node]) -> set[fx.Node]:
    """The nodes that some of ``through`` depend on, or that depend on some of them."""
    behind = set(through)
    for node in graph.nodes:
        if node in known and not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    before = reachable(through, lambda node: [n for n in node.all_input_nodes if n in known])
    return behind | before


def _tokenwise(graph: fx.Graph, known: Known, attending: set[fx.Node]) -> set[fx.Node]:
    """Patch embeddings, and pointwise convolutions that no wider one stands before or behind.

    A pointwise convolution among wider ones is a layer of a convolutional network.
    """
    convs = {node for node in known if _kind(node, known) == "conv"}
    patches = {n for n in convs & attending if _is_first(n, known) and _gives_tokens(n, known)}
    pointwise = {n for n in convs if all(size == 1 for size in _kernel(n))}
    near = _on_a_way(graph, known, convs - patches - pointwise)
    return patches | (pointwise & attending) - near


def _kernel(conv: fx.Node) -> Sequence[int | torch.SymInt]:
    weight = bound_arguments(conv)["weight"]
    return weight.meta["val"].shape[2:] if isinstance(weight, fx.Node) else ()


def _is_first(layer: fx.Node, known: Known) -> bool:
    """Whether no convolution or linear layer stands before a layer."""
    before = reachable([layer], lambda node: [n for n in node.all_input_nodes if n in known])
    return all(n is layer or _kind(n, known) not in ("conv", "linear") for n in before)


def _gives_tokens(conv: fx.Node, known: Known) -> bool:
    """Whether linear layers, and no others, read what a convolution makes, moved or normalised.

    An activation behind it, a pooling, or a further convolution says that it is a layer of a
    convolutional network.
    """
    found, stack = False, [conv]
    while stack:
        for user in (n for n in stack.pop().users if n in known):
            if _kind(user, known) in ("linear", "matmul"):
                found = True
            elif _passes(user, known, "scale", "shift"):
                stack.append(user)
            elif _kind(user, known) != "sum":  # what is added on the way is a block's own
                return False
    return found


# -- recurrent layers


def _recurrent(graph: fx.Graph, known: Known) -> set[fx.Node]:
    """The gates of recurrent layers: bounded ones, whose weights gate again what they have gated.

    However its steps are written, a recurrent layer multiplies its state by a gate at every step,
    and the weights behind the gates are the same at all of them; no gated MLP and no squeeze and
    excitation has that. Gates are also what the same weights make, by a sigmoid, of the same layer
    to scale a constant with, as the reset gate of a GRU does before there is a state; and those of
    PyTorch's own recurrent layers of a single step.
    """
    by_product = find_gates(known)
    gates = {gate for found in by_product.values() for gate in found if is_bounded(gate, known)}
    weights = {node: _weights(node, known) for node in known if is_bounded(node, known)}
    above: dict[fx.Node, frozenset[str]] = {}
    again: set[str] = set()
    for node in (n for n in graph.nodes if n in known):
        before = frozenset().union(*(above.get(n, ()) for n in node.all_input_nodes))
        own = frozenset().union(*(weights[n] for n in by_product.get(node, ()) if n in gates))
        again |= before & own
        above[node] = before | own
    return {
        node
        for node, made_by in weights.items()
        if (not again.isdisjoint(made_by) or _is_in_a_cell(node))
        and (node in gates or _only_scales_constants(node, known))
    }


def _weights(gate: fx.Node, known: Known) -> frozenset[str]:
    """The parameters of the layers next before an activation, through sums, norms and the like."""
    found, seen, stack = set[str](), {gate}, [n for n in gate.all_input_nodes if n in known]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        layer = _kind(node, known) in ("conv", "linear")
        if layer or _kind(node, known) in ("scale", "shift"):
            constants = reachable(n for n in node.all_input_nodes if n not in known)
            names = (str(n.target) for n in constants if n.op == "get_attr")
            found.update(name for name in names if not name.startswith(LIFTED))
        if not layer and _passes(node, known, "scale", "shift", "sum", "batch_norm"):
            stack += [n for n in node.all_input_nodes if n in known]
    return frozenset(found)


def _is_in_a_cell(node: fx.Node) -> bool:
    """Whether a node is part of a recurrent layer of PyTorch's own."""
    calls = (node.meta.get("nn_module_stack") or {}).values()
    return any(str(kind).startswith("torch.nn.modules.rnn.") for _, kind in calls)


def _only_scales_constants(node: fx.Node, known: Known) -> bool:
    """Whether all that reads a node, moved or shifted maybe, multiplies tensors by it."""
    users = [user for user in node.users if user in known]
    return bool(users) and all(
        (_kind(user, known) == "scale" and len(user.all_input_nodes) > 1)
        or (_passes(user, known, "scale", "shift") and _only_scales_constants(user, known))
        for user in users
    )


def _leaves_a_way(
    graph: fx.Graph, known: Known, starts: Iterable[fx.Node], stopped: Container[fx.Node]
) -> bool:
    """Whether an output depends on a start other than through what is stopped."""
    open_ = {node for node in starts if node in known}
    for node in graph.nodes:
        if node in known and node not in stopped and not open_.isdisjoint(node.all_input_nodes):
            open_.add(node)
    return not open_.isdisjoint(nodes_in(explained_leaves(graph)))


# -- inputs


def _preparing(graph: fx.Graph, known: Known, starts: Iterable[fx.Node]) -> set[fx.Node]:
    """What shifts or scales an input by channel before its first layers, by batch norm maybe.

    Before that an input may be moved, resized and clamped, or its logarithm taken.
    Tokens that are shifted by their positions are none, nor is an input without such a layer.
    """
    inputs = {node for node in starts if node.op == "placeholder"}
    before, found = set(inputs), set[fx.Node]()
    for node in graph.nodes:
        if node not in known or node in inputs or before.isdisjoint(node.all_input_nodes):
            continue
        changes = _kind(node, known) in ("shift", "scale", "batch_norm")
        if changes and _is_by_channel(node, known):
            found.add(node)
        elif not _prepares(node, known):
            continue
        before.add(node)
    layers = {n for n in known if _kind(n, known) in ("conv", "linear")}
    read = {n for layer in layers for n in layer.all_input_nodes} & before
    return found & reachable(read, lambda n: [] if n in inputs else n.all_input_nodes)


def _prepares(node: fx.Node, known: Known) -> bool:
    """Whether a node moves, resizes or limits an image, or is the logarithm of a spectrum."""
    passes = _passes(node, known, "pad", "interpolate", "avg_pool", "clamp", "hardtanh", "log")
    return passes and not _kind(node, known).endswith("norm")


def _is_by_channel(node: fx.Node, known: Known) -> bool:
    """Whether a shift or scale has one number for each channel, or one for all."""
    if _kind(node, known) == "batch_norm":
        return True
    (x,) = (n for n in node.all_input_nodes if n in known)
    alike = str(x.meta["val"].shape) == str(node.meta["val"].shape)
    constants = [n for n in node.all_input_nodes if n is not x]
    return alike and all(len(_varying(n)) <= 1 for n in constants)


#: What fills a tensor with one number; what repeats it along new dimensions, or those of one.
_FILLED = {aten.full.default, aten.zeros.default, aten.ones.default}
_FILLED |= {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}
_FILLED |= {aten.new_full.default, aten.new_zeros.default, aten.new_ones.default}
_REPEATED = {aten.expand.default, aten.expand_as.default, aten.repeat.default}
_REPEATED |= {aten.broadcast_to.default}


def _varying(node: fx.Node) -> set[int]:
    """Along which dimensions, from the last on, a constant varies, as far as its ops tell."""
    value, inputs = node.meta.get("val"), node.all_input_nodes
    if not isinstance(value, Tensor) or node.target in _FILLED:
        return set()
    wide = {d for d in range(-value.ndim, 0) if value.shape[d] != 1}
    shapes = [str(getattr(n.meta["val"], "shape", "")) for n in inputs]
    copies = shapes == [str(value.shape)]
    if node.target in _REPEATED:
        return _varying(inputs[0])
    if copies or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return wide & set().union(*map(_varying, inputs))
    return wide
