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
from lrpfx.canonize.same import Same


class Region(NamedTuple):
    """Ops that end in one node.

    Args:
        end: The node.
        entries: What enters; what else is read stays as it is.
        inside: The ops, in order, of those that compute the same the first.
    """

    end: fx.Node
    entries: Sequence[fx.Node]
    inside: Sequence[fx.Node]


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
        signals: u, v, by their places among the signals.
        shape: What g is: "constant", 1; "open", sigmoid(p a); "shut", 1 - a for an a that is a
            sigmoid itself, and "as it is", a.
        power: p.
        scale: c, None if it is not the same everywhere.
    """

    signals: tuple[int, ...]
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
    """Without gradients, and once for regions of one form, such as the steps of a recurrent layer.

    Ops of the user's may fail on values that mean nothing to them: then nothing is known.
    """

    @wraps(of)
    def found(measured: Measured, region: Region, *args: Any) -> Any:
        key = (of.__name__, _form(measured.same, region), args)
        if key not in measured.known:
            try:
                with torch.no_grad():
                    measured.known[key] = of(measured, region, *args)
            except Exception:  # of the user's ops
                measured.known[key] = None
        return measured.known[key]

    return found


def _form(same: Same, region: Region) -> Any:
    """What the values of a region are decided by, whatever enters."""
    names: dict[fx.Node, str] = {n: f"entry {i}" for i, n in enumerate(region.entries)}
    names |= {same.first(n): f"op {i}" for i, n in enumerate(region.inside)}
    calls = []
    for node in region.inside:
        read = fx.node.map_arg((node.args, node.kwargs), lambda n: names.get(same.first(n), n.name))
        calls.append((node.target, str(read)))
    values = [n.meta["val"] for n in region.entries]
    return tuple(calls), tuple((str(v.shape), v.dtype) for v in values)


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
def exponents(measured: Measured, region: Region) -> Exponents | None:
    """How a region is an exponential of what enters, if it is one."""
    end, entries, _ = region
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
def sigmoid(measured: Measured, region: Region) -> tuple[float, tuple[float, ...]] | None:
    """C, c and d, where a region is C times the sigmoid of c a + d b, of a and b that enter."""
    end, entries, _ = region
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
def power(measured: Measured, region: Region) -> Power | None:
    """How a region is a power of the one positive number that enters, if it is one."""
    end, (entry,), _ = region
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
def softmax(measured: Measured, region: Region, power: int) -> int | None:
    """Over which dimension of the one entry a region is a power of its softmax, if it is."""
    end, (entry,), _ = region
    for dim in range(entry.meta["val"].ndim):

        def formula(values: Values, dim: int = dim) -> Tensor:
            return values[entry].softmax(dim) ** power

        if _is(measured, end, _draws(measured, [entry], 1, 3), formula):
            return dim
    return None


@_known_or_none
def normalised(measured: Measured, region: Region) -> bool:
    """Whether a region is a softmax of the one entry, over whichever groups.

    Then its logarithm is the entry less some L, of which the derivative is the mean over each group
    by the region's own values: it takes 1 to 1, changes nothing that it has given, and is symmetric
    if entries are weighted by these values. No maximum is, and no plain mean.
    """
    end, (entry,), _ = region
    x = measured.drawn(entry)
    h = 1e-3 if x.itemsize == 8 else 3e-2

    def less(x: Tensor) -> Tensor:
        weights: Tensor = measured.value_with(end, {entry: x})
        return x - weights.log()

    def along(d: Tensor) -> Tensor:
        """The derivative of L, by differences."""
        return (less(x + h * d) - less(x - h * d)) / (2 * h)

    weights = measured.value_with(end, {entry: x})
    d, other = measured.drawn(entry, 1), measured.drawn(entry, 2)
    once, beside = along(d), along(other)
    sums = torch.stack([(weights * other * once).sum(), (weights * d * beside).sum()])
    pairs = ((along(torch.ones_like(x)), torch.ones_like(x)), (along(once), once), sums)
    near = 1e-4 if x.itemsize == 8 else 3e-2
    return bool(weights.isfinite().all()) and all(
        torch.allclose(a, b, near, near) for a, b in pairs
    )


@_known_or_none
def gated(measured: Measured, region: Region, place: int, bent: bool) -> list[Gated] | None:
    """The summands of a region in which each signal counts as often as it is there.

    None if it is not linear in each of these by itself.

    Args:
        measured: See ``Measured``.
        region: Its entries are the signals and a gate.
        place: Of the gate among them.
        bent: Whether it may be read by sigmoids; else it is one, and stands as it is or as 1 - a.
    """
    end, gate = region.end, region.entries[place]
    signals = [n for n in region.entries if n is not gate]
    like = {n: measured.drawn(n, i) for i, n in enumerate((gate, *signals))}
    places = range(len(signals))
    subsets = list(chain(*(combinations(places, k) for k in range(len(signals) + 1))))

    def factors(a: Tensor) -> dict[tuple[int, ...], Tensor]:
        """By signals what their product is multiplied by, for a value of the gate."""
        found: dict[tuple[int, ...], Tensor] = {}
        for own in subsets:
            ones = {n: torch.full_like(like[n], i in own) for i, n in enumerate(signals)}
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
            for i in found.signals:
                term = term * values[signals[i]]
            total = total + term
        return total

    drawn = _draws(measured, (gate, *signals), *((1, 3, 30) if bent else (1, 3)))
    return [found for found, _ in summands] if _is(measured, end, drawn, formula) else None


def _summand(
    own: tuple[int, ...], zero: Tensor, one: Tensor, bent: bool
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
