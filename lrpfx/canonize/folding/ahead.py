"""Batch norm before a layer -> part of that layer, where exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lrpfx.canonize.folding.commute import batch_norm_constants
from lrpfx.canonize.insert import insert
from lrpfx.ops import CONVS, bound_arguments, module_calls

aten = torch.ops.aten


def fold_ahead(bn: fx.Node) -> bool:
    """``layer(bn(x), W, b)`` -> ``layer(x, W', b')``; whether that was done."""
    if len(bn.users) != 1 or not _takes_shift(layer := next(iter(bn.users)), bn):
        return False
    with bn.graph.inserting_before(layer):
        _write(bn, layer)
    for old in (layer, bn):
        bn.graph.erase_node(old)
    return True


def _takes_shift(layer: fx.Node, bn: fx.Node) -> bool:
    """Whether a layer maps a shift of its input by channel to a constant."""
    if layer.target not in {*CONVS, aten.linear.default}:
        return False
    if layer.args[0] is not bn or bn in layer.args[1:]:
        return False
    if layer.target is aten.linear.default:
        return bool(layer.meta["val"].ndim == 2)
    padding = bound_arguments(layer)["padding"]
    return padding == "valid" or (padding != "same" and not any(padding))


def _write(bn: fx.Node, layer: fx.Node) -> None:
    """W (scale x + shift) + b = (W scale) x + (W shift + b), in the place of ``layer``."""
    arguments = bound_arguments(layer)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)  # (out, in / groups, ...)
    groups = arguments.get("groups", 1)
    by_group = (groups, shape[0] // groups, *shape[1:])
    per_input = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
    scale, shift = batch_norm_constants(bn)
    folded = scaled(bn, weight, scale, by_group, per_input, shape)
    spread = scaled(bn, weight, shift, by_group, per_input, shape)
    bias = insert(bn, aten.sum.dim_IntList, (spread, list(range(1, len(shape)))))
    if arguments["bias"] is not None:
        bias = insert(bn, aten.add.Tensor, (bias, arguments["bias"]))
    arguments.update(weight=typed_as(weight, folded), bias=typed_as(weight, bias))
    arguments[next(iter(arguments))] = bn.args[0]
    new = insert(layer, layer.target, tuple(arguments.values()))
    calls = (*module_calls(bn), *layer.meta.get("folded_ahead", ()))
    new.meta["folded_calls"] = new.meta["folded_ahead"] = tuple(dict.fromkeys(calls))
    layer.replace_all_uses_with(new)


def typed_as(other: fx.Node, new: fx.Node) -> fx.Node:
    """``new`` in the dtype of ``other``: autocast leaves the parameters of batch norm alone."""
    dtype = other.meta["val"].dtype
    if new.meta["val"].dtype == dtype:
        return new
    return insert(new, aten.to.dtype, (new, dtype))


def scaled(
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
