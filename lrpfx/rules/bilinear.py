"""Rules of ops on several live tensors at once: products, matrix products, softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrpfx.ops import Call, Composed, Op, Site, entmax, pull_back
from lrpfx.rules.base import (
    Absorbed,
    Carry,
    Flow,
    Rule,
    StabilizerLike,
    check_stabilizer,
    divide,
    is_zero,
    share,
    sum_all,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Uniform(Rule):
    """z = a * b: each of the n live factors gets R / n, summed over where it was broadcast.

    A factor that is itself a product, moved or scaled maybe, and used for nothing else, counts as
    often as it has factors: in ``(a * b) * c`` each of the three gets a third. Of ``prod`` and
    ``cumprod`` the entries of one tensor are the factors.

    Args:
        pairwise: Halve R at each binary product instead, in the order in which the model
            multiplies: in ``(a * b) * c`` c gets a half, a and b a quarter each.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.3 (uniform rule); shares
    that do not depend on the association: arXiv 2510.18810.
    """

    pairwise: bool = False

    reads_input: ClassVar[bool] = False

    def fits(self, op: Op) -> str:
        """Elementwise products of live tensors."""
        return "" if op.family == "product" else f"Uniform is for products, and {op.kind} is none"

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_i = R n_i / n, n_i the factors that x_i stands for."""
        assert isinstance(R, Tensor)
        if call.op.kind == "prod":
            return Flow(pull_back(lambda *x: _summed(call, *x), x, R / _counts(call, x)))
        shares = self.shares(call.site)
        return Flow(tuple((R * c).sum_to_size(t.shape) for c, t in zip(shares, x, strict=True)))

    def shares(self, site: Site) -> tuple[float, ...]:
        """n_i / n, or by the order of the products."""
        counts = (1,) * len(site.live) if self.pairwise else site.factors
        return tuple(count / sum(counts) for count in counts)

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """The shares: c_a = b c n_a / n; none of entries, whose number may be any."""
        return None if site.op.kind == "prod" else self.shares(site)

    def carries(self, site: Site, taken: bool) -> bool:
        """R / n = a (b c / n)."""
        return taken

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Each factor's multiplier is the product of the others."""
        return True, False

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_a = b c n_a / n."""
        if call.op.kind == "prod":
            return call.pull_back(x, m / _counts(call, x))
        shares = zip(self.shares(call.site), call.pull_back(x, m), strict=True)
        return tuple(c * part for part, c in shares)


#: Of ops that multiply the entries of one tensor: what adds them up in the same way.
_SUMS = {aten.prod.default: aten.sum.default, aten.prod.dim_int: aten.sum.dim_IntList}
_SUMS |= {aten.cumprod.default: aten.cumsum.default}


def _summed(call: Call, x: Tensor) -> Tensor:
    """The entries added up in the place of multiplied."""
    target = _SUMS[call.site.target]
    given = dict(call.site.arguments, self=x)
    if target is aten.sum.dim_IntList:
        given["dim"] = [given["dim"]]
    total: Tensor = target(**given)
    return total


def _counts(call: Call, x: tuple[Tensor, ...]) -> Tensor:
    """How many factors each output has."""
    return _summed(call, torch.ones_like(x[0]))


@dataclass(frozen=True)
class Bilinear(Rule):
    """z = a b of two live matrices: s = R / st(2 z), R_a = a * (s b'), R_b = b * (a's).

    Epsilon for each factor with the others held fixed, and an equal part of R for each: with n
    live factors (einsum), s = R / st(n z).

    Args:
        stabilizer: Number or callable.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.3 and eq. 14.
    """

    stabilizer: StabilizerLike = 1e-6

    reads_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the stabilizer."""
        check_stabilizer("Bilinear", self.stabilizer)

    def fits(self, op: Op) -> str:
        """Matrix products of two live tensors, convolutions with a live kernel among them."""
        return "" if op.kind == "matmul" else f"Bilinear is for matmul, and {op.kind} is none"

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_a = a * (s b'), R_b = b * (a's)."""
        assert isinstance(R, Tensor)
        d = len(x) * z
        s, _ = divide(R, d, self.stabilizer)
        c = call.pull_back(x, s)

        def absorbed() -> Absorbed:
            return {"stabilizer": sum_all([R - s * d])}

        return Flow(tuple(a * b for a, b in zip(x, c, strict=True)), absorbed)

    def carries(self, site: Site, taken: bool) -> bool:
        """R_a = a * (s b')."""
        return True

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """An equal part for each, where no stabilizer takes one."""
        return (1 / len(site.live),) * len(site.live) if is_zero(self.stabilizer) else None

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Without a stabilizer s = c / n, whatever the output is."""
        return True, not (taken and is_zero(self.stabilizer))

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_a = s b', c_b = a's."""
        n = len(x)
        if carry.takes and is_zero(self.stabilizer):
            return call.pull_back(x, m / n)
        s = share(m / n if carry.takes else m, n * z, self.stabilizer, carry.takes)
        return call.pull_back(x, s)


@dataclass(frozen=True)
class Taylor(Rule):
    """Softmax y expanded at x: R_x = x * J'(R / y), entries of -infinity get nothing.

    J is the Jacobian of y, so over one dimension this is R_x = x * (R - y * sum R). A log-softmax
    is the logarithm of one, which hands on what it gets. Relevance is not conserved here: the
    ledger books what the expansion leaves over.

    Source: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602), Prop. 3.1, eq. 12.
    """

    reads_output: ClassVar[bool] = True

    def fits(self, op: Op) -> str:
        """Softmax."""
        return "" if op.family == "softmax" else f"Taylor is for softmax, not for {op.kind}"

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = x * J'(R / y)."""
        assert isinstance(R, Tensor)
        R_x = self.weigh(x[0], _expanded(call, x, z, R))

        def absorbed() -> Absorbed:
            return {"softmax": sum_all([R]) - sum_all([R_x])}

        return Flow((R_x,), absorbed)

    def carries(self, site: Site, taken: bool) -> bool:
        """The expansion multiplies by x in any case."""
        return True

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """With R = y c this is the softmax's derivative."""
        return (1.0,)

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Over one dimension the output is enough."""
        return _by_jacobian(site), True

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_x = J'(R / y)."""
        return (_expanded(call, x, z, z * m if carry.takes else m),)


def _expanded(call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor) -> Tensor:
    """J'(R / y), which is R - y * sum R over one dimension; where y is zero, R is, too."""
    if _by_jacobian(call.site):
        (c,) = call.pull_back(x, divide(R, z, 0.0)[0])
        return c
    return R - z * R.sum(call.argument("dim"), keepdim=True)


def _by_jacobian(site: Site) -> bool:
    """Whether it takes the input to expand a softmax: over groups of entries, or a sparse one."""
    return isinstance(site.target, Composed) or site.target is entmax
