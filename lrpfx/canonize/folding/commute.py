"""Constants per channel behind moves -> behind the layer itself, where they can be folded.

Moves that keep channels apart (transpose, view, squeeze, slice, cat, ...) commute with what scales
and shifts channels. Which channel a value belongs to is followed by moving the channels' numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.canonize.insert import copied, insert
from lrpfx.ops import (
    BATCH,
    CONVS,
    KEPT,
    SHAPE_ONLY,
    bound_arguments,
    is_floating,
    is_reached,
    live_names,
    module_calls,
    op_name,
    source_line,
)

aten = torch.ops.aten

TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input}
TRANSPOSED |= {aten.conv_transpose3d.input}
AFFINE = CONVS | TRANSPOSED | {aten.linear.default}
PRODUCTS = {aten.matmul.default, aten.mm.default}
#: What scales or shifts by another tensor.
_ARITHMETIC = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor}
_CASTS = {aten.to.dtype, aten._to_copy.default}
#: Kinds of ops that do not belong between a layer and its batch norm by design.
_IN_BETWEEN = {"scale", "shift", "product", "where", "scatter", "clamp", "pad"}


@dataclass(frozen=True)
class Way:
    """From layers over moves, and factors that are numbers, to where they are read.

    Args:
        layers: Each with the product of the numbers behind it.
        moves: The nodes on the way, in order.
        written: One that writes into another, if there is one.
    """

    layers: dict[fx.Node, float]
    moves: list[fx.Node]
    written: fx.Node | None


@dataclass(frozen=True)
class Blocked:
    """Why there is no such way.

    Args:
        why: In words.
        by: The op that stands there, if one does.
    """

    why: str
    by: fx.Node | None = None


def way_from_layers(end: fx.Node) -> Way | Blocked:
    """The way to ``end`` from the layers that it moves the outputs of, if nothing else reads it."""
    factors = {end: 1.0}
    layers: dict[fx.Node, float] = {}
    moves: list[fx.Node] = []
    pending: set[fx.Node] = {end}
    written: fx.Node | None = None

    def blocked(why: str, by: fx.Node | None = None) -> Blocked:
        if written is None:
            return Blocked(why, by)
        return Blocked(f"{name_of(written)} stands between it and a layer", written)

    while pending:
        node = max(pending)  # after all that reads it
        pending.remove(node)
        factor = factors[node]
        if node.target in AFFINE | PRODUCTS:
            layers[node] = factor
        elif node is not end and _is_blank(node):
            continue
        elif node.op != "call_function":
            return blocked("there is no layer before it")
        reading = readers(node)
        if (len(reading) != 1) if node is end else any(n not in factors for n in reading):
            return blocked(f"{name_of(node)} before it is read {len(reading)} times", node)
        if node in layers:
            continue
        inputs = [n for n in node.all_input_nodes if is_floating(n.meta["val"])]
        number = _number(node)
        op = ops.find(node.target, frozenset(live_names(node, inputs)))
        moved = node.target is operator.getitem or (op is not None and op.family == "move")
        moved = moved and (op is None or op.kind not in _IN_BETWEEN - {"pad", "scatter"})
        written = written or (node if op is not None and op.kind == "scatter" else None)
        if number is None and not moved:
            return blocked(f"{name_of(node)} stands between it and a layer", node)
        moves.append(node)
        factor *= 1.0 if number is None else number
        if any(factors.setdefault(n, factor) != factor for n in inputs):
            return blocked(f"{name_of(node)} before it is scaled in several ways", node)
        pending.update(inputs)
    if not layers:
        return blocked("there is no layer before it")
    known, of_layers = set(layers), []
    for move in sorted(moves):  # others make what is written into
        if not known.isdisjoint(move.all_input_nodes):
            known.add(move)
            of_layers.append(move)
    return Way(layers, of_layers, written)


def _is_blank(node: fx.Node) -> bool:
    """Whether a node is made of nothing, as a tensor that is written into."""
    inputs = [n for n in node.all_input_nodes if is_floating(n.meta.get("val"))]
    return node.op == "call_function" and (node.target in SHAPE_ONLY or not inputs)


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads the values of a node, and not just its sizes or the statistics of its batch."""
    users = [n for n in node.users if BATCH not in n.meta]  # the statistics are its own
    return [n for n in users if n.op == "output" or is_floating(n.meta.get("val"))]


def name_of(node: fx.Node) -> str:
    """How reasons name a node: its module's path and its op."""
    calls = module_calls(node)
    return f"{op_name(node.target)} of {calls[-1].path}" if calls else op_name(node.target)


def note_of(node: fx.Node, blocked: Blocked) -> str:
    """What a user may not expect: an op of no layer's between a layer and its batch norm."""
    by = before = blocked.by
    while before is not None and before.target not in AFFINE | PRODUCTS:
        inputs = [n for n in before.all_input_nodes if is_floating(n.meta["val"])]
        live = (inputs, inputs[:1])
        rows = [ops.find(before.target, frozenset(live_names(before, some))) for some in live]
        between = any(op is not None and op.kind in _IN_BETWEEN for op in rows)
        before = inputs[0] if between else None
    if by is None or before is None or before is by:
        return ""
    where = f" ({line})" if (line := source_line(by)) else ""
    return (
        f"{name_of(node)} is not folded into the layer before it: {op_name(by.target)} stands "
        f"between them{where}"
    )


def put_behind_layers(
    module: fx.GraphModule, node: fx.Node, reached: dict[fx.Node, bool]
) -> list[fx.Node]:
    """``bn(move(layer(x)))`` -> ``move(layer(x) * s + t)``, for moves that keep channels apart.

    Likewise for a constant per channel that is added or multiplied; a number that the layer has
    been multiplied by goes into s.

    Args:
        module: What the graph belongs to.
        node: A batch norm, or a sum or product with a constant per channel.
        reached: See ``ops.is_reached``.

    Returns:
        The scales and shifts in the place of ``node``; none if it stays.
    """
    if (found := _changes_channels(node, reached)) is None:
        return []
    operand, dim, sign = found
    way = way_from_layers(operand)
    if isinstance(way, Blocked) or (not way.moves and sign == 1):
        return []
    same = all(n.meta["val"].dtype == node.meta["val"].dtype for n in way.layers)
    if not same or any(is_reached(weight_of(n), reached) for n in way.layers):
        return []
    places = _places(module, way, operand, dim)
    if isinstance(places, str):
        node.meta[KEPT] = places
        return []
    with module.graph.inserting_before(node):
        return _write(node, way, places, sign, reached)


def weight_of(layer: fx.Node) -> fx.Node:
    """The weight of a layer, or what else it is multiplied with."""
    _, weight, *_ = bound_arguments(layer).values()
    assert isinstance(weight, fx.Node)
    return weight


def _number(node: fx.Node) -> float | None:
    """The number that a node multiplies by; 1 for casts."""
    if node.target in _CASTS:
        return 1.0
    if node.target is aten.neg.default:
        return -1.0
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.all_input_nodes) == 1:
        number = next((a for a in node.args if isinstance(a, (int, float))), None)
        if number is not None and isinstance(node.args[0], fx.Node):
            return 1 / number if node.target is aten.div.Tensor else float(number)
    return None


def _changes_channels(
    node: fx.Node, reached: dict[fx.Node, bool]
) -> tuple[fx.Node, int, int] | None:
    """What a batch norm or a constant scales or shifts by channel, along which dimension.

    And the sign that it has, as in ``b - x``. One constant for all is none.
    """
    if node.target is aten.batch_norm.default:
        x = node.all_input_nodes[0]
        return None if bound_arguments(node)["running_mean"] is None else (x, 1, 1)
    if node.target not in _ARITHMETIC or node.kwargs:
        return None
    for i in (0, 1):
        operand, constant = node.args[i], node.args[1 - i]
        if not isinstance(operand, fx.Node) or not isinstance(constant, fx.Node):
            return None
        given, value = constant.meta["val"], node.meta["val"]
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return None
        alike = str(operand.meta["val"].shape) == str(value.shape)
        if not alike or (i and node.target is aten.div.Tensor):
            continue
        if not all(isinstance(size, int) for size in given.shape):
            continue
        wide = [d - given.ndim for d, size in enumerate(given.shape) if size != 1]
        if len(wide) != 1 or is_reached(constant, reached):
            continue
        sign = -1 if i and node.target is aten.sub.Tensor else 1
        return operand, wide[0] % value.ndim, sign
    return None


#: What a size that varies is taken for while channels are followed.
_ANY = 2


def _size(size: Any) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _ANY)))


def _places(
    module: fx.GraphModule, way: Way, end: fx.Node, dim: int
) -> dict[fx.Node, list[int]] | str:
    """By layer, for each channel its place along ``dim`` of ``end``, -1 if it is not there.

    Returns:
        The places, or why they are not known.
    """
    values: dict[fx.Node, Any] = {}
    first = {}
    numbers = 1
    for layer in way.layers:
        shape = [_size(n) for n in layer.meta["val"].shape]
        channels = len(shape) - (weight_of(layer).meta["val"].ndim - 1)
        own = torch.arange(numbers, numbers + shape[channels])
        first[layer], numbers = numbers, numbers + shape[channels]
        spread = [-1 if d == channels else 1 for d in range(len(shape))]
        values[layer] = own.reshape(spread).expand(shape)

    if (why := _move(module, values, way.moves)) is not None:
        return why
    moved: Tensor = values[end]
    spread = [-1 if d == dim else 1 for d in range(moved.ndim)]
    place = torch.arange(moved.shape[dim]).reshape(spread).expand(moved.shape)
    pairs = torch.stack([moved.flatten(), place.flatten()]).unique(dim=1)
    of = {int(number): int(at) for number, at in pairs.t()}
    if 0 in of:
        return "its input is padded, which would be shifted with the rest"
    if len(of) != pairs.shape[1]:
        return "its channels are not those of the layer before it"
    ends = [*list(first.values())[1:], numbers]
    return {
        layer: [of.get(k, -1) for k in range(start, end)]
        for (layer, start), end in zip(first.items(), ends, strict=True)
    }


def _move(
    module: fx.GraphModule, values: dict[fx.Node, Any], moves: Sequence[fx.Node]
) -> str | None:
    """Enter what moves make of the numbers that are known; returned is why that is not known."""

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if is_floating(node.meta["val"]):
            return torch.zeros([_size(n) for n in node.meta["val"].shape], dtype=torch.long)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(module).cpu()
        if not isinstance(node.meta["val"], Tensor):
            return _size(node.meta["val"])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    for node in moves:
        if _number(node) is not None:
            (before,) = (n for n in node.all_input_nodes if n in values)
            values[node] = values[before]
            continue
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # it moves by values that are not known here
            return f"{name_of(node)} before it moves values by others"
    return None


def _write(
    node: fx.Node,
    way: Way,
    places: dict[fx.Node, list[int]],
    sign: int,
    reached: dict[fx.Node, bool],
) -> list[fx.Node]:
    """The moves of the layers, scaled and shifted, in the place of ``node``."""
    written: list[fx.Node] = []
    scale, shift = _scale_and_shift(node, reached)
    copies: dict[fx.Node, fx.Node] = {}
    for layer, own in places.items():
        by = [1] * layer.meta["val"].ndim
        by[layer.meta["val"].ndim - (weight_of(layer).meta["val"].ndim - 1)] = -1
        parts = [
            None if vector is None else _taken(node, vector, own, neutral)
            for vector, neutral in ((scale, 1), (shift, 0))
        ]
        factor = way.layers[layer] * sign
        if factor != 1:
            some = next(part for part in (*parts, weight_of(layer)) if part is not None)
            all_ = insert(node, aten.new_full.default, (some, [len(own)], factor))
            parts[0] = all_ if parts[0] is None else insert(node, aten.mul.Tensor, (parts[0], all_))
        new = layer
        for target, part in ((aten.mul.Tensor, parts[0]), (aten.add.Tensor, parts[1])):
            if part is not None:
                part = insert(node, aten.reshape.default, (_typed(part, layer), by))
                new = insert(node, target, (new, part))
                written.append(new)
        copies[layer] = new
    for move in way.moves:
        if _number(move) is None:
            copies[move] = copied(move, copies, move)
        else:
            (before,) = (n for n in move.all_input_nodes if n in copies)
            copies[move] = copies[before]
    operand = way.moves[-1] if way.moves else next(iter(way.layers))
    node.replace_all_uses_with(copies[operand])
    for old in [node, *reversed(way.moves)]:
        if not old.users:  # else its batch is what statistics are of
            node.graph.erase_node(old)
    return written


def _typed(node: fx.Node, like: fx.Node) -> fx.Node:
    """``node`` in the dtype of another."""
    dtype = like.meta["val"].dtype
    return node if node.meta["val"].dtype == dtype else insert(node, aten.to.dtype, (node, dtype))


def _scale_and_shift(
    node: fx.Node, reached: dict[fx.Node, bool]
) -> tuple[fx.Node | None, fx.Node | None]:
    """By what a node scales and shifts channels, as vectors."""
    if node.target is aten.batch_norm.default:
        return batch_norm_constants(node)
    constant = next(n for n in node.all_input_nodes if not is_reached(n, reached))
    vector = insert(node, aten.reshape.default, (constant, [-1]))
    if node.target is aten.mul.Tensor:
        return vector, None
    if node.target is aten.div.Tensor:
        return insert(node, aten.reciprocal.default, (vector,)), None
    negative = node.target is aten.sub.Tensor and node.args[1] is constant
    return None, insert(node, aten.neg.default, (vector,)) if negative else vector


def batch_norm_constants(bn: fx.Node) -> tuple[fx.Node, fx.Node]:
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


def _taken(like: fx.Node, vector: fx.Node, places: Sequence[int], neutral: int) -> fx.Node:
    """The entries of a vector at given places; a neutral number where that is -1."""
    size = vector.meta["val"].shape[0]
    if list(places) == list(range(size)):
        return vector
    if size == 1 and -1 not in places:
        return insert(like, aten.expand.default, (vector, [len(places)]))
    value = vector.meta["val"]
    own = insert(like, aten.new_full.default, (vector, [1], neutral))
    longer = insert(like, aten.cat.default, ([vector, own],))
    parts, start = [], 0
    while start < len(places):  # runs of entries that follow each other
        stop = start + 1
        first = places[start] if places[start] >= 0 else value.shape[0]
        while stop < len(places) and places[stop] == first + stop - start:
            stop += 1
        parts.append(insert(like, aten.slice.Tensor, (longer, 0, first, first + stop - start)))
        start = stop
    return parts[0] if len(parts) == 1 else insert(like, aten.cat.default, (parts,))
