"""The rule of first layers that takes inputs by their sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrpfx.errors import RuleError
from lrpfx.ops import AffineMap, Call
from lrpfx.rules.base import Absorbed, Flow, StabilizerLike, divide, sum_all
from lrpfx.rules.terms import AffineRule, Input, Term, denominator


@dataclass(frozen=True, eq=False)
class Sign(AffineRule):
    """SIGN, for first layers: Epsilon with the sign of the input in the place of the input.

    s = R / st(z);  R_x = sgn(x) * (W's),  sgn(x) = 1 where x >= mu, else -1

    A dark pixel is as relevant as a bright one: inputs near zero are not faded out, as they are
    where relevance is multiplied by the input. Relevance is not conserved here; the ledger books
    the difference as "sign".

    Args:
        mu: The value of an input that counts as neither, a number or a tensor that broadcasts to
            the input.
        epsilon: The stabilizer's epsilon, or any stabilizer.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Gumpfer et al. 2023 (SIGN, https://doi.org/10.1016/j.inffus.2023.101883), LRP-SIGN and
    its threshold mu; zero counts as positive.
    """

    mu: float | Tensor = 0.0
    epsilon: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    stabilizer_field: ClassVar[str] = "epsilon"
    reads_output: ClassVar[bool] = True

    # A field may be a tensor, which does not compare to a bool.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The denominator, as Epsilon has it."""
        return [Term([(x.all, f)], f.bias, total=z)]

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = sgn(x) * (W's)."""
        assert isinstance(R, Tensor)
        f = self._parameters(call.affine(x))
        shares: tuple[Tensor, ...] = tuple(map(torch.zeros_like, x))
        for term in self.terms(Input(x, call.nonneg, padding=call.padding), f, z):
            known = None if self.zero_params else term.total
            d = denominator(term.parts, term.bias) if known is None else known
            s, _ = divide(R * term.gate, d, self.epsilon)
            for c in (W.T(s, x) for part, W in term.parts if part is not None):
                signed = (torch.where(self._above(a), b, -b) for a, b in zip(x, c, strict=True))
                shares = tuple(r + share for r, share in zip(shares, signed, strict=True))

        def absorbed() -> Absorbed:
            return {"sign": sum_all([R]) - sum_all(shares)}

        return Flow(shares, absorbed)

    def _above(self, x: Tensor) -> Tensor:
        mu = torch.as_tensor(self.mu, dtype=x.dtype, device=x.device)
        try:
            return x >= mu.expand(x.shape)
        except RuntimeError as error:
            raise RuleError(
                f"Sign: mu of shape {tuple(mu.shape)} does not broadcast to the input "
                f"{tuple(x.shape)}.",
                fix="give a number, or a tensor such as (1, C, 1, 1).",
            ) from error
