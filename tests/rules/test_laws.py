"""Random networks under random rules obey the laws; rules that are wrong on purpose do not."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import lrpfx
from lrpfx.rules.base import Flow
from lrpfx.rules.terms import AffineRule, Term
from tests.oracle import laws, reference
from tests.oracle.laws import Case
from tests.oracle.reference import Node
from tests.oracle.strategies import SPELLINGS, Network, networks, rules_for


@st.composite
def cases(draw: st.DrawFn, **options: Any) -> Case:
    network = draw(networks(**options))
    network = network.with_rules(draw(rules_for(network)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    seed = rng.normal(size=(network.samples, network.shapes[-1][0]))
    return Case(network, seed)


@given(case=cases(max_inputs=2), spelling=st.sampled_from(SPELLINGS))
def test_relevance_is_what_the_oracle_says(case: Case, spelling: str) -> None:
    assert laws.equals_reference(case, spelling) < 1e-10


@given(case=cases())
def test_every_spelling_gives_the_same_relevance(case: Case) -> None:
    first, *others = (laws.explained(case, laws.explainer(case.network, s)) for s in SPELLINGS)
    for other in others:
        assert laws.relative(other, first) < 1e-10


@given(case=cases(max_inputs=2))
def test_relevance_is_linear_in_the_seed(case: Case) -> None:
    rules = [node.rule[0] for node in case.network.nodes if node.rule is not None]
    assume(not {"ReLUDeconvNet", "ReLUGuidedBackprop"}.intersection(rules))  # which cut off R < 0
    assert laws.is_linear_in_the_seed(case, laws.explainer(case.network)) < 1e-10


@given(case=cases())
def test_a_batch_is_its_samples(case: Case) -> None:
    subject = laws.explainer(case.network, capture="export")
    assert laws.batch_equals_singles(case, subject) < 1e-10


@given(case=cases(max_inputs=2))
def test_the_ledger_closes(case: Case) -> None:
    assert laws.ledger_closes(case, laws.explainer(case.network)) < 1e-9


def cancels(network: Network) -> bool:
    """Whether summands that are not zero add up to exactly zero somewhere."""
    for sample in range(network.samples):
        values = reference.forward(network.nodes, network.sample(sample))
        for node, z in zip(network.nodes, values, strict=True):
            if node.op in reference.AFFINE:
                xs = [values[i] for i in node.inputs]
                W, _, _ = reference.matrix(node, [x.shape for x in xs])
                size = np.abs(W) @ np.abs(np.concatenate([x.ravel() for x in xs]))
                if np.any((z.ravel() == 0) & (size > 0)):
                    return True
    return False


# A leaky ReLU passes relevance whole where its gradient has the slope, so ReLU only. Where a sum
# cancels, its summands have gradient times input but no share of a relevance that is zero.
@given(network=networks(bias=False, activations=("relu",), max_inputs=2))
def test_lrp_0_is_gradient_times_input(network: Network) -> None:
    assume(not cancels(network))
    assert laws.equals_gradient_times_input(network) < 1e-10


# The laws can fail -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaled(lrpfx.Rule):
    """A rule that is wrong by a factor of 1.001."""

    rule: lrpfx.Rule

    def fits(self, op: Any) -> str:
        return self.rule.fits(op)

    @property
    def reads_input(self) -> bool:  # type: ignore[override]
        return self.rule.reads_input

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        return self.rule.reads_output

    def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Flow:
        flow = self.rule.propagate(call, x, z, R)
        return Flow(tuple(1.001 * r for r in flow.relevance), flow.absorbed)


@dataclass(frozen=True)
class BiasForgotten(lrpfx.Epsilon):
    """Epsilon without the bias in its denominator."""

    def terms(self, x: Any, f: Any, z: Any) -> list[Term]:
        return [Term([(x.all, f)])]


@dataclass(frozen=True)
class WrongBranch(lrpfx.ZPlus):
    """z-plus that takes the negative contributions."""

    def terms(self, x: Any, f: Any, z: Any) -> list[Term]:
        return [Term([(x.pos, f.neg), (x.neg, f.pos)], f.bias)]


@dataclass(frozen=True)
class SquaredSeed(lrpfx.Epsilon):
    """Epsilon that is not linear in the relevance it receives."""

    def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Flow:
        return super().propagate(call, x, z, R * R.abs())


@dataclass(frozen=True)
class BatchMean(lrpfx.Epsilon):
    """Epsilon that lets the samples of a batch see each other."""

    def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Flow:
        return super().propagate(call, x, z, R - R.mean(0, keepdim=True))


def dense_case() -> Case:
    """Two linear layers with a ReLU, biases everywhere, under Epsilon and ZPlus."""
    rng = np.random.default_rng(0)
    nodes = (
        Node("input"),
        Node(
            "linear",
            (0,),
            {"weight": rng.normal(size=(6, 4)), "bias": rng.normal(size=6)},
            ("ZPlus", {}),
        ),
        Node("relu", (1,), {}, ("Pass", {})),
        Node(
            "linear",
            (2,),
            {"weight": rng.normal(size=(3, 6)), "bias": rng.normal(size=3)},
            ("Epsilon", {}),
        ),
    )
    return Case(Network(nodes, (rng.normal(size=(3, 4)),)), rng.normal(size=(3, 3)))


def replacing(kind: type[lrpfx.Rule], wrong: type[lrpfx.Rule]) -> laws.Wrong:
    def change(rule: lrpfx.Rule) -> lrpfx.Rule:
        if type(rule) is not kind:
            return rule
        return wrong(**{f.name: getattr(rule, f.name) for f in fields(rule)})

    return change


def scaling(kind: type[lrpfx.Rule]) -> laws.Wrong:
    return lambda rule: Scaled(rule) if type(rule) is kind else rule


PLANTED = {
    "epsilon times 1.001": scaling(lrpfx.Epsilon),
    "z-plus times 1.001": scaling(lrpfx.ZPlus),
    "pass times 1.001": scaling(lrpfx.Pass),
    "bias forgotten": replacing(lrpfx.Epsilon, BiasForgotten),
    "wrong branch": replacing(lrpfx.ZPlus, WrongBranch),
    "not linear": replacing(lrpfx.Epsilon, SquaredSeed),
    "batch mixed": replacing(lrpfx.Epsilon, BatchMean),
}


def test_the_planted_case_itself_is_right() -> None:
    assert laws.equals_reference(dense_case(), "modules") < 1e-12


@pytest.mark.parametrize("wrong", PLANTED.values(), ids=PLANTED)
def test_the_oracle_catches_a_wrong_rule(wrong: laws.Wrong) -> None:
    assert laws.equals_reference(dense_case(), "modules", wrong) > 1e-4


@pytest.mark.parametrize("name", ["epsilon times 1.001", "z-plus times 1.001", "pass times 1.001"])
def test_the_ledger_catches_a_wrong_factor(name: str) -> None:
    case = dense_case()
    assert laws.ledger_closes(case, laws.explainer(case.network, wrong=PLANTED[name])) > 1e-5


def test_the_ledger_closes_where_biases_absorb() -> None:
    """Which few of the drawn networks have."""
    case = dense_case()
    assert laws.ledger_closes(case, laws.explainer(case.network)) < 1e-9


def test_linearity_catches_a_rule_that_is_not_linear() -> None:
    case = dense_case()
    subject = laws.explainer(case.network, wrong=PLANTED["not linear"])
    assert laws.is_linear_in_the_seed(case, subject) > 1e-3


def test_the_batch_law_catches_a_rule_that_mixes_samples() -> None:
    case = dense_case()
    subject = laws.explainer(case.network, wrong=PLANTED["batch mixed"])
    assert laws.batch_equals_singles(case, subject) > 1e-3


def test_gradient_times_input_catches_a_wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dense_case()
    bare = [
        replace(n, params={**n.params, "bias": None}) if n.op == "linear" else n
        for n in case.network.nodes
    ]
    network = replace(case.network, nodes=tuple(bare))
    assert laws.equals_gradient_times_input(network) < 1e-12
    right = AffineRule.propagate

    def wrong(self: AffineRule, call: Any, x: Any, z: Any, R: Any) -> Flow:
        flow = right(self, call, x, z, R)
        return Flow(tuple(1.001 * r for r in flow.relevance), flow.absorbed)

    monkeypatch.setattr(AffineRule, "propagate", wrong)
    assert laws.equals_gradient_times_input(network) > 1e-4
