"""One weight of a softmax of two -> the sigmoid of their difference."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.final import SOFTMAXES
from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import Measured, alike, close
from lrpfx.canonize.softmaxes.normalized import NORMALISER
from lrpfx.canonize.whole import sources
from lrpfx.canonize.writes import SPLITS
from lrpfx.ops import HELD, Composed, bound_arguments, varying

aten = torch.ops.aten


def gates_of_two(module: fx.GraphModule) -> fx.GraphModule:
    """``softmax(stack([a, b]), -1)[..., 0]`` -> ``sigmoid(a - b)``, if the other is not read.

    Then it gates, and is no mean of several. A softmax keeps a part of the relevance of its
    weights to itself, which a sigmoid does not.
    """
    graph, measured = module.graph, Measured(module)
    softmaxes = [n for n in graph.nodes if _is_softmax(n)]
    if not softmaxes:
        return module
    live, found = varying(graph), False
    products = [n for n in graph.nodes if n.target is aten.mul.Tensor and n in live]
    factors = {n for node in products for n in sources(node.all_input_nodes, live)}
    for node in sorted(factors.intersection(softmaxes)):
        picks = _picks(node)
        if picks is None or len({place for _, place in picks}) != 1:
            continue
        total = _total(node, picks[0][1][0], measured)
        if total is None:
            continue
        for pick, (dim, index) in picks:
            with graph.inserting_before(pick):
                new = _gate(pick, node, dim, index)
                if not close(total, torch.ones_like(total)):
                    new = insert(pick, aten.mul.Tensor, (new, _held_total(pick, node, dim)))
            pick.replace_all_uses_with(new)
            found = True
    if found:
        graph.eliminate_dead_code()
    return module


def _is_softmax(node: fx.Node) -> bool:
    if isinstance(node.target, Composed):
        return node.target.family == "softmax" and alike(node, node.all_input_nodes[0])
    return node.target in SOFTMAXES


def _total(softmax: fx.Node, dim: int, measured: Measured) -> Tensor | None:
    """What the weights add up to, as these are divided later maybe; None if they are none."""

    def total() -> Tensor:
        weights: Tensor = measured.value(softmax)
        return weights.sum(dim, keepdim=True)

    x: Any = softmax.args[0]
    return total() if measured.equals(softmax, lambda x: x.softmax(dim) * total(), x) else None


def _gate(pick: fx.Node, softmax: fx.Node, dim: int, index: int) -> fx.Node:
    """The sigmoid; at the insert point, as what follows."""
    x: Any = softmax.args[0]
    one, other = (insert(pick, aten.select.int, (x, dim, i)) for i in (index, 1 - index))
    difference = insert(pick, aten.sub.Tensor, (one, other))
    if pick.meta["val"].ndim == x.meta["val"].ndim:
        difference = insert(pick, aten.unsqueeze.default, (difference, dim))
    return insert(pick, aten.sigmoid.default, (difference,))


def _held_total(pick: fx.Node, softmax: fx.Node, dim: int) -> fx.Node:
    keep = pick.meta["val"].ndim == softmax.meta["val"].ndim
    total = insert(pick, aten.sum.dim_IntList, (softmax, [dim], keep))
    held = insert(pick, aten.alias.default, (total,))
    held.meta[HELD] = NORMALISER
    return held


Place = tuple[int, int]


def _picks(softmax: fx.Node) -> list[tuple[fx.Node, Place]] | None:
    """What reads a softmax, and which of two entries along which dimension; None if more."""
    found: list[tuple[fx.Node, Place]] = []
    shape = softmax.meta["val"].shape
    for user in softmax.users:
        if user.target in SPLITS:
            arguments = bound_arguments(user)
            dim, parts = arguments["dim"] % len(shape), user.meta["val"]
            getitems = [n for n in user.users if n.target is operator.getitem]
            if shape[dim] != 2 or len(parts) != 2 or len(getitems) != len(user.users):
                return None
            found += [(n, (dim, int(n.args[1]))) for n in getitems]  # type: ignore[arg-type]
        elif user.target in (aten.select.int, aten.slice.Tensor, aten.narrow.default):
            place = _place(user, shape)
            if place is None:
                return None
            found.append((user, place))
        else:
            return None
    return found


def _place(pick: fx.Node, shape: Any) -> Place | None:
    arguments = bound_arguments(pick)
    dim = arguments["dim"] % len(shape)
    first = arguments["index"] if "index" in arguments else arguments["start"]
    one = pick.target is aten.select.int or pick.meta["val"].shape[dim] == 1
    if not isinstance(shape[dim], int) or shape[dim] != 2 or not one:
        return None
    return (dim, (first or 0) % 2) if isinstance(first, int) or first is None else None
