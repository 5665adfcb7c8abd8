"""Each op that stands for a backward op computes what that computes."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrpfx.deploy.equivalents import EQUIVALENTS

aten = torch.ops.aten
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}
Case = tuple[Any, tuple[Any, ...]]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def convolutions() -> Iterator[Case]:
    """Strides that leave a rest, holes, groups, one channel each; one to three dimensions."""
    forms = itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4))
    for stride, padding, dilation, groups in forms:
        x, w = draw(2, 4, 11, 8), draw(8, 4 // groups, 3, 2)
        for n in (1, 2):
            given = (x, w) if n == 2 else (x[..., 0], w[..., 0])
            form = [stride] * n, [padding] * n, [dilation] * n
            z = aten.convolution(*given, None, *form, False, [0] * n, groups)
            grad = torch.randn_like(z)
            mask = [True, True, True]
            way = False, [0] * n, groups, mask
            yield aten.convolution_backward.default, (grad, *given, [8], *form, *way)
    x, w = draw(1, 2, 5, 6, 4), draw(3, 2, 2, 3, 2)
    form = [2, 1, 2], [1, 0, 1], [1, 2, 1]
    z = F.conv3d(x, w, None, *form)
    way = False, [0, 0, 0], 1, [True, True, True]
    yield aten.convolution_backward.default, (torch.randn_like(z), x, w, [3], *form, *way)


def transposed_convolutions() -> Iterator[Case]:
    forms = [(1, 0, 1, 0, 1), (2, 1, 1, 1, 2), (3, 1, 2, 2, 4), (2, 0, 3, 2, 1), (1, 2, 3, 2, 2)]
    for stride, padding, dilation, beyond, groups in forms:
        x, w = draw(2, 4, 5, 4), draw(4, 8 // groups, 3, 2)
        form = [stride] * 2, [padding] * 2, [dilation] * 2
        z = aten.convolution(x, w, None, *form, True, [beyond] * 2, groups)
        way = True, [beyond] * 2, groups, [True, True, True]
        yield aten.convolution_backward.default, (torch.randn_like(z), x, w, [8], *form, *way)


def average_pools() -> Iterator[Case]:
    forms = itertools.product((1, 2, 3), (0, 1), (False, True), (False, True), (None, 5))
    for stride, padding, ceil, counts, divisor in forms:
        form = [3, 2], [stride, 2], [padding, 1], ceil, counts, divisor
        x = draw(2, 3, 10, 7)
        z = F.avg_pool2d(x, *form)
        yield aten.avg_pool2d_backward.default, (torch.randn_like(z), x, *form)
    x = draw(2, 3, 5, 6, 7)
    for counts in (False, True):
        form3 = [2, 3, 2], [], [1, 1, 0], True, counts, None
        z = aten.avg_pool3d(x, *form3)
        yield aten.avg_pool3d_backward.default, (torch.randn_like(z), x, *form3)


def adaptive_pools() -> Iterator[Case]:
    for size in ((1, 1), (3, 2), (5, 7), (12, 3)):
        x = draw(2, 3, 10, 7)
        yield aten._adaptive_avg_pool2d.default, (x, list(size))
        yield aten._adaptive_avg_pool2d_backward.default, (draw(2, 3, *size), x)
    x = draw(2, 3, 5, 6, 7)
    yield aten._adaptive_avg_pool3d.default, (x, [2, 4, 3])
    yield aten._adaptive_avg_pool3d_backward.default, (draw(2, 3, 2, 4, 3), x)


def maximum_pools() -> Iterator[Case]:
    for stride, padding, ceil in itertools.product((1, 2), (0, 1), (False, True)):
        form = [3, 2], [stride, 2], [padding, 1], [1, 2], ceil
        x = draw(2, 3, 9, 8)
        z, places = aten.max_pool2d_with_indices(x, *form)
        grad = torch.randn_like(z)
        yield aten.max_pool2d_with_indices_backward.default, (grad, x, *form, places)
    x = draw(2, 3, 5, 6, 7)
    form3 = [2, 3, 2], [1, 2, 2], [1, 1, 0], [1, 1, 1], False
    z, places = aten.max_pool3d_with_indices(x, *form3)
    grad = torch.randn_like(z)
    yield aten.max_pool3d_with_indices_backward.default, (grad, x, *form3, places)
    z, places = aten.adaptive_max_pool3d(x, [2, 4, 3])
    yield aten.adaptive_max_pool3d_backward.default, (torch.randn_like(z), x, places)
    z, places = aten.adaptive_max_pool2d(x[0], [4, 3])
    yield aten.adaptive_max_pool2d_backward.default, (torch.randn_like(z), x[0], places)


def interpolations() -> Iterator[Case]:
    """To more and fewer places, with and without the scale that was asked for."""
    sizes, scales = (5, 6, 4), (1.75, 0.6, 2.0)
    for n, scaled in itertools.product((1, 2, 3), (False, True)):
        size = list(sizes[:n])
        out = [int(s * f) for s, f in zip(sizes, scales, strict=True)][:n]
        given = scales[:n] if scaled else (None,) * n
        grad = draw(2, 3, *out)
        for name in ("upsample_nearest", "_upsample_nearest_exact"):
            op = getattr(aten, f"{name}{n}d_backward").default
            yield op, (grad, out, [2, 3, *size], *given)
        names = ["upsample_" + ("linear1d", "bilinear2d", "trilinear3d")[n - 1]]
        if n == 2:
            names += ["upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
        for name, corners in itertools.product(names, (False, True)):
            op = getattr(aten, f"{name}_backward").default
            yield op, (grad, out, [2, 3, *size], corners, *given)


def replicated() -> Iterator[Case]:
    x = draw(2, 3, 4, 5, 3)
    pads = [1, 2, 0, 3, 2, 0]
    for n, given in ((1, x[..., 0, 0]), (2, x[..., 0]), (3, x)):
        form = pads[: 2 * n]
        z = F.pad(given, form, mode="replicate")
        op = getattr(aten, f"replication_pad{n}d_backward").default
        yield op, (torch.randn_like(z), given, form)


def adaptive_maxima() -> Iterator[Case]:
    for size in ((1, 1), (3, 2), (5, 7), (10, 3)):
        yield aten.adaptive_max_pool2d.default, (draw(2, 3, 10, 7), list(size))
    yield aten.adaptive_max_pool2d.default, (torch.ones(2, 3, 5, 5).double(), [2, 3])
    yield aten.adaptive_max_pool3d.default, (draw(2, 3, 5, 6, 7), [2, 4, 3])


def windows() -> Iterator[Case]:
    """That overlap, leave gaps and a rest, in each dimension."""
    for dim, size, step in itertools.product((0, 1, -1), (1, 3), (1, 2, 4)):
        x = draw(7, 6, 9)
        z = x.unfold(dim, size, step)
        yield aten.unfold_backward.default, (torch.randn_like(z), list(x.shape), dim, size, step)


def diagonals() -> Iterator[Case]:
    for offset, dims in itertools.product((-2, 0, 1, 3), ((0, 1), (2, 0), (-1, 1))):
        x = draw(5, 4, 6)
        z = x.diagonal(offset, *dims)
        yield aten.diagonal_backward.default, (torch.randn_like(z), list(x.shape), offset, *dims)


def signs() -> Iterator[Case]:
    other = draw(50)
    yield aten.copysign.Tensor, (torch.tensor(1e-3, dtype=torch.float64), other)
    other[::3] = 0.0
    yield aten.copysign.Tensor, (draw(50), other)
    for number in (-2.0, 3.0):
        yield aten.copysign.Scalar, (draw(50), number)


def leaks() -> Iterator[Case]:
    yield aten.rrelu_with_noise.default, (draw(50), draw(50), 0.1, 0.3, False)


def shrunk() -> Iterator[Case]:
    for bound in (0, 0.5):
        x = draw(50)
        x[::3] = bound
        yield aten.hardshrink_backward.default, (draw(50), x, bound)


KINDS: list[Callable[[], Iterator[Case]]] = [
    convolutions,
    transposed_convolutions,
    average_pools,
    adaptive_pools,
    maximum_pools,
    interpolations,
    replicated,
    adaptive_maxima,
    windows,
    diagonals,
    signs,
    leaks,
    shrunk,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_equivalent_computes_what_the_op_computes(
    kind: Callable[[], Iterator[Case]], dtype: torch.dtype
) -> None:
    for op, args in kind():
        given = [
            t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args
        ]
        expected, got = op(*given), EQUIVALENTS[op](*given)
        pairs = (
            [(expected, got)] if isinstance(expected, Tensor) else zip(expected, got, strict=True)
        )
        for e, g in pairs:
            assert e.shape == g.shape and e.dtype == g.dtype, (op, args[3:])
            if not e.is_floating_point():
                assert torch.equal(e, g)
                continue
            apart = (e - g).abs().max() / e.abs().max().clamp(min=1e-30)
            assert apart <= TOLERANCES[dtype], (op, [a for a in args if not isinstance(a, Tensor)])


def test_every_equivalent_is_among_the_cases() -> None:
    assert {op for kind in KINDS for op, _ in kind()} == set(EQUIVALENTS)
