"""Batch norm, and constants per channel -> part of the affine op beside them, by data flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.folding.ahead import fold_ahead, scaled, typed_as
from lrpfx.canonize.folding.commute import (
    AFFINE,
    PRODUCTS,
    TRANSPOSED,
    Blocked,
    Way,
    batch_norm_constants,
    name_of,
    note_of,
    put_behind_layers,
    readers,
    way_from_layers,
    weight_of,
)
from lrpfx.canonize.insert import insert
from lrpfx.ops import (
    CONVS,
    KEPT,
    KEPT_NOTE,
    bound_arguments,
    is_reached,
    module_calls,
    output_leaves,
    precision,
)

aten = torch.ops.aten

_COMMUTE = {aten.add.Tensor, aten.mul.Tensor}


def fold_into_layers(module: fx.GraphModule) -> fx.GraphModule:
    """``bn(conv(x, W, b))`` -> ``conv(x, W', b')``, and ``conv(bn(x), W, b)`` where exact.

    Likewise ``conv(x, W, b) * s + t`` with constants per channel, as a batch norm whose statistics
    are frozen is written, or a bias that is added by itself; ``x @ W + t`` is a linear layer.

    Moves between that keep channels apart commute with it, see ``commute.py``.

    W' and b' are computed in the graph from the live parameters, so nothing is copied and
    gradients reach the real weights. The unfolded conv and what was behind it stay as dead nodes:
    their values are what ``layers=`` reports as these modules' activations. Batch norm before zero
    padding is kept, as the padding would not be shifted with the rest.
    """
    reached: dict[fx.Node, bool] = {}
    finest = max(map(precision, output_leaves(module.graph)), default=0)
    for node in list(module.graph.nodes):
        for part in put_behind_layers(module, node, reached) or [node]:
            _fold(module, part, finest, reached)
    return module


def _fold(module: fx.GraphModule, node: fx.Node, finest: int, reached: dict[fx.Node, bool]) -> None:
    if node.target is not aten.batch_norm.default:
        if (found := _constant_behind(node, finest, reached)) is not None:
            _fold_constant(node, *found)
        elif (layer := _layer_behind(node, reached)) is not None:
            node.meta.setdefault(
                KEPT, f"constants by hand before {name_of(layer)} stay as they are"
            )
        return
    source: Any = node.args[0]
    if bound_arguments(node)["running_mean"] is None:
        return  # it standardises a weight
    if source.target in AFFINE and len(readers(source)) == 1 and _channels_match(source):
        with node.graph.inserting_before(node):
            _fold_back(node, source, *batch_norm_constants(node))
    elif not fold_ahead(node):
        _say_why(node, source)


def _say_why(bn: fx.Node, source: fx.Node) -> None:
    """Note why a batch norm stays by itself, for its row of the report."""
    way, (user, *more) = way_from_layers(source), (*bn.users, None)
    if isinstance(way, Way) and way.written is not None:
        way = Blocked(f"{name_of(way.written)} stands between it and a layer", way.written)
    if isinstance(way, Blocked):
        behind = way.why
        if note := note_of(bn, way):
            bn.meta[KEPT_NOTE] = note, way.by
    else:
        behind = bn.meta.get(KEPT, "its channels are not those of the layer before it")
    if len(more) > 1:
        ahead = "it is read several times"
    elif user is not None and user.target in CONVS and user.args[0] is bn:
        ahead = f"{name_of(user)} behind it pads with zeros"
    else:
        ahead = "there is no layer directly behind it"
    bn.meta[KEPT] = f"{behind}; {ahead}"


def _constant_behind(
    node: fx.Node, finest: int, reached: dict[fx.Node, bool]
) -> tuple[fx.Node, fx.Node] | None:
    """Of a sum or a product with a constant per channel the layer it stands behind, and that.

    Under autocast it may be finer than the layer's output; it is folded if what the model returns,
    which has ``finest`` bytes for a number, is not.
    """
    if node.target not in _COMMUTE | {aten.sub.Tensor, aten.div.Tensor}:
        return None
    commutes = node.target in _COMMUTE and not node.kwargs
    for layer, constant in (node.args, node.args[::-1])[: 2 if commutes else 1]:
        if not isinstance(layer, fx.Node) or not isinstance(constant, fx.Node):
            return None
        while layer.target is aten.to.dtype and len(readers(layer)) == 1:
            layer = layer.all_input_nodes[0]
        if layer.target not in AFFINE | PRODUCTS or len(readers(layer)) > 1:
            continue
        same = layer.meta["val"].dtype == node.meta["val"].dtype
        known = same or precision(node) > precision(layer) >= finest
        known = known and _is_per_channel(constant, layer)
        if known and not any(is_reached(n, reached) for n in (constant, weight_of(layer))):
            return layer, constant
    return None


def _layer_behind(node: fx.Node, reached: dict[fx.Node, bool]) -> fx.Node | None:
    """The layer that reads what a node scales or shifts by channel, if that is no input."""
    arithmetic = _COMMUTE | {aten.sub.Tensor, aten.div.Tensor}
    last = layer = node
    while layer.target in arithmetic and len(layer.users) == 1:
        last, layer = layer, next(iter(layer.users))
    given = [n for n in node.all_input_nodes if is_reached(n, reached)]
    constants = [n for n in node.all_input_nodes if n not in given]
    if (
        layer is node
        or layer.target not in AFFINE
        or layer.args[0] is not last
        or len(given) != 1
        or not constants
    ):
        return None
    out, before = node.meta["val"].shape, given[0]
    while before.op != "placeholder" and before.target in arithmetic:
        before = next(n for n in before.all_input_nodes if is_reached(n, reached))
    expected = [1] * len(out)
    channel = -1 if layer.target is aten.linear.default else 1 - len(out)
    expected[channel] = out[channel]
    shape = list(constants[0].meta["val"].shape)
    by_channel = [1] * (len(out) - len(shape)) + shape == expected
    return layer if by_channel and before.op != "placeholder" else None


def _is_per_channel(constant: fx.Node, layer: fx.Node) -> bool:
    """Whether a tensor has one entry for each channel of what a layer puts out."""
    if not isinstance(constant.meta["val"], Tensor):  # a size
        return False
    given, out = constant.meta["val"].shape, layer.meta["val"].shape
    weight = weight_of(layer).meta["val"]
    if len(given) > len(out) or weight.ndim < 2 or (layer.target in PRODUCTS and weight.ndim > 2):
        return False
    expected = [1] * len(out)
    channels = len(out) - (weight.ndim - 1)
    expected[channels] = out[channels]
    return [1] * (len(out) - len(given)) + list(given) == expected


def _fold_constant(node: fx.Node, layer: fx.Node, constant: fx.Node) -> None:
    """The layer with the constant in its weight, or in its bias."""
    with node.graph.inserting_before(node):
        given = typed_as(layer, insert(node, aten.reshape.default, (constant, [-1])))
        if layer.target in PRODUCTS:
            x, weight = bound_arguments(layer).values()
            transposed = insert(node, aten.t.default, (weight,))
            product, layer = layer, insert(layer, aten.linear.default, (x, transposed))
            product.replace_all_uses_with(layer)
            product.graph.erase_node(product)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            if node.target is aten.div.Tensor:
                given = insert(node, aten.reciprocal.default, (given,))
            _fold_back(node, layer, given, None)
            return
        alpha: Any = node.kwargs.get("alpha", 1)
        alpha = -alpha if node.target is aten.sub.Tensor else alpha
        given = given if alpha == 1 else insert(node, aten.mul.Tensor, (given, alpha))
        _fold_back(node, layer, None, given)


def _channels_match(node: fx.Node) -> bool:
    """Batch norm is over dimension 1, the channels of a linear layer or a lone sample elsewhere."""
    return bool(node.meta["val"].ndim == bound_arguments(node)["weight"].meta["val"].ndim)


def _fold_back(
    node: fx.Node, affine: fx.Node, scale: fx.Node | None, shift: fx.Node | None
) -> None:
    """scale (W x + b) + shift = (scale W) x + (scale b + shift), in the place of ``node``."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    bias: fx.Node | None = arguments["bias"]
    if scale is not None:
        arguments.update(weight=typed_as(weight, _scaled_outputs(node, affine, scale)))
        bias = None if bias is None else insert(node, aten.mul.Tensor, (bias, scale))
    if shift is not None:
        bias = shift if bias is None else insert(node, aten.add.Tensor, (bias, shift))
    arguments.update(bias=None if bias is None else typed_as(weight, bias))
    new = insert(affine, affine.target, tuple(arguments.values()))
    new.meta["folded_calls"] = (*affine.meta.get("folded_calls", ()), *module_calls(node))
    new.meta["stages"] = (*affine.meta.get("stages", (affine,)), node)
    new.meta["folded_ahead"] = affine.meta.get("folded_ahead", ())
    node.replace_all_uses_with(typed_as(node, new))


def _scaled_outputs(like: fx.Node, affine: fx.Node, scale: fx.Node) -> fx.Node:
    """The weight of a layer whose outputs are scaled."""
    arguments = bound_arguments(affine)
    weight: fx.Node = arguments["weight"]
    shape = tuple(weight.meta["val"].shape)
    if affine.target in TRANSPOSED:  # (in, out / groups, ...), outputs ordered by group
        groups = arguments["groups"]
        by_group = (groups, shape[0] // groups, *shape[1:])
        per_output = (groups, 1, shape[1]) + (1,) * (len(shape) - 2)
        return scaled(like, weight, scale, by_group, per_output, shape)
    per_output = (shape[0],) + (1,) * (len(shape) - 1)
    return scaled(like, weight, scale, shape, per_output, shape)
