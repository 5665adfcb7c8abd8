"""What ends relevance though values go on is noted, with its line; what takes nothing is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx


class Two(nn.Module):
    """Two branches, of which a function of one is added to the other."""

    def __init__(self, function: Callable[[Tensor], Tensor], joined: str = "+") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.head = nn.Linear(16 if joined == "cat" else 8, 2)
        self.function, self.joined = function, joined

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.function(self.a(x)), self.b(x).relu()
        return self.head(torch.cat([a, b], 1) if self.joined == "cat" else a + b)


def without_gradient(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y.relu()


def switched_off(y: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return y.tanh() * 2


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "no_grad": (without_gradient, "torch.no_grad()", "return y.relu()"),
    "set_grad_enabled": (switched_off, "torch.no_grad()", "return y.tanh() * 2"),
    "detach": (lambda y: y.detach(), "detach()", "y.detach()"),
    "what is added of a straight-through estimator": (
        lambda y: y + (y.round() - y).detach(),
        "detach()",
        "(y.round() - y).detach()",
    ),
    "round": (lambda y: torch.round(y), "rounding", "torch.round(y)"),
    "floor": (lambda y: y.floor(), "rounding", "y.floor()"),
    "sign": (lambda y: y.sign() * 3, "signs", "y.sign()"),
    "comparison": (lambda y: (y > 0).float(), "comparisons", "(y > 0)"),
    "ids": (lambda y: F.one_hot(y.argmax(1), 8).float(), "comparisons", "y.argmax(1)"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("joined", ["+", "cat"])
def test_an_end_is_noted_with_its_line(name: str, joined: str) -> None:
    function, told, line = ENDS[name]
    report = lrpfx.explain(Two(function, joined).eval(), torch.randn(3, 4), 1).report
    notes = [note for note in report.notes if "does not follow" in note]
    assert len(notes) == 1 and told in notes[0]
    assert line in notes[0]


SILENT: dict[str, Callable[[Tensor], Tensor]] = {
    "a ReLU by a comparison": lambda y: y * (y > 0),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "a maximum held": lambda y: (y - y.amax(1, keepdim=True).detach()).softmax(1),
    "the size of a batch": lambda y: y * (1 / y.shape[1]),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_takes_no_relevance_is_not_noted(name: str) -> None:
    report = lrpfx.explain(Two(SILENT[name]).eval(), torch.randn(3, 4), 1).report
    assert not [note for note in report.notes if "does not follow" in note]


def test_categories_in_one_hot_rows_are_noted() -> None:
    class Cats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(7, 2)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.head(torch.cat([x, F.one_hot(c, 3).to(x)], 1))

    inputs: Any = (torch.randn(2, 4), torch.tensor([0, 2]))
    notes = lrpfx.explain(Cats().eval(), inputs, 1).report.notes
    assert any("ids that index" in note and "F.one_hot(c, 3)" in note for note in notes)


def test_numbers_that_are_read_are_noted() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + x.mean().item()

    notes = lrpfx.explain(Reads().eval(), torch.randn(2, 4), 1).report.notes
    assert any("numbers that are read" in note and "x.mean().item()" in note for note in notes)
