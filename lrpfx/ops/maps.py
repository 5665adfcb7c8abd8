"""Arguments of an ATen call -> its affine map z = W x + b; the op table names these builders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrpfx.ops.affine import HALVES, AffineMap, Signal, widened

Arguments = dict[str, Any]  # the call's arguments by schema name, live ones included
Live = Sequence[str]  # names of the live ones, in schema order
Run = Callable[..., Tensor]  # the op itself as a function of its live inputs
Builder = Callable[[Arguments, Live, Run], AffineMap]


def _ints(value: Any, n: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def convolution(args: Arguments, live: Live, run: Run) -> AffineMap:
    """conv1d/2d/3d: x is ``input``; the transpose is a transposed convolution."""
    weight: Tensor = args["weight"]
    n = weight.ndim - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    conv_transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    stride, dilation = _ints(args["stride"], n), _ints(args["dilation"], n)
    groups, kernel = args["groups"], weight.shape[2:]
    padding, edges = args["padding"], None
    if padding == "valid":
        padding = 0
    elif padding == "same":
        # As PyTorch does: an odd total puts the extra zero at the end.
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):
            edges = [e for t in reversed(total) for e in (t // 2, t - t // 2)]
            padding = 0
    pads = _ints(padding, n)

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        (a,) = x
        a = a if edges is None else F.pad(a, edges)
        return conv(a, w, b, stride, pads, dilation, groups)

    # One matrix at every pixel, for which PyTorch's conv_transpose takes up to twice as long on a
    # CPU as the product does, and with strides up to four times.
    matrix = groups == 1 and not any(pads) and {*kernel} == {1}

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        if matrix and s.ndim == n + 2 and s.is_contiguous():
            c = torch.matmul(w.flatten(1).t(), s.reshape(*s.shape[:2], -1))
            c = c.reshape(*c.shape[:2], *s.shape[2:])
            return (c if {*stride} == {1} else _strewn(c, stride, x[0].shape[2:]),)
        spatial = list(x[0].shape[-n:])
        if edges is not None:
            spatial = [size + lo + hi for size, lo, hi in _per_dim(spatial, edges)]
        # Rows of the input that the last stride does not reach get their (zero) share this way.
        output_padding = [
            size - ((out - 1) * st - 2 * p + d * (k - 1) + 1)
            for size, out, st, p, d, k in zip(
                spatial, s.shape[-n:], stride, pads, dilation, kernel, strict=True
            )
        ]
        c = conv_transpose(s, w, None, stride, pads, output_padding, groups, dilation)
        return (c if edges is None else F.pad(c, [-e for e in edges]),)

    def flat() -> AffineMap:
        """All channels see the same sums: one channel of ones in the place of all."""
        one, channels = weight.new_ones(()).expand(1, 1, *kernel), -n - 1

        def spread(x: Signal, w: Any, b: Tensor | None) -> Tensor:
            z: Tensor = conv(x[0].sum(channels, keepdim=True), one, None, stride, pads, dilation)
            return z.expand(*z.shape[:channels], len(weight), *z.shape[-n:])

        def gather(s: Tensor, w: Any, x: Signal) -> Signal:
            (a,) = x
            first = (a.narrow(channels, 0, 1),)
            (c,) = backward(s.sum(channels, keepdim=True), one, first)
            return (c.expand(a.shape),)

        return AffineMap(spread, gather)

    whole = groups == 1 and edges is None
    bias = args.get("bias")
    return AffineMap(
        forward,
        backward,
        weight,
        bias,
        bias_shape=(-1,) + (1,) * n,
        flat=flat if whole else None,
        channels=-n - 1 if groups == 1 else None,
    )


def _strewn(c: Tensor, stride: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """What every ``stride``-th pixel gets, among zeros for the others."""
    known = c.shape[2:]
    c = c.reshape(*c.shape[:2], *(size for k in known for size in (k, 1)))
    c = F.pad(c, [edge for step in reversed(stride) for edge in (0, step - 1, 0, 0)])
    c = c.reshape(*c.shape[:2], *(k * step for k, step in zip(known, stride, strict=True)))
    # The last stride may reach past the input, or end before it.
    edges = [e for size, k in zip(sizes, c.shape[2:], strict=True) for e in (size - k, 0)]
    return F.pad(c, edges[::-1]) if any(edges) else c


def _per_dim(sizes: Sequence[int], edges: Sequence[int]) -> list[tuple[int, int, int]]:
    """Pair each spatial size with its (low, high) padding; F.pad lists the last dimension first."""
    pairs = list(zip(edges[0::2], edges[1::2], strict=True))[::-1]
    return [(size, lo, hi) for size, (lo, hi) in zip(sizes, pairs, strict=True)]


def transposed_convolution(args: Arguments, live: Live, run: Run) -> AffineMap:
    """conv_transpose1d/2d/3d: x is ``input``; the transpose is a convolution."""
    weight: Tensor = args["weight"]
    n = weight.ndim - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    conv_transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    stride, padding = _ints(args["stride"], n), _ints(args["padding"], n)
    output_padding, dilation = _ints(args["output_padding"], n), _ints(args["dilation"], n)
    groups = args["groups"]

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        return conv_transpose(x[0], w, b, stride, padding, output_padding, groups, dilation)

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        c = conv(s, w, None, stride, padding, dilation, groups)
        # An output padding of a whole stride (legal under dilation) reaches past the input.
        for dim, size in enumerate(x[0].shape[-n:], start=c.ndim - n):
            c = c.narrow(dim, 0, size)
        return (c,)

    return AffineMap(forward, backward, weight, args.get("bias"), (-1,) + (1,) * n)


def linear(args: Arguments, live: Live, run: Run) -> AffineMap:
    """linear over the last dimension: x is ``input``, weight (out, in)."""

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        return F.linear(x[0], w, b)

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        return ((s.unsqueeze(-1) * w if w.ndim == 1 else s @ w),)

    return AffineMap(forward, backward, args["weight"], args.get("bias"))


def by_weight(args: Arguments, live: Live, run: Run) -> AffineMap:
    """conv, conv_transpose and linear of a constant: x is ``weight``, and W what it is laid on."""
    of = linear
    if "stride" in args:
        of = transposed_convolution if "output_padding" in args else convolution
    layer = of(args, live, run)

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        return layer.forward((w,), x[0], b)

    return AffineMap(forward, None, args["input"], layer.bias, layer.bias_shape)


def matrix_product(args: Arguments, live: Live, run: Run) -> AffineMap:
    """matmul, mm, bmm, addmm with one constant factor, on either side."""
    names = ("mat1", "mat2") if "mat1" in args else tuple(args)[:2]
    on_left = live[0] == names[0]

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        z = torch.matmul(x[0], w) if on_left else torch.matmul(w, x[0])
        return z if b is None else z + b

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        c = torch.matmul(s, w.mT) if on_left else torch.matmul(w.mT, s)
        return (c.sum_to_size(x[0].shape),)

    bias = args["self"] * args["beta"] if "mat1" in args else None
    weight = args[names[1] if on_left else names[0]]
    vectors = args[names[0]].ndim == 1 or args[names[1]].ndim == 1
    return AffineMap(forward, None if vectors else backward, weight * args.get("alpha", 1), bias)


def einsum(args: Arguments, live: Live, run: Run) -> AffineMap:
    """x times a constant, summed over subscripts that both have."""
    equation: str = args["equation"]
    terms, _, out = equation.partition("->")
    a, b = terms.split(",")

    def forward(x: Signal, w: Any, bias: Tensor | None) -> Tensor:
        z = torch.einsum(equation, x[0], w)
        return z if bias is None else z + bias

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        return (torch.einsum(f"{out},{b}->{a}", s, w),)

    return AffineMap(forward, backward, args["weight"])


def batch_norm(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Eval-mode batch norm: a diagonal W = gamma / sqrt(var + eps) over dimension 1."""
    x: Tensor = args["input"]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = torch.rsqrt(args["running_var"] + args["eps"])
    if args["weight"] is not None:
        scale = scale * args["weight"]
    bias = -args["running_mean"] * scale
    if args["bias"] is not None:
        bias = bias + args["bias"]

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        z: Tensor = x[0] * w.reshape(shape)
        return z if b is None else z + b.reshape(shape)

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        return (s * w.reshape(shape),)

    return AffineMap(forward, backward, scale, bias, shape)


def _elementwise(weight: Any, bias: Any, x: Tensor) -> AffineMap:
    """z = weight * x + bias, each a number or a constant tensor that may broadcast x up."""

    def as_tensor(value: Any) -> Tensor | None:
        return value if value is None or isinstance(value, Tensor) else x.new_tensor(value)

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        z = x[0] if w is None else x[0] * w
        return z if b is None else z + b

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        return ((s if w is None else s * w).sum_to_size(x[0].shape),)

    return AffineMap(forward, backward, as_tensor(weight), as_tensor(bias))


def scale(args: Arguments, live: Live, run: Run) -> AffineMap:
    """mul by a constant on either side."""
    constant = "other" if live[0] == "self" else "self"
    return _elementwise(args[constant], None, args[live[0]])


def divide(args: Arguments, live: Live, run: Run) -> AffineMap:
    """div by a constant, whose own dtype may be too short for its inverse."""
    x, other = args["self"], args["other"]
    if isinstance(other, Tensor):
        other = other.to(torch.result_type(x, other))
    return _elementwise(1 / other, None, x)


def negate(args: Arguments, live: Live, run: Run) -> AffineMap:
    """-x."""
    return _elementwise(-1.0, None, args["self"])


def shift(args: Arguments, live: Live, run: Run) -> AffineMap:
    """add of a constant: self + alpha * other, one of them live."""
    alpha = args.get("alpha", 1)
    if live[0] == "self":
        return _elementwise(None, args["other"] * alpha, args["self"])
    return _elementwise(None if alpha == 1 else alpha, args["self"], args["other"])


def subtract(args: Arguments, live: Live, run: Run) -> AffineMap:
    """sub with a constant: self - alpha * other, one of them live."""
    alpha = args.get("alpha", 1)
    if live[0] == "self":
        return _elementwise(None, -(args["other"] * alpha), args["self"])
    return _elementwise(-alpha, args["self"], args["other"])


def subtract_from(args: Arguments, live: Live, run: Run) -> AffineMap:
    """rsub: other - alpha * self, with a constant ``other``."""
    return _elementwise(-args.get("alpha", 1), args["other"], args["self"])


def addition(coefficients: Callable[[float], tuple[float, float]]) -> Builder:
    """c1 * self + c2 * other, both live and broadcast; ``coefficients`` maps alpha to c1, c2."""

    def build(args: Arguments, live: Live, run: Run) -> AffineMap:
        first, second = coefficients(args.get("alpha", 1))

        def backward(s: Tensor, w: Any, x: Signal) -> Signal:
            parts = (s if c == 1 else s * c for c in (first, second))
            return tuple(p.sum_to_size(t.shape) for p, t in zip(parts, x, strict=True))

        return AffineMap(lambda x, w, b: run(*x), backward, coefficients_one=lambda x: x[0] + x[1])

    return build


def _normalized(
    x: Tensor, dims: list[int], eps: float, bias: Tensor | None, gain: Tensor | None, mean: bool
) -> AffineMap:
    """z = gain * (x - mean x) / std + bias over ``dims``, with 1 / std as a constant.

    The one map that depends on the value of x: through std, which the rule does not propagate
    through but whose own derivative counts.

    Source: Ali et al. 2022 (arXiv 2202.07304), eq. 10; Achtibat et al. 2024, Prop. 3.4.
    """
    centred = widened(x)
    centred = centred - centred.mean(dims, keepdim=True) if mean else centred
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if gain is not None:
        scale = scale * gain

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        (a,) = x
        z: Tensor = (a - a.mean(dims, keepdim=True) if mean else a) * scale
        return z if b is None else z + b

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        c = s * scale
        return ((c - c.mean(dims, keepdim=True) if mean else c),)

    return AffineMap(forward, backward, bias=bias)


def layer_norm(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Layer norm over the last dimensions."""
    dims = list(range(-len(args["normalized_shape"]), 0))
    return _normalized(args["input"], dims, args["eps"], args["bias"], args["weight"], True)


def rms_norm(args: Arguments, live: Live, run: Run) -> AffineMap:
    """RMS norm over the last dimensions."""
    dims = list(range(-len(args["normalized_shape"]), 0))
    x: Tensor = args["input"]
    own = torch.float32 if x.dtype in HALVES else x.dtype  # as PyTorch has it
    eps = torch.finfo(own).eps if args["eps"] is None else args["eps"]
    return _normalized(x, dims, eps, None, args["weight"], False)


def group_norm(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Group norm: layer norm over groups of channels, then gain and bias per channel."""
    return _grouped(args["input"], args["num_groups"], args)


def instance_norm(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Instance norm: a group per channel; with running statistics it is a batch norm."""
    if not args["use_input_stats"]:
        return batch_norm(args, live, run)
    return _grouped(args["input"], args["input"].shape[1], args)


def _grouped(x: Tensor, groups: int, args: Arguments) -> AffineMap:
    by_group = (x.shape[0], groups, -1)
    inner = _normalized(x.reshape(by_group), [-1], args["eps"], None, None, True)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    gain = None if args["weight"] is None else args["weight"].reshape(per_channel)

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        z = inner((x[0].reshape(by_group),)).reshape(x[0].shape)
        z = z if gain is None else z * gain
        return z if b is None else z + b.reshape(per_channel)

    def backward(s: Tensor, w: Any, x: Signal) -> Signal:
        s = s if gain is None else s * gain
        (c,) = inner.T(s.reshape(by_group), x)
        return (c.reshape(s.shape),)

    return AffineMap(forward, backward, bias=args["bias"], bias_shape=per_channel)


def linear_op(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Any op that is linear in its live inputs and has no weights: pooling, mean, interpolation."""
    return AffineMap(lambda x, weight, bias: run(*x))


def affine_op(args: Arguments, live: Live, run: Run) -> AffineMap:
    """Any op that is affine in its live inputs; its constant inputs make up the bias f(0)."""
    bias = run(*(torch.zeros_like(args[name]) for name in live))

    def forward(x: Signal, w: Any, b: Tensor | None) -> Tensor:
        z = run(*x) - bias
        return z if b is None else z + b

    return AffineMap(forward, bias=bias)
