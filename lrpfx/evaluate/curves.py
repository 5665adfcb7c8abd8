"""Scores while an input is erased, and the areas that are made of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.evaluate.statistics import Interval, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Order = Literal["most", "least", "random"]
_SAID = {"most": "most relevant first", "least": "least relevant first", "random": "random order"}
_OPPOSITE: dict[Order, Order] = {"most": "least", "least": "most", "random": "random"}


@dataclass(frozen=True, repr=False)
class Curves:
    """The target of each sample while more and more of it is erased.

    Args:
        scores: (N, S + 1), from nothing erased to everything, in the order that was asked for.
        opposite: Likewise in the opposite order.
        fractions: The part that is erased at each step, (S + 1,).
        order: What is erased first.
    """

    scores: Tensor
    opposite: Tensor
    fractions: Tensor
    order: Order

    @property
    def aopc(self) -> Tensor:
        """How far the target has fallen, on average over the steps, (N,).

        Source: Samek et al. 2017, https://arxiv.org/abs/1509.06321, eq. 12, per sample.
        """
        return (self.scores[:, :1] - self.scores).mean(1)

    @property
    def abpc(self) -> Tensor:
        """The area between the curves, least relevant first less most relevant first, (N,).

        A faithful explanation has a large one, whatever the fill; a random order has 0 on average.

        Source: Samek et al. 2017, https://arxiv.org/abs/1509.06321, sect. III.C; Blücher et al.
        2024, https://arxiv.org/abs/2401.06654, eq. 5 (symmetric relevance gain).
        """
        gain = (self.opposite - self.scores).mean(1)
        return -gain if self.order == "least" else gain

    def interval(self, what: Literal["aopc", "abpc"] = "abpc", level: float = 0.95) -> Interval:
        """The mean over samples with a bootstrap interval; see ``lrpfx.evaluate.interval``."""
        if what not in ("aopc", "abpc"):
            raise InputError(f"{what!r} is no area.", fix='give "aopc" or "abpc".')
        return interval(self.aopc if what == "aopc" else self.abpc, level)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw both curves, their means over samples, with bands of twice the standard error.

        Args:
            path: Where to write the picture, if anywhere.
            title: Above it.
            ax: Axes of your own.
        """
        from lrpfx.draw import draw_curves

        curves = {
            _SAID[self.order]: self.scores.cpu().double().numpy(),
            _SAID[_OPPOSITE[self.order]]
            + ", reversed" * (self.order == "random"): self.opposite.cpu().double().numpy(),
        }
        return draw_curves(
            self.fractions.cpu().double().numpy(),
            curves,
            xlabel="part erased",
            ylabel="target",
            title=title,
            path=path,
            ax=ax,
        )

    def __repr__(self) -> str:
        n, steps = self.scores.shape
        return (
            f"Curves({_SAID[self.order]}; {n} samples, {steps - 1} steps; on average "
            f"AOPC {float(self.aopc.mean()):.4g}, ABPC {float(self.abpc.mean()):.4g})"
        )
