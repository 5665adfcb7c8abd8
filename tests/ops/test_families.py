"""Ops that are others in one word: their relevance is that of the others, written out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lrpfx
from tests.ops.test_table import IMAGE, ROW, Between, kernel, samples, together

pytestmark = pytest.mark.usefixtures("each_front")

Fn = Callable[[Tensor], Tensor]
ATTNLRP = lrpfx.composites.AttnLRP(0.0)


def agree(
    one: Fn, other: Fn, shape: tuple[int, ...], rules: object = ATTNLRP, atol: float = 1e-10
) -> None:
    models, x = [Between(fn, shape) for fn in (one, other)], samples(shape)
    got, expected = (lrpfx.Explainer(model, x, rules=rules)(x, 1) for model in models)
    torch.testing.assert_close(got.output, expected.output, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.relevance, expected.relevance, rtol=1e-8, atol=atol)
    assert got.relevance.any()


# -- variances, norms and distances that are no divisors ---------------------------------------


def mean_of_squares(x: Tensor) -> Tensor:
    return (x * x).mean(1, keepdim=True)


def normalised_and_back(spread: Fn) -> Fn:
    """RevIN: what is divided by is multiplied with in the end."""

    def run(x: Tensor) -> Tensor:
        z = x - x.mean(1, keepdim=True)
        scale = torch.sqrt(spread(z) + 1e-2)
        return F.relu((z / scale) @ kernel(8, 8)) * scale

    return run


SPREADS: dict[str, tuple[Fn, Fn]] = {
    "var": (lambda x: x.var(1, keepdim=True, unbiased=False), mean_of_squares),
    "var, corrected": (
        lambda x: x.var(1, keepdim=True),
        lambda x: (x * x).sum(1, keepdim=True) / 7,
    ),
    "std": (lambda x: x.std(1, keepdim=True, correction=0) ** 2, mean_of_squares),
    "var_mean": (lambda x: torch.var_mean(x, 1, keepdim=True, correction=0)[0], mean_of_squares),
    "std_mean": (
        lambda x: torch.std_mean(x, 1, keepdim=True, correction=0)[0] ** 2,
        mean_of_squares,
    ),
    "vector_norm": (
        lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True) ** 2 / 8,
        mean_of_squares,
    ),
    "norm": (lambda x: x.norm(dim=1, keepdim=True) ** 2 / 8, mean_of_squares),
}


@pytest.mark.parametrize(("spread", "plain"), SPREADS.values(), ids=SPREADS)
def test_a_statistic_that_also_multiplies_is_the_mean_of_squares(spread: Fn, plain: Fn) -> None:
    agree(normalised_and_back(spread), normalised_and_back(plain), ROW)


def test_norms_and_distances_are_their_sums_and_roots() -> None:
    centres = kernel(5, 8)

    def named(x: Tensor) -> Tensor:
        order = torch.linalg.vector_norm
        return together(
            *(order(x, p, dim=1) for p in (1, 2, 3, float("inf"), -float("inf"))),
            torch.cdist(x, centres),
            torch.cdist(x, centres, p=1.0),
            F.pairwise_distance(x, centres[:1], eps=0.0),
            torch.hypot(x, x.flip(1)),
            torch.linalg.matrix_norm(x.unflatten(1, (2, 4))),
        )

    def plain(x: Tensor) -> Tensor:
        away = x[:, None] - centres
        return together(
            x.abs().sum(1),
            x.square().sum(1).sqrt(),
            (x.abs() ** 3).sum(1) ** (1 / 3),
            x.abs().amax(1),
            x.abs().amin(1),
            away.square().sum(2).sqrt(),
            away.abs().sum(2),
            away[:, 0].square().sum(1).sqrt(),
            (x.square() + x.flip(1).square()).sqrt(),
            x.square().sum(1).sqrt(),
        )

    agree(named, plain, ROW)


# -- logarithms of sums of exponentials --------------------------------------------------------


def test_a_log_softmax_inside_is_the_logarithm_of_a_softmax() -> None:
    agree(
        lambda x: F.log_softmax(x @ kernel(8, 8), 1) * 2,
        lambda x: F.softmax(x @ kernel(8, 8), 1).log() * 2,
        ROW,
    )


def test_a_log_softmax_of_improbable_classes_stays_finite() -> None:
    """The logarithm of its softmax would not."""
    model, x = Between(lambda x: F.log_softmax(1e4 * x, 1) * 2, ROW), samples(ROW)
    assert lrpfx.explain(model, x, 1, rules=ATTNLRP).relevance.isfinite().all()


def test_sums_of_exponentials_share_by_what_each_adds() -> None:
    fixed = kernel(4, 1)

    def named(x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 2))
        return together(
            x.logsumexp(1),
            x.logsumexp((1, 2), keepdim=True),
            torch.logaddexp(x, x.flip(1)),
            torch.logaddexp(x, fixed),
            torch.logaddexp(fixed.expand_as(x), x),
            torch.logaddexp2(x, x.flip(2)),
            x.logcumsumexp(1),
        )

    def plain(x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 2))
        return together(
            x.exp().sum(1).log(),
            x.exp().sum((1, 2), keepdim=True).log(),
            (x.exp() + x.flip(1).exp()).log(),
            (x.exp() + fixed.exp()).log(),
            (fixed.exp() + x.exp()).log(),
            (x.exp2() + x.flip(2).exp2()).log2(),
            x.exp().cumsum(1).log(),
        )

    agree(named, plain, ROW)


# -- products of the entries of one tensor -----------------------------------------------------


def test_a_product_of_entries_is_shared_evenly_by_its_factors() -> None:
    model, x = Between(lambda x: together(x.prod(1), x[:, :3].cumprod(1)), ROW), samples(ROW)
    got = lrpfx.explain(model, x, 1, rules=ATTNLRP).relevance
    y, weight = (x * model.gain).detach(), model.head.weight[1].detach()
    expected = (y.prod(1) * weight[0] / 8)[:, None].repeat(1, 8)
    R = y[:, :3].cumprod(1) * weight[1:]
    for i in range(3):  # the i-th output has i + 1 factors
        expected[:, : i + 1] += R[:, i, None] / (i + 1)
    torch.testing.assert_close(got, expected)


# -- weights that depend on the input ----------------------------------------------------------


def test_a_live_kernel_is_a_matrix_product_of_patches() -> None:
    def named(x: Tensor) -> Tensor:
        kernels = (x[:, :, :3, :3] * 0.5).flatten(1)
        image = x.reshape(1, -1, 6, 6)
        z = F.conv2d(image, kernels.view(-1, 4, 3, 3), kernels[:, 0], padding=1, groups=len(x))
        return z.view(len(x), -1)

    def plain(x: Tensor) -> Tensor:
        kernels = (x[:, :, :3, :3] * 0.5).flatten(1)
        z = F.unfold(x, 3, padding=1).transpose(1, 2) @ kernels[:, :, None]
        return z.flatten(1) + kernels[:, :1]

    agree(named, plain, IMAGE)


def test_a_hypernetwork_is_a_matrix_product() -> None:
    def named(x: Tensor) -> Tensor:
        one = x[0]
        weight, bias = one[:6].view(2, 3), one[6:]
        return together(
            F.linear(x[:, :3], weight, bias),
            F.linear(kernel(1, 3), weight).expand(len(x), 2),
            F.linear(x[:, :3], kernel(2, 3), bias),
            F.conv_transpose1d(x[:, :2, None], weight[..., None]),
        )

    def plain(x: Tensor) -> Tensor:
        one = x[0]
        weight, bias = one[:6].view(2, 3), one[6:]
        return together(
            x[:, :3] @ weight.T + bias,
            (kernel(1, 3) @ weight.T).expand(len(x), 2),
            x[:, :3] @ kernel(2, 3).T + bias,
            (x[:, :2] @ weight)[..., None],
        )

    agree(named, plain, ROW)


def test_norms_with_live_gains_are_norms_and_products() -> None:
    mean, var = kernel(4), kernel(4).abs() + 1

    def named(x: Tensor) -> Tensor:
        gain, bias = x[0, :, 0, 0], x[0, :, 1, 1]
        return together(
            F.batch_norm(x, mean, var, gain, bias),
            F.group_norm(x, 2, gain, bias),
            F.layer_norm(x, (6,), x[0, 0, 0], x[0, 0, 1]),
            F.prelu(x, gain),
        )

    def plain(x: Tensor) -> Tensor:
        gain, bias = x[0, :, :1, 0, None], x[0, :, 1:2, 1, None]
        return together(
            F.batch_norm(x, mean, var) * gain + bias,
            F.group_norm(x, 2) * gain + bias,
            F.layer_norm(x, (6,)) * x[0, 0, 0] + x[0, 0, 1],
            F.relu(x) - gain * F.relu(-x),
        )

    agree(named, plain, IMAGE)


def test_rules_that_split_weights_take_those_under_a_live_kernel() -> None:
    """The constant is what the kernel is multiplied with."""
    agree(
        lambda x: F.linear(kernel(5, 8), x).T,
        lambda x: x @ kernel(5, 8).T,
        ROW,
        rules=[("linear", lrpfx.Gamma(0.3))],
    )
