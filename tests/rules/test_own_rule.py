"""docs/own_rule.md: what it shows runs, and computes the formulas that it states."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrpfx
from lrpfx.composites import EpsilonPlus

PAGE = Path(__file__).parents[2] / "docs" / "own_rule.md"


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the page's blocks of code define, run from top to bottom."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2))
    names: dict[str, Any] = {"model": model.double().eval(), "x": torch.randn(2, 2, 4).double()}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(block, names)
    return names


def test_the_rule_of_ten_lines_has_about_ten(shown: dict[str, Any]) -> None:
    source = re.search(r"@dataclass.*?```", PAGE.read_text(), re.S)
    assert source is not None and len(source[0].splitlines()) <= 11


def test_affine_rule_computes_its_formula(shown: dict[str, Any]) -> None:
    model, x, rule = shown["model"], shown["x"], shown["Size"]
    for ledger in (True, False):
        got = lrpfx.explain(model, x, 1, rules=[("0", rule()), "epsilon_plus"], ledger=ledger)
        above = lrpfx.explain(model, x, 1, rules="epsilon_plus", layers=["0"])
        R = above.layers["0"].relevance
        size = nn.Conv1d(2, 3, 2).double().requires_grad_(False)
        size.weight.copy_(model[0].weight.abs())
        size.bias.copy_(model[0].bias.abs())
        s = R / (size(x.abs()) + 1e-6)
        want = x.abs() * torch.nn.functional.conv_transpose1d(s, size.weight)
        assert (got.relevance - want).abs().max() < 1e-12 * want.abs().max()
    assert (shown["explanation"].relevance - want).abs().sum() > 0  # of the strongest class


def test_rule_of_anything_hands_on_what_it_says_and_books_the_rest(shown: dict[str, Any]) -> None:
    model, x = shown["model"], shown["x"]
    own = EpsilonPlus() + [("relu", shown["Fade"](0.25))]
    plain, faded = (lrpfx.explain(model, x, 1, rules=r) for r in ("epsilon_plus", own))
    torch.testing.assert_close(faded.relevance, 0.25 * plain.relevance)
    row = next(row for row in faded.report.rows if row.kind == "relu")
    assert row.absorbed["faded"] == pytest.approx(0.75 * row.relevance_in)
