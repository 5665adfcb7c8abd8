"""Sparse softmaxes, in the words of the packages that have them, against their own derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lrpfx
from tests.ops.test_table import Between, gradient_times_input, kernel, samples

LRP_0 = lrpfx.composites.EpsilonAll(epsilon=0.0)


class Sparsemax(torch.autograd.Function):
    """As TabNet has it: in place, by a sort, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x -= x.max(dim=-1, keepdim=True)[0]
        ordered = torch.sort(x, descending=True, dim=-1)[0]
        sums = ordered.cumsum(-1) - 1
        rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        count = (rank * ordered > sums).sum(dim=-1).unsqueeze(-1)
        threshold = sums.gather(-1, count - 1)
        threshold /= count.to(x.dtype)
        y = torch.clamp(x - threshold, min=0)
        ctx.save_for_backward(y, count)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        y, count = ctx.saved_tensors
        g = torch.where(y > 0, g, 0.0)
        return torch.where(y > 0, g - g.sum(-1, keepdim=True) / count, 0.0)


class Entmax15(torch.autograd.Function):
    """As the package entmax has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = (x - x.max(dim=-1, keepdim=True)[0]) / 2
        ordered = torch.sort(x, descending=True, dim=-1)[0]
        rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
        mean, squares = ordered.cumsum(-1) / rank, (ordered**2).cumsum(-1) / rank
        rest = torch.clamp((1 - rank * (squares - mean**2)) / rank, 0)
        thresholds = mean - torch.sqrt(rest)
        count = (thresholds <= ordered).sum(-1).unsqueeze(-1)
        y = torch.clamp(x - thresholds.gather(-1, count - 1), min=0) ** 2
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope = ctx.saved_tensors[0].sqrt()
        return slope * (g - (g * slope).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True))


def bisected(alpha: float) -> type[torch.autograd.Function]:
    """As the package entmax has it for any alpha: alpha is a tensor, the sum is made one."""

    class Bisected(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            a = torch.tensor(alpha, dtype=x.dtype).expand(x.shape[0], 1)

            def p(x: Tensor) -> Tensor:
                return torch.clamp(x, min=0) ** (1 / (a - 1))

            x = x * (a - 1)
            top = x.max(dim=1, keepdim=True)[0]
            low, high = top - 1, top - x.shape[1] ** (1 - a)
            start = p(x - low).sum(1) - 1
            width = high - low
            for _ in range(45):
                width = width / 2
                middle = low + width
                y = p(x - middle)
                low = torch.where(((y.sum(1) - 1) * start >= 0).unsqueeze(1), middle, low)
            y = y / y.sum(dim=1).unsqueeze(dim=1)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            slope = torch.where(y > 0, y ** (2 - alpha), y.new_zeros(1))
            return slope * (g - (g * slope).sum(1, keepdim=True) / slope.sum(1, keepdim=True))

    return Bisected


def by_topk(x: Tensor) -> Tensor:
    ordered = x.topk(x.shape[1], 1).values
    steps = (ordered.cumsum(1) - 1) / torch.arange(1, x.shape[1] + 1)
    last = (ordered > steps).sum(1, keepdim=True) - 1
    return torch.relu(x - steps.gather(1, last))


def by_bisection(x: Tensor) -> Tensor:
    low = x.amax(1, keepdim=True) - 1
    step = torch.ones_like(low)
    for _ in range(35):
        step = step / 2
        above = torch.clamp(x - low - step, min=0).sum(1, keepdim=True) >= 1
        low = torch.where(above, low + step, low)
    y = torch.clamp(x - low, min=0)
    return y / y.sum(1, keepdim=True)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], type[torch.autograd.Function]]] = {
    "TabNet's": (Sparsemax.apply, Sparsemax),
    "by topk": (by_topk, Sparsemax),
    "by bisection": (by_bisection, Sparsemax),
    "1.5-entmax": (Entmax15.apply, Entmax15),
}
LONG = (bisected(1.3).apply, bisected(1.3))  # some three hundred nodes


@pytest.mark.parametrize(
    ("fn", "known"),
    [*FORMS.values(), pytest.param(*LONG, marks=pytest.mark.nightly)],
    ids=[*FORMS, "1.3-entmax"],
)
def test_a_sparse_softmax_is_expanded_by_its_own_derivative(
    fn: Callable[[Tensor], Tensor], known: type[torch.autograd.Function]
) -> None:
    """Behind a linear layer R / y is the layer's weight, so LRP-0 is gradient times input."""
    x = samples((6,))
    model, twin = (Between(lambda x, f=f: f(x @ kernel(6, 6)), (6,)) for f in (fn, known.apply))
    explainer = lrpfx.Explainer(model, x, rules=LRP_0)
    assert [row.kind for row in explainer.report.rows].count("entmax") == 1
    expected = gradient_times_input(twin, x, 1)
    for options in ({}, {"ledger": False}):
        got = explainer(x, 1, **options)
        torch.testing.assert_close(got.relevance, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(got.output, twin(x), rtol=1e-6, atol=1e-8)


def test_what_only_sorts_and_cuts_off_is_no_sparse_softmax() -> None:
    model = Between(lambda x: torch.relu(x - x.sort(1).values.cumsum(1)[:, :1]), (6,))
    report = lrpfx.Explainer(model, samples((6,)), rules=LRP_0).report
    assert "entmax" not in [row.kind for row in report.rows]


def test_relevance_through_a_sparse_mask_has_exact_derivatives() -> None:
    model, x = Between(lambda x: by_topk(x @ kernel(6, 6)) * x, (6,)), samples((6,), 2)
    explainer = lrpfx.Explainer(model, x, rules="attnlrp")
    leaf, way = x.clone().requires_grad_(), torch.randn_like(x)
    total = explainer(leaf, 1, create_graph=True).relevance.square().sum()
    (slope,) = torch.autograd.grad(total, leaf)
    ends = [explainer(x + h * way, 1).relevance.square().sum() for h in (1e-6, -1e-6)]
    torch.testing.assert_close(
        (slope * way).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7
    )
