"""Functions that users write by hand -> the op that has their name: relu, softmax, sigmoid, ..."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.hold import inverted, live_values
from lrpfx.canonize.insert import insert
from lrpfx.canonize.opened import lerp
from lrpfx.canonize.writer import Writer
from lrpfx.ops import (
    LIFTED,
    bound_arguments,
    hardsigmoid,
    module_calls,
    output_leaves,
    precision,
    varying,
)

aten = torch.ops.aten

#: An op, and its arguments.
Found = tuple[Any, tuple[Any, ...]]


def whole_relus(module: fx.GraphModule) -> fx.GraphModule:
    """``clamp(x, min=0)``, ``where(x > 0, x, 0)``, ``x * (x > 0)`` -> ``relu(x)``, and so on."""
    zeros = {node for node in module.graph.nodes if _is_zeros(node, module)}
    for node in list(module.graph.nodes):
        x = _rectified(node, zeros)
        if x is None or _form(x) != _form(node) or not precision(node):
            continue
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(insert(node, aten.relu.default, (x,)))
        module.graph.erase_node(node)
    return module


_FULL = {aten.full.default, aten.full_like.default, aten.new_full.default}
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}


def _is_zeros(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node is a tensor of zeros by how it is made; buffers may change."""
    if node.target in _FULL:
        return bool(bound_arguments(node)["fill_value"] == 0)
    node = _reached(node, aten.detach.default)
    if node.op == "get_attr" and str(node.target).startswith(LIFTED):
        return not operator.attrgetter(str(node.target))(module).any()
    return node.target in _ZEROS


def _rectified(node: fx.Node, zeros: set[fx.Node]) -> Any:
    """The x whose max(x, 0) a node is in other words."""

    def is_zero(value: Any) -> bool:
        return value in zeros if isinstance(value, fx.Node) else value is not None and value == 0

    def sign(mask: Any) -> tuple[Any, Any]:
        """The x whose sign a mask tells, and which."""
        mask = _reached(mask, aten.to.dtype)
        known = isinstance(mask, fx.Node) and mask.target in _SIGNS and is_zero(mask.args[1])
        return (mask.args[0], _SIGNS[mask.target]) if known else (None, 0)

    def picked(mask: Any, a: Any, b: Any) -> Any:
        """Of a where the mask is set, b elsewhere; unlike a ReLU it keeps no NaN."""
        if any(_calls(n, *_MAKES_NAN) for n in (a, b)):
            return None
        if is_zero(b) and sign(mask) == (a, 1):
            return a
        return b if is_zero(a) and sign(mask) == (b, -1) else None

    target: Any = node.target
    given = list(bound_arguments(node).values()) if target in _RECTIFY else []
    match _RECTIFY.get(target), given:
        case "clamp", [x, low, *high] if is_zero(low) and high in ([], [None]):
            return x
        case "bend", [x, *numbers] if all(map(is_zero, numbers)):
            return x
        case "maximum", [a, b]:
            return a if is_zero(b) else b if is_zero(a) else None
        case "product", [a, b]:
            return picked(a, b, 0) or picked(b, a, 0)
        case "where", [mask, a, b]:
            return picked(mask, a, b)
        case "fill", [x, mask, value]:
            return picked(mask, value, x)
        case "put", [x, [mask], value, False]:
            return picked(mask, value, x)
    return None


_RECTIFY = {
    aten.clamp.default: "clamp",
    aten.clamp_min.default: "clamp",
    aten.threshold.default: "bend",
    aten.leaky_relu.default: "bend",
    aten.maximum.default: "maximum",
    aten.max.other: "maximum",
    aten.mul.Tensor: "product",
    aten.where.self: "where",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.masked_fill.Scalar: "fill",
    aten.index_put.default: "put",
}
_MAKES_NAN = {aten.sqrt.default, aten.rsqrt.default, aten.log.default, aten.log1p.default}
_MAKES_NAN |= {aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.div.Tensor}
_SIGNS = dict.fromkeys((aten.gt.Scalar, aten.ge.Scalar, aten.gt.Tensor, aten.ge.Tensor), 1)
_SIGNS |= dict.fromkeys((aten.lt.Scalar, aten.le.Scalar, aten.lt.Tensor, aten.le.Tensor), -1)


def whole_lerps(module: fx.GraphModule) -> fx.GraphModule:
    """``a + w * (b - a)`` -> ``(1 - w) * a + w * b`` for w no constant: each counts once.

    Likewise ``a - w * (a - b)``; not where ``w * (b - a)`` is what a module returns. So does
    PyTorch write the steps of a GRU, whose equation is the latter. For a constant w, such as the
    inverse of a divisor, the two are one linear map.
    """
    if not any(map(_lerp_of, module.graph.nodes)):
        return module
    changing = varying(module.graph)
    turned = inverted(module.graph, live_values(module.graph))
    for node in list(module.graph.nodes):
        found = _lerp_of(node)
        if found is None or found[2] not in changing or found[2] in turned:
            continue
        step, way, weight = found
        start, end = way.args if node.target is aten.sub.Tensor else way.args[::-1]
        with module.graph.inserting_before(node):
            new = lerp(Writer(node, module), start, end, weight)
        changing.add(new)
        node.replace_all_uses_with(new)
        for old in (node, step, way):
            if not old.users:
                module.graph.erase_node(old)
    return module


def _lerp_of(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """Of ``a + w * (b - a)``, or ``a - w * (a - b)``, the step, what w multiplies there, and w."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    taken = node.target is aten.sub.Tensor
    for start, step in [node.args] if taken else [node.args, node.args[::-1]]:
        if not isinstance(step, fx.Node) or step.target is not aten.mul.Tensor:
            continue
        for way, weight in (step.args, step.args[::-1]):
            if not isinstance(way, fx.Node) or way.target is not aten.sub.Tensor or way.kwargs:
                continue
            own = module_calls(node) == module_calls(step)  # else a module returns the step
            if way.args[0 if taken else 1] is start and len(step.users) == 1 and own:
                return step, way, weight
    return None


def whole_functions(module: fx.GraphModule) -> fx.GraphModule:
    """``1 / (1 + exp(-x))`` -> ``sigmoid(x)``, and so on.

    So is ``1 / (1 + exp(x))``, that of ``-x``, and ``exp(x) / (1 + exp(x))``; ``y / (1 + exp(-x))``
    is ``y * sigmoid(x)``, ``relu6(x + 3) / 6`` is ``hardsigmoid(x)``, ``log(1 + exp(x))`` is
    ``softplus(x)``.
    """
    finest = max(map(precision, output_leaves(module.graph)), default=0)
    for node in list(module.graph.nodes):
        if precision(node) < finest:
            continue  # it would change what comes out by more than its own round-off
        with module.graph.inserting_before(node):
            found = next(filter(None, (of(node) for of in _FUNCTIONS)), None)
            if found is None:
                continue
            new = insert(node, *found)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return module


def _sigmoid_of(node: fx.Node) -> Found | None:
    """Of ``y / (1 + exp(-x))`` the sigmoid, times y, and of ``exp(x) / (1 + exp(x))``."""
    above, below = _quotient(node)
    power = _more_than_one(below)
    if not _calls(power, aten.exp.default) or precision(power) != precision(power.args[0]):
        return None
    x: Any = power.args[0]
    if _calls(above, aten.exp.default) and above.args == power.args:
        return aten.sigmoid.default, (x,)
    if _calls(x, aten.neg.default) or (_calls(x, aten.mul.Tensor) and x.args[1] == -1):
        x = x.args[0]
    else:
        x = insert(node, aten.neg.default, (x,))
    if above == 1:
        return aten.sigmoid.default, (x,)
    return aten.mul.Tensor, (insert(node, aten.sigmoid.default, (x,)), above)


def _hardsigmoid_of(node: fx.Node) -> Found | None:
    """Of ``relu6(x + 3) / 6`` x."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor):
        return None
    clamped: Any = node.args[0]
    number, whole = node.args[1], {aten.div.Tensor: 6, aten.mul.Tensor: 1 / 6}[node.target]
    if number != whole or not _calls(clamped, *_CLAMPS):
        return None
    moved, *range_ = bound_arguments(clamped).values()
    if tuple(range_) not in ((), (0, 6)) or not _calls(moved, aten.add.Tensor) or moved.kwargs:
        return None
    return (hardsigmoid, moved.args[:1]) if moved.args[1] == 3 else None


_CLAMPS = (aten.relu6.default, aten.clamp.default, aten.hardtanh.default)


def _softplus_of(node: fx.Node) -> Found | None:
    """Of ``log(1 + exp(x))`` x."""
    power: Any = None
    if _calls(node, aten.log1p.default):
        power = node.args[0]
    elif _calls(node, aten.log.default):
        power = _more_than_one(node.args[0])
    if not _calls(power, aten.exp.default) or precision(power) != precision(power.args[0]):
        return None
    return aten.softplus.default, power.args


_FUNCTIONS: tuple[Callable[[fx.Node], Found | None], ...] = (
    _sigmoid_of,
    _hardsigmoid_of,
    _softplus_of,
)


def _more_than_one(node: Any) -> Any:
    """Of ``1 + a`` a."""
    if not _calls(node, aten.add.Tensor) or node.kwargs:
        return None
    return next((a for a, one in (node.args, node.args[::-1]) if one == 1), None)


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _reached(node: Any, *through: Any) -> Any:
    """What a node is the first argument's form of."""
    while _calls(node, *through):
        node = node.args[0]
    return node


def _quotient(node: Any) -> tuple[Any, Any]:
    """Of ``a / b``, or ``a * (1 / b)``, a and b; of ``1 / b`` 1 and b."""
    inverted = _calls(node, aten.pow.Tensor_Scalar) and node.args[1] == -1
    if inverted or _calls(node, aten.reciprocal.default):
        return 1, node.args[0]
    if node.target is aten.div.Tensor:
        return node.args[0], node.args[1]
    if node.target is aten.mul.Tensor:
        for a, inverse in (node.args, node.args[::-1]):
            while _calls(inverse, aten.mul.Tensor) and inverse.args[1] == 1:  # 1 / b is 1 * (1 / b)
                inverse = inverse.args[0]
            if _calls(inverse, aten.reciprocal.default):
                return a, inverse.args[0]
    return None, None


def _form(node: fx.Node) -> tuple[str, torch.dtype]:
    value = node.meta["val"]
    return str(value.shape), value.dtype
