"""What rules of affine ops z = W x + b share: each is a list of terms, relevance and what stays.

A term shares its part of R in proportion to the summands of one denominator
d = sum_i W_i x_i + b, where W_i is a part of the weights (positive, negative, squared ...) and x_i
a part of the input:

    s = gate * R / st(d),    R_x = sum_i x_i * (W_i's),    absorbed: b * s and (st(d) - d) * s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrpfx.errors import RuleError
from lrpfx.ops import HALVES, AffineMap, Call, Op, Signal, Site, beside, negative, positive
from lrpfx.rules.base import (
    Absorbed,
    Carry,
    Flow,
    Rule,
    StabilizerLike,
    check_stabilizer,
    divide,
    finite,
    is_zero,
    only_where,
    over,
    share,
    sum_all,
    times,
)


class Input(NamedTuple):
    """The live inputs of an affine op, by parts.

    Args:
        all: The inputs.
        nonneg: Whether they are proven >= 0.
        fast: Whether shortcuts are wanted that give the same up to round-off.
        above: Whether relevance arrives only where the output is positive.
        padding: See ``Call.padding``.
    """

    all: Signal
    nonneg: bool = False
    fast: bool = False
    above: bool = False
    padding: tuple[int, ...] = ()

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
        """Ones shaped like x, zeros where x was padded with these."""
        return tuple(self.padded(t.new_ones(()).expand(t.shape)) for t in self.inside)

    @property
    def inside(self) -> Signal:
        """The inputs without padding."""
        if not self.padding:
            return self.all
        return tuple(F.pad(t, [-n for n in self.padding]) for t in self.all)

    def padded(self, t: Tensor) -> Tensor:
        """What is shaped like the inputs without padding, with padding."""
        return F.pad(t, self.padding) if self.padding else t


class Term(NamedTuple):
    """One denominator d = sum of W_i x_i + bias, and the gate on the relevance it shares.

    Args:
        parts: Pairs (x_i, W_i); a pair whose x_i is None is a symbolic zero.
        bias: In the op's own layout; None if the denominator has no bias.
        gate: Factor on R: a number or a tensor shaped like z.
        total: d where it is known already, to save computing it.
        stable: st(d) where it is known already; it may be written into.
        sign: 1 if d is known to be >= 0, -1 if it is known to be <= 0, else 0.
        of: The term shares only what arrives at this part of the output, the positive or the
            negative one; at all of it if None.
    """

    parts: Sequence[tuple[Signal | None, AffineMap]]
    bias: Tensor | None = None
    gate: float | Tensor = 1.0
    total: Tensor | None = None
    stable: Tensor | None = None
    sign: int = 0
    of: Tensor | None = None


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
    #: Whether the one denominator is the output z itself, if no parameters are taken as zero.
    divides_by_output: ClassVar[bool] = False
    #: Whether the fast form takes z for more than a factor of the multiplier that arrives.
    fast_reads_output: ClassVar[bool] = True
    _of_formula: ClassVar[dict[str, tuple[str, ...]]] = {
        **Rule._of_formula,
        "terms": ("reads_input", "proportional", "divides_by_output", "fast_reads_output"),
    }

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
        masked = call.site.scores or call.op.kind == "shift"
        shares: list[Signal] = []
        booked: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        for term in self.terms(Input(x, call.nonneg, padding=call.padding), f, z):
            parts = [(part, W) for part, W in term.parts if part is not None]
            known = term.total is not None and not self.zero_params
            d = term.total if known else denominator(parts, term.bias)
            assert d is not None
            gated = R if isinstance(term.gate, float) and term.gate == 1 else R * term.gate
            s, _ = divide(gated, d, self._stabilizer)
            for part, W in parts:
                c = W.T(s, x)
                part = tuple(map(finite, part)) if masked else part
                shares.append(tuple(a * b for a, b in zip(part, c, strict=True)))
            booked.append((gated, d, s, f.spread(term.bias)))
        relevance = tuple(_sum(share) for share in zip(*shares, strict=True))
        return Flow(relevance, lambda: _absorbed(R, booked, masked))

    # -- computed fast

    @property
    def _over_z(self) -> bool:
        """Whether the one denominator is z as the forward pass has it."""
        return self.divides_by_output and not self.zero_params

    @property
    def _exact(self) -> bool:
        """Whether nothing is added to that, so that a multiplier needs no division."""
        return self._over_z and is_zero(self._stabilizer)

    def accepts(self, site: Site) -> bool:
        """A masked score is -infinity, and has no finite product with its multiplier."""
        return site.op.kind != "shift" or self._exact

    def carries(self, site: Site, taken: bool) -> bool:
        """R_x = x * c where every part of the input is the input itself."""
        return self.proportional == "always" or (self.proportional == "nonneg" and site.nonneg)

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """All, where the denominator is z itself; a norm's depends on its input.

        Not batch norm: PyTorch's own backward of it mixes up channels if the gradient of a single
        sample comes in channels_last strides while the input is a slice of channels.
        """
        follows = self._exact and site.op.family == "affine" and site.op.kind != "batch_norm"
        return (1.0,) * len(site.live) if follows else None

    @property
    def multiplies_by_output(self) -> bool:
        """Whether ``multiply`` reads z only as a factor of the multiplier that arrives."""
        if self._over_z:
            return not callable(self._stabilizer) and not is_zero(self._stabilizer)
        return True

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Inputs for denominators other than z, and for the standard deviation of a norm."""
        if self._over_z:
            return site.op.family == "normalize", not (taken and self._exact)
        return True, taken or self.fast_reads_output

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_x = sum over terms and parts of W_i's."""
        f = self._parameters(call.affine(x))
        if self._over_z:
            return f.T(share(m, z, self._stabilizer, carry.takes, int(carry.cut)), x)
        given = Input(x, call.nonneg, True, carry.above, call.padding)
        return self._sum(list(self.terms(given, f, z)), x, z, m, carry.takes, weighed=False)

    def relevance(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """R_x = sum over terms and parts of x_i * (W_i's)."""
        f = self._parameters(call.affine(x))
        # Without a multiplier z is not there.
        given = Input(x, call.nonneg, carry.takes, carry.above, call.padding)
        terms = list(self.terms(given, f, z))
        return self._sum(terms, x, z, m, carry.takes, weighed=True)

    def _sum(
        self,
        terms: list[Term],
        x: Signal,
        z: Tensor,
        m: Tensor,
        taken: bool,
        weighed: bool,
    ) -> Signal:
        """The sum over terms and parts of W_i's, or of x_i * (W_i's); it uses the terms up."""
        shares = []
        # What several terms share is computed once.
        R = z * m if taken and sum(term.of is None for term in terms) > 1 else None
        while terms:
            term = terms.pop(0)
            parts = [(part, W) for part, W in term.parts if part is not None]
            parts = beside(parts) if weighed else parts
            gate, own = (term.gate, m) if isinstance(term.gate, float) else (1.0, m * term.gate)
            if taken and (R is None or term.of is not None):
                s = self._share(z if term.of is None else term.of, own, term, parts)
            else:
                arrived = own if R is None else R if own is m else R * term.gate
                arrived = arrived if term.of is None else only_where(term.of, arrived)
                s = self._share(arrived, None, term, parts)
                del arrived
            shares.append((gate, parts, s))
        del R, own, term, s  # their memory is needed
        total: list[Tensor] = []
        while shares:
            gate, parts, s = shares.pop(0)
            for part, W in parts:
                c = W.T(s, part)
                if weighed:
                    c = tuple(_folded(a * b, t) for a, b, t in zip(part, c, x, strict=True))
                # Products, and what comes through weights, are nobody else's.
                total = _add(total, list(c), gate, own=weighed or W.weight is not None)
        return tuple(total)

    def _share(
        self,
        R: Tensor,
        m: Tensor | None,
        term: Term,
        parts: Sequence[tuple[Signal, AffineMap]],
    ) -> Tensor:
        """R / st(d), times m if there is one."""
        stable, epsilon = term.stable, self.added(R)
        if stable is None and term.sign and epsilon and (term.total is None or self.zero_params):
            stable = denominator(parts, term.bias, added=term.sign * epsilon)
        if stable is not None:
            s = over(R, stable)
            return s if m is None else times(s, m)
        known = term.total is not None and not self.zero_params
        d = term.total if known else denominator(parts, term.bias)
        assert d is not None
        return share(R if m is None else R * m, d, self._stabilizer, False, term.sign)

    def added(self, z: Tensor) -> float:
        """The number that the stabilizer adds to a denominator like z; 0 if it is none of these."""
        stabilizer = self._stabilizer
        return 0.0 if callable(stabilizer) or z.dtype in HALVES else stabilizer

    @property
    def _stabilizer(self) -> StabilizerLike:
        value: StabilizerLike = getattr(self, self.stabilizer_field)
        return value

    def _parameters(self, f: AffineMap) -> AffineMap:
        return f.without(_names(self.zero_params)) if self.zero_params else f


def _names(zero_params: ZeroParams) -> tuple[str, ...]:
    return (zero_params,) if isinstance(zero_params, str) else tuple(zero_params or ())


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _folded(R: Tensor, x: Tensor) -> Tensor:
    """The sum of what stands beside each other, see ``affine.beside``."""
    if R.shape == x.shape:
        return R
    (dim,) = (d for d, (many, one) in enumerate(zip(R.shape, x.shape, strict=True)) if many != one)
    return R.reshape(*x.shape[:dim], -1, *x.shape[dim:]).sum(dim)


def _add(total: list[Tensor], found: list[Tensor], gate: float, own: bool) -> list[Tensor]:
    """``total + gate * found``, where no total yet is an empty list; both may be changed."""
    if not total:
        return found if gate == 1 else [c.mul_(gate) if own else c * gate for c in found]
    if own:
        return [t.add_(c, alpha=gate) for t, c in zip(total, found, strict=True)]
    return [torch.add(t, c, alpha=gate) for t, c in zip(total, found, strict=True)]


def denominator(
    parts: Sequence[tuple[Signal | None, AffineMap]],
    bias: Tensor | None,
    fast: bool = False,
    added: float = 0.0,
) -> Tensor:
    """d = sum_i W_i x_i + bias, and a number ``added``."""
    known = [(part, W) for part, W in parts if part is not None]
    (first, W), *rest = beside(known) if fast else known
    if added and bias is not None:  # where it takes no pass of its own
        bias, added = bias + added, 0.0
    d = _sum([W(first, bias), *(W(part) for part, W in rest)])
    return d + added if added else d


def _absorbed(
    R: Tensor, booked: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], masked: bool
) -> Absorbed:
    """What stays here: the bias's summand, the stabilizer's, and outputs with nothing to share by.

    With gate * R = s * st(d) and d = sum_i W_i x_i + b, the inputs get s * (d - b) in sum; the
    rest is b * s and (st(d) - d) * s = gate * R - d * s. "dead" collects the outputs whose
    denominator is zero (or infinite) or whose gates are all closed. ``masked`` says that d may be
    -infinity, as a masked attention score is, which gets and keeps nothing.
    """
    zero = R.new_zeros((), dtype=torch.float64)
    absorbed = {"bias": zero, "stabilizer": zero, "dead": zero}
    for gated, d, s, bias in booked:
        gated, d, s = gated.detach(), d.detach(), s.detach()
        rest = gated - s * d
        nothing = d == 0
        if masked:
            nothing = nothing | d.isinf()
            rest = torch.where(d.isinf(), gated, rest)
        dead = sum_all([rest * nothing])
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
