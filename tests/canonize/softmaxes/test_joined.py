"""Softmaxes over several exponentials: in chunks, entry by entry, with a running maximum.

The twin has ``softmax`` over all scores at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import composites

pytestmark = pytest.mark.usefixtures("each_way")

Attend = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = nn.Linear(4, 4).double(), nn.Linear(4, 5).double()
        self.out = nn.Linear(5, 2).double()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self.q(x) @ x.mT / 2, self.v(x))).sum(1)


def whole(a: Tensor, v: Tensor) -> Tensor:
    return a.softmax(-1) @ v


def total(e: Tensor) -> Tensor:
    return e.sum(-1, keepdim=True)


def chunks(a: Tensor, v: Tensor, sizes: tuple[int, ...] = (1, 3), held: bool = False) -> Tensor:
    top = a.amax(-1, keepdim=True)
    top = top.detach() if held else top
    parts = [(s - top).exp() for s in a.split(sizes, -1)]
    above = sum(e @ w for e, w in zip(parts, v.split(sizes, 1), strict=True))
    return above / sum(map(total, parts))


def entries(a: Tensor, v: Tensor) -> Tensor:
    e = [s.exp() for s in a.unbind(-1)]
    return sum((s / sum(e))[..., None] * v[:, i : i + 1] for i, s in enumerate(e))


def columns(a: Tensor, v: Tensor) -> Tensor:
    e = [s.exp() for s in a.split(1, -1)]
    return sum(s * v[:, i : i + 1] for i, s in enumerate(e)) * sum(e).reciprocal()


def running(a: Tensor, v: Tensor) -> Tensor:
    """Rabe and Staats 2021, https://arxiv.org/abs/2112.05682; FlashAttention has the same."""
    top, above, below = a.new_full((*a.shape[:-1], 1), -torch.inf), 0.0, 0.0
    for s, w in zip(a.split((1, 2, 1), -1), v.split((1, 2, 1), 1), strict=True):
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        e, scale = (s - new).exp(), (top - new).exp()
        above, below, top = above * scale + e @ w, below * scale + total(e), new
    return above / below


def with_ones(a: Tensor, v: Tensor) -> Tensor:
    return (a - a.amax(-1, keepdim=True)).exp() @ torch.cat([v, torch.ones_like(v[..., :1])], -1)


def ones_sliced(a: Tensor, v: Tensor) -> Tensor:
    y = with_ones(a, v)
    return y[..., :-1] / y[..., -1:]


def ones_split(a: Tensor, v: Tensor) -> Tensor:
    y, d = with_ones(a, v).split([5, 1], -1)
    return y / d


def ones_selected(a: Tensor, v: Tensor) -> Tensor:
    y = with_ones(a, v)
    return y.narrow(-1, 0, 5) / y[..., -1].unsqueeze(-1)


def of_two(a: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(a * 1.4426950408889634)
    return e @ v / total(e)


def of_a_number(a: Tensor, v: Tensor) -> Tensor:
    e = 2.718281828459045**a
    return e / total(e) @ v


FORMS: dict[str, Attend] = {
    "chunks": chunks,
    "equal chunks, the maximum held": lambda a, v: chunks(a, v, (2, 2), True),
    "entry by entry": entries,
    "column by column, over an inverse": columns,
    "a running maximum": running,
    "a column of ones": ones_sliced,
    "a column of ones, split": ones_split,
    "a column of ones, selected": ones_selected,
    "powers of two": of_two,
    "powers of a number": of_a_number,
}
EXPORTED = ("equal chunks, the maximum held", "a running maximum", "a column of ones, split")
X = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
RULES: dict[str, Any] = {
    "attnlrp": composites.AttnLRP(1e-18),
    "epsilon_plus": composites.EpsilonPlus(1e-18, 1e-18),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return {
        name: lrpfx.explain(Attention(whole), X, 1, rules=rules).relevance
        for name, rules in RULES.items()
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_softmax_in_parts_is_one(name: str, expected: dict[str, Tensor]) -> None:
    model = Attention(FORMS[name])
    torch.testing.assert_close(model(X), Attention(whole)(X))
    for each, rules in RULES.items():
        exported = each == "attnlrp" and name in EXPORTED
        explainer = lrpfx.Explainer(model, X, rules, capture="export" if exported else "record")
        for ledger in (True, False):
            got = explainer(X, 1, ledger=ledger).relevance
            torch.testing.assert_close(got, expected[each])


def gates(a: Tensor, v: Tensor) -> Tensor:
    """The weights of two branches, as selective kernels have them."""
    left, right = a.tanh().exp(), (2 * a).exp()
    return (left / (left + right)) @ v + (right / (left + right)) @ v.flip(1)


def gates_whole(a: Tensor, v: Tensor) -> Tensor:
    left, right = torch.stack([a.tanh(), 2 * a]).softmax(0)
    return left @ v + right @ v.flip(1)


def test_weights_of_branches_are_a_softmax_over_the_branches() -> None:
    got, twin = (lrpfx.explain(Attention(f), X, 1, rules="attnlrp") for f in (gates, gates_whole))
    torch.testing.assert_close(got.relevance, twin.relevance)


NONE: dict[str, Attend] = {
    "something else in the sum": lambda a, v: a.exp() / (a.exp() + a.tanh().exp() + a**2) @ v,
    "a live factor in the sum": lambda a, v: a.exp() / (a.exp() + a.tanh().exp() * (1 + a**2)) @ v,
    "another sum below": lambda a, v: a.exp() @ v / total((a / 2).exp()),
    "other exponentials above": lambda a, v: (a / 2).exp() / (a.exp() + a.tanh().exp()) @ v,
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_softmax_keeps_its_value_and_derivative(name: str) -> None:
    model = Attention(NONE[name])
    seed = torch.ones(2, 2, dtype=torch.float64)
    e = lrpfx.explain(model, X, seed, rules=[("*", lrpfx.Gradient())])
    torch.testing.assert_close(e.output, model(X))
    assert "softmax" not in {row.kind for row in e.report.rows}


def test_products_with_parts_are_taken_apart_only_at_their_bounds() -> None:
    """Columns that overlap, or of which one is used otherwise, stay in the product."""

    def across(a: Tensor, v: Tensor) -> Tensor:
        y = a @ torch.cat([v, v.tanh()], -1)
        return y[..., 2:7] * y.sum(-1, keepdim=True)

    model = Attention(across)
    seed = torch.ones(2, 2, dtype=torch.float64)
    e = lrpfx.explain(model, X, seed, rules=[("*", lrpfx.Gradient())])
    variable = X.clone().requires_grad_()
    model(variable).sum().backward()
    torch.testing.assert_close(e.relevance, variable.grad)
