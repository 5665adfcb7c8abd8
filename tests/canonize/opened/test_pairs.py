"""Complex numbers inside of a model: the relevance of the real arithmetic that they stand for."""

import math

import pytest
import torch
from torch import Tensor

import lrpfx
from tests.ops.test_families import agree
from tests.ops.test_table import (
    IMAGE,
    ROW,
    Between,
    gradient_times_input,
    kernel,
    samples,
    together,
)

pytestmark = pytest.mark.usefixtures("each_front")

LRP_0 = lrpfx.composites.EpsilonAll(epsilon=0.0)


def gains(*shape: int) -> Tensor:
    return torch.complex(kernel(*shape), kernel(*shape, 2)[..., 1])


def test_a_filter_in_the_frequency_domain_is_a_circular_convolution() -> None:
    taps = kernel(8)

    def plain(x: Tensor) -> Tensor:
        return x @ torch.stack([taps.roll(i) for i in range(8)])

    agree(
        lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(taps), n=8), plain, ROW, LRP_0
    )


def test_what_is_linear_as_a_whole_is_gradient_times_input() -> None:
    """A global filter, modes that are mixed and written into zeros, a mixer of tokens, a frame."""

    def linear(x: Tensor) -> Tensor:
        filtered = torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * gains(4, 6, 4), (6, 6))
        modes = torch.fft.rfft2(x)
        mixed = torch.zeros(len(x), 3, 6, 4, dtype=torch.complex128)
        mixed[:, :, :2, :3] = torch.einsum(
            "nixy,ioxy->noxy", modes[:, :, :2, :3], gains(4, 3, 2, 3)
        )
        mixed[:, :, -2:, :3] = torch.einsum("nixy,io->noxy", modes[:, :, -2:, :3], gains(4, 3))
        tokens = torch.fft.fft(torch.fft.fft(x.flatten(2), dim=-1), dim=-2).real
        rows = torch.fft.fftshift(torch.fft.fft(x.flatten(1)), dim=1)
        window = torch.hann_window(16, dtype=torch.float64)
        frames = torch.stft(x.flatten(1), 16, 8, window=window, return_complex=True)
        back = torch.istft(frames * gains(9, 1), 16, 8, window=window)
        layer = torch.complex(x, x.flip(1)) @ gains(6, 5) + torch.complex(x, -x) @ gains(6, 5)
        return together(
            filtered, torch.fft.irfft2(mixed, (6, 6)), tokens, rows.real, back, layer.imag
        )

    model, x = Between(linear, IMAGE), samples(IMAGE)
    explainer = lrpfx.Explainer(model, x, rules=LRP_0)
    expected = gradient_times_input(model, x, 1)
    torch.testing.assert_close(explainer(x, 1).relevance, expected, rtol=1e-9, atol=1e-10)
    fast = explainer(x, 1, ledger=False).relevance
    torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-10)


def test_a_spectrogram_is_an_activation_of_two_linear_maps() -> None:
    window = torch.hann_window(8, dtype=torch.float64) + 0.1
    k, n = torch.arange(5.0).double()[:, None], torch.arange(8.0).double()
    cosines, sines = (f(2 * math.pi * k * n / 8) * window for f in (torch.cos, torch.sin))

    def named(x: Tensor) -> Tensor:
        frames = torch.stft(x, 8, 2, window=window, center=False, return_complex=True)
        return together(frames.abs().log1p(), frames.abs() ** 2, torch.view_as_real(frames))

    def plain(x: Tensor) -> Tensor:
        frames = x.unfold(1, 8, 2)
        real, imag = frames @ cosines.T, frames @ -sines.T
        size = (real.square() + imag.square()).sqrt()
        parts = (size.log1p().mT, (size**2).mT, torch.stack([real.mT, imag.mT], -1))
        return together(*parts)

    agree(named, plain, (12,), LRP_0)


def test_rotation_by_complex_numbers_is_rotation() -> None:
    angles = kernel(4)

    def named(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.view(-1, 4, 2)) * torch.polar(angles.abs(), angles)
        return torch.view_as_real(turned).flatten(1)

    def plain(x: Tensor) -> Tensor:
        a, b = x.view(-1, 4, 2).unbind(-1)
        cos, sin = angles.abs() * angles.cos(), angles.abs() * angles.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)

    agree(named, plain, ROW, LRP_0)


def test_products_of_two_complex_numbers_are_matrix_products() -> None:
    """Autocorrelation; z = a b is (a c - b d, a d + b c), each a sum of two products."""

    def named(x: Tensor) -> Tensor:
        a, b = torch.complex(*x.view(-1, 2, 4).unbind(1)), torch.fft.fft(x[:, :4])
        return torch.view_as_real(a * b.conj())

    def plain(x: Tensor) -> Tensor:
        k = torch.arange(4.0).double()
        turns = 2 * math.pi * k[:, None] * k / 4
        a, b = x.view(-1, 2, 4).unbind(1)
        c, d = x[:, :4] @ turns.cos(), x[:, :4] @ turns.sin()
        left = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
        return (left @ torch.stack([c, d], -1)[..., None]).squeeze(-1)

    agree(named, plain, ROW)


def test_real_factors_and_divisors_of_complex_numbers_count_as_such() -> None:
    def named(x: Tensor) -> Tensor:
        z = torch.complex(x, x.flip(1))
        return torch.view_as_real(z / (z.abs() + 1) * x.sigmoid() + x * 2j + 1)

    def plain(x: Tensor) -> Tensor:
        a, b = x, x.flip(1)
        size = (a.square() + b.square()).sqrt() + 1
        real, imag = a / size * x.sigmoid() + 1, b / size * x.sigmoid() + x * 2
        return torch.stack([real, imag], -1)

    agree(named, plain, ROW)


@pytest.mark.parametrize("name", ["angle", "exp", "sgn"])
def test_what_complex_numbers_have_no_rule_for_is_refused(name: str) -> None:
    function = getattr(torch, name)
    model = Between(lambda x: torch.view_as_real(function(torch.fft.rfft(x)) + 0j), ROW)
    with pytest.raises(lrpfx.errors.UnsupportedOpError, match=f"{name}.default of complex numbers"):
        lrpfx.explain(model, samples(ROW))
