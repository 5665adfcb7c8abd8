"""Batch norm, and constants per channel, before a layer -> part of that layer, where exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.canonize.commute import (
    ARITHMETIC,
    changes_channels,
    is_between,
    is_number,
    moved_numbers,
    readers,
    scale_and_shift,
    taken,
    weight_of,
)
from lrpfx.canonize.insert import copied, insert
from lrpfx.ops import CONVS, bound_arguments, is_floating, live_names, module_calls

aten = torch.ops.aten


def fold_ahead(module: fx.GraphModule, node: fx.Node, reached: dict[fx.Node, bool]) -> bool:
    """``layer(move(bn(x)), W, b)`` -> ``layer(move(x), W', b')``; whether that was done.

    Likewise for a constant per channel before a convolution, of which those before it follow; not
    for those that stand on an input, which are the input's.

    Args:
        module: What the graph belongs to.
        node: A batch norm, or a sum or product with a constant per channel.
        reached: See ``ops.is_reached``.
    """
    is_norm = node.target is aten.batch_norm.default
    if not (is_norm or node.target in ARITHMETIC) or (way := _way_to_layer(node)) is None:
        return False
    layer, moves = way
    if not is_norm and (layer.target is aten.linear.default or not _has_layer_before(node)):
        return False
    if (found := changes_channels(node, reached)) is None:
        return False
    operand, dim, sign = found
    places = _places(module, node, dim, moves, layer)
    if places is None:
        return False
    with node.graph.inserting_before(layer):
        scale, shift = scale_and_shift(node, reached)
        if not _takes(layer, places, shift):
            return False
        parts = [
            None if vector is None else taken(node, vector, places, neutral)
            for vector, neutral in ((scale, 1), (shift, 0))
        ]
        if sign != 1:
            negative = insert(node, aten.new_full.default, (weight_of(layer), [len(places)], sign))
            own = parts[0]
            parts[0] = negative if own is None else insert(node, aten.mul.Tensor, (own, negative))
        copies = {node: operand}
        for move in moves:
            copies[move] = copied(move, copies, move)
        x = copies[moves[-1]] if moves else operand
        _write(node, layer, x, *parts)
    for old in [layer, *reversed(moves), node]:
        node.graph.erase_node(old)
    fold_ahead(module, operand, reached)
    return True


def _has_layer_before(node: fx.Node) -> bool:
    """Whether what a node scales or shifts is more than an input that is scaled and shifted."""
    before: Any = node
    while isinstance(before, fx.Node) and before.op == "call_function":
        inputs = [n for n in before.all_input_nodes if is_floating(n.meta["val"])]
        op = ops.find(before.target, frozenset(live_names(before, inputs[:1])))
        if not (is_between(before) or (op is not None and op.family == "move")):
            return True
        before = inputs[0] if inputs else None
    return False


def _way_to_layer(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The layer that a node leads to, over moves, if nothing else reads any of them."""
    moves: list[fx.Node] = []
    while len(node.users) == 1 and len(readers(node)) == 1:
        (user,) = node.users
        if user.target in CONVS or user.target is aten.linear.default:
            is_input = user.args[0] is node and node not in user.args[1:]
            return (user, moves) if is_input else None
        inputs = [n for n in user.all_input_nodes if is_floating(n.meta["val"])]
        op = ops.find(user.target, frozenset(live_names(user, inputs)))
        if op is None or op.family != "move" or inputs != [node] or is_number(user):
            return None
        moves.append(user)
        node = user
    return None


def _places(
    module: fx.GraphModule, node: fx.Node, dim: int, moves: Sequence[fx.Node], layer: fx.Node
) -> list[int] | None:
    """For each channel that the layer reads which one of ``node`` it is, -1 for padding."""
    moved = moved_numbers(module, node, dim, moves)
    if not isinstance(moved, Tensor):
        return None
    weight = weight_of(layer).meta["val"]
    channels = moved.ndim - (1 if layer.target is aten.linear.default else weight.ndim - 1)
    rows = moved.movedim(channels, 0).flatten(1)
    if bool((rows != rows[:, :1]).any()):
        return None
    return [int(n) - 1 for n in rows[:, 0]]


def _takes(layer: fx.Node, places: Sequence[int], shift: fx.Node | None) -> bool:
    """Whether the layer maps a shift of its input to a constant: nothing is padded with zeros."""
    if shift is None:
        return True
    padding = bound_arguments(layer).get("padding", "valid")
    inside = padding == "valid" or (padding != "same" and not any(padding))
    return inside and -1 not in places


def _write(
    node: fx.Node, layer: fx.Node, x: fx.Node, scale: fx.Node | None, shift: fx.Node | None
) -> None:
    """W (scale x + shift) + b = (W scale) x + (W shift + b), in the place of ``layer``."""
    arguments = bound_arguments(layer)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)  # (out, in / groups, ...)
    groups = arguments.get("groups", 1)
    by_group = (groups, shape[0] // groups, *shape[1:])
    per_input = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
    if shift is not None:
        spread = scaled(node, weight, shift, by_group, per_input, shape)
        bias = insert(node, aten.sum.dim_IntList, (spread, list(range(1, len(shape)))))
        if arguments["bias"] is not None:
            bias = insert(node, aten.add.Tensor, (bias, arguments["bias"]))
        arguments.update(bias=typed_as(weight, bias))
    if scale is not None:
        folded = scaled(node, weight, scale, by_group, per_input, shape)
        arguments.update(weight=typed_as(weight, folded))
    arguments[next(iter(arguments))] = x
    new = insert(layer, layer.target, tuple(arguments.values()))
    calls = (*module_calls(node), *layer.meta.get("folded_ahead", ()))
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
