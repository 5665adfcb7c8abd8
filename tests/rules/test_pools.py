"""Rules of pools, against loops over windows that PyTorch itself finds, and sums by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lrpfx
from lrpfx import SmoothPool, TakeMost, composites, errors
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")


def windows_of(pool: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Which inputs each output of a pool can be, (outputs, inputs), by trying each."""
    size = torch.Size(shape).numel()
    lifted = torch.full((size, size), -1.0).fill_diagonal_(1.0).double()
    return (pool(lifted.reshape(size, *shape)).reshape(size, -1) == 1.0).T


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "1d": (lambda x: F.max_pool1d(x, 3, 2, padding=1), (2, 6)),
    "2d": (lambda x: F.max_pool2d(x, (2, 3), (1, 2), padding=(1, 0)), (1, 4, 5)),
    "3d": (lambda x: F.max_pool3d(x, 2), (1, 2, 4, 3)),
    "dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=(2, 1)), (1, 4, 3)),
    "ceil mode": (lambda x: F.max_pool2d(x, 3, 2, padding=1, ceil_mode=True), (1, 6, 5)),
    "ceil mode past the end": (lambda x: F.max_pool1d(x, 1, 2, ceil_mode=True), (1, 6)),
    "adaptive": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), (1, 5, 4)),
    "adaptive 1d": (lambda x: F.adaptive_max_pool1d(x, 3), (2, 7)),
    "with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (1, 4, 4)),
    "amax": (lambda x: x.amax((1, 3)), (2, 2, 3)),
    "amax of all but the sample": (lambda x: x.amax((-1, -2, -3), keepdim=True), (2, 2, 2)),
    "max": (lambda x: x.max(2).values, (2, 3)),
}


@pytest.mark.parametrize(("pool", "shape"), POOLS.values(), ids=POOLS)
def test_candidates_are_those_that_can_win(
    pool: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    inside = windows_of(pool, shape).double()
    model = Apply(lambda m, x: pool(x).flatten(1))
    x = torch.rand(2, *shape).double() + 0.1
    R = torch.randn(2, len(inside)).double()
    flat = x.flatten(1)
    sums = flat[:, None] * inside / (flat @ inside.T)[..., None]
    odds = (3 * flat[:, None]).masked_fill(inside == 0, -torch.inf).softmax(-1)
    for rule, shares in ((SmoothPool(0.0), sums), (TakeMost(3.0), odds)):
        explainer = lrpfx.Explainer(model, x, [("select", rule)])
        want = torch.einsum("no,noi->ni", R, shares).reshape(x.shape)
        for ledger in (True, False):
            torch.testing.assert_close(explainer(x, R, ledger=ledger).relevance, want)


SMALLEST: dict[str, Callable[[Tensor], Tensor]] = {
    "amin": lambda x: x.amin(2),
    "min": lambda x: x.min(2).values,
    "negated": lambda x: -(-x).amax(2),
}


@pytest.mark.parametrize("pool", SMALLEST.values(), ids=SMALLEST)
def test_of_a_minimum_the_smallest_take_most(pool: Callable[[Tensor], Tensor]) -> None:
    x, R = torch.randn(2, 3, 4).double(), torch.randn(2, 3).double()
    model = Apply(lambda m, x: pool(x))
    rules = composites.EpsilonAll(0.0) + [("select", TakeMost(2.0))]
    got = lrpfx.explain(model, x, R, rules=rules)
    torch.testing.assert_close(got.relevance, R[..., None] * (-2 * x).softmax(-1))


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "maximum": (torch.maximum, 1),
    "minimum": (torch.minimum, -1),
    "fmin": (torch.fmin, -1),
    "logaddexp": (torch.logaddexp, 1),
}


@pytest.mark.parametrize(("pick", "sign"), PAIRS.values(), ids=PAIRS)
def test_two_tensors_share_and_what_is_broadcast_collects(
    pick: Callable[[Tensor, Tensor], Tensor], sign: int
) -> None:
    a, b, R = (torch.randn(*shape).double() for shape in ((2, 3), (2, 1), (2, 3)))
    got = lrpfx.explain(Apply(lambda m, a, b: pick(a, b)), (a, b), R, rules=TakeMost(2.0))
    part = (sign * 2 * (a - b)).sigmoid()
    torch.testing.assert_close(got.relevance[0], R * part)
    torch.testing.assert_close(got.relevance[1], (R * (1 - part)).sum(1, keepdim=True))


def test_a_constant_among_the_candidates_absorbs_its_share() -> None:
    x = torch.tensor([[1.0, 3.0]]).double()
    model = Apply(lambda m, x: torch.maximum(x, m.floor), floor=torch.tensor(1.0).double())
    got = lrpfx.explain(model, x, torch.ones(1, 2).double(), rules=SmoothPool(0.0), ledger=True)
    torch.testing.assert_close(got.relevance, torch.tensor([[0.5, 0.75]]).double())
    assert got.report.absorbed["constant"] == pytest.approx(0.75)


def test_a_logsumexp_at_beta_one_is_as_by_its_gradient() -> None:
    x, R = torch.randn(2, 3, 4).double(), torch.randn(2, 3).double()
    model = Apply(lambda m, x: x.logsumexp(2))
    want = lrpfx.explain(model, x, R).relevance
    torch.testing.assert_close(lrpfx.explain(model, x, R, rules=TakeMost()).relevance, want)


def test_masked_scores_take_no_part() -> None:
    x = torch.tensor([[[0.5, -torch.inf, 1.0]]])
    model = Apply(lambda m, x: x.masked_fill(m.mask, -torch.inf).amax(2), mask=x.isinf())
    for rule in (SmoothPool(), TakeMost()):
        got = lrpfx.explain(model, torch.ones(1, 1, 3), torch.ones(1, 1), rules=[("select", rule)])
        torch.testing.assert_close(got.relevance, torch.tensor([[[0.5, 0.0, 0.5]]]))


def test_relevance_through_pools_has_exact_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 1, 4, 4).double().requires_grad_()
    model = Apply(lambda m, x: F.max_pool2d(x.tanh(), 3, 1).flatten(1))
    for rule in (SmoothPool(), TakeMost()):
        explainer = lrpfx.Explainer(model, x, [("select", rule)])
        assert torch.autograd.gradcheck(
            lambda x, e=explainer: e(x, 1, create_graph=True).relevance, [x]
        )


def test_negative_candidates_are_said_to_share_in_both_signs() -> None:
    model = Apply(lambda m, x: F.max_pool1d(x, 2).flatten(1))
    x = torch.tensor([[[-1.0, 2.0]]])
    with pytest.warns(UserWarning, match="down to -1"):
        report = lrpfx.explain(model, x, 0, rules=SmoothPool(0.125)).report  # warns once
    assert any("both signs" in note for note in report.notes)
    behind = Apply(lambda m, x: F.max_pool1d(x.relu(), 2).flatten(1))
    assert not lrpfx.explain(behind, x, 0, rules=[("select", SmoothPool())]).report.notes


@pytest.mark.parametrize(
    ("pick", "kind"),
    [(lambda x: x.cummax(1).values, "max"), (lambda x: x.sort(1).values, "sort")],
)
def test_what_has_no_list_of_candidates_is_refused(
    pick: Callable[[Tensor], Tensor], kind: str
) -> None:
    with pytest.raises(errors.RuleError, match="TakeMost is a rule of pools"):
        lrpfx.explain(Apply(lambda m, x: pick(x)), torch.ones(1, 3), 0, rules=[(kind, TakeMost())])


@pytest.mark.parametrize("beta", [0, -1.0, float("inf"), float("nan"), True, "1"])
def test_a_sharpness_without_meaning_is_refused(beta: Any) -> None:
    with pytest.raises(errors.RuleError, match="beta"):
        TakeMost(beta)
