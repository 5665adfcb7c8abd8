"""wrt= -> which inputs are explained; the others are constants."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply
from tests.test_errors import check_form

pytestmark = pytest.mark.usefixtures("each_way")

EXACT = EpsilonAll(0.0)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Pool(nn.Module):
    """A mean over the places that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.o = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pooled = (F.relu(self.e(x)) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return self.o(pooled)


def model() -> nn.Module:
    return Pool().double().eval()


def x() -> Tensor:
    return torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.manual_seed(1))


@pytest.mark.parametrize(
    ("wrt", "keywords"),
    [(("x",), False), ([0], False), ("x", True), (-2, True)],
    ids=str,
)
def test_a_floating_mask_that_is_not_explained_takes_nothing(wrt: Any, keywords: bool) -> None:
    inputs: Any = {"x": x(), "mask": MASK.double()} if keywords else (x(), MASK.double())
    as_integers = lrpfx.explain(model(), (x(), MASK), 1, rules=EXACT).relevance[0]
    e = lrpfx.explain(model(), inputs, 1, rules=EXACT, wrt=wrt)
    found = e.relevance
    r, mask = (found["x"], found["mask"]) if keywords else found
    torch.testing.assert_close(r, as_integers)
    assert mask is None and "by wrt= are x;" in e.report.notes[-1]
    assert not [note for note in e.report.notes if "divisor" in note]


def test_the_same_under_every_composite_that_an_explainer_is_made_with() -> None:
    for rules in ("epsilon_plus", "attnlrp", "guided_backprop", None):
        explainer = lrpfx.Explainer(model(), (x(), MASK.double()), rules, wrt=["x"])
        expected = lrpfx.explain(model(), (x(), MASK), 1, rules=rules).relevance[0]
        for ledger in (None, True):
            got = explainer((x(), MASK.double()), 1, ledger=ledger).relevance
            torch.testing.assert_close(got[0], expected)
            assert got[1] is None


def test_what_is_left_out_is_a_constant_of_the_sum_too() -> None:
    forward = Apply(lambda m, a, b: m.o(a * b + b), o=nn.Linear(4, 2)).double()
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    e = lrpfx.explain(forward, (a, b), 1, rules=EXACT, wrt="args.1")
    # b * (a + 1), with a constant: each product's factor is b alone.
    expected = b * (a + 1) * forward.o.weight[1]
    torch.testing.assert_close(e.relevance[1], expected.detach())
    assert e.relevance[0] is None


def test_names_go_into_nested_inputs_and_token_ids() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.o = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, batch: dict[str, Any], *more: Tensor, scale: Tensor) -> Tensor:
            h = self.table(batch["ids"]) + batch["extra"][0] + more[0]
            return self.o((h * scale).sum(1))

    ids, extra, added = torch.tensor([[1, 2], [3, 3]]), torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    nested = Nested().eval()

    class Call(nn.Module):  # keywords and positions at once
        def __init__(self) -> None:
            super().__init__()
            self.inner = nested

        def forward(self, batch: dict[str, Any], *more: Tensor) -> Tensor:
            return self.inner(batch, *more[:1], scale=more[1])

    inputs = ({"ids": ids, "extra": [extra]}, added, torch.rand(2, 1, 1) + 1)
    everything = lrpfx.explain(Call(), inputs, 1)
    assert everything.relevance[2] is not None
    for wrt, explained in [
        ("batch.ids", [True, False, False, False]),
        (("batch",), [True, True, False, False]),
        (("batch.extra.0", "more.0"), [False, True, True, False]),
        ((1,), [False, False, True, False]),
    ]:
        r = lrpfx.explain(Call(), inputs, 1, wrt=wrt).relevance
        found = [r[0]["ids"], r[0]["extra"][0], r[1], r[2]]
        assert [one is not None for one in found] == explained


@pytest.mark.parametrize("wrt", ["y", (), ("x", "z"), 2, -3, ("x.0",), 1.5, [None], (True,)])
def test_what_names_nothing_is_refused_with_what_there_is(wrt: Any) -> None:
    with pytest.raises(errors.InputError, match="wrt") as caught:
        lrpfx.Explainer(model(), (x(), MASK.double()), wrt=wrt)
    assert caught.value.where[0].startswith("x: float64[2, 5, 4]")
    assert caught.value.where[1].startswith("mask: ")
    check_form(caught.value)


def test_integers_that_index_no_embedding_cannot_be_chosen() -> None:
    with pytest.raises(errors.InputError, match="nothing to explain in 'mask'") as caught:
        lrpfx.explain(model(), (x(), MASK), wrt=("x", "mask"))
    check_form(caught.value)


def test_coverage_counts_what_is_chosen() -> None:
    rows = {}
    for wrt in (None, "x"):
        report = lrpfx.coverage(model(), (x(), MASK.double()), EXACT, wrt=wrt)
        rows[wrt] = [row.kind for row in report.rows]
    assert "product" in rows[None] and "product" not in rows["x"]
