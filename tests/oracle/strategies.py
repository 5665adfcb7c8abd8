"""Random small networks for hypothesis, and their twins in torch.

Hypothesis draws the structure of a network, numpy its numbers, from a seed that hypothesis draws,
so that a failing example shrinks to few nodes instead of to round numbers. Weights and inputs are
multiples of 1/8: zeros, dead units, ties and outputs that cancel to exactly zero are common then,
and they are the same zeros and ties in whatever order the sums are taken.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.oracle import reference
from tests.oracle.reference import Array, Node, Params, Rule, Shape

STEP = 0.125
MAX_CHANNELS = 4
MAX_LENGTH = 6
MAX_FEATURES = 12

PIECEWISE_LINEAR = ("relu", "leaky_relu")
SPELLINGS = ("modules", "functional", "inplace")


# Networks -----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Network:
    """A network of reference nodes, and a batch of samples to run it on.

    Nodes that share their parameters hold the same `params` object; see `owners`.

    Attributes:
        nodes: The nodes in order of execution; the last is the output, a vector of classes.
        inputs: One array for each input node, with the samples on axis 0.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Array, ...]

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shape of every node's value, without the batch."""
        return tuple(value.shape for value in reference.forward(self.nodes, self.sample(0)))

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For every node the first one with the same parameters: itself, unless shared."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(id(node.params), k) for k, node in enumerate(self.nodes))

    @property
    def samples(self) -> int:
        """Number of samples in the batch."""
        return len(self.inputs[0])

    def sample(self, k: int) -> tuple[Array, ...]:
        """Return the inputs of sample k."""
        return tuple(batch[k] for batch in self.inputs)

    def forward(self) -> list[Array]:
        """Return the value of every node for the whole batch."""
        runs = [reference.forward(self.nodes, self.sample(k)) for k in range(self.samples)]
        return [np.stack(values) for values in zip(*runs, strict=True)]

    def relevance(self, seed: Array, kept: Mapping[int, Array] | None = None) -> list[Array]:
        """Return the relevance of every node for the whole batch; `seed` has a row per sample."""
        runs = [
            reference.relevance(self.nodes, self.sample(k), seed[k], kept)
            for k in range(self.samples)
        ]
        return [np.stack(values) for values in zip(*runs, strict=True)]

    def with_rules(self, rules: Sequence[Rule | None]) -> "Network":
        """Return the network with these rules, one for each node."""
        nodes = [replace(node, rule=rule) for node, rule in zip(self.nodes, rules, strict=True)]
        return replace(self, nodes=tuple(nodes))

    def __repr__(self) -> str:
        """Return one line for each node, with shapes in place of arrays."""
        lines = [f"Network, {self.samples} samples:"]
        for k, node in enumerate(self.nodes):
            params = ", ".join(f"{name}={_brief(value)}" for name, value in node.params.items())
            shared = f" = node {self.owners[k]}" if self.owners[k] != k else ""
            rule = f"  {node.rule[0]}({_brief(node.rule[1])})" if node.rule is not None else ""
            lines.append(
                f"  {k}: {node.op}{list(node.inputs)} {self.shapes[k]}{shared} {params}{rule}"
            )
        return "\n".join(lines)


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_brief(item)}" for name, item in value.items())
    return f"array{value.shape}" if isinstance(value, np.ndarray) else str(value)


class _Builder:
    """The network under construction, whose last node is the one that the next block reads."""

    def __init__(self, rng: np.random.Generator, bias: bool, activations: Sequence[str]) -> None:
        self.rng = rng
        self.bias = bias
        self.activations = activations
        self.nodes: list[Node] = []
        self.shapes: list[Shape] = []

    @property
    def last(self) -> int:
        return len(self.nodes) - 1

    @property
    def shape(self) -> Shape:
        return self.shapes[-1]

    def append(self, op: str, inputs: Sequence[int] = (), **params: Any) -> None:
        self.append_node(Node(op, tuple(inputs) or (self.last,), params))

    def append_input(self, shape: Shape) -> None:
        self.nodes.append(Node("input"))
        self.shapes.append(shape)

    def append_node(self, node: Node) -> None:
        # The shape of a value does not depend on the numbers.
        blank = [np.zeros(self.shapes[i]) for i in node.inputs]
        alone = replace(node, inputs=tuple(range(len(blank))))
        chain = [*(Node("input") for _ in blank), alone]
        self.nodes.append(node)
        self.shapes.append(reference.forward(chain, blank)[-1].shape)

    def numbers(self, shape: Shape, bound: float = 1.0) -> Array:
        """Return multiples of 1/8 between -bound and bound, a quarter of them set to zero."""
        steps = round(bound / STEP)
        drawn = self.rng.integers(-steps, steps + 1, shape) * STEP
        return np.where(self.rng.random(shape) < 0.25, 0.0, drawn)

    def weights(self, draw: st.DrawFn, shape: Shape, outputs: int) -> Params:
        """Return weight and bias of a layer; now and then a unit has no weights."""
        weight = self.numbers(shape)
        weight[self.rng.random(shape[0]) < 0.1] = 0.0
        if not self.bias or not draw(st.booleans()):
            return {"weight": weight, "bias": None}
        # A bias of -4 makes a unit that a ReLU keeps silent.
        bias = np.where(self.rng.random(outputs) < 0.1, -4.0, self.numbers((outputs,)))
        return {"weight": weight, "bias": bias}


def _fits(shape: Shape) -> bool:
    if len(shape) == 1:
        return 1 <= shape[0] <= MAX_FEATURES
    return len(shape) <= 3 and shape[0] <= MAX_CHANNELS and max(shape[1:]) <= MAX_LENGTH


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    blocks: Sequence[str] | None = None,
    activations: Sequence[str] = tuple(reference.ACTIVATIONS),
    bias: bool = True,
    max_blocks: int = 6,
    max_inputs: int = 1,
    ndims: Sequence[int] = (1, 2, 3),
    classes: int = 3,
) -> Network:
    """Draw a network whose every decision is well posed; see `well_posed`.

    Args:
        draw: Given by hypothesis.
        blocks: Names of the blocks to draw from, all of `BLOCKS` by default.
        activations: Ops that the blocks may use as activations.
        bias: Whether layers may have biases; False also leaves out shifts and batch norms.
        max_blocks: Largest number of blocks between input and output.
        max_inputs: Largest number of inputs; they are joined at once.
        ndims: Numbers of axes of a sample: 1 for features, 2 for a sequence, 3 for an image.
        classes: Length of the output.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    net = _Builder(rng, bias, activations)
    allowed = [name for name in blocks or BLOCKS if bias or name not in WITH_OFFSET]
    ndim = draw(st.sampled_from(ndims))
    length = st.integers(2, MAX_LENGTH)
    shape = tuple(draw(length) for _ in range(ndim))
    if ndim > 1:
        shape = (draw(st.integers(1, 3)), *shape[1:])
    n_inputs = draw(st.integers(1, max_inputs))
    for _ in range(n_inputs):
        net.append_input(shape)
    for k in range(1, n_inputs):
        net.append(draw(st.sampled_from(("add", "sub"))), (net.last, k))
    for _ in range(draw(st.integers(0, max_blocks))):
        legal = [name for name in allowed if BLOCKS[name][0](net)]
        if not legal:
            break
        BLOCKS[draw(st.sampled_from(legal))][1](draw, net)
    if len(net.shape) > 1:
        net.append("reshape", shape=(math.prod(net.shape),))
    net.append("linear", **net.weights(draw, (classes, *net.shape), classes))
    samples = draw(st.integers(2, 3))
    network = Network(
        tuple(net.nodes), tuple(net.numbers((samples, *shape), 2.0) for _ in range(n_inputs))
    )
    assume(well_posed(network))
    return network


# Blocks -------------------------------------------------------------------------------------------


def _conv(draw: st.DrawFn, net: _Builder) -> None:
    channels, *size = net.shape
    out = draw(st.integers(1, MAX_CHANNELS))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == out % g == 0]))
    kernel, stride, padding, dilation = [], [], [], []
    for n in size:
        k = draw(st.integers(1, min(3, n)))
        # Padding by more than half of the kernel would let the size grow from layer to layer.
        p = draw(st.integers(0, (k - 1) // 2 if n == MAX_LENGTH else k // 2))
        d = draw(st.integers(1, 2))
        kernel.append(k)
        stride.append(draw(st.integers(1, 2)))
        padding.append(p)
        dilation.append(d if d * (k - 1) < n + 2 * p else 1)
    net.append(
        "conv",
        **net.weights(draw, (out, channels // groups, *kernel), out),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
    )


def _conv_transpose(draw: st.DrawFn, net: _Builder) -> None:
    channels, *size = net.shape
    out = draw(st.integers(1, MAX_CHANNELS))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == out % g == 0]))
    kernel, stride, padding, extra = [], [], [], []
    for n in size:
        # The output has (n - 1) stride + kernel + extra - 2 padding entries, which have to fit.
        s = draw(st.integers(1, 2 if 2 * (n - 1) < MAX_LENGTH else 1))
        room = MAX_LENGTH - (n - 1) * s
        k = draw(st.integers(1, min(3, room)))
        kernel.append(k)
        stride.append(s)
        padding.append(draw(st.integers(0, (k - 1) // 2)))
        extra.append(draw(st.integers(0, min(s - 1, room - k))))
    net.append(
        "conv_transpose",
        **net.weights(draw, (channels, out // groups, *kernel), out),
        stride=tuple(stride),
        padding=tuple(padding),
        output_padding=tuple(extra),
        dilation=(1,) * len(size),
        groups=groups,
    )


def _same_shape_layer(draw: st.DrawFn, net: _Builder) -> None:
    """Append a convolution or linear layer whose output has the shape of its input."""
    channels, *size = net.shape
    if not size:
        net.append("linear", **net.weights(draw, (channels, channels), channels))
        return
    k = draw(st.sampled_from((1, 3)))
    net.append(
        "conv",
        **net.weights(draw, (channels, channels, *[k] * len(size)), channels),
        stride=(1,) * len(size),
        padding=(k // 2,) * len(size),
        dilation=(1,) * len(size),
        groups=1,
    )


def _linear(draw: st.DrawFn, net: _Builder) -> None:
    out = draw(st.integers(1, MAX_CHANNELS))
    net.append("linear", **net.weights(draw, (out, net.shape[-1]), out))


def _batch_norm(draw: st.DrawFn, net: _Builder) -> None:
    # Statistics off the grid: a channel that cancelled to zero would do so only up to round-off.
    channels = (net.shape[0],)
    affine = draw(st.booleans())
    net.append(
        "batch_norm",
        mean=net.rng.normal(size=channels),
        var=net.rng.uniform(0.5, 2.0, channels),
        weight=net.rng.normal(size=channels) if affine else None,
        bias=net.rng.normal(size=channels) if affine else None,
        eps=draw(st.sampled_from((1e-5, 1e-3))),
    )


def _conv_batch_norm(draw: st.DrawFn, net: _Builder) -> None:
    _conv(draw, net)
    _batch_norm(draw, net)


def _activation(draw: st.DrawFn, net: _Builder) -> None:
    op = draw(st.sampled_from(list(net.activations)))
    params: Params = {}
    if op == "leaky_relu":
        params["negative_slope"] = draw(st.sampled_from((0.25, 0.01)))
    elif op == "elu":
        params["alpha"] = draw(st.sampled_from((1.0, 0.5)))
    elif op == "softplus":
        params["beta"] = draw(st.sampled_from((1.0, 2.0)))
    net.append(op, **params)


def _residual(draw: st.DrawFn, net: _Builder) -> None:
    skip = net.last
    _same_shape_layer(draw, net)
    if bool(net.activations) and draw(st.booleans()):
        _activation(draw, net)
        _same_shape_layer(draw, net)
    net.append(draw(st.sampled_from(("add", "sub"))), draw(st.permutations((skip, net.last))))


def _shared(draw: st.DrawFn, net: _Builder) -> None:
    """Append a layer and an activation, and then the same two once more."""
    _same_shape_layer(draw, net)
    _activation(draw, net)
    layer, activation = net.nodes[-2:]
    for node in (layer, activation):
        net.append_node(replace(node, inputs=(net.last,)))


def _skip(draw: st.DrawFn, net: _Builder) -> None:
    earlier = draw(st.sampled_from(_same_shape(net)))
    net.append(draw(st.sampled_from(("add", "sub"))), draw(st.permutations((earlier, net.last))))


def _same_shape(net: _Builder) -> list[int]:
    return [k for k in range(net.last) if net.shapes[k] == net.shape]


def _cat(draw: st.DrawFn, net: _Builder) -> None:
    earlier, axis = draw(st.sampled_from(_catenable(net)))
    net.append("cat", draw(st.permutations((earlier, net.last))), axis=axis)


def _catenable(net: _Builder) -> list[tuple[int, int]]:
    """Return the nodes and axes along which the last node can be prolonged, also by itself."""
    return [
        (k, axis)
        for k, shape in enumerate(net.shapes)
        for axis in range(len(net.shape))
        if len(shape) == len(net.shape)
        and shape[:axis] + shape[axis + 1 :] == net.shape[:axis] + net.shape[axis + 1 :]
        and _fits((*shape[:axis], shape[axis] + net.shape[axis], *shape[axis + 1 :]))
    ]


def _broadcast(draw: st.DrawFn, net: _Builder) -> None:
    """Append the sum with a mean that is broadcast."""
    whole = net.last
    net.append("mean", axes=(draw(st.sampled_from(_long_axes(net))),), keepdims=True)
    net.append(draw(st.sampled_from(("add", "sub"))), draw(st.permutations((whole, net.last))))


def _long_axes(net: _Builder) -> list[int]:
    return [axis for axis, n in enumerate(net.shape) if n > 1]


def _pool_settings(draw: st.DrawFn, net: _Builder) -> Params:
    kernel = tuple(draw(st.integers(1, min(3, n))) for n in net.shape[1:])
    return {
        "kernel": kernel,
        "stride": tuple(draw(st.integers(1, 2)) for _ in kernel),
        # An even kernel that is padded would let the size grow.
        "padding": tuple(draw(st.integers(0, (k - 1) // 2)) for k in kernel),
    }


def _max_pool(draw: st.DrawFn, net: _Builder) -> None:
    net.append("max_pool", **_pool_settings(draw, net))


def _avg_pool(draw: st.DrawFn, net: _Builder) -> None:
    net.append("avg_pool", **_pool_settings(draw, net), count_include_pad=draw(st.booleans()))


def _global_avg_pool(draw: st.DrawFn, net: _Builder) -> None:
    net.append("global_avg_pool")


def _mean(draw: st.DrawFn, net: _Builder) -> None:
    keepdims = len(net.shape) == 1 or draw(st.booleans())
    most = len(net.shape) if keepdims else len(net.shape) - 1
    axes = draw(st.sets(st.integers(0, len(net.shape) - 1), min_size=1, max_size=most))
    net.append("mean", axes=tuple(sorted(axes)), keepdims=keepdims)


def _scale(draw: st.DrawFn, net: _Builder) -> None:
    net.append("scale", c=net.numbers(_constant_shape(draw, net), 2.0))


def _shift(draw: st.DrawFn, net: _Builder) -> None:
    net.append("shift", c=net.numbers(_constant_shape(draw, net)))


def _constant_shape(draw: st.DrawFn, net: _Builder) -> Shape:
    per_channel = (net.shape[0], *[1] * (len(net.shape) - 1))
    return draw(st.sampled_from(((), per_channel, net.shape)))


def _slice(draw: st.DrawFn, net: _Builder) -> None:
    axis = draw(st.integers(0, len(net.shape) - 1))
    n = net.shape[axis]
    index: list[slice | int] = [slice(None)] * len(net.shape)
    if len(net.shape) > 1 and draw(st.booleans()):
        index[axis] = draw(st.integers(0, n - 1))
    else:
        start = draw(st.integers(0, n - 1))
        index[axis] = slice(start, draw(st.integers(start + 1, n)), draw(st.integers(1, 2)))
    net.append("slice", index=tuple(index))


def _flip(draw: st.DrawFn, net: _Builder) -> None:
    axes = draw(st.sets(st.integers(0, len(net.shape) - 1), min_size=1))
    net.append("flip", axes=tuple(sorted(axes)))


def _roll(draw: st.DrawFn, net: _Builder) -> None:
    axis = draw(st.integers(0, len(net.shape) - 1))
    net.append("roll", shifts=(draw(st.sampled_from((-1, 1, 2))),), axes=(axis,))


def _pad(draw: st.DrawFn, net: _Builder) -> None:
    axis = draw(st.sampled_from(_growable(net, 1)))
    room = 2 if axis in _growable(net, 2) else 1
    before = draw(st.integers(0, room))
    widths = [(0, 0)] * len(net.shape)
    widths[axis] = (before, draw(st.integers(0, room - before)))
    net.append("pad", widths=tuple(widths))


def _growable(net: _Builder, more: int) -> list[int]:
    """Return the axes that may become longer by this much."""
    shape = net.shape
    return [k for k, n in enumerate(shape) if _fits((*shape[:k], n + more, *shape[k + 1 :]))]


def _reshape(draw: st.DrawFn, net: _Builder) -> None:
    net.append("reshape", shape=draw(st.sampled_from(_reshapes(net))))


def _reshapes(net: _Builder) -> list[Shape]:
    size = math.prod(net.shape)
    candidates = itertools.chain.from_iterable(
        itertools.product(range(1, MAX_FEATURES + 1), repeat=ndim) for ndim in (1, 2, 3)
    )
    return [shape for shape in candidates if math.prod(shape) == size and _fits(shape)]


def _permute(draw: st.DrawFn, net: _Builder) -> None:
    net.append("permute", axes=draw(st.sampled_from(_permutations(net))))


def _permutations(net: _Builder) -> list[Shape]:
    return [
        axes
        for axes in itertools.permutations(range(len(net.shape)))
        if _fits(tuple(net.shape[axis] for axis in axes))
    ]


def _expand(draw: st.DrawFn, net: _Builder) -> None:
    """Append an expansion of an axis of length one, or of a new axis in front."""
    axis = draw(st.sampled_from(_expandable(net)))
    n = draw(st.integers(2, 3))
    shape = (n, *net.shape) if axis < 0 else (*net.shape[:axis], n, *net.shape[axis + 1 :])
    net.append("expand", shape=shape)


def _expandable(net: _Builder) -> list[int]:
    front = [-1] if _fits((3, *net.shape)) else []
    return [*front, *(axis for axis in _growable(net, 2) if net.shape[axis] == 1)]


def _repeat(draw: st.DrawFn, net: _Builder) -> None:
    axis = draw(st.sampled_from(_repeatable(net)))
    net.append("repeat", reps=tuple(2 if k == axis else 1 for k in range(len(net.shape))))


def _repeatable(net: _Builder) -> list[int]:
    return [axis for axis, n in enumerate(net.shape) if axis in _growable(net, n)]


def _always(net: _Builder) -> bool:
    return True


def _has_space(net: _Builder) -> bool:
    return len(net.shape) > 1


# What a network must offer for the block to be appended, and the block.
BLOCKS: dict[str, tuple[Callable[[_Builder], object], Callable[[st.DrawFn, _Builder], None]]] = {
    "activation": (lambda net: net.activations, _activation),
    "linear": (_always, _linear),
    "conv": (_has_space, _conv),
    "conv_batch_norm": (_has_space, _conv_batch_norm),
    "conv_transpose": (_has_space, _conv_transpose),
    "batch_norm": (_always, _batch_norm),
    "residual": (_always, _residual),
    "shared": (lambda net: net.activations, _shared),
    "skip": (_same_shape, _skip),
    "cat": (_catenable, _cat),
    "broadcast": (_long_axes, _broadcast),
    "max_pool": (_has_space, _max_pool),
    "avg_pool": (_has_space, _avg_pool),
    "global_avg_pool": (_has_space, _global_avg_pool),
    "mean": (_always, _mean),
    "scale": (_always, _scale),
    "shift": (_always, _shift),
    "slice": (_always, _slice),
    "flip": (_always, _flip),
    "roll": (_always, _roll),
    "pad": (lambda net: _growable(net, 1), _pad),
    "reshape": (_reshapes, _reshape),
    "permute": (_permutations, _permute),
    "expand": (_expandable, _expand),
    "repeat": (_repeatable, _repeat),
}

# Blocks that add a constant.
WITH_OFFSET = ("batch_norm", "conv_batch_norm", "shift")


# Well-posedness -----------------------------------------------------------------------------------


def well_posed(network: Network) -> bool:
    """Tell whether round-off cannot turn any decision that the network or a rule takes.

    ReLU, the winner of a pool, the sign of the stabilizer and the gate of Gamma jump at a
    boundary. A sum that is zero in one order of summation and 1e-17 in another falls on either
    side, and both answers are right. So every affine output, with its bias and without, and every
    lead of a winner must be far from zero, or be exact: made of multiples of a power of two, where
    no sum rounds.
    """
    return all(_sample_well_posed(network, network.sample(k)) for k in range(network.samples))


def _sample_well_posed(network: Network, inputs: Sequence[Array]) -> bool:
    values = reference.forward(network.nodes, inputs)
    exact: list[NDArray[np.bool_]] = []
    for node, value in zip(network.nodes, values, strict=True):
        xs = [values[i] for i in node.inputs]
        known = [exact[i] for i in node.inputs]
        if node.op == "input":
            exact.append(np.full(value.shape, True))
        elif node.op in reference.AFFINE:
            rounds_not = _exact_sums(node, xs, known)
            if rounds_not is None:
                return False
            exact.append(rounds_not.reshape(value.shape))
        elif node.op in reference.ACTIVATIONS:
            linear = node.op in PIECEWISE_LINEAR and known[0] & _on_grid(value)
            dead = node.op == "relu" and xs[0] < 0
            exact.append(linear | dead | (known[0] & (xs[0] == 0) & (value == 0)))
        else:
            if node.op == "max_pool" and not _clear_pool(node, xs[0], known[0]):
                return False
            source = reference.sources(node, xs)
            flat = np.concatenate([mask.ravel() for mask in known])
            exact.append((source < 0) | flat[source])
    return True


def _exact_sums(
    node: Node, xs: Sequence[Array], known: Sequence[NDArray[np.bool_]]
) -> NDArray[np.bool_] | None:
    """Return which outputs of an affine node are exact; None if another one is close to zero."""
    W, b, _ = reference.matrix(node, [x.shape for x in xs])
    x = np.concatenate([x.ravel() for x in xs])
    x_exact = np.concatenate([mask.ravel() for mask in known])
    terms = W * x
    nothing = (W == 0) | (x_exact & (x == 0))
    exact_terms = nothing | (x_exact & _on_grid(W) & _on_grid(terms))
    size = np.abs(terms).sum(axis=1)
    exact = exact_terms.all(axis=1) & (size < 2.0**8)
    exact_with_bias: NDArray[np.bool_] = exact & _on_grid(b)
    far = np.abs(terms.sum(axis=1)) > 1e-6 * size
    far_with_bias = np.abs(terms.sum(axis=1) + b) > 1e-6 * (size + np.abs(b))
    if not np.all((exact | far) & (exact_with_bias | far_with_bias)):
        return None
    return exact_with_bias


def _on_grid(a: Array) -> NDArray[np.bool_]:
    # Sums of such numbers below 2**8 fit into the 53 bits of a float64.
    scaled = a * 2.0**44
    whole: NDArray[np.bool_] = scaled == np.round(scaled)
    return whole


def _clear_pool(node: Node, x: Array, known: NDArray[np.bool_]) -> bool:
    """Tell whether winners are clear, and so is the sign of the sum over each window."""
    for window in reference.windows(node.params, x.shape)[1].values():
        ranked = sorted((x[i] for i in window), reverse=True)
        tied = [i for i in window if x[i] >= ranked[0] - 1e-6]
        if len(tied) > 1 and not all(known[i] for i in tied):
            return False
        if abs(sum(ranked)) <= 1e-6 * sum(map(abs, ranked)) and not all(known[i] for i in window):
            return False
    return True


# Rules --------------------------------------------------------------------------------------------

_WEIGHTED = ("Epsilon", "ZPlus", "AlphaBeta", "Gamma", "ZBox", "WSquare", "Flat", "Sign")
_MEANS_AND_SUMS = ("Norm", "Epsilon", "Flat")

# The rules that each op is drawn from; ops that are missing follow the gradient.
RULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("conv", "conv_transpose", "linear"), _WEIGHTED),
    **dict.fromkeys(("batch_norm", "scale", "shift"), ("Epsilon",)),
    **dict.fromkeys(("add", "sub", "avg_pool", "mean", "global_avg_pool"), _MEANS_AND_SUMS),
    **dict.fromkeys(reference.ACTIVATIONS, ("Pass",)),
    "max_pool": ("Gradient", *reference.POOL_RULES),
    "relu": ("Pass", "ReLUDeconvNet", "ReLUGuidedBackprop", "ReLUBetaSmooth"),
}

_STABILIZER = {"stabilizer": st.sampled_from((1e-6, 0.01, 0.0))}
_ZERO_PARAMS = {"zero_params": st.just("bias")}
_ALPHA_BETA = st.sampled_from(((2.0, 1.0), (1.0, 0.0), (1.5, 0.5), (1.4, 0.4)))

# Parameters that each rule may be given, drawn apart from each other.
_OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "Epsilon": {"epsilon": st.sampled_from((1e-6, 0.25, 0.0)), **_ZERO_PARAMS},
    "Norm": _STABILIZER,
    "ZPlus": {**_STABILIZER, **_ZERO_PARAMS},
    "AlphaBeta": {**_STABILIZER, **_ZERO_PARAMS},
    # Multiples of a power of two keep exact sums exact.
    "Gamma": {"gamma": st.sampled_from((0.25, 0.5, 64.0)), **_STABILIZER, **_ZERO_PARAMS},
    # Its denominator is a difference, which a stabilizer of 0 leaves to round-off.
    "ZBox": {"stabilizer": st.sampled_from((1e-6, 0.01)), **_ZERO_PARAMS},
    "WSquare": {**_STABILIZER, **_ZERO_PARAMS},
    "Flat": _STABILIZER,
    "Sign": {"epsilon": st.sampled_from((1e-6, 0.25)), **_ZERO_PARAMS},
    "SmoothPool": {"stabilizer": st.sampled_from((1e-6, 0.01))},
    "TakeMost": {"beta": st.sampled_from((0.5, 4.0))},
    "ReLUBetaSmooth": {"beta_smooth": st.sampled_from((1.0, 10.0))},
}


@st.composite
def rules_for(
    draw: st.DrawFn, network: Network, choices: Mapping[str, Sequence[str]] = RULES
) -> tuple[Rule | None, ...]:
    """Draw a rule for every node, None where relevance follows the gradient.

    Nodes that share their parameters get the same rule. A parameter that is left out has its
    default.

    Args:
        draw: Given by hypothesis.
        network: The network, as drawn by `networks`.
        choices: Names of the rules to draw from, for each op.
    """
    rules: list[Rule | None] = []
    for k, node in enumerate(network.nodes):
        if network.owners[k] < k:
            rules.append(rules[network.owners[k]])
        elif node.op in choices:
            rules.append(_rule(draw, draw(st.sampled_from(list(choices[node.op]))), network, k))
        else:
            rules.append(None)
    return tuple(rules)


def _rule(draw: st.DrawFn, name: str, network: Network, k: int) -> Rule:
    params = draw(st.fixed_dictionaries({}, optional=_OPTIONS.get(name, {})))
    if name == "AlphaBeta" and draw(st.booleans()):
        params["alpha"], params["beta"] = draw(_ALPHA_BETA)
    if name == "ZBox":
        params["low"], params["high"] = draw(_boxes(network, k))
    return name, params


@st.composite
def _boxes(draw: st.DrawFn, network: Network, k: int) -> tuple[float | Array, float | Array]:
    """Draw the bounds of ZBox: numbers, or arrays where the node reads an input of its own."""
    low, high = draw(st.sampled_from((-2.0, -1.0, 0.0))), draw(st.sampled_from((0.5, 1.0, 2.0)))
    source = network.nodes[k].inputs[0]
    if network.owners.count(k) > 1 or network.nodes[source].op != "input" or draw(st.booleans()):
        return low, high
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = rng.integers(0, 5, (2, *network.shapes[source])) * STEP
    return low - steps[0], high + steps[1]


# Twins in torch -----------------------------------------------------------------------------------


class Twin(nn.Module):
    """A network in torch, its samples on axis 0.

    Attributes:
        layers: One module for each node that computes something, shared ones once.
        paths: For each of these nodes the path of its module.
    """

    def __init__(self, layers: dict[int, nn.Module], network: Network) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(k): layer for k, layer in layers.items()})
        self.wiring = tuple(
            (str(owner), node.inputs)
            for owner, node in zip(network.owners, network.nodes, strict=True)
        )
        self.paths = {
            k: f"layers.{owner}"
            for k, owner in enumerate(network.owners)
            if network.nodes[k].op != "input"
        }

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the value of the last node."""
        values: list[Tensor] = []
        given = iter(inputs)
        for name, sources in self.wiring:
            if name in self.layers:
                values.append(self.layers[name](*[values[i] for i in sources]))
            else:
                values.append(next(given))
        return values[-1]


class Spelled(nn.Module):
    """A node as a function of its inputs, with its arrays as parameters and buffers.

    Attributes:
        function: Called with this module and the inputs.
        settings: The params of the node that are not arrays.
    """

    weight: Tensor
    bias: Tensor | None
    c: Tensor

    def __init__(self, node: Node, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.settings: Params = {}
        for name, value in {"weight": None, "bias": None, **node.params}.items():
            if name in ("weight", "bias"):
                given = None if value is None else nn.Parameter(torch.tensor(value))
                self.register_parameter(name, given)
            elif isinstance(value, np.ndarray):
                self.register_buffer(name, torch.tensor(value))
            else:
                self.settings[name] = value

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the value of the node."""
        return self.function(self, *inputs)


def to_torch(network: Network, spelling: str) -> Twin:
    """Return the network in torch, float64 and in eval mode.

    Args:
        network: The network.
        spelling: "modules" takes the layers of torch.nn where there are any and the functions of
            torch for the rest, "functional" takes functions of parameters, methods and operators,
            "inplace" is functional but overwrites its first input wherever nothing else reads it.
    """
    layers: dict[int, nn.Module] = {}
    for k, node in enumerate(network.nodes):
        if node.op == "input" or network.owners[k] != k:
            continue
        users = [user for user, owner in enumerate(network.owners) if owner == k]
        if spelling == "modules" and node.op in MODULES:
            layers[k] = _module(node, network.shapes[node.inputs[0]])
        elif spelling == "modules":
            layers[k] = Spelled(node, TORCH.get(node.op, METHODS[node.op]))
        elif spelling == "inplace" and all(_overwrites(network, user) for user in users):
            layers[k] = Spelled(node, INPLACE.get(node.op, METHODS[node.op]))
        elif spelling in ("functional", "inplace"):
            layers[k] = Spelled(node, METHODS[node.op])
        else:
            raise ValueError(f"no spelling {spelling!r}, there are {', '.join(SPELLINGS)}")
    return Twin(layers, network).double().eval()


def _overwrites(network: Network, k: int) -> bool:
    """Tell whether node k may overwrite its first input, and the result fits into it."""
    first = network.nodes[k].inputs[0]
    return network.shapes[first] == network.shapes[k] and _is_free(network, first)


def _is_free(network: Network, k: int) -> bool:
    """Tell whether the value of node k may be overwritten by its reader.

    It needs to be the only reader, of the value and of whatever that is a view of. The user's
    input is never overwritten, nor an activation, which autograd keeps for its derivative.
    """
    node = network.nodes[k]
    readers = sum(other.inputs.count(k) for other in network.nodes)
    if readers != 1 or node.op in ("input", "expand", *reference.ACTIVATIONS):
        return False
    return node.op not in ("slice", "reshape", "permute") or _is_free(network, node.inputs[0])


def _module(node: Node, shape: Shape) -> nn.Module:
    """Return the layer of torch.nn for a node whose input has this shape."""
    layer: nn.Module = MODULES[node.op](node.params, len(shape) - 1)
    renamed = {"mean": "running_mean", "var": "running_var"}
    arrays = {
        renamed.get(name, name): torch.tensor(value)
        for name, value in node.params.items()
        if isinstance(value, np.ndarray)
    }
    # Not strict: a batch norm counts its batches, which the reference does not.
    layer.double().load_state_dict(arrays, strict=False)
    return layer


def _settings(params: Params) -> Params:
    """Return the params that are not arrays, by the names of torch.nn."""
    renamed = {"kernel": "kernel_size"}
    return {
        renamed.get(name, name): value
        for name, value in params.items()
        if name not in ("weight", "bias", "mean", "var")
    }


def _nn_conv(params: Params, ndim: int) -> nn.Module:
    out, group_in, *kernel = params["weight"].shape
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    return layer(
        group_in * params.get("groups", 1),
        out,
        tuple(kernel),
        bias=params.get("bias") is not None,
        **_settings(params),
    )


def _nn_conv_transpose(params: Params, ndim: int) -> nn.Module:
    channels, group_out, *kernel = params["weight"].shape
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 1]
    return layer(
        channels,
        group_out * params.get("groups", 1),
        tuple(kernel),
        bias=params.get("bias") is not None,
        **_settings(params),
    )


def _nn_linear(params: Params, ndim: int) -> nn.Module:
    out, features = params["weight"].shape
    return nn.Linear(features, out, bias=params.get("bias") is not None)


def _nn_batch_norm(params: Params, ndim: int) -> nn.Module:
    layer = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[ndim]
    affine = params.get("weight") is not None
    return layer(len(params["mean"]), affine=affine, **_settings(params))


def _nn_max_pool(params: Params, ndim: int) -> nn.Module:
    return (nn.MaxPool1d, nn.MaxPool2d)[ndim - 1](**_settings(params))


def _nn_avg_pool(params: Params, ndim: int) -> nn.Module:
    return (nn.AvgPool1d, nn.AvgPool2d)[ndim - 1](**_settings(params))


def _nn_global_avg_pool(params: Params, ndim: int) -> nn.Module:
    return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[ndim - 1](1)


# Layers of torch.nn, from the params of the node and the number of spatial axes.
MODULES: dict[str, Callable[[Params, int], nn.Module]] = {
    "conv": _nn_conv,
    "conv_transpose": _nn_conv_transpose,
    "linear": _nn_linear,
    "batch_norm": _nn_batch_norm,
    "max_pool": _nn_max_pool,
    "avg_pool": _nn_avg_pool,
    "global_avg_pool": _nn_global_avg_pool,
    "relu": lambda params, ndim: nn.ReLU(),
    "leaky_relu": lambda params, ndim: nn.LeakyReLU(**params),
    "gelu": lambda params, ndim: nn.GELU(),
    "silu": lambda params, ndim: nn.SiLU(),
    "tanh": lambda params, ndim: nn.Tanh(),
    "sigmoid": lambda params, ndim: nn.Sigmoid(),
    "softplus": lambda params, ndim: nn.Softplus(**params),
    "elu": lambda params, ndim: nn.ELU(**params),
    "hardswish": lambda params, ndim: nn.Hardswish(),
}


def _f_conv(m: Spelled, x: Tensor) -> Tensor:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return convolve(x, m.weight, m.bias, **m.settings)


def _f_conv_transpose(m: Spelled, x: Tensor) -> Tensor:
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
    return convolve(x, m.weight, m.bias, **m.settings)


def _f_max_pool(m: Spelled, x: Tensor) -> Tensor:
    return (F.max_pool1d, F.max_pool2d)[x.ndim - 3](x, **_settings(m.settings))


def _f_avg_pool(m: Spelled, x: Tensor) -> Tensor:
    return (F.avg_pool1d, F.avg_pool2d)[x.ndim - 3](x, **_settings(m.settings))


def _f_global_avg_pool(m: Spelled, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _f_pad(m: Spelled, x: Tensor) -> Tensor:
    # F.pad wants the last axis first.
    return F.pad(x, [width for pair in reversed(m.settings["widths"]) for width in pair])


def _f_expand(m: Spelled, x: Tensor) -> Tensor:
    shape = m.settings["shape"]
    fresh = (1,) * (len(shape) + 1 - x.ndim)
    return x.reshape(x.shape[0], *fresh, *x.shape[1:]).expand(-1, *shape)


def _batched(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


# Functions of parameters, methods and operators.
METHODS: dict[str, Callable[..., Tensor]] = {
    "conv": _f_conv,
    "conv_transpose": _f_conv_transpose,
    "linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "batch_norm": lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias, **m.settings),
    "scale": lambda m, x: x * m.c,
    "shift": lambda m, x: x + m.c,
    "add": lambda m, a, b: a + b,
    "sub": lambda m, a, b: a - b,
    "max_pool": _f_max_pool,
    "avg_pool": _f_avg_pool,
    "mean": lambda m, x: x.mean(_batched(m.settings["axes"]), m.settings.get("keepdims", False)),
    "global_avg_pool": _f_global_avg_pool,
    "cat": lambda m, *xs: torch.cat(xs, m.settings["axis"] + 1),
    "slice": lambda m, x: x[(slice(None), *m.settings["index"])],
    "reshape": lambda m, x: x.reshape(x.shape[0], *m.settings["shape"]),
    "permute": lambda m, x: x.permute(0, *_batched(m.settings["axes"])),
    "flip": lambda m, x: x.flip(_batched(m.settings["axes"])),
    "roll": lambda m, x: x.roll(m.settings["shifts"], _batched(m.settings["axes"])),
    "pad": _f_pad,
    "expand": _f_expand,
    "repeat": lambda m, x: x.repeat(1, *m.settings["reps"]),
    "relu": lambda m, x: F.relu(x),
    "leaky_relu": lambda m, x: F.leaky_relu(x, **m.settings),
    "gelu": lambda m, x: F.gelu(x),
    "silu": lambda m, x: F.silu(x),
    "tanh": lambda m, x: x.tanh(),
    "sigmoid": lambda m, x: x.sigmoid(),
    "softplus": lambda m, x: F.softplus(x, **m.settings),
    "elu": lambda m, x: F.elu(x, **m.settings),
    "hardswish": lambda m, x: F.hardswish(x),
}


def _torch_mean(m: Spelled, x: Tensor) -> Tensor:
    axes = _batched(m.settings["axes"])
    return torch.mean(x, dim=axes, keepdim=m.settings.get("keepdims", False))


# The other spelling of what torch.nn has no layer for.
TORCH: dict[str, Callable[..., Tensor]] = {
    "mean": _torch_mean,
    "scale": lambda m, x: torch.mul(x, m.c),
    "shift": lambda m, x: torch.add(x, m.c),
    "add": lambda m, a, b: torch.add(a, b),
    "sub": lambda m, a, b: torch.sub(a, b),
    "cat": lambda m, *xs: torch.concat(xs, dim=m.settings["axis"] + 1),
    "reshape": lambda m, x: torch.reshape(x, (x.shape[0], *m.settings["shape"])),
    "permute": lambda m, x: torch.permute(x, (0, *_batched(m.settings["axes"]))),
    "flip": lambda m, x: torch.flip(x, _batched(m.settings["axes"])),
    "roll": lambda m, x: torch.roll(x, m.settings["shifts"], _batched(m.settings["axes"])),
    "repeat": lambda m, x: torch.tile(x, (1, *m.settings["reps"])),
}


def _i_scale(m: Spelled, x: Tensor) -> Tensor:
    x *= m.c
    return x


def _i_add(m: Spelled, a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


# What overwrites its first input.
INPLACE: dict[str, Callable[..., Tensor]] = {
    "scale": _i_scale,
    "shift": lambda m, x: x.add_(m.c),
    "add": _i_add,
    "sub": lambda m, a, b: a.sub_(b),
    "relu": lambda m, x: x.relu_(),
    "leaky_relu": lambda m, x: F.leaky_relu(x, **m.settings, inplace=True),
    "silu": lambda m, x: F.silu(x, inplace=True),
    "tanh": lambda m, x: x.tanh_(),
    "sigmoid": lambda m, x: x.sigmoid_(),
    "elu": lambda m, x: F.elu(x, **m.settings, inplace=True),
    "hardswish": lambda m, x: F.hardswish(x, inplace=True),
}
