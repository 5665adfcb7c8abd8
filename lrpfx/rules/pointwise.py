"""Rules of elementwise nonlinearities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrpfx.errors import RuleError
from lrpfx.ops import Call, Op, Site
from lrpfx.rules.base import Absorbed, Carry, Flow, Rule, sum_all, times


@dataclass(frozen=True)
class Pass(Rule):
    """R_x = R, for ops with one input and an output of its shape.

    Source: Bach et al. 2015, sect. "Layer-wise relevance propagation": activations hand on the
    relevance of their output; Achtibat et al. 2024 (AttnLRP), Prop. 3.1 (identity rule).
    """

    reads_input: ClassVar[bool] = False

    def fits(self, op: Op) -> str:
        """Ops that keep the shape of their one input."""
        return "" if op.keeps_shape else f"Pass needs input and output alike, not {op.kind}"

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = R."""
        assert isinstance(R, Tensor)
        return Flow((R,))

    def carries(self, site: Site, taken: bool) -> bool:
        """f(x) c = x (f(x) / x) c: where f(0) is not 0, x = 0 would lose its relevance."""
        return taken and site.vanishes

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """A ReLU's f(x) / x is its derivative."""
        return (1.0,) if site.op.kind == "relu" else None

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """The input; the output is computed again where that is one op."""
        return True, site.op.kind == "composed"

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_x = c f(x) / x, and c f'(0) at 0."""
        (a,) = x
        if call.op.kind == "relu":
            return (torch.ops.aten.threshold_backward(m, a, 0),)
        # Of one pixel: channels may have slopes of their own.
        channels = [size if dim == 1 else 1 for dim, size in enumerate(a.shape)]
        (slope,) = call.pull_back((a.new_zeros(channels),), a.new_ones(channels))
        ratio = z / a if call.op.kind == "composed" else call.run(a).div_(a)
        return (times(torch.where(a == 0, slope, ratio), m),)


@dataclass(frozen=True)
class ReLURule(Rule):
    """Base of the rules that change the gradient of a ReLU."""

    def fits(self, op: Op) -> str:
        """ReLU only."""
        name = type(self).__name__
        return "" if op.kind == "relu" else f"{name} is a rule of relu, not of {op.kind}"

    def through(self, x: Tensor, R: Tensor) -> Tensor:
        """R_x from x and R."""
        raise NotImplementedError

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = through(x, R)."""
        assert isinstance(R, Tensor)
        out = self.through(x[0], R)

        def absorbed() -> Absorbed:
            return {"gradient": sum_all([R]) - sum_all([out])}

        return Flow((out,), absorbed)


@dataclass(frozen=True)
class ReLUDeconvNet(ReLURule):
    """DeconvNet: R_x = max(R, 0). Source: Zeiler and Fergus 2014, sect. 2.1."""

    def through(self, x: Tensor, R: Tensor) -> Tensor:
        """R_x = p(R)."""
        return R.relu()


@dataclass(frozen=True)
class ReLUGuidedBackprop(ReLURule):
    """Guided backprop: R_x = R [x > 0] [R > 0]. Source: Springenberg et al. 2015, eq. 1."""

    def through(self, x: Tensor, R: Tensor) -> Tensor:
        """R_x = p(R) [x > 0]."""
        return R.relu() * (x > 0).to(R.dtype)


@dataclass(frozen=True)
class ReLUBetaSmooth(ReLURule):
    """Smoothed ReLU: R_x = R * sigmoid(beta x). Source: Dombrowski et al. 2019, sect. 3.

    Args:
        beta: Sharpness; the larger, the closer to the gradient of the ReLU.
    """

    beta: float = 10.0

    def __post_init__(self) -> None:
        """Check beta > 0."""
        if not self.beta > 0:
            raise RuleError(f"ReLUBetaSmooth: beta must be > 0, got {self.beta}.", fix="try 10.")

    def through(self, x: Tensor, R: Tensor) -> Tensor:
        """R_x = R * sigmoid(beta x)."""
        return R * torch.sigmoid(self.beta * x)
