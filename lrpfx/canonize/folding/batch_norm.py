"""Batch norm of training mode -> batch norm by the statistics of the batch, which are constants.

They are computed in the graph from the activations, so that derivatives of relevance run through
them; relevance does not.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.folding.commute import batch_norm_constants
from lrpfx.canonize.insert import insert
from lrpfx.ops import BATCH, HALVES, HELD, bound_arguments, reachable

aten = torch.ops.aten

#: Why the statistics are held.
OF_BATCH = "statistic of the batch"


@dataclass(frozen=True)
class BatchStatistics:
    """What a batch norm of training mode finds in a batch, and the buffers that follow it.

    Args:
        mean: Node of the mean of each channel.
        var: Node of its biased variance.
        buffers: Names of the running mean and variance, "" where there are none.
        momentum: Of the running ones.
    """

    mean: fx.Node
    var: fx.Node
    buffers: tuple[str, str]
    momentum: float


def is_of_batch(node: fx.Node) -> bool:
    """Whether a node is a batch norm that uses the statistics of the batch, of what varies."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _uses_batch(node):
        return False
    return any(n.op == "placeholder" for n in reachable([node]))


def _uses_batch(node: fx.Node) -> bool:
    if node.target is aten.batch_norm.default:
        arguments = bound_arguments(node)
        return bool(arguments["training"]) or arguments["running_mean"] is None
    native = "native_batch_norm" in node.target._schema.name  # type: ignore[union-attr]
    return native and node.target is not aten._native_batch_norm_legit_no_training.default


def hold_batch_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """``batch_norm(x, training)`` -> ``batch_norm(x, mean(x), var(x))``, both held."""
    for number, node in enumerate([n for n in module.graph.nodes if is_of_batch(n)]):
        a = bound_arguments(node)
        names = _buffer(a.get("running_mean"), 3), _buffer(a.get("running_var"), 4)
        x = a["input"]
        with module.graph.inserting_before(node):
            source, dims = x, [d for d in range(x.meta["val"].ndim) if d != 1]
            if x.meta["val"].dtype in HALVES:
                source = insert(node, aten.to.dtype, (x, torch.float32))
            mean = insert(node, aten.mean.dim, (source, dims))
            var = insert(node, aten.var.correction, (source, dims), {"correction": 0})
            for part in (source, mean, var):
                if part is not x:
                    part.meta[HELD] = OF_BATCH
            for what, part in (("mean", mean), ("var", var)):
                part.meta[BATCH] = (number, what, names, a["momentum"])
            args = (x, a["weight"], a["bias"], mean, var, False, 0.0, a["eps"], False)
            new = insert(node, aten.batch_norm.default, args)
        _replace(node, new)
    return module


def _replace(node: fx.Node, new: fx.Node) -> None:
    """``new`` in the place of a batch norm, or of its first result."""
    if node.target is aten.batch_norm.default:
        node.replace_all_uses_with(new)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(new)
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _buffer(node: Any, place: int) -> str:
    """The name of a running statistic, which an earlier call may have returned anew."""
    while isinstance(node, fx.Node) and node.target is operator.getitem:
        native: Any = node.args[0]
        node = bound_arguments(native)["running_mean" if place == 3 else "running_var"]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def write_out_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """``batch_norm(x, w, b, mean(x), var(x))`` -> ``batch_norm(x, w', b', 0, 1)``, if it is left.

    PyTorch's own has no derivatives by the statistics that it is given.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        a = bound_arguments(node)
        if a["running_mean"] is None or BATCH not in a["running_mean"].meta:
            continue
        with module.graph.inserting_before(node):
            scale, shift = batch_norm_constants(node)
            zeros = insert(node, aten.zeros_like.default, (scale,))
            ones = insert(node, aten.ones_like.default, (scale,))
        node.args = (a["input"], scale, shift, zeros, ones, False, 0.0, 0.0, False)
        node.kwargs = {}
    return module


def batch_statistics(graph: fx.Graph) -> list[BatchStatistics]:
    """What the batch norms of training mode find, in the order of their calls."""
    return list(_found(graph))


def _found(graph: fx.Graph) -> Iterator[BatchStatistics]:
    parts: dict[int, dict[str, fx.Node]] = {}
    for node in graph.nodes:
        if BATCH in node.meta:
            number, what, *_ = node.meta[BATCH]
            parts.setdefault(number, {})[what] = node
    for number in sorted(parts):
        nodes = parts[number]
        *_, names, momentum = nodes["mean"].meta[BATCH]
        yield BatchStatistics(nodes["mean"], nodes["var"], names, momentum)
