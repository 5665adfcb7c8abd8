"""Exponentials in any words, over their sum, are softmaxes; what is none is left as it is.

The twin has ``softmax`` in the place of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import composites

pytestmark = pytest.mark.usefixtures("each_way")

Function = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, function: Function | None, later: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(4, 4).double(), nn.Linear(4, 5).double()
        self.function, self.later = function, later

    def forward(self, x: Tensor) -> Tensor:
        a, v = self.q(x) @ x.mT / 2, self.v(x)
        if self.function is None:
            return (a.softmax(-1) @ v).sum(1)
        e = self.function(a)
        total = e.sum(-1, keepdim=True)
        return (e @ v / total if self.later else e / total @ v).sum(1)


#: Each has another mechanism: a product, a quotient, a power, a function, a factor.
EXPONENTIALS: dict[str, Function] = {
    "halves": lambda a: (a / 2).exp() * (a / 2).exp(),
    "a product of two": lambda a: (0.3 * a).exp() * (0.7 * a).exp(),
    "a quotient": lambda a: (3 * a).exp() / (2 * a).exp(),
    "over that of the maximum": lambda a: a.exp() / a.amax(-1, keepdim=True).exp(),
    "an inverse": lambda a: (-a).exp() ** -1,
    "a product of roots": lambda a: a.exp().sqrt() * a.exp() ** 0.5,
    "odds": lambda a: a.sigmoid() / (1 - a.sigmoid()),
    "odds from an inverse": lambda a: 1 / (-a).sigmoid() - 1,
    "of a hyperbolic tangent": lambda a: (1 + (a / 2).tanh()) / (1 - (a / 2).tanh()),
    "less one and one": lambda a: torch.expm1(a) + 1,
    "hyperbolic": lambda a: a.sinh() + a.cosh(),
    "a power of a tensor": lambda a: torch.pow(torch.full_like(a, math.e), a),
    "with a factor": lambda a: 0.5 * a.sigmoid() / (3 * (-a).sigmoid()),
}
SLOW = {"a quotient", "an inverse", "a product of roots", "odds", "hyperbolic", "halves"}
X = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return lrpfx.explain(Attention(None), X, 1, rules=composites.AttnLRP(1e-18)).relevance


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] * (n in SLOW)) for n in EXPONENTIALS]
)
def test_exponentials_over_their_sum_are_a_softmax(name: str, expected: Tensor) -> None:
    for later in (False, True):
        model = Attention(EXPONENTIALS[name], later)
        torch.testing.assert_close(model(X), Attention(None)(X))
        e = lrpfx.explain(model, X, 1, rules=composites.AttnLRP(1e-18))
        torch.testing.assert_close(e.relevance, expected)
        assert not any("divisor" in note for note in e.report.notes)


def test_they_are_so_in_single_precision_and_when_computed_twice(expected: Tensor) -> None:
    def twice(a: Tensor) -> Tensor:
        return (a / 2).exp() * (a / 2).exp() / ((a / 2).exp() * (a / 2).exp()).sum(-1, True)

    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return (twice(self.q(x) @ x.mT / 2) @ self.v(x)).sum(1)

    got = lrpfx.explain(Twice(None), X, 1, rules=composites.AttnLRP(1e-18))
    torch.testing.assert_close(got.relevance, expected)
    single = Attention(EXPONENTIALS["odds"]).float()
    got = lrpfx.explain(single, X.float(), 1, rules=composites.AttnLRP(1e-18))
    torch.testing.assert_close(got.relevance.double(), expected, rtol=1e-4, atol=1e-5)


NONE: dict[str, Function] = {
    "sigmoids": lambda a: a.sigmoid(),
    "a hyperbolic cosine": lambda a: a.cosh(),
    "a sum of two": lambda a: a.exp() + (2 * a).exp(),
    "one of another function, too": lambda a: a.clamp(max=0.1).exp() * a.square().exp(),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_exponential_keeps_value_and_derivative(name: str) -> None:
    model = Attention(NONE[name])
    seed = torch.ones(2, 5, dtype=torch.float64)
    e = lrpfx.explain(model, X, seed, rules=[("*", lrpfx.Gradient())])
    torch.testing.assert_close(e.output, model(X))
    variable = X.clone().requires_grad_()
    model(variable).sum().backward()
    torch.testing.assert_close(e.relevance, variable.grad)
