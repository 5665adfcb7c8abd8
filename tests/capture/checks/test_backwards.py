"""A backward of the model's own is noted where it is not the gradient of the forward pass."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import lrpfx

pytestmark = pytest.mark.usefixtures("each_way")


class Spike(torch.autograd.Function):
    """A step, with the gradient of something smooth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (1 + ctx.saved_tensors[0].abs()) ** 2


class Reversed(torch.autograd.Function):
    """The gradient of adversarial training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Swish(torch.autograd.Function):
    """Saves memory; its backward is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Model(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.norm, self.above = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.below(x)
        y = self.norm(y + self.function.apply(y)) * y.softmax(1)
        return self.above(y).softmax(1)


class Forward(torch.autograd.Function):
    """For inference: its backward is an error of its own kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ValueError("there is no backward")


BY = pytest.mark.parametrize("by", ["export", "record"])


@BY
@pytest.mark.parametrize("function", [Spike, Reversed])
def test_a_backward_that_is_another_is_noted_with_its_line(
    function: type[torch.autograd.Function], by: Literal["export", "record"]
) -> None:
    model, x = Model(function).eval(), torch.randn(2, 4)
    notes = lrpfx.explain(model, x, 1, capture=by).report.notes
    (own,) = (note for note in notes if "backward of its own" in note)
    assert f"{function.__name__} at " in own and "self.function.apply(y)" in own


@BY
def test_a_backward_that_is_the_gradient_is_not_noted(by: Literal["export", "record"]) -> None:
    model, x = Model(Swish).eval(), torch.randn(2, 4)
    apply = vars(torch.autograd.Function).get("apply")
    notes = lrpfx.explain(model, x, 1, capture=by).report.notes
    assert not any("backward of its own" in note for note in notes)
    assert vars(torch.autograd.Function).get("apply") is apply


@BY
def test_a_backward_that_fails_is_noted_as_not_compared(by: Literal["export", "record"]) -> None:
    model, x = Model(Forward).eval(), torch.randn(2, 4)
    explanation = lrpfx.explain(model, x, 1, capture=by)
    assert explanation.relevance.abs().max() > 0
    assert any("could not be compared" in note for note in explanation.report.notes)
