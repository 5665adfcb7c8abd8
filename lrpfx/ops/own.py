"""Ops of lrpfx's own, for what PyTorch has no single op for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfx.ops.affine import widened


def einsum(equation: str, x: Tensor, weight: Tensor) -> Tensor:
    """An einsum of two tensors that is a linear layer: ``weight`` is a constant.

    Args:
        equation: With an arrow, and without an ellipsis.
        x: The live one, which may stand on either side in the user's own equation.
        weight: With sizes, not ones that broadcast.
    """
    return torch.einsum(equation, x, weight)


def strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """``torch.as_strided`` of x as it lies in memory if it is contiguous.

    Args:
        x: Any tensor.
        size: Of what is returned.
        stride: In entries of x.
        offset: Place of the first entry.
    """
    places = _places(x, size, stride, offset)
    return x.reshape(-1).index_select(0, places.reshape(-1)).reshape(places.shape)


def strided_scatter(
    x: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], offset: int
) -> Tensor:
    """x with ``src`` in the place of what ``strided`` reads of it."""
    # The derivative of torch.as_strided_scatter is not that of what it computes.
    places = _places(x, size, stride, offset)
    return x.reshape(-1).scatter(0, places.reshape(-1), src.reshape(-1)).reshape(x.shape)


def _places(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    places = torch.full((), offset, device=x.device)
    for n, step in zip(size, stride, strict=True):
        places = places[..., None] + step * torch.arange(n, device=x.device)
    return places


def hardsigmoid(x: Tensor) -> Tensor:
    """As ``torch.nn.functional.hardsigmoid``, whose derivative is in float32 and has none itself.

    Args:
        x: Any tensor.
    """
    return torch.nn.functional.relu6(x + 3) / 6


def entmax(x: Tensor, dim: int, power: float) -> Tensor:
    """The sparse softmax y = max(x / power - t, 0) ** power, t such that y sums to one.

    Of power 1 sparsemax, the nearest point of the simplex; of power 2 1.5-entmax. All of it can be
    differentiated again: t is a formula of the entries that are left, or, for other powers, two
    steps of Newton's method from what bisection found, exact for derivatives up to the third.

    Args:
        x: Any tensor; entries of -infinity get nothing.
        dim: What y sums to one along.
        power: 1 / (alpha - 1).

    Source: Martins and Astudillo 2016 (arXiv 1602.02068), alg. 1; Peters et al. 2019
    (arXiv 1905.05702), alg. 2.
    """
    u = widened(x) / power
    u = u - u.detach().amax(dim, keepdim=True)  # so t lies between -1 and 0
    if power not in (1, 2):
        return _by_steps(u, dim, power).to(x.dtype)
    left = _left(u.detach().clamp_min(-2), dim, power)
    u = u.masked_fill(~left, 0.0)
    count = left.sum(dim, keepdim=True).to(u.dtype)
    mean = u.sum(dim, keepdim=True) / count
    spread = ((u - mean).square() * left).sum(dim, keepdim=True)
    t = _threshold(mean, spread / count, count, power)
    y: Tensor = ((u - t).relu() ** power).masked_fill(~left, 0.0)
    return y.to(x.dtype)


def _by_steps(u: Tensor, dim: int, power: float) -> Tensor:
    held = u.detach()
    t = torch.full_like(held.amax(dim, keepdim=True), -1.0)
    step = torch.ones_like(t)
    for _ in range(_BISECTIONS):
        step = step / 2
        above = ((held - t - step).relu() ** power).sum(dim, keepdim=True) >= 1
        t = torch.where(above, t + step, t)
    left = held > t
    for _ in range(2):
        v = torch.where(left, u - t, 1.0)  # what is cut off has no derivative, and no power of 0
        excess = ((v**power) * left).sum(dim, keepdim=True) - 1
        t = t + excess / (power * (v ** (power - 1)) * left).sum(dim, keepdim=True)
    return torch.where(left, u - t, 1.0) ** power * left


def _left(u: Tensor, dim: int, power: float) -> Tensor:
    """Which entries stay above the threshold: the k largest, for the largest k that fits."""
    ordered = u.sort(dim, descending=True).values
    count = torch.ones_like(ordered).cumsum(dim)
    mean = ordered.cumsum(dim) / count
    variance = ordered.square().cumsum(dim) / count - mean.square()
    above = _threshold(mean, variance, count, power)
    last = (above <= ordered).sum(dim, keepdim=True) - 1
    return u > above.gather(dim, last)


def _threshold(mean: Tensor, variance: Tensor, count: Tensor, power: float) -> Tensor:
    """t with sum (u - t) ** power = 1, of u the mean, variance and number."""
    if power == 1:
        return mean - 1 / count
    return mean - (1 / count - variance).clamp_min(0).sqrt()


#: Halvings of an interval of 1, to the last digit of float64.
_BISECTIONS = 54
#: Names of their arguments.
OWN: dict[Any, list[str]] = {
    einsum: ["equation", "x", "weight"],
    hardsigmoid: ["x"],
    entmax: ["x", "dim", "power"],
    strided: ["x", "size", "stride", "offset"],
    strided_scatter: ["x", "src", "size", "stride", "offset"],
}
