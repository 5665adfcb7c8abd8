"""Batch norm -> part of the affine op before or after it, by data flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lrpfx.functionalize import insert
from lrpfx.graph import bound_arguments, module_calls

aten = torch.ops.aten

_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_CONVS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
_TRANSPOSED |= {aten.conv_transpose3d.input}
_AFFINE = _CONVS | _TRANSPOSED | {aten.linear.default}


def fold_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """``bn(conv(x, W, b))`` -> ``conv(x, W', b')``, and ``conv(bn(x), W, b)`` where exact.

    W' and b' are computed in the graph from the live parameters, so nothing is copied and
    gradients reach the real weights. The unfolded conv stays as a dead node: its value is what
    ``layers=`` reports as that module's activation. Batch norm before zero padding is kept, as
    the padding would not be shifted with the rest.
    """
    for node in [n for n in module.graph.nodes if n.target is aten.batch_norm.default]:
        source = node.args[0]
        if bound_arguments(node)["running_mean"] is None:
            continue  # it standardises a weight
        if source.target in _AFFINE and len(source.users) == 1 and _channels_match(source):
            _fold_back(node, source)
        elif len(node.users) == 1 and _takes_shift(user := next(iter(node.users)), node):
            _fold_ahead(node, user)
    return module


def _channels_match(node: fx.Node) -> bool:
    """Batch norm is over dimension 1, the channels of a linear layer or a lone sample elsewhere."""
    return bool(node.meta["val"].ndim == bound_arguments(node)["weight"].meta["val"].ndim)


def _takes_shift(node: fx.Node, bn: fx.Node) -> bool:
    """Whether the affine op ``node`` maps a per-channel shift of its input to a constant."""
    if node.target is aten.linear.default:
        return node.args[0] is bn and node.args[1] is not bn and node.meta["val"].ndim == 2
    if node.target not in _CONVS or node.args[0] is not bn or node.args[1] is bn:
        return False
    padding = bound_arguments(node)["padding"]
    return padding == "valid" or (padding != "same" and not any(padding))


def _scale_and_shift(bn: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Nodes for gamma / sqrt(var + eps) and beta - mean * that, both (C,)."""
    a = bound_arguments(bn)
    shifted = insert(bn, aten.add.Tensor, (a["running_var"], a["eps"]))
    scale = insert(bn, aten.rsqrt.default, (shifted,))
    if a["weight"] is not None:
        scale = insert(bn, aten.mul.Tensor, (scale, a["weight"]))
    moved = insert(bn, aten.mul.Tensor, (a["running_mean"], scale))
    if a["bias"] is not None:
        return scale, insert(bn, aten.sub.Tensor, (a["bias"], moved))
    return scale, insert(bn, aten.neg.default, (moved,))


def _fold_back(bn: fx.Node, affine: fx.Node) -> None:
    """bn(W x + b) = (scale W) x + (scale b + shift)."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)
    with bn.graph.inserting_before(bn):
        scale, shift = _scale_and_shift(bn)
        if affine.target in _TRANSPOSED:  # (in, out / groups, ...), outputs ordered by group
            groups = arguments["groups"]
            by_group = (groups, shape[0] // groups, *shape[1:])
            per_output = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
            folded = _scaled(bn, weight, scale, by_group, per_output, shape)
        else:
            per_output = (shape[0],) + (1,) * (len(shape) - 1)
            folded = _scaled(bn, weight, scale, shape, per_output, shape)
        if arguments["bias"] is not None:
            scaled = insert(bn, aten.mul.Tensor, (arguments["bias"], scale))
            shift = insert(bn, aten.add.Tensor, (scaled, shift))
        arguments.update(weight=_like(weight, folded), bias=_like(weight, shift))
        new = insert(affine, affine.target, tuple(arguments.values()))
    new.meta["folded_calls"] = module_calls(bn)
    new.meta["unfolded"] = affine
    bn.replace_all_uses_with(new)
    bn.graph.erase_node(bn)


def _fold_ahead(bn: fx.Node, affine: fx.Node) -> None:
    """W (scale x + shift) + b = (W scale) x + (W shift + b)."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)  # (out, in / groups, ...)
    groups = arguments.get("groups", 1)
    by_group = (groups, shape[0] // groups, *shape[1:])
    per_input = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
    with bn.graph.inserting_before(affine):
        scale, shift = _scale_and_shift(bn)
        folded = _scaled(bn, weight, scale, by_group, per_input, shape)
        spread = _scaled(bn, weight, shift, by_group, per_input, shape)
        bias = insert(bn, aten.sum.dim_IntList, (spread, list(range(1, len(shape)))))
        if arguments["bias"] is not None:
            bias = insert(bn, aten.add.Tensor, (bias, arguments["bias"]))
        arguments.update(weight=_like(weight, folded), bias=_like(weight, bias))
        name = next(iter(arguments))
        arguments[name] = bn.args[0]
        new = insert(affine, affine.target, tuple(arguments.values()))
    new.meta["folded_calls"] = module_calls(bn)
    affine.replace_all_uses_with(new)
    affine.graph.erase_node(affine)
    bn.graph.erase_node(bn)


def _like(weight: fx.Node, new: fx.Node) -> fx.Node:
    """``new`` in the dtype of ``weight``: autocast leaves the parameters of batch norm alone."""
    dtype = weight.meta["val"].dtype
    if new.meta["val"].dtype == dtype:
        return new
    return insert(new, aten.to.dtype, (new, dtype))


def _scaled(
    like: fx.Node,
    weight: fx.Node,
    factor: fx.Node,
    weight_shape: Sequence[int],
    factor_shape: Sequence[int],
    shape: Sequence[int],
) -> fx.Node:
    """weight * factor, each viewed in its own shape, the product in ``shape``."""
    factor = insert(like, aten.reshape.default, (factor, list(factor_shape)))
    if tuple(weight_shape) != tuple(shape):
        weight = insert(like, aten.reshape.default, (weight, list(weight_shape)))
    product = insert(like, aten.mul.Tensor, (weight, factor))
    if tuple(weight_shape) != tuple(shape):
        product = insert(like, aten.reshape.default, (product, list(shape)))
    return product
