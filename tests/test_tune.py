"""tune() finds the rules that are planted as the best, and says what they were chosen over."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrpfx
from lrpfx import Epsilon, Gamma, ZPlus
from tests.conftest import assert_untouched


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 1, 6, 6)


def _near(rules: Any, net: nn.Module, x: Tensor) -> Any:
    """An objective that is best for given rules."""
    expected = lrpfx.explain(net, x, 1, rules=rules).relevance

    def closeness(explanation: lrpfx.Explanation) -> Tensor:
        return -(explanation.relevance - expected).flatten(1).norm(dim=1)

    return closeness


PLANTED = [("conv", Gamma(0.5)), ("linear", Epsilon(0.1))]


def test_planted_rules_are_found_in_a_list(net: nn.Module, x: Tensor, one_trace: None) -> None:
    candidates = ["epsilon_gamma", "epsilon_all", PLANTED, "auto", "epsilon_plus_flat"]
    with assert_untouched(net, x):
        composite, trials = lrpfx.tune(net, x, 1, candidates, _near(PLANTED, net, x))
    torch.testing.assert_close(
        lrpfx.explain(net, x, 1, rules=composite).relevance,
        lrpfx.explain(net, x, 1, rules=PLANTED).relevance,
    )
    assert [trial.mean for trial in trials] == sorted((t.mean for t in trials), reverse=True)
    # The default comes to epsilon_gamma here.
    assert {trial.same for trial in trials} == {(), ("auto",)} and len(trials) == 4
    assert "Gamma(gamma=0.5) on 'conv'" in str(trials) and "closeness" in str(trials)


def test_planted_rules_are_found_in_a_grid(net: nn.Module, x: Tensor, one_trace: None) -> None:
    grid = {
        "conv": [ZPlus(), Gamma(0.1), Gamma(0.5), Gamma(2.0)],
        "linear": [Epsilon(), Epsilon(0.1)],
    }
    objective = _near(PLANTED, net, x)
    for budget, tried in ((None, 8), (7, 7)):
        found = lrpfx.tune(net, x, 1, grid, objective, budget)
        assert dict(found.composite.entries) == dict(PLANTED)
        assert len(found.trials) <= tried
    assert len(lrpfx.tune(net, x, 1, grid, objective, 3).trials) == 3


def test_the_best_by_perturbation_is_that_of_a_linear_model() -> None:
    linear = nn.Sequential(nn.Linear(6, 2)).eval()
    x = torch.randn(30, 6)
    rules = {"flat": [("linear", lrpfx.Flat())], "exact": "epsilon_all", "w2": lrpfx.WSquare()}
    for objective in ("abpc", "aopc"):
        found = lrpfx.tune(lrpfx.Explainer(linear, x), x, 0, rules, objective, fill=0.0)
        assert found.trials[0].name == "exact"
        assert found.trials[0].values.shape == (30,)


@pytest.mark.parametrize("whole", [False, True], ids=["loader", "data set"])
def test_data_may_come_in_batches_with_labels(
    whole: bool, net: nn.Module, x: Tensor, one_trace: None
) -> None:
    labels = torch.arange(8) % 3
    pairs = TensorDataset(x, labels)
    names = ["epsilon_plus", "epsilon_all"]
    loaded = pairs if whole else DataLoader(pairs, batch_size=4, generator=torch.Generator())
    with assert_untouched(net, x):
        by_batch = lrpfx.tune(net, loaded, "label", names, steps=6)
    at_once = lrpfx.tune(net, x, labels, names, steps=6)
    for one, other in zip(by_batch.trials, at_once.trials, strict=True):
        assert one.name == other.name
        torch.testing.assert_close(one.values, other.values)


def test_candidates_of_the_default_that_do_not_fit_are_left_out(
    net: nn.Module, x: Tensor, one_trace: None
) -> None:
    def smoothness(explanation: lrpfx.Explanation) -> float:
        return -float(explanation.relevance.diff().abs().mean())

    found = lrpfx.tune(net, x, 1, objective=smoothness)
    names = {name for trial in found.trials for name in (trial.name, *trial.same)}
    assert {"auto", "epsilon_all", "Gamma(0.25) on all"} <= names
    assert len(lrpfx.tune(net, x, 1, objective=smoothness, budget=2).trials) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(rules="epsilon_plus"), "no list of candidates"),
        (dict(rules=[]), "no rules to choose from"),
        (dict(rules=["epsilon_plus"], objective="best"), "objective='best'"),
        (dict(rules=["epsilon_plus"], objective=lambda e: float("nan")), "returned"),
        (dict(rules=["epsilon_minus"]), "no composite"),
        (dict(rules=["epsilon_plus"], budget=0), "budget=0"),
        (dict(rules=["epsilon_plus"], data=3), "data is int"),
    ],
)
def test_what_has_no_answer_is_an_error(
    net: nn.Module, x: Tensor, options: Any, said: str, one_trace: None
) -> None:
    with pytest.raises(lrpfx.errors.LrpError, match=said):
        lrpfx.tune(net, **{"data": x, "target": 1, **options})
