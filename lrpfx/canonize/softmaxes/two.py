"""One weight of a softmax of two -> the sigmoid of their difference."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.final import SOFTMAXES
from lrpfx.canonize.insert import insert
from lrpfx.canonize.measure import Measured, alike
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
    for node in factors.intersection(softmaxes):
        picks = _picks(node)
        if picks is None or len({place for _, place in picks}) != 1:
            continue
        x: Any = node.args[0]
        ends = [(end, place) for pick, place in picks for end in (pick, *_quotients(pick))]
        for pick, (dim, index) in ends:
            if not measured.equals(pick, partial(_gate, dim=dim, index=index, like=pick), x):
                continue
            with graph.inserting_before(pick):
                one, other = (
                    insert(pick, aten.select.int, (x, dim, i)) for i in (index, 1 - index)
                )
                difference = insert(pick, aten.sub.Tensor, (one, other))
                if pick.meta["val"].ndim == x.meta["val"].ndim:
                    difference = insert(pick, aten.unsqueeze.default, (difference, dim))
                new = insert(pick, aten.sigmoid.default, (difference,))
            pick.replace_all_uses_with(new)
            found = True
    if found:
        graph.eliminate_dead_code()
    return module


def _is_softmax(node: fx.Node) -> bool:
    if isinstance(node.target, Composed):
        return node.target.family == "softmax" and alike(node, node.all_input_nodes[0])
    return node.target in SOFTMAXES


def _quotients(pick: fx.Node) -> list[fx.Node]:
    """What is divided by a normaliser later."""
    own = (n for n in pick.users if n.target is aten.div.Tensor and n.args[0] is pick)
    return [n for n in own if all(HELD in d.meta for d in n.all_input_nodes[1:])]


def _gate(x: Tensor, dim: int, index: int, like: fx.Node) -> Tensor:
    gate = (x.select(dim, index) - x.select(dim, 1 - index)).sigmoid()
    return gate.unsqueeze(dim) if like.meta["val"].ndim == x.ndim else gate


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
