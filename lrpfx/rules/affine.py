"""Rules of affine ops z = W x + b. Letters as in the papers: x input, z output, s = R / st(d).

Every rule is a list of terms. A term shares its part of R in proportion to the summands of one
denominator d = sum_i W_i x_i + b, where W_i is a part of the weights (positive, negative,
squared ...) and x_i a part of the input:

    s = gate * R / st(d),    R_x = sum_i x_i * (W_i's),    absorbed: b * s and (st(d) - d) * s
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lrpfx.affine import HALVES, AffineMap, Signal, negative, positive
from lrpfx.errors import RuleError
from lrpfx.rules.base import (
    Absorbed,
    Carry,
    Flow,
    Rule,
    StabilizerLike,
    check_number,
    check_stabilizer,
    divide,
    is_zero,
    share,
    sum_all,
)

if TYPE_CHECKING:
    from lrpfx.ops import Call, Op, Site


@dataclass(frozen=True)
class Input:
    """The live inputs of an affine op, by parts.

    Args:
        all: The inputs.
        nonneg: Whether they are proven >= 0.
        fast: Whether shortcuts are wanted that give the same up to round-off.
        above: Whether relevance arrives only where the output is positive.
    """

    all: Signal
    nonneg: bool = False
    fast: bool = False
    above: bool = False

    @property
    def pos(self) -> Signal:
        """xp = max(x, 0)."""
        return self.all if self.nonneg else tuple(positive(t) for t in self.all)

    @property
    def neg(self) -> Signal | None:
        """xn = min(x, 0); None is the symbolic zero of an input proven non-negative."""
        return None if self.nonneg else tuple(negative(t) for t in self.all)

    @property
    def one(self) -> Signal:
        """Ones shaped like x."""
        return tuple(t.new_ones(()).expand(t.shape) for t in self.all)


@dataclass(frozen=True)
class Term:
    """One denominator d = sum of W_i x_i + bias, and the gate on the relevance it shares.

    Args:
        parts: Pairs (x_i, W_i); a pair whose x_i is None is a symbolic zero.
        bias: In the op's own layout; None if the denominator has no bias.
        gate: Factor on R: a number or a tensor shaped like z.
        total: d where it is known already, to save computing it.
        sign: 1 if d is known to be >= 0, -1 if it is known to be <= 0, else 0.
        where: The term shares only what arrives where this is positive; everywhere if None.
    """

    parts: Sequence[tuple[Signal | None, AffineMap]]
    bias: Tensor | None = None
    gate: float | Tensor = 1.0
    total: Tensor | None = None
    sign: int = 0
    where: Tensor | None = None


ZeroParams = str | Sequence[str] | None


@dataclass(frozen=True)
class AffineRule(Rule):
    """Base of the rules of affine ops; a rule is its list of terms.

    Args:
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero. The forward
            pass keeps them.
    """

    zero_params: ZeroParams = field(default=None, kw_only=True)

    #: Whether the rule splits weights, and so needs an op that has some.
    needs_weight: ClassVar[bool] = True
    #: Name of the field that holds the stabilizer.
    stabilizer_field: ClassVar[str] = "stabilizer"
    #: When the relevance is the input times something: "always", "nonneg" for inputs proven so.
    proportional: ClassVar[str] = "never"

    def __post_init__(self) -> None:
        """Check the parameters."""
        name = type(self).__name__
        check_stabilizer(name, self._stabilizer)
        unknown = set(_names(self.zero_params)) - {"weight", "bias"}
        if unknown:
            raise RuleError(
                f"{name}: zero_params names unknown parameters {sorted(unknown)}.",
                fix='the parameters are "weight" and "bias".',
            )

    def fits(self, op: Op) -> str:
        """Affine ops; those with weights where the rule splits weights."""
        if op.affine is None:
            return f"{type(self).__name__} is a rule of affine ops, and {op.kind} is none"
        if self.needs_weight and not op.weighted:
            return f"{type(self).__name__} splits weights, and {op.kind} has none"
        return ""

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The rule itself."""
        raise NotImplementedError

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = sum over terms and parts of x_i * (W_i's)."""
        assert isinstance(R, Tensor)
        f = self._parameters(call.affine(x))
        shares: list[Signal] = []
        booked: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        for term in self.terms(Input(x, call.nonneg), f, z):
            parts = [(part, W) for part, W in term.parts if part is not None]
            known = term.total is not None and not self.zero_params
            d = term.total if known else _denominator(parts, term.bias)
            assert d is not None
            gated = R if isinstance(term.gate, float) and term.gate == 1 else R * term.gate
            s, _ = divide(gated, d, self._stabilizer)
            for part, W in parts:
                c = W.T(s, x)
                shares.append(tuple(a * b for a, b in zip(part, c, strict=True)))
            booked.append((gated, d, s, f.spread(term.bias)))
        relevance = tuple(_sum(share) for share in zip(*shares, strict=True))
        return Flow(relevance, lambda: _absorbed(R, booked, call.op.kind == "shift"))

    # -- computed fast

    def _exact(self, site: Site) -> bool:
        """Whether the denominator is z itself, so that a multiplier needs no division."""
        own_denominator = isinstance(self, (Epsilon, Norm)) and not self.zero_params
        return own_denominator and is_zero(self._stabilizer)

    def accepts(self, site: Site) -> bool:
        """A masked score is -infinity, and has no finite product with its multiplier."""
        return site.op.kind != "shift" or self._exact(site)

    def carries(self, site: Site, taken: bool) -> bool:
        """R_x = x * c where every part of the input is the input itself."""
        return self.proportional == "always" or (self.proportional == "nonneg" and site.nonneg)

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """All, where the denominator is z itself; a norm's depends on its input.

        Not batch norm: PyTorch's own backward of it mixes up channels if the gradient of a single
        sample comes in channels_last strides while the input is a slice of channels.
        """
        follows = self._exact(site) and site.op.family == "affine" and site.op.kind != "batch_norm"
        return (1.0,) * len(site.live) if follows else None

    @property
    def multiplies_by_output(self) -> bool:
        """Whether ``multiply`` reads z only as a factor of the multiplier that arrives."""
        if isinstance(self, (Epsilon, Norm)) and not self.zero_params:
            return not callable(self._stabilizer) and not is_zero(self._stabilizer)
        return True

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Inputs for denominators other than z, and for the standard deviation of a norm."""
        if isinstance(self, (Epsilon, Norm)) and not self.zero_params:
            return site.op.family == "normalize", not (taken and self._exact(site))
        return True, taken or not isinstance(self, ZPlus)

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_x = sum over terms and parts of W_i's."""
        f = self._parameters(replace(call.affine(x), memory=call.memory))
        if isinstance(self, (Epsilon, Norm)) and not self.zero_params:  # d = z
            return f.T(share(m, z, self._stabilizer, carry.takes, int(carry.cut)), x)
        given = Input(x, call.nonneg, fast=True, above=carry.above)
        return self._sum(list(self.terms(given, f, z)), x, z, m, carry.takes, lambda part, c: c)

    def relevance(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """R_x = sum over terms and parts of x_i * (W_i's)."""
        if type(self).propagate is not AffineRule.propagate:  # a rule that says it itself
            return super().relevance(call, x, z, m, carry)
        f = self._parameters(replace(call.affine(x), memory=call.memory))
        terms = list(self.terms(Input(x, call.nonneg), f, z))
        return self._sum(terms, x, z, m, carry.takes, torch.mul)

    def _sum(
        self,
        terms: list[Term],
        x: Signal,
        z: Tensor,
        m: Tensor,
        taken: bool,
        times: Callable[[Tensor, Tensor], Tensor],
    ) -> Signal:
        """The sum over terms and parts of ``times(x_i, W_i's)``; it uses the terms up."""
        R, shares = z * m if taken else m, []
        while terms:
            term = terms.pop(0)
            parts = [(part, W) for part, W in term.parts if part is not None]
            gate, gated = term.gate, R if term.where is None else _above(term.where, R)
            if isinstance(gate, Tensor):
                gate, gated = 1.0, gated * gate
            own = gated is not R or (taken and not terms)
            shares.append((gate, parts, self._share(gated, term, parts, own)))
        del R, gated, term
        total: list[Tensor] = []
        while shares:
            gate, parts, s = shares.pop(0)
            for part, W in parts:
                total = _add(total, list(map(times, part, W.T(s, x))), gate)
        return tuple(total)

    def _share(
        self, R: Tensor, term: Term, parts: Sequence[tuple[Signal, AffineMap]], own: bool
    ) -> Tensor:
        """R / st(d); it may take the memory of R if that is its ``own``."""
        stabilizer, bias = self._stabilizer, term.bias
        d = None if self.zero_params else term.total
        if term.sign and not callable(stabilizer) and stabilizer > 0 and R.dtype not in HALVES:
            epsilon = term.sign * stabilizer
            if d is not None:
                d = d.add_(epsilon)
            elif bias is not None:  # added where the bias is, it takes no pass of its own
                d = _denominator(parts, bias + epsilon)
            else:
                d = _denominator(parts, None) + epsilon
            return R.div_(d) if own else R / d
        return share(R, _denominator(parts, bias) if d is None else d, stabilizer, False, term.sign)

    @property
    def _stabilizer(self) -> StabilizerLike:
        value: StabilizerLike = getattr(self, self.stabilizer_field)
        return value

    def _parameters(self, f: AffineMap) -> AffineMap:
        names = _names(self.zero_params)
        if "bias" in names:
            f = replace(f, bias=None)
        if "weight" in names and f.weight is not None:
            f = f.with_weight(torch.zeros_like)
        return f


def _names(zero_params: ZeroParams) -> tuple[str, ...]:
    return (zero_params,) if isinstance(zero_params, str) else tuple(zero_params or ())


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _above(where: Tensor, R: Tensor) -> Tensor:
    """R where ``where`` is positive, else 0."""
    passed: Tensor = torch.ops.aten.threshold_backward(R, where, 0)
    return passed


def _add(total: list[Tensor], found: list[Tensor], gate: float) -> list[Tensor]:
    """``total + gate * found``, where no total yet is an empty list."""
    if not total:
        return found if gate == 1 else [c * gate for c in found]
    return [torch.add(t, c, alpha=gate) for t, c in zip(total, found, strict=True)]


def _denominator(parts: Sequence[tuple[Signal | None, AffineMap]], bias: Tensor | None) -> Tensor:
    (first, W), *rest = [(part, W) for part, W in parts if part is not None]
    return _sum([W(first, bias), *(W(part) for part, W in rest)])


def _absorbed(
    R: Tensor, booked: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], masked: bool
) -> Absorbed:
    """What stays here: the bias's summand, the stabilizer's, and outputs with nothing to share by.

    With gate * R = s * st(d) and d = sum_i W_i x_i + b, the inputs get s * (d - b) in sum; the
    rest is b * s and (st(d) - d) * s = gate * R - d * s. "dead" collects the outputs whose
    denominator is zero or whose gates are all closed. ``masked`` says that d may be -infinity, as
    a masked attention score is, which gets and keeps nothing.
    """
    zero = R.new_zeros((), dtype=torch.float64)
    absorbed = {"bias": zero, "stabilizer": zero, "dead": zero}
    for gated, d, s, bias in booked:
        gated, d, s = gated.detach(), d.detach(), s.detach()
        rest = gated - s * d
        rest = rest.nan_to_num(0.0) if masked else rest
        dead = sum_all([rest * (d == 0)])
        absorbed["stabilizer"] = absorbed["stabilizer"] + sum_all([rest]) - dead
        absorbed["dead"] = absorbed["dead"] + dead
        if bias is not None:
            share = s * bias.detach()
            share = share.nan_to_num(0.0) if masked else share
            absorbed["bias"] = absorbed["bias"] + sum_all([share])
    if len(booked) > 1 or booked[0][0] is not R:
        closed = sum_all([R]) - sum_all([gated for gated, _, _, _ in booked])
        absorbed["dead"] = absorbed["dead"] + closed
    return absorbed


@dataclass(frozen=True)
class Epsilon(AffineRule):
    """LRP-epsilon: R_x = x * W'(R / st(z)), with the bias in z.

    Args:
        epsilon: The stabilizer's epsilon, or any stabilizer; 0 is LRP-0.
        zero_params: See AffineRule.

    Source: Bach et al. 2015, eq. 58; Montavon et al. 2019, eq. 10.3.
    """

    epsilon: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    stabilizer_field: ClassVar[str] = "epsilon"
    proportional: ClassVar[str] = "always"
    reads_output: ClassVar[bool] = True

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """d = W x + b = z."""
        return [Term([(x.all, f)], f.bias, total=z)]


@dataclass(frozen=True)
class Norm(AffineRule):
    """Epsilon for ops without weights (average pooling, residual sums): R_x = x * J'(R / st(z)).

    Args:
        stabilizer: Number or callable.
        zero_params: See AffineRule.

    Source: Anders et al. 2021 (zennit), rule Norm; the epsilon rule of Bach et al. 2015, eq. 58.
    """

    stabilizer: StabilizerLike = 1e-6

    needs_weight: ClassVar[bool] = False
    proportional: ClassVar[str] = "always"
    reads_output: ClassVar[bool] = True

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
        zero_params: See AffineRule.

    Source: Montavon et al. 2017 (deep Taylor decomposition), eq. 19, extended to negative inputs
    as alpha-beta with alpha = 1, beta = 0 (Bach et al. 2015, eq. 60).
    """

    stabilizer: StabilizerLike = 1e-6

    proportional: ClassVar[str] = "nonneg"

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The positive contributions."""
        return [Term(_agreeing(x, f), _part(positive, f.bias), sign=1)]


@dataclass(frozen=True)
class AlphaBeta(AffineRule):
    """Alpha-beta: positive contributions weighted by alpha, negative ones by -beta.

    d1 = Wp xp + Wn xn + bp,  d2 = Wn xp + Wp xn + bn,  s_i = R / st(d_i)
    R_x = alpha * [xp * (Wp's1) + xn * (Wn's1)] - beta * [xp * (Wn's2) + xn * (Wp's2)]

    Args:
        alpha: Weight of the positive contributions.
        beta: Weight of the negative ones; alpha - beta = 1.
        stabilizer: Number or callable.
        zero_params: See AffineRule.

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
        plus = Term(_agreeing(x, f), _part(positive, f.bias), gate=float(self.alpha), sign=1)
        if self.beta == 0:
            return [plus]
        minus = Term(_opposing(x, f), _part(negative, f.bias), gate=-float(self.beta), sign=-1)
        # d1 + d2 = z; rounded to a half type, the difference is nothing like d2.
        if x.fast and not self.zero_params and z.dtype not in HALVES:
            d = _denominator(plus.parts, plus.bias)
            return [replace(plus, total=d), replace(minus, total=z - d)]
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
        zero_params: See AffineRule.

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
        up = f.with_weight(lambda w: w + g * positive(w), f"up {g}")
        bias_up = _part(lambda b: b + g * positive(b), f.bias)
        if x.above and x.nonneg:  # nothing arrives elsewhere
            d = _denominator([(x.all, up)], bias_up).clamp_min_(0.0)
            return [Term([(x.all, up)], bias_up, total=d, sign=1)]
        down = f.with_weight(lambda w: w + g * negative(w), f"down {g}")
        bias_down = _part(lambda b: b + g * negative(b), f.bias)
        over = Term([(x.pos, up), (x.neg, down)], bias_up)
        under = Term([(x.pos, down), (x.neg, up)], bias_down)
        if not x.fast:
            above, below = (z > 0).to(z.dtype), (z < 0).to(z.dtype)
            return [replace(over, gate=above), replace(under, gate=below)]
        over, under = replace(over, where=z), replace(under, where=-z)
        if x.nonneg and not self.zero_params and z.dtype not in HALVES:
            # d1 = z + g d and d2 = z + g (z - d), with d what contributes positively; where a term
            # counts, its denominator has the sign of z.
            d = _denominator([(x.all, f.pos)], _part(positive, f.bias))
            over = replace(over, total=torch.add(z, d, alpha=g).clamp_min_(0.0), sign=1)
            d2 = torch.sub((1 + g) * z, d, alpha=g)
            under = replace(under, total=d2.clamp_max_(0.0), sign=-1)
        return [over, under]


@dataclass(frozen=True, eq=False)  # fields may be tensors, which do not compare to a bool
class ZBox(AffineRule):
    """z-box, for first layers whose input lies in a box [low, high].

    s = R / st(z - (Wp l + bp) - (Wn h + bn));  R_x = x * (W's) - l * (Wp's) - h * (Wn's)

    The bias cancels. Zero padding of a convolution stays zero: l and h are padded like x.

    Args:
        low: Lowest possible input, a number or a tensor that broadcasts to the input.
        high: Highest possible input, likewise.
        stabilizer: Number or callable.
        zero_params: See AffineRule.

    Source: Montavon et al. 2017, eq. 13 (z^B rule).
    """

    low: float | Tensor
    high: float | Tensor
    stabilizer: StabilizerLike = 1e-6

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
        low, high = _box(self.low, x), _box(self.high, x)
        return [Term([(x.all, f), (low, f.pos), (high, f.neg)])]


@dataclass(frozen=True)
class WSquare(AffineRule):
    """w-square, for first layers on unbounded inputs: d = W^2 1 + b^2, R_x = (W^2)'(R / st(d)).

    Args:
        stabilizer: Number or callable.
        zero_params: See AffineRule.

    Source: Montavon et al. 2017, eq. 12 (w^2 rule).
    """

    stabilizer: StabilizerLike = 1e-6

    reads_input: ClassVar[bool] = False

    def terms(self, x: Input, f: AffineMap, z: Tensor) -> Sequence[Term]:
        """The squared weights, whatever the input."""
        return [Term([(x.one, f.square)], _part(torch.square, f.bias))]


@dataclass(frozen=True)
class Flat(AffineRule):
    """Flat: R is spread evenly over the receptive field: R_x = 1'(R / st(count)).

    Weights and inputs are taken as one and there is no bias; also for ops without weights.

    Args:
        stabilizer: Number or callable.
        zero_params: See AffineRule.

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


def _agreeing(x: Input, f: AffineMap) -> list[tuple[Signal | None, AffineMap]]:
    """The contributions W x that are positive."""
    return [(x.pos, f.pos), (x.neg, f.neg)]


def _opposing(x: Input, f: AffineMap) -> list[tuple[Signal | None, AffineMap]]:
    """The contributions W x that are negative."""
    return [(x.pos, f.neg), (x.neg, f.pos)]


def _part(change: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor | None:
    return None if bias is None else change(bias)


def _box(bound: float | Tensor, x: Input) -> Signal:
    """``-bound`` in the shape of each input: the box enters the denominator with a minus."""
    spread = []
    for t in x.all:
        value = -torch.as_tensor(bound, dtype=t.dtype, device=t.device)
        try:
            spread.append(value.expand(t.shape))
        except RuntimeError as error:
            raise RuleError(
                f"ZBox: a bound of shape {tuple(value.shape)} does not broadcast to the input "
                f"{tuple(t.shape)}.",
                fix="give a number, or a tensor such as (1, C, 1, 1).",
            ) from error
    return tuple(spread)
