"""Rules of products of live tensors, such as the gate of a squeeze-and-excitation block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lrpfx.rules.base import Flow, Rule

if TYPE_CHECKING:
    from lrpfx.ops import Call, Op


@dataclass(frozen=True)
class Uniform(Rule):
    """z = a * b: each of the n live factors gets R / n, summed over where it was broadcast.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.3 (uniform rule).
    """

    reads_input: ClassVar[bool] = False

    def fits(self, op: Op) -> str:
        """Elementwise products of live tensors."""
        return "" if op.kind == "product" else f"Uniform is for products, and {op.kind} is none"

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_i = R / n."""
        assert isinstance(R, Tensor)
        share = R / len(x)
        return Flow(tuple(share.sum_to_size(t.shape) for t in x))
