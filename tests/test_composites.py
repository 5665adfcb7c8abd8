"""What `rules=` may be: composites, entries of one's own over them, and what stands for these."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import AlphaBeta, Epsilon, First, Flat, Gamma, Gradient, ZPlus, composites, errors
from lrpfx.composites import Composite, EpsilonAll, EpsilonPlus, EpsilonPlusFlat
from lrpfx.plan import resolve
from tests.conftest import traced_once

TRACES: dict[int, Any] = {}


@functools.cache
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Conv1d(2, 2, 2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, 3)).double().eval()


def report(rules: Any) -> lrpfx.Report:
    with traced_once(TRACES):
        return lrpfx.Explainer(model(), torch.ones(2, 1, 5).double(), rules).report


def laid(rules: Any) -> str:
    """The rules of the two convolutions and the linear layer."""
    return " ".join(r.rule for r in report(rules).rows if r.kind in ("conv", "linear"))


OWN = [("2", Gamma())]


@pytest.mark.parametrize(
    "rules",
    [
        EpsilonPlusFlat() + OWN,
        OWN + EpsilonPlusFlat(),
        EpsilonPlusFlat() + {"2": Gamma()},
        EpsilonPlusFlat() + ("2", Gamma()),
        EpsilonPlusFlat() + Composite(OWN),
        [*OWN, "epsilon_plus_flat"],
        [*OWN, "EpsilonPlusFlat"],
        (*OWN, EpsilonPlusFlat()),
        [*OWN, EpsilonPlusFlat],
        [*OWN, *EpsilonPlusFlat().entries],
        Composite(OWN, over=EpsilonPlusFlat()),
        [*OWN, EpsilonPlusFlat() + [("2", Epsilon())]],
    ],
)
def test_own_entries_come_first_over_the_composite_that_is_named(rules: Any) -> None:
    assert laid(rules) == "Flat Gamma Epsilon"


def test_own_entries_hide_those_below_and_nothing_else() -> None:
    assert laid(EpsilonPlusFlat() + [("conv", Gamma())]) == "Gamma Gamma Epsilon"
    assert laid(EpsilonPlusFlat() + [("2", Gamma())] + [("2", ZPlus())]) == "Flat ZPlus Epsilon"
    assert (
        laid([("0", AlphaBeta()), "attnlrp"]) == "AlphaBeta Epsilon(epsilon=0) Epsilon(epsilon=0)"
    )


def test_parameters_of_the_composite_below_stay() -> None:
    shown = laid(EpsilonPlusFlat(epsilon=0.25) + [("0", Gamma(0.5))])
    assert shown == "Gamma(gamma=0.5) ZPlus Epsilon(epsilon=0.25)"


def test_the_report_says_what_the_entries_are_laid_over() -> None:
    assert report(EpsilonPlusFlat() + OWN).rules == "1 entry over epsilon_plus_flat"
    assert "over epsilon_plus_flat" not in report(OWN).rules


def test_own_entries_over_a_composite_must_match_something() -> None:
    for rules in (EpsilonPlusFlat() + [("layer4.*", Gamma())], [("lineer", Gamma()), "attnlrp"]):
        with pytest.raises(errors.SelectorError, match="matches nothing"):
            report(rules)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param(EpsilonPlus, "ZPlus ZPlus Epsilon", id="a composite's class"),
        pytest.param("EpsilonPlus", "ZPlus ZPlus Epsilon", id="CamelCase"),
        pytest.param(["epsilon_plus"], "ZPlus ZPlus Epsilon", id="a list of a name"),
        pytest.param({"linear": ZPlus()}, "Gamma Gamma ZPlus", id="a dict"),
        pytest.param(("linear", ZPlus()), "Gamma Gamma ZPlus", id="a pair"),
        pytest.param([["linear", ZPlus()]], "Gamma Gamma ZPlus", id="a pair as a list"),
        pytest.param(Gamma(), "Gamma Gamma Gamma", id="a rule"),
        pytest.param([("0", Flat()), Gamma()], "Flat Gamma Gamma", id="a rule in a list"),
        pytest.param([Gamma(), "epsilon_plus_flat"], "Gamma Gamma Gamma", id="a rule over"),
        pytest.param(EpsilonPlus() + Gradient(), "Gradient Gradient Gradient", id="a rule added"),
    ],
)
def test_what_has_one_obvious_meaning_has_it(rules: Any, expected: str) -> None:
    assert laid(rules) == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (("0", "5"), "ZPlus Gamma ZPlus"),
        (["0", "5"], "ZPlus Gamma ZPlus"),
        ((nn.Linear, "2"), "Gamma ZPlus ZPlus"),
        ((nn.Conv1d, nn.Conv2d), "ZPlus ZPlus Epsilon"),
        ((First(), "linear"), "ZPlus Gamma ZPlus"),
        (First("conv"), "ZPlus Gamma Epsilon"),
        (composites.First(("conv", "linear")), "ZPlus Gamma Epsilon"),
    ],
)
def test_of_a_tuple_of_selectors_any_may_match(selector: Any, expected: str) -> None:
    assert laid([(selector, ZPlus())]) == expected


def test_what_of_a_tuple_matches_nothing_is_noted() -> None:
    (note,) = report([((nn.Conv1d, "layer4"), Gamma())]).notes
    assert "selector 'layer4' of Conv1d or 'layer4' matches nothing" in note


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: [((), Gamma())], errors.RuleError, "no selector"),
        (lambda: [("conv", Gamma)], errors.RuleError, r"\('conv', lrpfx\.Gamma\(\.\.\.\)\)"),
        (lambda: [("conv", "gamma")], errors.RuleError, r"\('conv', lrpfx\.Gamma\(\.\.\.\)\)"),
        (lambda: [("conv", "z_plus")], errors.RuleError, r"lrpfx\.ZPlus"),
        (lambda: Gamma, errors.RuleError, r"\('conv', Gamma\(\.\.\.\)\)"),
        (lambda: composites.EpsilonGammaBox, errors.SelectorError, r"EpsilonGammaBox\(low=\.\.\."),
        (lambda: [*OWN, "epsilon_gamma_box"], errors.SelectorError, r"EpsilonGammaBox\(low="),
        (lambda: [*OWN, "epsilon_pluss"], errors.SelectorError, "did you mean 'epsilon_plus'"),
        (lambda: [EpsilonPlus(), *OWN], errors.RuleError, "put last"),
        (lambda: EpsilonPlus() + EpsilonAll(), errors.RuleError, r"EpsilonAll\(\) \+ \["),
        (lambda: EpsilonPlus() + 3, errors.RuleError, "pairs"),
        (lambda: EpsilonPlus() + "conv", errors.RuleError, "pairs"),
        (lambda: [(("conv", "relu"), Gamma())], errors.RuleError, "does not fit what 'relu' names"),
        (lambda: [(("cov", "cnov"), Gamma())], errors.SelectorError, "did you mean 'conv'"),
    ],
)
def test_what_has_no_meaning_gets_its_repair(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        report(make())


def test_laid_over_is_one_rule_after_the_other() -> None:
    """By hand: Gamma at the first layer of what epsilon-plus hands down to it."""
    net, x = model(), torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(1)).double()
    whole = lrpfx.explain(net, x, 1, rules=EpsilonPlus() + [("0", Gamma(0.5))], layers=["0"])
    R = whole.layers["0"].relevance
    w, b, z = net[0].weight, net[0].bias, net[0](x)
    up, down = w + 0.5 * w.relu(), w - 0.5 * (-w).relu()
    bias_up, bias_down = b + 0.5 * b.relu(), b - 0.5 * (-b).relu()
    xp, xn = x.relu(), -(-x).relu()
    conv, back = nn.functional.conv1d, nn.functional.conv_transpose1d

    def shared(d: Tensor, gate: Tensor) -> Tensor:
        return gate * R / (d + 1e-6 * torch.where(d >= 0, 1.0, -1.0))

    s1 = shared(conv(xp, up, bias_up) + conv(xn, down), z > 0)
    s2 = shared(conv(xp, down, bias_down) + conv(xn, up), z < 0)
    want = xp * (back(s1, up) + back(s2, down)) + xn * (back(s1, down) + back(s2, up))
    torch.testing.assert_close(whole.relevance, want)


@pytest.mark.parametrize(
    ("composite", "note"),
    [
        ("epsilon_plus", "epsilon_plus lays ZPlus on 'conv', and here are none"),
        (
            composites.EpsilonGammaBox(-3, 3),
            "epsilon_gamma_box lays ZBox(low=-3, high=3) on first conv, and here are none",
        ),
        ("guided_backprop", "guided_backprop lays ReLUGuidedBackprop on 'relu', and here are none"),
        ("cplrp", "cplrp lays Stop on gates, and here are none"),
        ("excitation_backprop", ""),
        ("attnlrp", ""),
        ("epsilon_all", ""),
        (None, ""),
    ],
)
def test_a_part_of_a_composite_that_matches_nothing_is_noted(composite: Any, note: str) -> None:
    with traced_once(TRACES):
        report = lrpfx.Explainer(linear(), torch.ones(2, 3).double(), composite).report
    assert (note in report.notes) if note else not report.notes


@functools.cache
def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double().eval()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_OWN", {})


@pytest.mark.usefixtures("registered")
def test_a_registered_name_stands_for_its_rules() -> None:
    lrpfx.register_composite("mine", [*OWN, "epsilon_plus_flat"])
    assert laid("mine") == "Flat Gamma Epsilon"
    assert report("mine").rules == "mine: 1 entry over epsilon_plus_flat"
    assert laid([("linear", ZPlus()), "mine"]) == "Flat Gamma ZPlus"
    lrpfx.register_composite("mine", EpsilonAll(0.5))
    assert report("mine").rules == "mine"
    assert laid("mine").startswith("Epsilon(epsilon=0.5)")


@pytest.mark.usefixtures("registered")
def test_what_makes_rules_can_be_decorated() -> None:
    @lrpfx.register_composite("made")
    def made() -> Any:
        return EpsilonPlus() + OWN

    @lrpfx.register_composite("whole")
    class Whole(composites.Named):
        def __init__(self) -> None:
            super().__init__([("*", Gradient())])

    assert made().entries and laid("made") == "ZPlus Gamma Epsilon"
    assert report("whole").rules == "whole"
    assert laid(Whole()) == laid("whole") == "Gradient Gradient Gradient"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "rules", "error", "says"),
    [
        ("auto", OWN, errors.SelectorError, "a composite of lrpfx"),
        ("EpsilonPlus", OWN, errors.SelectorError, "a composite of lrpfx"),
        ("my rules", OWN, errors.SelectorError, "no name"),
        ("mine", composites.EpsilonGammaBox, errors.RuleError, "parameters without defaults"),
        ("mine", 3, errors.RuleError, "no composite"),
        ("mine", [("conv", Gamma)], errors.RuleError, "instance is needed"),
    ],
)
def test_what_cannot_be_registered_says_why(
    name: str, rules: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        lrpfx.register_composite(name, rules)
    with pytest.raises(errors.SelectorError, match="there is no composite 'mime'"):
        report("mime")
