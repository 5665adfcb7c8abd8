"""Layer-wise relevance propagation the slow way: the oracle of the tests.

Dense matrices and the papers' sums, in numpy float64, one sample at a time. Nothing here is shared
with the library, neither code nor torch, so that both can only agree by being right.

A network is a list of nodes in order of execution. Each op is of one of four kinds:

    affine       z = W x + b, with W written out entry by entry and x all inputs, flat, end to end
    move         every output is a copy of one input, or a zero
    max pooling  a move whose sources depend on the input, or by a rule that shares among candidates
    activation   elementwise

Relevance rules of the affine ops have one form. The contribution n_ij of input j to output i is
set against a denominator d_i, and

    R_j = sum_i n_ij / stabilize(d_i) * R_i.

A node without a rule hands down its gradient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Shape = tuple[int, ...]
Params = dict[str, Any]
Rule = tuple[str, Params]
Stabilizer = float | Callable[[Array], Array]


@dataclass(frozen=True)
class Node:
    """One operation, in the terms of a single sample: no axis is the batch.

    The params of each op, with their defaults:

        input              (none)
        conv               weight (out, in / groups, *kernel), bias=None, stride=1, padding=0,
                           dilation=1, groups=1
        conv_transpose     weight (in, out / groups, *kernel), the params of conv, output_padding=0
        linear             weight (out, in), bias=None; acts on the last axis
        batch_norm         mean, var, weight=None, bias=None, eps=1e-5; axis 0 is the channel
        scale, shift       c, an array that is multiplied or added, with broadcasting
        add, sub           (none); two inputs, with broadcasting
        avg_pool           kernel, stride=kernel, padding=0, count_include_pad=True
        mean               axes, keepdims=False
        global_avg_pool    (none); every axis but the first becomes 1
        max_pool           kernel, stride=kernel, padding=0
        cat                axis
        slice              index, a tuple of slices and integers
        reshape, expand    shape
        permute, flip      axes
        roll               shifts, axes
        pad                widths, a pair (before, after) for every axis
        repeat             reps
        relu, tanh, gelu, silu, sigmoid, hardswish   (none)
        leaky_relu         negative_slope=0.01
        elu                alpha=1.0
        softplus           beta=1.0, threshold=20.0

    Attributes:
        op: Name of the operation.
        inputs: Indices of the nodes that it reads.
        params: Weights and settings.
        rule: Name and parameters of the relevance rule; None follows the gradient.
    """

    op: str
    inputs: tuple[int, ...] = ()
    params: Params = field(default_factory=dict)
    rule: Rule | None = None


# Networks -----------------------------------------------------------------------------------------


def forward(nodes: Sequence[Node], inputs: Sequence[Array]) -> list[Array]:
    """Return the value of every node; the input nodes take `inputs` in order."""
    given = iter(inputs)
    values: list[Array] = []
    for node in nodes:
        if node.op == "input":
            values.append(np.asarray(next(given), dtype=np.float64))
        else:
            values.append(_evaluate(node, [values[i] for i in node.inputs]))
    return values


def relevance(
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    seed: Array,
    kept: Mapping[int, Array] | None = None,
) -> list[Array]:
    """Return the relevance that arrives at every node when `seed` arrives at the last one.

    Of what arrives at a node in `kept` only that times this mask is handed on.
    """
    return _propagate(nodes, inputs, seed, kept)[0]


def absorbed(nodes: Sequence[Node], inputs: Sequence[Array], seed: Array) -> list[float]:
    """Return for every node the relevance that arrives minus what it hands to its inputs.

    Input nodes keep what they get and absorb nothing.
    """
    arriving, handed = _propagate(nodes, inputs, seed)
    return [
        0.0 if node.op == "input" else float(R.sum() - sum(r.sum() for r in parts))
        for node, R, parts in zip(nodes, arriving, handed, strict=True)
    ]


def _propagate(
    nodes: Sequence[Node],
    inputs: Sequence[Array],
    seed: Array,
    kept: Mapping[int, Array] | None = None,
) -> tuple[list[Array], list[list[Array]]]:
    """Return the relevance arriving at every node and the relevance it hands to each input."""
    values = forward(nodes, inputs)
    if np.shape(seed) != values[-1].shape:
        raise ValueError(f"seed has shape {np.shape(seed)}, the output has {values[-1].shape}")
    arriving = [np.zeros_like(value) for value in values]
    arriving[-1] += seed
    handed: list[list[Array]] = [[] for _ in nodes]
    for k in reversed(range(len(nodes))):
        node = nodes[k]
        if node.op == "input":
            continue
        R = arriving[k] * (kept or {}).get(k, 1.0)
        handed[k] = _hand_down(node, [values[i] for i in node.inputs], values[k], R)
        for i, part in zip(node.inputs, handed[k], strict=True):
            arriving[i] += part
    return arriving, handed


def _evaluate(node: Node, xs: Sequence[Array]) -> Array:
    if node.op in AFFINE:
        W, b, shape = matrix(node, [x.shape for x in xs])
        return (W @ _flat(xs) + b).reshape(shape)
    if node.op in ACTIVATIONS:
        return ACTIVATIONS[node.op][0](xs[0], **node.params)
    source = sources(node, xs)
    return np.where(source >= 0, _flat(xs)[source], 0.0)


def _hand_down(node: Node, xs: Sequence[Array], z: Array, R: Array) -> list[Array]:
    if node.op in AFFINE:
        return _split(_affine_relevance(node, xs, z, R), xs)
    if node.op in ACTIVATIONS:
        return [_activation_relevance(node, xs[0], R)]
    if node.op == "max_pool" and node.rule is not None and node.rule[0] in POOL_RULES:
        return [_pool_relevance(node, xs[0], R)]
    if node.rule is not None and node.rule[0] != "Gradient":
        raise ValueError(f"{node.op} follows the gradient, it has no rule {node.rule[0]}")
    source = sources(node, xs)
    r = np.zeros(sum(x.size for x in xs))
    np.add.at(r, source[source >= 0], R[source >= 0])
    return _split(r, xs)


def _flat(xs: Sequence[Array]) -> Array:
    return np.concatenate([x.ravel() for x in xs])


def _split(flat: Array, xs: Sequence[Array]) -> list[Array]:
    ends = np.cumsum([x.size for x in xs])
    return [part.reshape(x.shape) for part, x in zip(np.split(flat, ends[:-1]), xs, strict=True)]


# Rules of the affine ops --------------------------------------------------------------------------


def _affine_relevance(node: Node, xs: Sequence[Array], z: Array, R: Array) -> Array:
    shapes = [x.shape for x in xs]
    W, b, _ = matrix(node, shapes)
    name, given = node.rule if node.rule is not None else ("Gradient", {})
    params = dict(given)
    zero_params = params.pop("zero_params", None)
    if zero_params not in (None, "bias"):
        raise ValueError(f"zero_params is 'bias' or None, not {zero_params!r}")
    if zero_params == "bias":
        b = np.zeros_like(b)
    if name == "Flat":
        W = _ones(node, shapes)
    if name == "Pass" and [z.shape] != shapes:
        raise ValueError(f"Pass needs one input of the output's shape, {node.op} has {shapes}")
    for bound in {"low", "high"} & params.keys():
        params[bound] = np.broadcast_to(params[bound], shapes[0]).ravel()
    return AFFINE_RULES[name](W, b, _flat(xs), z.ravel(), R.ravel(), **params)


def _distribute(n: Array, d: Array, R: Array, stabilizer: Stabilizer) -> Array:
    """R_j = sum_i n_ij / stabilize(d_i) * R_i; where the denominator is 0, R_i is absorbed."""
    d = _stabilize(d, stabilizer)
    share = np.divide(n, d[:, None], out=np.zeros_like(n), where=d[:, None] != 0)
    r: Array = np.sum(share * R[:, None], axis=0)
    return r


def _stabilize(d: Array, stabilizer: Stabilizer) -> Array:
    if callable(stabilizer):
        return stabilizer(d)
    return d + stabilizer * np.where(d >= 0, 1.0, -1.0)


def _pos(t: Array) -> Array:
    return np.maximum(t, 0.0)


def _neg(t: Array) -> Array:
    return np.minimum(t, 0.0)


def _gradient(W: Array, b: Array, x: Array, z: Array, R: Array) -> Array:
    r: Array = np.sum(W * R[:, None], axis=0)
    return r


def _pass(W: Array, b: Array, x: Array, z: Array, R: Array) -> Array:
    return R


def _epsilon(W: Array, b: Array, x: Array, z: Array, R: Array, epsilon: Stabilizer = 1e-6) -> Array:
    # Without the bias (zero_params) the denominator is not z, hence the sum.
    c = W * x
    return _distribute(c, c.sum(axis=1) + b, R, epsilon)


def _norm(W: Array, b: Array, x: Array, z: Array, R: Array, stabilizer: Stabilizer = 1e-6) -> Array:
    return _epsilon(W, b, x, z, R, stabilizer)


def _z_plus(
    W: Array, b: Array, x: Array, z: Array, R: Array, stabilizer: Stabilizer = 1e-6
) -> Array:
    # w_ij x_j is positive where both are positive or both are negative.
    c = _pos(W * x)
    return _distribute(c, c.sum(axis=1) + _pos(b), R, stabilizer)


def _alpha_beta(
    W: Array,
    b: Array,
    x: Array,
    z: Array,
    R: Array,
    alpha: float = 2.0,
    beta: float = 1.0,
    stabilizer: Stabilizer = 1e-6,
) -> Array:
    excites, inhibits = _pos(W * x), _neg(W * x)
    positive = _distribute(excites, excites.sum(axis=1) + _pos(b), R, stabilizer)
    negative = _distribute(inhibits, inhibits.sum(axis=1) + _neg(b), R, stabilizer)
    return alpha * positive - beta * negative


def _gamma(
    W: Array,
    b: Array,
    x: Array,
    z: Array,
    R: Array,
    gamma: float = 0.25,
    stabilizer: Stabilizer = 1e-6,
) -> Array:
    # Contributions of the sign of the output are favoured; an output of exactly 0 has no sign, and
    # its relevance is absorbed. The sign is that of the true output, also under zero_params.
    c = W * x
    up, bias_up = c + gamma * _pos(c), b + gamma * _pos(b)
    down, bias_down = c + gamma * _neg(c), b + gamma * _neg(b)
    return _distribute(
        up, up.sum(axis=1) + bias_up, np.where(z > 0, R, 0.0), stabilizer
    ) + _distribute(down, down.sum(axis=1) + bias_down, np.where(z < 0, R, 0.0), stabilizer)


def _z_box(
    W: Array,
    b: Array,
    x: Array,
    z: Array,
    R: Array,
    low: Array,
    high: Array,
    stabilizer: Stabilizer = 1e-6,
) -> Array:
    # The denominator z - (W+ low + b+) - (W- high + b-) is the sum of the contributions.
    n = W * x - _pos(W) * low - _neg(W) * high
    return _distribute(n, n.sum(axis=1), R, stabilizer)


def _w_square(
    W: Array, b: Array, x: Array, z: Array, R: Array, stabilizer: Stabilizer = 1e-6
) -> Array:
    return _distribute(W**2, np.sum(W**2, axis=1) + b**2, R, stabilizer)


def _flat_rule(
    W: Array, b: Array, x: Array, z: Array, R: Array, stabilizer: Stabilizer = 1e-6
) -> Array:
    # W is what `_ones` returns.
    return _distribute(W, W.sum(axis=1), R, stabilizer)


def _sign(
    W: Array,
    b: Array,
    x: Array,
    z: Array,
    R: Array,
    mu: float = 0.0,
    epsilon: Stabilizer = 1e-6,
) -> Array:
    signs = np.where(x >= mu, 1.0, -1.0)
    return _distribute(W * signs, (W * x).sum(axis=1) + b, R, epsilon)


AFFINE_RULES: dict[str, Callable[..., Array]] = {
    "Gradient": _gradient,
    "Pass": _pass,
    "Epsilon": _epsilon,
    "Norm": _norm,
    "ZPlus": _z_plus,
    "AlphaBeta": _alpha_beta,
    "Gamma": _gamma,
    "ZBox": _z_box,
    "WSquare": _w_square,
    "Flat": _flat_rule,
    "Sign": _sign,
}


def _ones(node: Node, shapes: Sequence[Shape]) -> Array:
    """Return the matrix of the Flat rule.

    Weights become one, also those that are zero. Means keep their own coefficients, which matters
    only to the stabilizer; every other op gets ones where it has a coefficient.
    """
    if "weight" in node.params and node.op != "batch_norm":
        ones = {**node.params, "weight": np.ones_like(node.params["weight"])}
        return matrix(Node(node.op, params=ones), shapes)[0]
    W, _, _ = matrix(node, shapes)
    if node.op in ("avg_pool", "global_avg_pool", "mean"):
        return W
    return np.where(W != 0, 1.0, 0.0)


# Affine ops as dense matrices ---------------------------------------------------------------------


def matrix(node: Node, shapes: Sequence[Shape]) -> tuple[Array, Array, Shape]:
    """Return W (outputs x inputs), b (outputs) and the output's shape of an affine node.

    Args:
        node: A node whose op is in `AFFINE`.
        shapes: Shape of each of its inputs, which W takes flat and end to end.
    """
    W, b, shape = AFFINE[node.op](node.params, *shapes)
    return W.reshape(math.prod(shape), -1), b.ravel(), shape


def _conv(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    weight = params["weight"]
    channels_out, channels_group, *kernel = weight.shape
    stride, padding, dilation = _window(params, len(kernel))
    size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    )
    W = np.zeros((channels_out, *size, *shape))
    for out in range(channels_out):
        group = out // (channels_out // params.get("groups", 1))
        for o in np.ndindex(size):
            for tap in np.ndindex(*kernel):
                i = tuple(
                    a * s - p + t * d
                    for a, t, s, p, d in zip(o, tap, stride, padding, dilation, strict=True)
                )
                if not _inside(i, shape[1:]):
                    continue
                for c in range(channels_group):
                    W[(out, *o, group * channels_group + c, *i)] = weight[(out, c, *tap)]
    return W, _bias(params, (channels_out, *size)), (channels_out, *size)


def _conv_transpose(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    weight = params["weight"]
    channels_in, channels_group, *kernel = weight.shape
    groups = params.get("groups", 1)
    stride, padding, dilation = _window(params, len(kernel))
    extra = _each(params.get("output_padding", 0), len(kernel))
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, k, s, p, d, e in zip(
            shape[1:], kernel, stride, padding, dilation, extra, strict=True
        )
    )
    channels_out = groups * channels_group
    W = np.zeros((channels_out, *size, *shape))
    for c in range(channels_in):
        group = c // (channels_in // groups)
        for i in np.ndindex(*shape[1:]):
            for tap in np.ndindex(*kernel):
                o = tuple(
                    a * s - p + t * d
                    for a, t, s, p, d in zip(i, tap, stride, padding, dilation, strict=True)
                )
                if not _inside(o, size):
                    continue
                for out in range(channels_group):
                    W[(group * channels_group + out, *o, c, *i)] = weight[(c, out, *tap)]
    return W, _bias(params, (channels_out, *size)), (channels_out, *size)


def _linear(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    weight = params["weight"]
    size = (*shape[:-1], weight.shape[0])
    W = np.zeros((*size, *shape))
    for row in np.ndindex(*shape[:-1]):
        for out, c in np.ndindex(*weight.shape):
            W[(*row, out, *row, c)] = weight[out, c]
    bias = params.get("bias")
    return W, np.broadcast_to(0.0 if bias is None else bias, size), size


def _batch_norm(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    mean, var = params["mean"], params["var"]
    weight, bias = params.get("weight"), params.get("bias")
    factor = (1.0 if weight is None else weight) / np.sqrt(var + params.get("eps", 1e-5))
    offset = (0.0 if bias is None else bias) - factor * mean
    per_channel = (-1, *[1] * (len(shape) - 1))
    W, _, _ = _scale({"c": factor.reshape(per_channel)}, shape)
    return W, np.broadcast_to(offset.reshape(per_channel), shape), shape


def _scale(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    size = np.broadcast_shapes(shape, params["c"].shape)
    W = np.broadcast_to(params["c"], size).reshape(-1, 1) * _spread(shape, size)
    return W, np.zeros(size), size


def _shift(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    size = np.broadcast_shapes(shape, params["c"].shape)
    return _spread(shape, size), np.broadcast_to(params["c"], size), size


def _add(params: Params, left: Shape, right: Shape) -> tuple[Array, Array, Shape]:
    size = np.broadcast_shapes(left, right)
    return np.hstack([_spread(left, size), _spread(right, size)]), np.zeros(size), size


def _sub(params: Params, left: Shape, right: Shape) -> tuple[Array, Array, Shape]:
    size = np.broadcast_shapes(left, right)
    return np.hstack([_spread(left, size), -_spread(right, size)]), np.zeros(size), size


def _avg_pool(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    size, covered = windows(params, shape)
    W = np.zeros((*size, *shape))
    for o, window in covered.items():
        padded = math.prod(_each(params["kernel"], len(shape) - 1))
        count = padded if params.get("count_include_pad", True) else len(window)
        for i in window:
            W[(*o, *i)] = 1.0 / count
    return W, np.zeros(size), size


def _mean(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    axes = {axis % len(shape) for axis in params["axes"]}
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    W = np.zeros((*kept, *shape))
    for i in np.ndindex(*shape):
        o = tuple(0 if axis in axes else a for axis, a in enumerate(i))
        W[(*o, *i)] = 1.0 / math.prod(shape[axis] for axis in axes)
    dropped = tuple(n for axis, n in enumerate(shape) if axis not in axes)
    size = kept if params.get("keepdims", False) else dropped
    return W, np.zeros(size), size


def _global_avg_pool(params: Params, shape: Shape) -> tuple[Array, Array, Shape]:
    return _mean({"axes": tuple(range(1, len(shape))), "keepdims": True}, shape)


AFFINE: dict[str, Callable[..., tuple[Array, Array, Shape]]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "shift": _shift,
    "add": _add,
    "sub": _sub,
    "avg_pool": _avg_pool,
    "mean": _mean,
    "global_avg_pool": _global_avg_pool,
}


def _bias(params: Params, shape: Shape) -> Array:
    """Return the bias of a convolution, one number per channel, at every output."""
    b = np.zeros(shape)
    if params.get("bias") is not None:
        for channel, value in enumerate(params["bias"]):
            b[channel] = value
    return b


def _spread(shape: Shape, size: Shape) -> Array:
    """Return the matrix that broadcasts an array of `shape` to `size`."""
    W = np.zeros((math.prod(size), math.prod(shape)))
    source = np.arange(math.prod(shape)).reshape(shape)
    for o, i in enumerate(np.broadcast_to(source, size).ravel()):
        W[o, i] = 1.0
    return W


def windows(params: Params, shape: Shape) -> tuple[Shape, dict[Shape, list[Shape]]]:
    """Return the output's shape of a pooling, and for every output the inputs in its window."""
    kernel = _each(params["kernel"], len(shape) - 1)
    stride, padding, _ = _window({"stride": kernel, **params}, len(kernel))
    size = tuple(
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True)
    )
    covered = {}
    for channel, *o in np.ndindex(shape[0], *size):
        taps = [
            tuple(a * s - p + t for a, s, p, t in zip(o, stride, padding, tap, strict=True))
            for tap in np.ndindex(kernel)
        ]
        covered[(channel, *o)] = [(channel, *i) for i in taps if _inside(i, shape[1:])]
    return (shape[0], *size), covered


def _window(params: Params, axes: int) -> tuple[Shape, Shape, Shape]:
    """Return stride, padding and dilation, a number per spatial axis each."""
    return (
        _each(params.get("stride", 1), axes),
        _each(params.get("padding", 0), axes),
        _each(params.get("dilation", 1), axes),
    )


def _each(setting: int | Sequence[int], axes: int) -> Shape:
    return (setting,) * axes if isinstance(setting, int) else tuple(setting)


def _inside(i: Shape, shape: Shape) -> bool:
    return all(0 <= a < n for a, n in zip(i, shape, strict=True))


# Moves and max pooling ----------------------------------------------------------------------------


def sources(node: Node, xs: Sequence[Array]) -> Index:
    """Return for every output of a move the input that it copies, or -1 where it is a zero.

    Inputs are numbered flat and end to end. The move itself is made on these numbers.
    """
    starts = np.cumsum([0, *[x.size for x in xs]])
    numbers = [
        start + np.arange(x.size).reshape(x.shape) for start, x in zip(starts[:-1], xs, strict=True)
    ]
    if node.op == "max_pool":
        return _winners(node.params, xs[0], numbers[0])
    return np.asarray(MOVES[node.op](node.params, *numbers))


def _winners(params: Params, x: Array, numbers: Index) -> Index:
    size, covered = windows(params, x.shape)
    source = np.zeros(size, dtype=np.int64)
    for o, window in covered.items():
        # The windows leave the padding out, so it cannot win; max keeps the first of equals.
        source[o] = numbers[max(window, key=x.__getitem__)]
    return source


MOVES: dict[str, Callable[..., Index]] = {
    "cat": lambda params, *numbers: np.concatenate(numbers, params["axis"]),
    "slice": lambda params, numbers: numbers[params["index"]],
    "reshape": lambda params, numbers: numbers.reshape(params["shape"]),
    "permute": lambda params, numbers: np.transpose(numbers, params["axes"]),
    "flip": lambda params, numbers: np.flip(numbers, params["axes"]),
    "roll": lambda params, numbers: np.roll(numbers, params["shifts"], params["axes"]),
    "pad": lambda params, numbers: np.pad(numbers, params["widths"], constant_values=-1),
    "expand": lambda params, numbers: np.broadcast_to(numbers, params["shape"]),
    "repeat": lambda params, numbers: np.tile(numbers, params["reps"]),
}


def _pool_relevance(node: Node, x: Array, R: Array) -> Array:
    assert node.rule is not None
    name, params = node.rule
    r = np.zeros_like(x)
    for o, window in windows(node.params, x.shape)[1].items():
        shares = POOL_RULES[name](np.array([x[i] for i in window]), **params)
        for i, share in zip(window, shares, strict=True):
            r[i] += share * R[o]
    return r


def _smooth_pool(x: Array, stabilizer: Stabilizer = 1e-6) -> Array:
    (d,) = _stabilize(np.array([x.sum()]), stabilizer)
    return x / d if d else np.zeros_like(x)


def _take_most(x: Array, beta: float = 1.0) -> Array:
    e = np.exp(beta * (x - x.max()))
    share: Array = e / e.sum()
    return share


# What each candidate of one output gets of its relevance.
POOL_RULES: dict[str, Callable[..., Array]] = {
    "SmoothPool": _smooth_pool,
    "TakeMost": _take_most,
}


# Activations --------------------------------------------------------------------------------------


def _activation_relevance(node: Node, x: Array, R: Array) -> Array:
    name, params = node.rule if node.rule is not None else ("Gradient", {})
    if name == "Gradient":
        return ACTIVATIONS[node.op][1](x, **node.params) * R
    if name == "Pass":
        return R
    if node.op != "relu":
        raise ValueError(f"{name} is no rule for {node.op}")
    return RELU_RULES[name](x, R, **params)


def _deconvnet(x: Array, R: Array) -> Array:
    return _pos(R)


def _guided_backprop(x: Array, R: Array) -> Array:
    return np.where((x > 0) & (R > 0), R, 0.0)


def _beta_smooth(x: Array, R: Array, beta_smooth: float = 10.0) -> Array:
    return R * _sigmoid(beta_smooth * x)


RELU_RULES: dict[str, Callable[..., Array]] = {
    "ReLUDeconvNet": _deconvnet,
    "ReLUGuidedBackprop": _guided_backprop,
    "ReLUBetaSmooth": _beta_smooth,
}


def _relu_slope(x: Array) -> Array:
    return np.where(x > 0, 1.0, 0.0)


def _leaky_relu(x: Array, negative_slope: float = 0.01) -> Array:
    return np.where(x > 0, x, negative_slope * x)


def _leaky_relu_slope(x: Array, negative_slope: float = 0.01) -> Array:
    return np.where(x > 0, 1.0, negative_slope)


def _normal_cdf(x: Array) -> Array:
    erf: Array = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0))
    return 0.5 * (1.0 + erf)


def _gelu(x: Array) -> Array:
    return x * _normal_cdf(x)


def _gelu_slope(x: Array) -> Array:
    return _normal_cdf(x) + x * np.exp(-(x**2) / 2.0) / math.sqrt(2.0 * math.pi)


def _sigmoid(x: Array) -> Array:
    # The hyperbolic form of 1 / (1 + exp(-x)) cannot overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _sigmoid_slope(x: Array) -> Array:
    return _sigmoid(x) * (1.0 - _sigmoid(x))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _silu_slope(x: Array) -> Array:
    return _sigmoid(x) + x * _sigmoid_slope(x)


def _tanh_slope(x: Array) -> Array:
    return 1.0 - np.tanh(x) ** 2


def _softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    return np.where(beta * x > threshold, x, np.logaddexp(0.0, beta * x) / beta)


def _softplus_slope(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    return np.where(beta * x > threshold, 1.0, _sigmoid(beta * x))


def _elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(_neg(x)))


def _elu_slope(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, 1.0, alpha * np.exp(_neg(x)))


def _hardswish(x: Array) -> Array:
    gate: Array = np.clip(x + 3.0, 0.0, 6.0) / 6.0
    return x * gate


def _hardswish_slope(x: Array) -> Array:
    # At the kinks torch takes the flat slope on the left and the slope of x on the right.
    return np.where(x <= -3.0, 0.0, np.where(x >= 3.0, 1.0, x / 3.0 + 0.5))


# Each activation and its derivative.
ACTIVATIONS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "relu": (_pos, _relu_slope),
    "leaky_relu": (_leaky_relu, _leaky_relu_slope),
    "gelu": (_gelu, _gelu_slope),
    "silu": (_silu, _silu_slope),
    "tanh": (np.tanh, _tanh_slope),
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "softplus": (_softplus, _softplus_slope),
    "elu": (_elu, _elu_slope),
    "hardswish": (_hardswish, _hardswish_slope),
}
