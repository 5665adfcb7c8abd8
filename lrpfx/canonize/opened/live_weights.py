"""Layers whose parameters depend on the input -> the layer without them, and plain arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx.canonize.writer import Writer

aten = torch.ops.aten


def layer(op: Writer, input: Any, weight: Any, bias: Any, **rest: Any) -> fx.Node | None:
    """``conv(x, w, b)`` -> ``conv(x, w) + b``, where w or b is live; so of linear layers."""
    if bias is None or not op.changes(weight, bias):
        return None
    target: Any = op.node.target
    return _layer(op, target, input, weight, bias, *rest.values())


_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


def convolution(op: Writer, input: Any, weight: Any, bias: Any, **rest: Any) -> fx.Node:
    """``convolution(x, w, b, ...)`` -> the one of its number of dimensions."""
    n = weight.meta["val"].ndim - 2
    stride, padding, dilation = (rest[name] for name in ("stride", "padding", "dilation"))
    groups = rest["groups"]
    if rest["transposed"]:
        last = rest["output_padding"], groups, dilation
        return _layer(op, _TRANSPOSED[n], input, weight, bias, stride, padding, *last)
    return _layer(op, _PLAIN[n], input, weight, bias, stride, padding, dilation, groups)


def _layer(op: Writer, target: Any, input: Any, weight: Any, bias: Any, *rest: Any) -> fx.Node:
    """The layer, with the bias by itself where it or the weight is live."""
    if bias is None or not op.changes(weight, bias):
        return op(target, input, weight, bias, *rest)
    images = weight.meta["val"].ndim - 2
    shift = op(aten.reshape.default, bias, [-1] + [1] * images) if images else bias
    return op.sum(op(target, input, weight, None, *rest), shift)


def convolution_of_sequences(op: Writer, self: Any, weight: Any, bias: Any, pad: int) -> fx.Node:
    """``conv_tbc(x, w, b)`` -> a convolution of x with time last."""
    x = op(aten.permute.default, self, [1, 2, 0])
    kernel = op(aten.permute.default, weight, [2, 1, 0])
    out = _layer(op, aten.conv1d.default, x, kernel, bias, [1], [pad])
    return op(aten.permute.default, out, [2, 0, 1])


def norm_of_channels(op: Writer, input: Any, **rest: Any) -> fx.Node | None:
    """``batch_norm(x, w, b)`` -> ``batch_norm(x) * w + b``, and of groups and instances."""
    form = [1, -1] + [1] * (input.meta["val"].ndim - 2)
    return _norm(op, input, rest, form)


def norm_of_features(op: Writer, input: Any, **rest: Any) -> fx.Node | None:
    """``layer_norm(x, w, b)`` -> ``layer_norm(x) * w + b``."""
    return _norm(op, input, rest, None)


def _norm(op: Writer, input: Any, rest: dict[str, Any], form: list[int] | None) -> fx.Node | None:
    weight, bias = rest["weight"], rest.get("bias")
    if not op.changes(weight, bias):
        return None
    plain = {k: None if k in ("weight", "bias") else v for k, v in rest.items()}
    out = op(op.node.target, input, *plain.values())
    if weight is not None:
        out = op.mul(out, weight if form is None else op(aten.reshape.default, weight, form))
    if bias is not None:
        out = op.sum(out, bias if form is None else op(aten.reshape.default, bias, form))
    return out


def prelu(op: Writer, self: Any, weight: Any) -> fx.Node | None:
    """``prelu(x, w)`` -> ``relu(x) + w * -relu(-x)``, where w is live."""
    if not op.changes(weight):
        return None
    below = op(aten.neg.default, op(aten.relu.default, op(aten.neg.default, self)))
    rank = self.meta["val"].ndim
    if rank > 1:
        weight = op(aten.reshape.default, weight, [1, -1] + [1] * (rank - 2))
    return op.sum(op(aten.relu.default, self), op.mul(below, weight))
