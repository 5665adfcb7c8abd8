"""Maps that are zero everywhere are noted, and why they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    """Of two units the first one is dead, and the third class reads that one alone."""
    first, last = nn.Linear(3, 2), nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1, 1], [1, 1, 1]]))
        first.bias.copy_(torch.tensor([-100.0, 0]))
        last.weight.copy_(torch.tensor([[1.0, 1], [0, 1], [1, 0]]))
    return lrpfx.Explainer(nn.Sequential(first, nn.ReLU(), last).eval(), torch.ones(2, 3))


def test_an_output_of_zero_is_noted(explainer: lrpfx.Explainer) -> None:
    e = explainer(torch.ones(2, 3), 2)
    assert not e.relevance.any()
    assert e.report.notes == (
        "what is explained is zero for 2 of 2 samples (0, 1), and so is all relevance",
    )
    (note,) = explainer(torch.tensor([[1.0, 1, 1], [-1, -1, -1]]), 1).report.notes
    assert "zero for 1 of 2 samples (1)" in note
    assert not explainer(torch.ones(2, 3), 1).report.notes
    several = explainer(torch.ones(2, 3), "all").report.notes
    assert several == e.report.notes


def test_a_given_seed_of_zeros_is_noted(explainer: lrpfx.Explainer) -> None:
    (note,) = explainer(torch.ones(1, 3), torch.zeros(1, 3)).report.notes
    assert note == "what is explained is zero, and so is all relevance"


@pytest.mark.parametrize(
    ("forward", "rules"),
    [
        pytest.param(lambda m, x: m.o((m.i(x) - 100).relu()), "epsilon_all", id="dead units"),
        pytest.param(
            lambda m, x: m.o(m.i(x).relu()),
            [
                ("relu", lrpfx.ReLUGuidedBackprop()),
                (composites.First(), lrpfx.Epsilon(1e30)),
                "epsilon_all",
            ],
            id="a stabilizer that takes all",
        ),
        pytest.param(lambda m, x: m.o(m.i(x * 0)), "epsilon_all", id="times zero"),
    ],
)
def test_relevance_that_arrives_nowhere_is_noted(forward: Any, rules: Any) -> None:
    torch.manual_seed(0)
    model = Apply(forward, i=nn.Linear(3, 4), o=nn.Linear(4, 2))
    x: Tensor = torch.randn(2, 3)
    explainer = lrpfx.Explainer(model, x, rules)
    for options in ({}, {"ledger": True}, {"create_graph": True}):
        e = explainer(x, 1, **options)
        notes = [note for note in e.report.notes if "relevance is zero everywhere" in note]
        assert notes and not all(r.any() for r in e.relevance) and "leaks()" in notes[0]
