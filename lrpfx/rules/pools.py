"""Rules of ops that pick the largest or the smallest: max pools, maxima, log-sum-exp.

Letters: x_j the candidates of one output, R its relevance. Without one of these rules the winner
takes all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrpfx.errors import RuleError
from lrpfx.ops import Call, Op, pull_back, widened
from lrpfx.rules.base import (
    Absorbed,
    Flow,
    Rule,
    StabilizerLike,
    check_number,
    check_stabilizer,
    divide,
    finite,
    sum_all,
)


@dataclass(frozen=True)
class PoolRule(Rule):
    """Base of the rules that share relevance among the candidates of a pool."""

    def fits(self, op: Op) -> str:
        """Ops whose outputs are picked from candidates that can be listed."""
        name = type(self).__name__
        return "" if op.pool else f"{name} is a rule of pools by maximum or minimum, not {op.kind}"

    def shares(self, x: Tensor, inside: Tensor, sign: int, R: Tensor) -> Tensor:
        """What each candidate gets of R (..., 1)."""
        raise NotImplementedError

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """The shares, at the places that the candidates come from."""
        R = R[0] if isinstance(R, tuple) else R  # the indices have none
        candidates, inside = call.candidates(*x)
        R_c = R.reshape(candidates.shape[:-1]).unsqueeze(-1)
        shares = self.shares(candidates, inside, call.sign, R_c)
        out = pull_back(lambda *t: call.candidates(*t).values, x, shares)
        return Flow(out, self._absorbed(R, shares, out))

    @staticmethod
    def _absorbed(R: Tensor, shares: Tensor, out: tuple[Tensor, ...]) -> Callable[[], Absorbed]:
        def absorbed() -> Absorbed:
            given = sum_all([shares])
            # Among the candidates may be constants, as in maximum(x, 0.5).
            return {"stabilizer": sum_all([R]) - given, "constant": given - sum_all(out)}

        return absorbed


@dataclass(frozen=True)
class SmoothPool(PoolRule):
    """A max pool taken for an average pool: R_j = x_j R / st(sum_l x_l).

    Each candidate gets the part of R that it would contribute to their mean. Where all are >= 0,
    as behind a ReLU, none gets relevance of the other sign.

    Args:
        stabilizer: Number or callable.

    Source: Montavon et al. 2017 (deep Taylor decomposition), the rule of a sum pooling, with the
    stabilizer of Bach et al. 2015, eq. 58.
    """

    stabilizer: StabilizerLike = 1e-6

    def __post_init__(self) -> None:
        """Check the stabilizer."""
        check_stabilizer("SmoothPool", self.stabilizer)

    def unmet(self, call: Call, x: Sequence[Tensor]) -> str:
        """That no candidate is negative."""
        least = 0.0 if call.nonneg else min(float(t.min()) for t in x)
        if least >= 0:
            return ""
        return (
            f"{self} on values down to {least:g}: shares of relevance have both signs, and may be "
            "larger than what they are shares of"
        )

    def shares(self, x: Tensor, inside: Tensor, sign: int, R: Tensor) -> Tensor:
        """x_j s with s = R / st(sum_l x_l)."""
        x = finite(x) * inside
        s, _ = divide(R, x.sum(-1, keepdim=True), self.stabilizer)
        return x * s


@dataclass(frozen=True)
class TakeMost(PoolRule):
    """The winner takes most: R_j = R exp(beta x_j) / sum_l exp(beta x_l); of a minimum, -beta.

    Relevance is conserved, and no candidate gets any of the other sign. A large ``beta`` comes near
    to winner takes all, with ties shared evenly. Of a logsumexp, beta = 1 is the share in its sum.

    Args:
        beta: How strongly the winner is favoured, in units of 1 / x.

    Source: Kauffmann et al. 2022, "From clustering to cluster explanations via neural networks"
    (arXiv 1906.07633), sect. IV; Kauffmann et al. 2020 (arXiv 1805.06230).
    """

    beta: float = 1.0

    reads_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check 0 < beta < infinity."""
        check_number("TakeMost", "beta", self.beta)
        if not 0 < self.beta < float("inf"):
            raise RuleError(
                f"TakeMost: beta must be above zero and finite, got {self.beta}.",
                fix="winner takes all is lrpfx.Gradient(), the rule of pools by default.",
            )

    def shares(self, x: Tensor, inside: Tensor, sign: int, R: Tensor) -> Tensor:
        """R softmax(beta x)_j."""
        x = (sign * self.beta * widened(x)).masked_fill(~inside, -torch.inf)
        return R * x.softmax(-1).to(R.dtype)
