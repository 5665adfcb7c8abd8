"""Relevance that grows beyond measure is warned of, once, and noted with its place."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.errors import ExplosionWarning
from lrpfx.rules import Flow
from tests.conftest import Apply

MODES: list[dict[str, Any]] = [
    {},
    {"ledger": True},
    {"ledger": False},
    {"create_graph": True},
    {"create_graph": True, "ledger": False},
]


def names(mode: dict[str, Any]) -> str:
    return " ".join(mode) or "default"


def nearly_cancelling() -> tuple[nn.Module, Tensor]:
    """Summands 1 and 1 - 2^-12: what is shared by their sum grows to (2 - 2^-12) 2^12 times.

    It does not begin as small as the sum is, as exp(0) = 1.
    """
    model = Apply(lambda m, x: torch.cat([(x[:, :1] - x[:, 1:]).exp(), x.sum(1, keepdim=True)], 1))
    return model, torch.tensor([[1.0, 1 - 2.0**-12]] * 2, dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES, ids=names)
def test_a_node_that_hands_on_a_thousandfold_is_named(mode: dict[str, Any]) -> None:
    model, x = nearly_cancelling()
    explainer = lrpfx.Explainer(model, x, lrpfx.composites.EpsilonAll(epsilon=0.0))
    with pytest.warns(ExplosionWarning, match="8.19e[+]03 times") as caught:
        e = explainer(x, 0, **mode)
        explainer(x, 0, **mode)
    assert len(caught) == 1
    (note,) = (n for n in e.report.notes if "grew" in n)
    assert "(the model): sub, float64[N, 1] under Norm" in note
    assert "handed on 8.19e+03 times what it got" in note
    assert __file__ == caught[0].filename


def test_of_several_maps_the_worst_is_told_of() -> None:
    model, x = nearly_cancelling()
    explainer = lrpfx.Explainer(model, x, lrpfx.composites.EpsilonAll(epsilon=0.0))
    with pytest.warns(ExplosionWarning, match="in 1 of 2 maps.*sub, "):
        e = explainer(x, "all")
    assert any("in 1 of 2 maps" in note for note in e.report.notes)


def tripling(layers: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Each layer makes (1, 1) of (1, 1), and of relevance (r, -r) three times as much."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(layers))).double()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))
    ones = torch.ones(2, 2, dtype=torch.float64)
    return model, ones, ones * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize("mode", MODES, ids=names)
def test_what_grows_little_by_little_is_named_where_it_is_past_the_bound(mode: Any) -> None:
    model, x, seed = tripling(8)
    with pytest.warns(ExplosionWarning, match="6.56e[+]03 times.*little by little.* at 0: linear"):
        e = lrpfx.explain(model, x, seed, **mode)
    torch.testing.assert_close(e.relevance, 3.0**8 * seed, rtol=1e-3, atol=0)


class Thousandfold(lrpfx.Pass):
    """Wrong: hands on 2,000 times what it gets."""

    def propagate(self, call: Any, x: Any, z: Tensor, R: Any) -> Flow:
        return Flow((2000 * R,))


@pytest.mark.parametrize("mode", MODES, ids=names)
def test_a_node_between_is_named_where_what_has_grown_is_kept_back_below(mode: Any) -> None:
    """Of the sum, 1e-5 is the input's: the map is no larger than the seed."""
    model = Apply(lambda m, x: (1e-5 * x + 1).tanh().sum(1, keepdim=True))
    x, rules = torch.ones(2, 3, dtype=torch.float64), [("tanh", Thousandfold()), "epsilon_all"]
    explainer = lrpfx.Explainer(model, x, rules)
    with pytest.warns(ExplosionWarning, match="on its way: .*tanh.* handed on 2e[+]03 times"):
        e = explainer(x, 0, **mode)
    assert e.relevance.abs().sum() < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer(x, 0, **mode)


@pytest.mark.parametrize("target", ["compiled", "all", [[0, 1], [1, 0]]], ids=str)
def test_a_node_between_is_named_of_a_compiled_call_and_of_several_targets(target: Any) -> None:
    model = Apply(lambda m, x: (1e-5 * x + 1).tanh().sum(1, keepdim=True).expand(2, 2))
    x, rules = torch.ones(2, 3, dtype=torch.float64), [("tanh", Thousandfold()), "epsilon_all"]
    explainer = lrpfx.Explainer(model, x, rules, capture="record")
    if target == "compiled":
        explainer.compile(backend="eager")
    for _ in range(2):
        with pytest.warns(ExplosionWarning, match="on its way: .*tanh.* handed on 2e[+]03 times"):
            explainer(x, 0 if target == "compiled" else target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explainer(x, 0 if target == "compiled" else target)
        explainer = copy.deepcopy(explainer)  # which begins anew


def test_a_node_is_named_when_the_report_is_read_of_a_later_call() -> None:
    model = Apply(lambda m, x: ((1e-5 * x + 1).tanh() * x.detach()[:, :1]).sum(1, keepdim=True))
    x, rules = torch.ones(2, 3, dtype=torch.float64), [("tanh", Thousandfold()), "epsilon_all"]
    explainer = lrpfx.Explainer(model, x, rules)
    explainer(0 * x, lambda out: out[:, 0])  # nothing to see
    later = explainer(x, 0)
    with pytest.warns(ExplosionWarning, match="on its way: .*tanh.* handed on 2e[+]03 times"):
        assert later.report.rows


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rules", [None, "epsilon_plus"], ids=str)
def test_an_output_that_is_small_beside_its_summands_is_no_explosion(rules: Any) -> None:
    """Behind a move and a shift, too: the bias is minus the rest, but for a millionth."""
    layers = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    model = Apply(lambda m, x: m.net(x)[:, None].mean(1) + 1, net=nn.Sequential(*layers)).double()
    x = torch.rand(1, 4, dtype=torch.float64)
    with torch.no_grad():
        layers[2].bias -= model(x)[0] - 1e-6
    explainer = lrpfx.Explainer(model, x, rules)
    for mode in MODES:
        e = explainer(x, 1, **mode)
        torch.testing.assert_close(e.output, torch.full_like(e.output, 1e-6), rtol=1e-6, atol=0)
        assert e.relevance.abs().sum() > 1000 * e.output[0, 1]


def test_a_wrong_rule_at_the_output_is_no_small_output() -> None:
    model = Apply(lambda m, x: m.head(x).tanh(), head=nn.Linear(3, 2)).double()
    x = torch.rand(2, 3, dtype=torch.float64)
    for mode in {}, {"ledger": True}:
        with pytest.warns(ExplosionWarning, match="tanh.* handed on 2e[+]03 times"):
            lrpfx.explain(model, x, 1, rules=[("tanh", Thousandfold())], **mode)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES, ids=names)
def test_what_does_not_grow_is_silent(mode: dict[str, Any]) -> None:
    model, x, seed = tripling(6)
    assert not lrpfx.explain(model, x, seed, **mode).report.notes
    model, x = nearly_cancelling()
    (note,) = lrpfx.explain(model, x, 1, **mode).report.notes
    assert "exp at" in note
    _, note = lrpfx.explain(model, x, torch.zeros_like(x), **mode).report.notes
    assert "what is explained is zero" in note  # and nothing grows


@pytest.mark.filterwarnings("error")
def test_a_gradient_has_no_measure() -> None:
    model, x, seed = tripling(7)
    e = lrpfx.explain(model, x, seed, rules="guided_backprop", ledger=True)
    assert e.relevance.abs().max() > 1000


def test_warnings_can_be_told_apart() -> None:
    assert issubclass(ExplosionWarning, lrpfx.errors.LrpWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ExplosionWarning)
        model, x = nearly_cancelling()
        lrpfx.explain(model, x, 0, rules=lrpfx.composites.EpsilonAll(epsilon=0.0))
