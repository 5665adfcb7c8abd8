"""Recurrent layers and cells -> the ops of their steps; one step is traced, the rest are copies."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from lrpfx.canonize.insert import insert
from lrpfx.capture import AUTOCAST
from lrpfx.errors import CaptureError
from lrpfx.ops import bound_arguments, source_line

aten = torch.ops.aten

_States = tuple[fx.Node, ...]


class _Weights(NamedTuple):
    """Of one layer in one direction; biases and the projection of the state are optional."""

    w_ih: fx.Node
    w_hh: fx.Node
    b_ih: fx.Node | None
    b_hh: fx.Node | None
    w_hr: fx.Node | None


@dataclass(frozen=True)
class _Writer:
    """Writes ops in the place of a node, where the graph inserts."""

    like: fx.Node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        return insert(self.like, target, args)

    def linear(self, *args: fx.Node | None) -> fx.Node:
        """``W x + b``; as autocast has it, if the layer was run under it."""
        dtype = self.like.meta.get(AUTOCAST)
        if dtype is not None:
            args = tuple(None if n is None else self(aten.to.dtype, n, dtype) for n in args)
        return self(aten.linear.default, *args)

    def parts(self, x: fx.Node, number: int) -> list[fx.Node]:
        """Equal parts along the last dimension."""
        value = x.meta["val"]
        split = self(aten.split.Tensor, x, value.shape[-1] // number, value.ndim - 1)
        return [self(operator.getitem, split, i) for i in range(number)]


def _lstm(write: _Writer, a: fx.Node, states: _States, weights: _Weights) -> _States:
    """``i, f, g, o = U h + a; c = f c + i g; h = o tanh(c)``, of what the input gives: ``a``."""
    h, c = states
    gates = write(aten.add.Tensor, write.linear(h, weights.w_hh, weights.b_hh), a)
    parts = write.parts(gates, 4)
    i, f = (write(aten.sigmoid.default, part) for part in parts[:2])
    g, o = write(aten.tanh.default, parts[2]), write(aten.sigmoid.default, parts[3])
    kept, new = write(aten.mul.Tensor, f, c), write(aten.mul.Tensor, i, g)
    c = write(aten.add.Tensor, kept, new)
    h = write(aten.mul.Tensor, o, write(aten.tanh.default, c))
    if weights.w_hr is not None:
        h = write.linear(h, weights.w_hr)
    return h, c


def _gru(write: _Writer, a: fx.Node, states: _States, weights: _Weights) -> _States:
    """``r, z = sigmoid(U h + a); n = tanh(a_n + r U_n h); h = (h - n) z + n``."""
    (h,) = states
    own = write.parts(a, 3)
    past = write.parts(write.linear(h, weights.w_hh, weights.b_hh), 3)
    r, z = (
        write(aten.sigmoid.default, write(aten.add.Tensor, there, here))
        for there, here in zip(past[:2], own[:2], strict=True)
    )
    through = write(aten.mul.Tensor, past[2], r)
    n = write(aten.tanh.default, write(aten.add.Tensor, own[2], through))
    kept = write(aten.mul.Tensor, write(aten.sub.Tensor, h, n), z)
    return (write(aten.add.Tensor, kept, n),)


def _elman(function: Any) -> Callable[..., _States]:
    def step(write: _Writer, a: fx.Node, states: _States, weights: _Weights) -> _States:
        """``h = f(U h + a)``."""
        past = write.linear(states[0], weights.w_hh, weights.b_hh)
        return (write(function, write(aten.add.Tensor, past, a)),)

    return step


_STEPS: dict[Any, Callable[..., _States]] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _gru,
    aten.rnn_tanh.input: _elman(aten.tanh.default),
    aten.rnn_relu.input: _elman(aten.relu.default),
    aten.lstm_cell.default: _lstm,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh_cell.default: _elman(aten.tanh.default),
    aten.rnn_relu_cell.default: _elman(aten.relu.default),
}
#: What ``open_recurrent`` opens.
RECURRENT = frozenset(_STEPS)


def open_recurrent(module: fx.GraphModule) -> fx.GraphModule:
    """``lstm(x, (h, c), weights)`` -> its steps, and so of all recurrent layers and cells.

    Source: the equations of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.
    """
    for node in [n for n in module.graph.nodes if n.target in RECURRENT]:
        with module.graph.inserting_before(node):
            results = _cell(node) if "cell" in str(node.target) else _layers(node)
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        module.graph.erase_node(node)
    return module


def _cell(node: fx.Node) -> fx.Node | _States:
    write, bound = _Writer(node), bound_arguments(node)
    hx = bound["hx"]
    states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    b_ih, b_hh = bound.get("b_ih"), bound.get("b_hh")
    weights = _Weights(bound["w_ih"], bound["w_hh"], b_ih, b_hh, None)
    a = write.linear(bound["input"], weights.w_ih, weights.b_ih)
    new = _STEPS[node.target](write, a, states, weights)
    return new if len(new) > 1 else new[0]


def _layers(node: fx.Node) -> _States:
    """The output, and the last of each state: of all layers, one after the other."""
    write, bound = _Writer(node), bound_arguments(node)
    x, hx = bound["input"], bound["hx"]
    starts = [write(aten.unbind.int, h) for h in (hx if isinstance(hx, (tuple, list)) else (hx,))]
    directions = 2 if bound["bidirectional"] else 1
    params, number = bound["params"], bound["num_layers"] * directions
    each = len(params) // number
    if bound["batch_first"]:
        x = write(aten.transpose.int, x, 0, 1)
    ends: list[_States] = []
    for layer in range(bound["num_layers"]):
        outputs = []
        for reverse in range(directions):
            k = directions * layer + reverse
            weights = _weights(params[each * k : each * (k + 1)], bound["has_biases"])
            states = tuple(write(operator.getitem, start, k) for start in starts)
            output, end = _steps(write, x, states, weights, bool(reverse))
            outputs.append(output)
            ends.append(end)
        x = write(aten.cat.default, outputs, 2) if len(outputs) > 1 else outputs[0]
    if bound["batch_first"]:
        x = write(aten.transpose.int, x, 0, 1)
    return x, *(write(aten.stack.default, list(last)) for last in zip(*ends, strict=True))


def _weights(params: Sequence[fx.Node], has_biases: bool) -> _Weights:
    w_ih, w_hh, *rest = params
    b_ih, b_hh = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
    return _Weights(w_ih, w_hh, b_ih, b_hh, rest[0] if rest else None)


def _steps(
    write: _Writer, x: fx.Node, states: _States, weights: _Weights, reverse: bool
) -> tuple[fx.Node, _States]:
    """One layer in one direction: its output (T, N, H), and its last states (N, H)."""
    number = x.meta["val"].shape[0]
    if not isinstance(number, int):
        raise CaptureError(
            "a recurrent layer is opened step by step, and its number of steps is left open.",
            where=[source_line(write.like)],
            fix="leave the dimension of time out of dynamic=, and make an Explainer per length.",
        )
    step = _STEPS[write.like.target]
    a = write.linear(x, weights.w_ih, weights.b_ih)
    steps = write(aten.unbind.int, a)
    at = [write(operator.getitem, steps, t) for t in range(number)]
    if reverse:
        at.reverse()
    states = tuple(write(aten.unsqueeze.default, state, 0) for state in states)
    graph, before = write.like.graph, set(write.like.graph.nodes)
    first = now = step(write, at[0], states, weights)
    traced = [n for n in graph.nodes if n not in before]
    outputs = [now[0]]
    for own in at[1:]:
        other: dict[fx.Node, fx.Node] = {at[0]: own, **dict(zip(states, now, strict=True))}
        for n in traced:
            other[n] = graph.node_copy(n, functools.partial(_other, other))
        now = tuple(other[n] for n in first)
        outputs.append(now[0])
    if reverse:
        outputs.reverse()
    ends = tuple(write(aten.squeeze.dim, state, 0) for state in now)
    return write(aten.cat.default, outputs), ends


def _other(others: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return others.get(node, node)
