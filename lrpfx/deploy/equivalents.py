"""Backward ops -> the forward ops that they are equal to: a table for the tracer.

Runtimes other than PyTorch know no backward ops. What is linear in a dimension is a matrix there:
that of the op itself, laid on unit vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn import functional as F

aten = torch.ops.aten
Ints = Sequence[int]


# -- convolutions


class _Convolution(NamedTuple):
    """What a convolution is beside its tensors, a number for each dimension."""

    stride: Ints
    padding: Ints
    dilation: Ints
    transposed: bool
    groups: int

    def of_input(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """The convolution the other way, with exactly what the last stride leaves over."""
        sizes, left = input.shape[2:], [0] * len(self.stride)
        if not self.transposed:
            given = sizes, grad.shape[2:], weight.shape[2:], *self[:3]
            left = [
                size - ((out - 1) * st - 2 * p + d * (k - 1) + 1)
                for size, out, k, st, p, d in zip(*given, strict=True)
            ]
        way = *self[:3], not self.transposed, left, self.groups
        c: Tensor = aten.convolution(grad, weight, None, *way)
        if self.transposed:
            for dim, size in enumerate(sizes, start=2):  # output padding may reach past the input
                c = c.narrow(dim, 0, size)
        return c

    def of_weight(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """A product at each place of the kernel."""
        # Transposed, the output is what the kernel is moved over.
        moved, fixed = (grad, input) if self.transposed else (input, grad)
        sizes = fixed.shape[2:]
        moved = F.pad(moved, [p for p in reversed(self.padding) for _ in range(2)])
        fixed = fixed.unflatten(1, (self.groups, -1)).flatten(3)
        found = []
        for place in itertools.product(*map(range, weight.shape[2:])):
            window, steps = moved, zip(place, self.dilation, self.stride, sizes, strict=True)
            for dim, (at, d, st, size) in enumerate(steps, start=2):
                window = aten.slice(window, dim, at * d, at * d + (size - 1) * st + 1, st)
            window = window.unflatten(1, (self.groups, -1)).flatten(3)
            found.append(torch.einsum("ngol,ngil->goi", fixed, window).flatten(0, 1))
        return torch.stack(found, -1).reshape(weight.shape)


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Ints | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What arrives at input, weight and bias."""
    steps, pads, holes = (_several(v, weight.ndim - 2) for v in (stride, padding, dilation))
    convolution = _Convolution(steps, pads, holes, transposed, groups)
    of_input, of_weight, of_bias = output_mask
    return (
        convolution.of_input(grad_output, input, weight) if of_input else None,
        convolution.of_weight(grad_output, input, weight) if of_weight else None,
        grad_output.sum([0, *range(2, grad_output.ndim)]) if of_bias else None,
    )


def _several(value: Ints, n: int) -> list[int]:
    return list(value) * n if len(value) == 1 else list(value)


# -- what is linear in each dimension: pooling by mean, interpolation


def _by_matrices(grad: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The transpose of what a matrix (out, in) does in each of the last dimensions."""
    for dim, matrix in enumerate(reversed(matrices), start=1):
        if dim == 1:
            grad = grad @ matrix
        elif dim == 2:
            grad = matrix.mT @ grad
        else:
            grad = (grad.transpose(-1, -dim) @ matrix).transpose(-1, -dim)
    return grad


def _units(size: int, like: Tensor) -> Tensor:
    """Unit vectors (size, size)."""
    numbers = torch.arange(size, device=like.device)
    return (numbers[:, None] == numbers).to(like.dtype)


def _sums(begin: Tensor, end: Tensor, number: Tensor, size: int, like: Tensor) -> Tensor:
    """Sums over the intervals [begin, end) of a dimension, each over its number: (out, size)."""
    place = torch.arange(size, device=like.device)
    inside = (place >= begin[:, None]) & (place < end[:, None])
    return inside.to(like.dtype) / number[:, None].to(like.dtype)


def _avg_pool_backward(n: int) -> Callable[..., Tensor]:
    def backward(
        grad_output: Tensor,
        self: Tensor,
        kernel_size: Ints,
        stride: Ints,
        padding: Ints,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        kernel, pads = _several(kernel_size, n), _several(padding, n)
        steps = _several(stride, n) if len(stride) else kernel
        matrices = []
        for size, out, k, step, pad in zip(
            self.shape[-n:], grad_output.shape[-n:], kernel, steps, pads, strict=True
        ):
            begin = torch.arange(out, device=self.device) * step - pad
            end = (begin + k).clamp(max=size + pad)
            number = end - begin
            if divisor_override is not None:
                number = torch.ones_like(begin)
            elif not count_include_pad:
                number = end.clamp(max=size) - begin.clamp(min=0)
            matrices.append(_sums(begin, end, number, size, self))
        found = _by_matrices(grad_output, matrices)
        return found if divisor_override is None else found / divisor_override

    return backward


def _adaptive(sizes: Ints, out: Ints, like: Tensor) -> list[Tensor]:
    """The matrices of an adaptive pooling by mean."""
    matrices = []
    for size, number in zip(sizes, out, strict=True):
        place = torch.arange(number, device=like.device)
        begin, end = place * size // number, ((place + 1) * size + number - 1) // number
        matrices.append(_sums(begin, end, end - begin, size, like))
    return matrices


def _adaptive_avg_pool(n: int) -> Callable[..., Tensor]:
    def forward(self: Tensor, output_size: Ints) -> Tensor:
        matrices = _adaptive(self.shape[-n:], output_size, self)
        return _by_matrices(self, [matrix.mT for matrix in matrices])

    return forward


def _adaptive_avg_pool_backward(n: int) -> Callable[..., Tensor]:
    def backward(grad_output: Tensor, self: Tensor) -> Tensor:
        return _by_matrices(grad_output, _adaptive(self.shape[-n:], grad_output.shape[-n:], self))

    return backward


def _resize_backward(n: int, op: Any, corners: bool) -> Callable[..., Tensor]:
    """Of an interpolation in n dimensions, each of them by ``op``, with or without its corners."""

    def backward(grad_output: Tensor, output_size: Ints, input_size: Ints, *rest: Any) -> Tensor:
        scales = rest[1:] if corners else rest
        scales = scales if len(scales) == n else (None,) * n
        matrices = []
        for size, out, scale in zip(input_size[-n:], output_size, scales, strict=True):
            units = _units(size, grad_output)[None]
            given = rest[:1] if corners else ()
            if op.name().removeprefix("aten::") in _PLANAR:
                # Twice beside itself: PyTorch takes one column alone for channels.
                pairs = torch.stack([units, units], -1)
                matrix = op(pairs, [out, 2], *given, scale, None)[0, ..., 0]
            else:
                matrix = op(units, [out], *given, scale)[0]
            matrices.append(matrix.mT)
        return _by_matrices(grad_output, matrices)

    return backward


#: Interpolations that there are in two dimensions only.
_PLANAR = "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"


def _replicated_backward(n: int) -> Callable[..., Tensor]:
    """Of a padding by the outermost values."""

    def backward(grad_output: Tensor, self: Tensor, padding: Ints) -> Tensor:
        matrices = []
        for dim, size in enumerate(self.shape[-n:]):
            low, high = padding[2 * (n - 1 - dim) : 2 * (n - dim)]
            places = torch.arange(size + low + high, device=self.device) - low
            read = places.clamp(min=0, max=size - 1)
            numbers = torch.arange(size, device=self.device)
            matrices.append((read[:, None] == numbers).to(self.dtype))
        return _by_matrices(grad_output, matrices)

    return backward


# -- what picks one of several


def _scattered(grad: Tensor, like: Tensor, indices: Tensor, n: int) -> Tensor:
    """Each gradient where its index says, in the last n dimensions as one; zero elsewhere."""
    zeros = torch.zeros_like(like).flatten(-n)
    return zeros.scatter_add(-1, indices.flatten(-n), grad.flatten(-n)).reshape(like.shape)


def unfold_backward(grad_in: Tensor, input_sizes: Ints, dim: int, size: int, step: int) -> Tensor:
    """Each gradient at the place that its window read."""
    dim = dim % len(input_sizes)
    windows = torch.arange(grad_in.shape[dim], device=grad_in.device)
    places = windows[:, None] * step + torch.arange(size, device=grad_in.device)
    grad = grad_in.movedim(dim, -2).flatten(-2)
    zeros = grad.new_zeros([*grad.shape[:-1], input_sizes[dim]])
    return zeros.scatter_add(-1, places.flatten().expand(grad.shape), grad).movedim(-1, dim)


def diagonal_backward(
    grad_output: Tensor, input_sizes: Ints, offset: int, dim1: int, dim2: int
) -> Tensor:
    """Each gradient on the diagonal."""
    first, second = dim1 % len(input_sizes), dim2 % len(input_sizes)
    rows, columns = input_sizes[first], input_sizes[second]
    number = torch.arange(grad_output.shape[-1], device=grad_output.device)
    places = (number + max(-offset, 0)) * columns + number + max(offset, 0)
    zeros = grad_output.new_zeros([*grad_output.shape[:-1], rows * columns])
    found: Tensor = zeros.scatter_add(-1, places.expand(grad_output.shape), grad_output)
    return found.reshape(*found.shape[:-1], rows, columns).movedim((-2, -1), (first, second))


def _max_pool_backward(n: int) -> Callable[..., Tensor]:
    def backward(grad_output: Tensor, self: Tensor, *rest: Any) -> Tensor:
        return _scattered(grad_output, self, rest[-1], n)

    return backward


def _adaptive_max_pool(n: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The largest of each window, of windows that differ in size, and its place in all."""

    def forward(self: Tensor, output_size: Ints) -> tuple[Tensor, Tensor]:
        sizes = self.shape[-n:]
        lead = self.shape[:-n]
        place = torch.zeros((1,) * 2 * n, dtype=torch.int64, device=self.device)
        inside = torch.ones_like(place, dtype=torch.bool)
        for dim, (size, out) in enumerate(zip(sizes, output_size, strict=True)):
            window = torch.arange(out, device=self.device)
            begin, end = window * size // out, ((window + 1) * size + out - 1) // out
            longest = (size + out - 1) // out + 1
            at = begin[:, None] + torch.arange(longest, device=self.device)
            shape = [1] * 2 * n
            shape[dim], shape[n + dim] = out, longest
            place = place * size + at.clamp(max=size - 1).reshape(shape)
            inside = inside & (at < end[:, None]).reshape(shape)
        place, inside = place.flatten(n), inside.flatten(n)
        windows = self.flatten(-n)[..., place.flatten()].reshape(*lead, *place.shape)
        windows = torch.where(inside, windows, torch.finfo(self.dtype).min)
        values, first = windows.max(-1)
        index = place.expand(windows.shape).gather(-1, first[..., None])[..., 0]
        return values, index

    return forward


# -- elementwise


def copysign(self: Tensor, other: Tensor | float) -> Tensor:
    """The sign of zero counts as that of +0."""
    size = self.abs()
    if isinstance(other, Tensor):
        return torch.where(other < 0, -size, size)
    return -size if other < 0 else size


def rrelu_with_noise(
    self: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
) -> Tensor:
    """In evaluation mode, the only one that is explained."""
    assert not training
    return F.leaky_relu(self, (lower + upper) / 2)


def hardshrink_backward(grad_out: Tensor, self: Tensor, lambd: float) -> Tensor:
    """Passes where the input was not taken for zero."""
    return torch.where(self.abs() <= lambd, torch.zeros_like(grad_out), grad_out)


#: Of interpolations: how many dimensions, what stands for one, and whether corners may be aligned.
_RESIZED: dict[str, tuple[int, Any, bool]] = {
    **{f"upsample_nearest{n}d": (n, aten.upsample_nearest1d.default, False) for n in (1, 2, 3)},
    **{
        f"_upsample_nearest_exact{n}d": (n, aten._upsample_nearest_exact1d.default, False)
        for n in (1, 2, 3)
    },
    "upsample_linear1d": (1, aten.upsample_linear1d.default, True),
    "upsample_bilinear2d": (2, aten.upsample_linear1d.default, True),
    "upsample_trilinear3d": (3, aten.upsample_linear1d.default, True),
    **{name: (2, getattr(aten, name).default, True) for name in _PLANAR},
}

#: By op, what is written down in its place; what PyTorch itself knows of others is in ``TABLE``.
EQUIVALENTS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward(2),
    aten.avg_pool3d_backward.default: _avg_pool_backward(3),
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    aten._adaptive_avg_pool3d.default: _adaptive_avg_pool(3),
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_avg_pool_backward(3),
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
    aten.adaptive_max_pool2d_backward.default: _max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: _max_pool_backward(3),
    aten.replication_pad1d_backward.default: _replicated_backward(1),
    aten.replication_pad2d_backward.default: _replicated_backward(2),
    aten.replication_pad3d_backward.default: _replicated_backward(3),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
    aten.diagonal_backward.default: diagonal_backward,
    aten.unfold_backward.default: unfold_backward,
    aten.copysign.Tensor: copysign,
    aten.copysign.Scalar: copysign,
    aten.rrelu_with_noise.default: rrelu_with_noise,
    aten.hardshrink_backward.default: hardshrink_backward,
    **{
        getattr(aten, f"{name}_backward").default: _resize_backward(*how)
        for name, how in _RESIZED.items()
    },
}

#: For the tracer.
TABLE = {op: f for op, f in decomposition_table.items() if "backward" in str(op)} | EQUIVALENTS
