"""Rules of affine ops z = W x + b, each a list of ``terms``.

Letters as in the papers: x input, z output, d a denominator, s = R / st(d); p and n are the
positive and the negative part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lrpfx.errors import RuleError
from lrpfx.ops import AffineMap, Call, Op, Signal, negative, positive
from lrpfx.rules.base import StabilizerLike, check_number
from lrpfx.rules.terms import AffineRule, Input, Term, denominator


@dataclass(frozen=True)
class Epsilon(AffineRule):
    """LRP-epsilon: R_x = x * W'(R / st(z)), with the bias in z.

    Args:
        epsilon: The stabilizer's epsilon, or any stabilizer; 0 is LRP-0.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Bach et al. 2015, eq. 58; Montavon et al. 2019, eq. 10.3.
    """

    epsilon: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    stabilizer_field: ClassVar[str] = "epsilon"
    proportional: ClassVar[str] = "always"
    reads_output: ClassVar[bool] = True
    divides_by_output: ClassVar[bool] = True

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """d = W x + b = z."""
        return [Term([(x.all, f)], f.bias, total=z)]


@dataclass(frozen=True)
class Norm(AffineRule):
    """Epsilon for ops without weights (average pooling, residual sums): R_x = x * J'(R / st(z)).

    Args:
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Anders et al. 2021 (zennit), rule Norm; the epsilon rule of Bach et al. 2015, eq. 58.
    """

    stabilizer: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    proportional: ClassVar[str] = "always"
    reads_output: ClassVar[bool] = True
    divides_by_output: ClassVar[bool] = True

    def fits(self, op: Op) -> str:
        """Affine ops without weights; batch norm that could not be folded counts as one."""
        if op.affine is not None and op.weighted and op.kind != "batch_norm":
            return f"Norm is for ops without weights, and {op.kind} has some: use Epsilon"
        return super().fits(op)

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """d = J x + b = z."""
        return [Term([(x.all, f)], f.bias, total=z)]


@dataclass(frozen=True)
class ZPlus(AffineRule):
    """z-plus, for inputs of any sign: d = Wp xp + Wn xn + bp.

    R_x = xp * (Wp's) + xn * (Wn's), s = R / st(d).

    Args:
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Montavon et al. 2017 (deep Taylor decomposition), eq. 19, extended to negative inputs
    as alpha-beta with alpha = 1, beta = 0 (Bach et al. 2015, eq. 60).
    """

    stabilizer: StabilizerLike = 1e-6

    proportional: ClassVar[str] = "nonneg"
    fast_reads_output: ClassVar[bool] = False

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The positive contributions."""
        return [Term(_agreeing(x, f), f.bias_part(positive, "pos"), sign=1)]


@dataclass(frozen=True)
class AlphaBeta(AffineRule):
    """Alpha-beta: positive contributions weighted by alpha, negative ones by -beta.

    d1 = Wp xp + Wn xn + bp,  d2 = Wn xp + Wp xn + bn,  s_i = R / st(d_i)
    R_x = alpha * [xp * (Wp's1) + xn * (Wn's1)] - beta * [xp * (Wn's2) + xn * (Wp's2)]

    Args:
        alpha: Weight of the positive contributions.
        beta: Weight of the negative ones; alpha - beta = 1.
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Bach et al. 2015, eq. 60.
    """

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: StabilizerLike = 1e-6

    proportional: ClassVar[str] = "nonneg"

    def __post_init__(self) -> None:
        """Check alpha - beta = 1, with room for round-off: 1.4 and 0.4 are legal."""
        super().__post_init__()
        check_number("AlphaBeta", "alpha", self.alpha, above=-math.inf)
        check_number("AlphaBeta", "beta", self.beta, above=-math.inf)
        if min(self.alpha, self.beta) < 0 or not math.isclose(self.alpha - self.beta, 1.0):
            raise RuleError(
                "AlphaBeta: alpha - beta must be 1 with both >= 0, "
                f"got alpha={self.alpha}, beta={self.beta}.",
                fix=f"for alpha={self.alpha} give beta={self.alpha - 1:g}.",
            )

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """Positive and negative contributions."""
        plus = Term(_agreeing(x, f), f.bias_part(positive, "pos"), gate=float(self.alpha), sign=1)
        if self.beta == 0:
            return [plus]
        minus = Term(_opposing(x, f), f.bias_part(negative, "neg"), gate=-float(self.beta), sign=-1)
        # d1 + d2 = z, so d2 - epsilon = z - (d1 + epsilon). Rounded to a half type, the difference
        # would be nothing like d2.
        if x.fast and not self.zero_params and (epsilon := self.added(z)):
            d = denominator(plus.parts, plus.bias, fast=True, added=epsilon)
            # Rounding, and a z that was recovered where nothing arrives, must not leave it zero.
            return [plus._replace(stable=d), minus._replace(stable=(z - d).clamp_max_(-epsilon))]
        return [plus, minus]


@dataclass(frozen=True)
class Gamma(AffineRule):
    """Gamma, generalised to inputs and outputs of any sign.

    Wu = W + g Wp, Wd = W + g Wn, bu = b + g bp, bd = b + g bn
    d1 = Wu xp + Wd xn + bu,  s1 = [z > 0] R / st(d1)
    d2 = Wd xp + Wu xn + bd,  s2 = [z < 0] R / st(d2)
    R_x = xp * (Wu's1) + xn * (Wd's1) + xp * (Wd's2) + xn * (Wu's2)

    Args:
        gamma: How much the agreeing contributions are favoured.
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Montavon et al. 2019, eq. 10.4; generalised in Andeol et al. 2021, as rule
    ``Gamma`` of zennit. The gate reads the biased output z, whatever ``zero_params`` says.
    """

    gamma: float = 0.25
    stabilizer: StabilizerLike = 1e-6

    proportional: ClassVar[str] = "nonneg"
    reads_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check gamma >= 0."""
        super().__post_init__()
        check_number("Gamma", "gamma", self.gamma)

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """Outputs above zero favour positive contributions, outputs below zero negative ones."""
        g = self.gamma
        up = f.with_weight(lambda w: torch.add(w, positive(w), alpha=g), f"up {g}")
        bias_up = f.bias_part(lambda b: b + g * positive(b), f"up {g}")
        epsilon = self.added(z)
        exact = not self.zero_params and not callable(self.stabilizer)
        if x.above and x.nonneg and exact:  # nothing arrives where d is not above z > 0
            d = denominator([(x.all, up)], bias_up, added=epsilon).clamp_min_(epsilon)
            known = Term([(x.all, up)], bias_up)
            return [known._replace(stable=d) if epsilon else known._replace(total=d)]
        down = f.with_weight(lambda w: torch.add(w, negative(w), alpha=g), f"down {g}")
        bias_down = f.bias_part(lambda b: b + g * negative(b), f"down {g}")
        over = Term([(x.pos, up), (x.neg, down)], bias_up)
        under = Term([(x.pos, down), (x.neg, up)], bias_down)
        if not x.fast:
            above, below = (z > 0).to(z.dtype), (z < 0).to(z.dtype)
            return [over._replace(gate=above), under._replace(gate=below)]
        p, n = positive(z), negative(z)
        over, under = over._replace(of=p), under._replace(of=n)
        if x.nonneg and epsilon and g and not self.zero_params:
            # With d what contributes positively, d1 = z + g d where z > 0, and elsewhere
            # d2 = z + g (z - d); g (d + epsilon / g) brings the stabilizers along.
            d = denominator([(x.all, f.pos)], f.bias_part(positive, "pos"), added=epsilon / g)
            over = over._replace(stable=torch.add(p, d, alpha=g))
            under = under._replace(stable=d.mul_(-g).add_(n, alpha=1 + g))
        return [over, under]


@dataclass(frozen=True, eq=False)
class ZBox(AffineRule):
    """z-box, for first layers whose input lies in a box [low, high].

    s = R / st(z - (Wp l + bp) - (Wn h + bn));  R_x = x * (W's) - l * (Wp's) - h * (Wn's)

    The bias cancels. Zero padding of a convolution stays zero: l and h are padded like x. Outside
    of the box contributions change their sign; the formula is computed all the same, with a
    warning and a note in the report.

    Args:
        low: Lowest possible input, a number or a tensor that broadcasts to the input; of bounds for
            a larger batch the first ones count.
        high: Highest possible input, likewise.
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.
        strict: Refuse inputs that lie outside of the box.

    Raises:
        RuleError: Of an explanation, under ``strict``, where an input is not in the box.

    Source: Montavon et al. 2017, eq. 13 (z^B rule).
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: StabilizerLike = 1e-6
    strict: bool = field(default=False, kw_only=True)

    # Fields may be tensors, which do not compare to a bool.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Check low <= high."""
        super().__post_init__()
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        try:
            ordered = bool((low <= high).all())
        except RuntimeError as error:
            raise RuleError(
                f"ZBox: low {tuple(low.shape)} and high {tuple(high.shape)} do not broadcast.",
                fix="give numbers, or tensors that broadcast to the input.",
            ) from error
        if not ordered:
            raise RuleError("ZBox: low is above high somewhere.", fix="exchange the two.")

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The box's corners are subtracted from the input's contributions."""
        low, high = (
            tuple(x.padded(-_bound(b, t)) for t in x.inside) for b in (self.low, self.high)
        )
        return [Term([(x.all, f), (low, f.pos), (high, f.neg)])]

    def unmet(self, call: Call, x: Sequence[Tensor]) -> str:
        """That the inputs lie in the box."""
        for t in Input(tuple(x), padding=call.padding).inside:
            low, high = _bound(self.low, t), _bound(self.high, t)
            beyond = torch.maximum(low - t, t - high)
            size = torch.maximum(low.abs().max(), high.abs().max())
            if bool(beyond.max() > max(_ROUNDED, 4 * torch.finfo(t.dtype).eps) * size):
                outside = int((beyond > 0).sum())
                least, most = (bound.item() for bound in torch.aminmax(t))
                found = (
                    f"{self}: {outside} of {t.numel()} inputs lie outside of the box; they are "
                    f"between {least:g} and {most:g}"
                )
                if self.strict:
                    raise RuleError(
                        f"{found}.",
                        fix="give the least and the largest value that this layer's input can "
                        "have, after what the model does to it before, such as normalisation.",
                    )
                return found
        return ""


@dataclass(frozen=True)
class WSquare(AffineRule):
    """w-square, for first layers on unbounded inputs: d = W^2 1 + b^2, R_x = (W^2)'(R / st(d)).

    Args:
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Montavon et al. 2017, eq. 12 (w^2 rule).
    """

    stabilizer: StabilizerLike = 1e-6

    reads_input: ClassVar[bool] = False

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The squared weights, whatever the input."""
        return [Term([(x.one, f.square)], f.bias_part(torch.square, "square"))]


@dataclass(frozen=True)
class Flat(AffineRule):
    """Flat: R is spread evenly over the receptive field: R_x = 1'(R / st(count)).

    Weights and inputs are taken as one and there is no bias; also for ops without weights.

    Args:
        stabilizer: Number or callable.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Lapuschkin et al. 2019, supplementary note 1 (flat rule); Bach et al. 2016.
    """

    stabilizer: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    reads_input: ClassVar[bool] = False

    def fits(self, op: Op) -> str:
        """Affine ops; the map of a normalisation depends on its input and has no flat form."""
        return "" if op.family == "affine" else f"Flat is a rule of affine ops, not of {op.kind}"

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """Every input counts the same."""
        return [Term([(x.one, f.ones)])]


#: Part of a box by which an input may leave it without a word: rounding of bounds and inputs.
_ROUNDED = 1e-4


def _agreeing(x: Input, f: AffineMap) -> list[tuple[Signal | None, AffineMap]]:
    """The contributions W x that are positive."""
    return [(x.pos, f.pos), (x.neg, f.neg)]


def _opposing(x: Input, f: AffineMap) -> list[tuple[Signal | None, AffineMap]]:
    """The contributions W x that are negative."""
    return [(x.pos, f.neg), (x.neg, f.pos)]


def _bound(bound: float | Tensor, t: Tensor) -> Tensor:
    """A bound of the box in the shape of the input."""
    value = torch.as_tensor(bound, dtype=t.dtype, device=t.device)
    # The last batch of a loader is smaller. Not by len(), which would fix a size that may vary.
    if value.ndim == t.ndim > 1 and value.shape[0] > t.shape[0]:
        value = value[: t.shape[0]]
    try:
        return value.expand(t.shape)
    except RuntimeError as error:
        raise RuleError(
            f"ZBox: a bound of shape {tuple(value.shape)} does not broadcast to the input "
            f"{tuple(t.shape)}.",
            fix="give a number, or a tensor such as (1, C, 1, 1).",
        ) from error
