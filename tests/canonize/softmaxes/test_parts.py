"""Softmaxes and gates that are written in parts: of two, pair by pair, place by place.

The twins have the plain function in the place of the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")

Form = Callable[[Tensor, Tensor], Tensor]


def both(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], -1)


def gate(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).sigmoid()


def total(e: Tensor) -> Tensor:
    return e.sum(-1, keepdim=True)


def weights(a: Tensor, b: Tensor) -> Tensor:
    return (a + b).softmax(-1)


def normed(e: Tensor) -> Tensor:
    return e / total(e)


def of_first(a: Tensor, b: Tensor) -> Tensor:
    return a.softmax(-1)


def differences(a: Tensor) -> Tensor:
    return a[:, None] - a[:, :, None]


MASK = torch.tensor([1, 1, 0, 1, 1, 0]) > 0


def in_halves(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:, :2].softmax(-1), a[:, 2:].softmax(-1)], -1)


def by_mask(a: Tensor, b: Tensor) -> Tensor:
    filled = (a.masked_fill(mask, -torch.inf) for mask in (MASK, ~MASK))
    return sum(s.softmax(-1) for s in filled)


def masks_in_place(a: Tensor, b: Tensor) -> Tensor:
    e = a.exp()
    for mask in (MASK, ~MASK):
        e[:, mask] /= total(e[:, mask])
    return e


def slices_in_place(a: Tensor, b: Tensor) -> Tensor:
    e = (a - a.amax(-1, keepdim=True)).exp()
    e[:, :2] /= total(e[:, :2])
    e[:, 2:] = e[:, 2:] / total(e[:, 2:])
    return e


def parts_in_place(a: Tensor, b: Tensor) -> Tensor:
    e = a * 1
    for part in e.split([2, 4], -1):
        part.exp_()
        part /= total(part)
    return e


#: Factors of the same values, each with its plain twin.
FACTORS: dict[str, tuple[Form, Form]] = {
    "of two, selected": (lambda a, b: both(a, b).softmax(-1)[..., 0], gate),
    "of two, unbound": (lambda a, b: both(a, b).softmax(-1).unbind(-1)[0], gate),
    "of two, the last": (lambda a, b: both(b, a).softmax(-1)[..., -1:].squeeze(-1), gate),
    "of two, by hand": (lambda a, b: normed(both(a, b).exp())[..., 0], gate),
    "of two exponentials": (lambda a, b: (e := a.exp()) / (e + b.exp()), gate),
    "of two, through a logarithm": (lambda a, b: (a - torch.logaddexp(a, b)).exp(), gate),
    "product of exponentials": (lambda a, b: normed(both(a.exp(), b.exp()).prod(-1)), weights),
    "exponentials multiplied": (lambda a, b: normed(both(a, b).exp().prod(-1)), weights),
    "product of odds": (
        lambda a, b: normed(both((p := a.sigmoid()) / (1 - p), b.exp()).prod(-1)),
        weights,
    ),
    "pair by pair": (lambda a, b: 1 / differences(a).exp().sum(-1), of_first),
    "pair by pair, through a logarithm": (
        lambda a, b: (-differences(a).logsumexp(-1)).exp(),
        of_first,
    ),
    "masks in place": (masks_in_place, by_mask),
    "slices in place": (slices_in_place, in_halves),
    "parts in place": (parts_in_place, in_halves),
}
SLOW = {"of two, unbound", "exponentials multiplied", "product of odds", "parts in place"}


def explained(form: Form, out: Callable[[Apply, Tensor, Tensor], Tensor]) -> Any:
    torch.manual_seed(0)
    members = {name: nn.Linear(4, 6) for name in "abv"} | {"head": nn.Linear(6, 3)}
    x = torch.randn(2, 4).double()
    model = Apply(lambda m, x: out(m, form(m.a(x), m.b(x)), m.v(x)), **members).double()
    return lrpfx.explain(model, x, 1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] * (n in SLOW)) for n in FACTORS]
)
def test_a_factor_in_other_words_is_that_factor(name: str) -> None:
    found, expected = (explained(f, lambda m, w, v: m.head(w * v)) for f in FACTORS[name])
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-5)
    assert not any("divisor" in note for note in found.report.notes)


#: Products with a weight of two, divided behind the product.
LATER: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a quotient": lambda a, b, v: a.exp() * v / (a.exp() + b.exp()),
    "an inverse": lambda a, b, v: v * a.exp() * (1 / (a.exp() + b.exp())),
    "of what is stacked": lambda a, b, v: (e := both(a, b).exp())[..., 0] * v / e.sum(-1),
    "sliced": lambda a, b, v: ((e := both(b, a).exp())[..., 1:] * v[..., None] / total(e))[..., 0],
}


@pytest.mark.parametrize("name", LATER)
def test_a_weight_of_two_that_is_divided_later_is_a_gate(name: str) -> None:
    form = LATER[name]
    found = explained(both, lambda m, w, v: m.head(form(w[..., 0], w[..., 1], v)))
    expected = explained(gate, lambda m, w, v: m.head(w * v))
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-5)


def test_weights_of_which_both_are_read_are_those_of_a_mean() -> None:
    def mean(m: Apply, w: Tensor, v: Tensor) -> Tensor:
        return m.head(w[..., 0] * v + w[..., 1] * v.flip(1))

    def whole(m: Apply, w: Tensor, v: Tensor) -> Tensor:
        return m.head((w * both(v, v.flip(1))).sum(-1))

    found, expected = (explained(lambda a, b: both(a, b).softmax(-1), f) for f in (mean, whole))
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-5, atol=1e-6)


def test_a_probability_of_two_at_the_output_is_explained_by_its_logits() -> None:
    x = torch.randn(2, 4).double()
    layer = nn.Linear(4, 2)
    one = Apply(lambda m, x: m.fc(x).softmax(-1)[:, 1], fc=layer).double()
    logits = Apply(lambda m, x: m.fc(x)[:, 1], fc=layer).double()
    found, expected = (lrpfx.explain(m, x) for m in (one, logits))
    torch.testing.assert_close(found.relevance, expected.relevance)


@pytest.mark.parametrize("form", [lambda s: 1 / s, lambda s: -s.log()])
def test_differences_of_pairs_at_the_output_are_left_out(form: Callable) -> None:
    x, layer = torch.randn(2, 4).double(), nn.Linear(4, 3)
    model = Apply(lambda m, x: form(differences(m.fc(x)).exp().sum(-1)), fc=layer).double()
    found = lrpfx.explain(model, x, 1)
    torch.testing.assert_close(found.relevance, lrpfx.explain(layer, x, 1).relevance)
    assert any("left out" in note for note in found.report.notes)


@pytest.mark.parametrize(
    "less",
    [
        lambda a: a.square().mean(-1, keepdim=True).log(),
        lambda a: a.amax(-1, keepdim=True) * a.exp().sum(-1, keepdim=True).log(),
        lambda a: a.abs().sum(-1, keepdim=True).log(),
    ],
)
def test_exponentials_less_another_logarithm_are_no_softmaxes(less: Callable) -> None:
    e = explained(lambda a, b: (a - less(a)).exp(), lambda m, w, v: m.head(w * v))
    assert not any("softmax" in row.kind for row in e.report.rows)
