"""Ops under every name that PyTorch has for them have the relevance of their plain spelling."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply

aten, special = torch.ops.aten, torch.special
Fn = Callable[[Tensor], Tensor]

torch.manual_seed(0)
#: Of a convolution of one channel to two, and constants.
W, B = torch.randn(2, 1, 3).double(), torch.randn(2).double()
POSITIVE = (torch.rand(3, 6) + 0.5).double()
ROOM = torch.tensor([0.0, 1, -1, 0, 2, 0]).double().expand(3, 6)


def one_dimension(y: Tensor) -> Tensor:
    return F.conv1d(y[:, None], W, B, padding=1)


def centred(y: Tensor) -> Tensor:
    return y - y.mean(1, keepdim=True)


PAIRS: dict[str, tuple[Fn, Fn]] = {
    "convolution": (
        lambda y: torch.convolution(y[:, None], W, B, [1], [1], [1], False, [0], 1),
        one_dimension,
    ),
    "convolution of ATen, transposed": (
        lambda y: aten.convolution(y.view(3, 2, 3), W, B[:1], [2], [1], [1], True, [1], 1),
        lambda y: F.conv_transpose1d(y.view(3, 2, 3), W, B[:1], 2, 1, 1),
    ),
    "convolution with a live bias": (
        lambda y: torch.convolution(y[:, None], W, y[0, :2], [1], [1], [1], False, [0], 1),
        lambda y: F.conv1d(y[:, None], W, None, padding=1) + y[0, :2, None],
    ),
    "convolution of sequences": (
        lambda y: torch.conv_tbc(y.T[:, :, None].contiguous(), W.permute(2, 1, 0), B, 1),
        lambda y: one_dimension(y).permute(2, 0, 1),
    ),
    "xlog1py": (lambda y: special.xlog1py(y, POSITIVE), lambda y: y * (1 + POSITIVE).log()),
    "xlog1py of a number": (lambda y: special.xlog1py(2.0, y**2), lambda y: 2 * (1 + y**2).log()),
    "heaviside": (lambda y: torch.heaviside(y, B[0]) * y, lambda y: y.relu()),
    "heaviside, live at zero": (
        lambda y: torch.heaviside(ROOM, y),
        lambda y: torch.where(ROOM == 0, y, (ROOM > 0).double()),
    ),
    "round": (lambda y: y + special.round(y), lambda y: y + y.round()),
    "diagonal": (lambda y: torch.diag(y[:, :3]), lambda y: y[:, :3].diagonal()),
    "unfold": (lambda y: torch.unfold_copy(y, 1, 3, 1), lambda y: y.unfold(1, 3, 1)),
    "alias": (torch.alias_copy, lambda y: y),
    "split": (lambda y: torch.split_copy(y, 2, 1)[1], lambda y: y.split(2, 1)[1]),
    "mean without NaN": (lambda y: y.nanmean(1), lambda y: y.mean(1)),
    "covariances": (torch.cov, lambda y: centred(y) @ centred(y).T / 5),
    "a covariance": (lambda y: y[0].cov(), lambda y: (centred(y)[0] ** 2).sum() / 5),
    "a number copied": (
        lambda y: (y[:, :1].copy_(2.0), y)[1],
        lambda y: torch.cat([torch.full((3, 1), 2.0).double(), y[:, 1:]], 1),
    ),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_another_name_is_another_name_only(one: Fn, other: Fn) -> None:
    torch.manual_seed(1)
    x, layer, found = torch.randn(3, 6).double(), nn.Linear(6, 6), []
    for f in (one, other):
        model = Apply(lambda m, x, f=f: f(m.layer(x)).sum().expand(3, 1), layer=layer).double()
        found.append(lrpfx.explain(model, x, 0, EpsilonAll(0.0)))
    torch.testing.assert_close(found[0].output, found[1].output)
    torch.testing.assert_close(found[0].relevance, found[1].relevance)
    assert found[0].relevance.any()


def test_correlations_have_their_deviations_as_constants() -> None:
    """Gradient times input of it, so written, and without any bias."""
    torch.manual_seed(1)
    x = torch.randn(3, 6).double().requires_grad_()
    with torch.no_grad():
        norms = (x - x.mean(1, keepdim=True)).norm(dim=1)
    model = Apply(lambda m, x: torch.corrcoef(x)[:, :1])
    products = centred(x) @ centred(x[:1]).T / norms[:, None] / norms[0]
    torch.testing.assert_close(products, model(x))
    (expected,) = torch.autograd.grad(products.sum(), x)
    found = lrpfx.explain(model, x.detach(), torch.ones(3, 1).double(), EpsilonAll(0.0))
    seeded = lrpfx.explain(model, x.detach(), lambda o: o.sum(), EpsilonAll(0.0))
    torch.testing.assert_close(seeded.relevance, expected * x / 2)
    assert found.relevance.any()


def test_a_normal_distribution_function_at_the_output_is_left_out_as_a_sigmoid_is() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(4, 3).double(), nn.Linear(3, 1).double()
    probit = lrpfx.explain(Apply(lambda m, x: special.ndtr(m.layer(x)), layer=layer), x, 0)
    logit = lrpfx.explain(layer, x, 0)
    assert (logit.output < 0).any()
    torch.testing.assert_close(probit.relevance, logit.relevance)
    assert any("normal distribution function at the output" in n for n in probit.report.notes)


def test_what_has_no_derivative_says_so() -> None:
    x = torch.rand(2, 3)
    for f in (special.bessel_j0, lambda x: special.legendre_polynomial_p(x, 2)):
        with pytest.raises(lrpfx.errors.UnsupportedOpError, match="no derivative"):
            lrpfx.explain(Apply(lambda m, x, f=f: f(x)), x, 0)


def test_random_numbers_written_by_default_are_told_of() -> None:
    model = Apply(lambda m, x: x + torch.empty(3).bernoulli_())
    with pytest.raises(lrpfx.errors.CaptureError, match="draws random numbers"):
        lrpfx.explain(model, torch.rand(2, 3), 0)
