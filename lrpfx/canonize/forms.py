"""A node, and what it is computed from -> the formula that it is of that, whatever the numbers.

Numbers are drawn for what enters; the node must then have the value of the formula. So a formula is
found in every spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import chain, combinations
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from lrpfx.canonize.measure import ROUNDED, Measured, close


class Exponents(NamedTuple):
    """A node is k exp(c a + d b).

    Args:
        powers: c and d.
        plain: Whether k, which is constant, is one everywhere.
    """

    powers: tuple[float, ...]
    plain: bool


class Power(NamedTuple):
    """A node is k x ** p.

    Args:
        scale: k.
        power: p.
    """

    scale: float
    power: float


class Gated(NamedTuple):
    """A summand c u v g(a).

    Args:
        signals: u, v.
        shape: What g is: "constant", 1; "open", sigmoid(p a); "shut", 1 - a for an a that is a
            sigmoid itself, and "as it is", a.
        power: p.
        scale: c, None if it is not the same everywhere.
    """

    signals: tuple[fx.Node, ...]
    shape: Literal["constant", "open", "shut", "as it is"]
    power: float
    scale: float | None

    def factor(self, a: Tensor) -> Tensor:
        """g(a)."""
        if self.shape == "constant":
            return torch.ones_like(a)
        if self.shape == "open":
            return (self.power * a).sigmoid()
        return 1 - a if self.shape == "shut" else a


def _known_or_none(of: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients; ops of the user's may fail on values that mean nothing to them."""

    @wraps(of)
    def measured(*args: Any, **kwargs: Any) -> Any:
        try:
            with torch.no_grad():
                return of(*args, **kwargs)
        except Exception:
            return None

    return measured


Values = dict[fx.Node, Tensor]


def _is(
    measured: Measured,
    end: fx.Node,
    drawn: Iterable[Values],
    formula: Callable[[Values], Tensor],
    size: float = 0.0,
) -> bool:
    """Whether a node has the value of a formula for each of some values of what enters.

    Args:
        measured: See ``Measured``.
        end: The node.
        drawn: Values of what enters.
        formula: Of these.
        size: Of what is added up in the formula, and has round-off.
    """
    for values in drawn:
        value = measured.value_with(end, values)
        if not bool(value.isfinite().all()) or not close(value, formula(values), size):
            return False
    return True


def _draws(measured: Measured, entries: Sequence[fx.Node], *sizes: float) -> Iterable[Values]:
    """Numbers for all that enters, one set for each size."""
    plain = {n: measured.drawn(n, i) for i, n in enumerate(entries)}
    return ({n: size * t for n, t in plain.items()} for size in sizes)


def _rounded(measured: Tensor, parts: int = 1) -> float:
    """The mean of what is measured, as a fraction if it is near one: it has round-off."""
    number = float(measured.double().mean())
    whole = round(parts * number) / parts
    return whole if abs(number - whole) < max(1e-5, ROUNDED[measured.itemsize] / 2) else number


@_known_or_none
def exponents(measured: Measured, end: fx.Node, entries: Sequence[fx.Node]) -> Exponents | None:
    """How ``end`` is an exponential of some nodes, if it is one.

    Args:
        measured: See ``Measured``.
        end: The node in question.
        entries: What it is computed from; what else it reads stays as it is.
    """
    zeros = {n: torch.zeros_like(measured.drawn(n)) for n in entries}
    k: Tensor = measured.value_with(end, zeros)
    counts = k != 0
    powers = []
    for n in entries:
        grown = (measured.value_with(end, {**zeros, n: zeros[n] + 1}) / k)[counts].log()
        powers.append(_rounded(grown, 12))  # of roots, too

    def formula(values: Values) -> Tensor:
        terms = [c * values[n] for n, c in zip(entries, powers, strict=True)]
        return k * sum(terms[1:], terms[0]).exp()

    if not any(powers) or not _is(measured, end, _draws(measured, entries, 1, 3), formula):
        return None
    if not _is(measured, end, [{n: measured.value(n) for n in entries}], formula):
        return None  # it is too coarse there
    return Exponents(tuple(powers), close(k, torch.ones_like(k)))


@_known_or_none
def sigmoid(
    measured: Measured, end: fx.Node, entries: Sequence[fx.Node]
) -> tuple[float, tuple[float, ...]] | None:
    """C and the numbers c, where ``end`` is C times the sigmoid of c a + d b.

    Args:
        measured: See ``Measured``.
        end: The node in question.
        entries: a and b, or more or less of them; what else is read stays as it is.
    """
    zeros = {n: torch.zeros_like(measured.drawn(n)) for n in entries}
    half = measured.value_with(end, zeros).flatten()[0]
    scale = _rounded(2 * half)
    ones = (measured.value_with(end, {**zeros, n: zeros[n] + 1}).flatten()[0] for n in entries)
    powers = tuple(_rounded(torch.logit(one / (2 * half))) for one in ones)

    def formula(values: Values) -> Tensor:
        terms = [c * values[n] for n, c in zip(entries, powers, strict=True)]
        return scale * sum(terms[1:], terms[0]).sigmoid()

    drawn = _draws(measured, entries, 1, 3, 30)
    return (scale, powers) if _is(measured, end, drawn, formula, abs(scale)) else None


@_known_or_none
def power(measured: Measured, end: fx.Node, entry: fx.Node) -> Power | None:
    """How ``end`` is a power of a positive number, if it is one; see ``exponents``."""
    drawn = measured.drawn(entry).abs() + 0.1
    one, four = (
        measured.value_with(end, {entry: torch.full_like(drawn, n)}).flatten()[0] for n in (1, 4)
    )
    found = Power(_rounded(one), _rounded((four / one).log2() / 2, 12))

    def formula(values: Values) -> Tensor:
        return found.scale * values[entry] ** found.power

    values = ({entry: size * drawn} for size in (1, 1e-2, 1e2))
    return found if _is(measured, end, values, formula) else None


@_known_or_none
def softmax(measured: Measured, end: fx.Node, entry: fx.Node, power: int) -> int | None:
    """Over which dimension of the entry ``end`` is a power of its softmax, if it is."""
    for dim in range(entry.meta["val"].ndim):

        def formula(values: Values, dim: int = dim) -> Tensor:
            return values[entry].softmax(dim) ** power

        if _is(measured, end, _draws(measured, [entry], 1, 3), formula):
            return dim
    return None


@_known_or_none
def gated(
    measured: Measured, end: fx.Node, signals: Sequence[fx.Node], gate: fx.Node, bent: bool
) -> list[Gated] | None:
    """The summands of a node in which each signal counts as often as it is there, if it has such.

    Args:
        measured: See ``Measured``.
        end: The node in question.
        signals: What it must be linear in, each by itself.
        gate: What it may depend on by sigmoids.
        bent: Whether these are of the gate; else it is one, and stands as it is or as 1 - gate.
    """
    like = {n: measured.drawn(n, i) for i, n in enumerate((gate, *signals))}
    subsets = list(chain(*(combinations(signals, k) for k in range(len(signals) + 1))))

    def factors(a: Tensor) -> dict[tuple[fx.Node, ...], Tensor]:
        """By signals what their product is multiplied by, for a value of the gate."""
        found: dict[tuple[fx.Node, ...], Tensor] = {}
        for own in subsets:
            ones = {n: torch.full_like(like[n], n in own) for n in signals}
            value = measured.value_with(end, {**ones, gate: a})
            found[own] = value - sum(found[part] for part in found if {*part} < {*own})
        return found

    zero, one = (factors(torch.full_like(like[gate], n)) for n in (0, 1))
    summands = [
        found for own in subsets if (found := _summand(own, zero[own], one[own], bent)) is not None
    ]

    def formula(values: Values) -> Tensor:
        total = torch.zeros_like(zero[()])
        for found, c in summands:
            term = c * found.factor(values[gate])
            for n in found.signals:
                term = term * values[n]
            total = total + term
        return total

    drawn = _draws(measured, (gate, *signals), *((1, 3, 30) if bent else (1, 3)))
    return [found for found, _ in summands] if _is(measured, end, drawn, formula) else None


def _summand(
    own: tuple[fx.Node, ...], zero: Tensor, one: Tensor, bent: bool
) -> tuple[Gated, Tensor] | None:
    """The summand of some signals and its c, from its factor for a gate of zero and of one.

    None if it is zero; that it is right is seen by its value for other numbers.
    """
    none = torch.zeros_like(zero)
    if close(zero, none) and close(one, none):
        return None
    power, c = 0.0, zero
    shape: Literal["constant", "open", "shut", "as it is"] = "constant"
    if bent and not close(zero, one):
        shape, c = "open", 2 * zero
        there = c.abs() > ROUNDED[c.itemsize]
        power = _rounded(torch.logit((one / c)[there]))
    elif close(zero, none):
        shape, c = "as it is", one
    elif close(one, none):
        shape = "shut"
    uniform = close(c, c.flatten()[0].expand_as(c))
    return Gated(own, shape, power, _rounded(c) if uniform else None), c
