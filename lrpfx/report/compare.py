"""Two reports side by side: where rules and relevance part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from lrpfx.report.rows import Row, Rows
from lrpfx.report.tables import Column, Table, Tabular, number

_COLUMNS = (
    Column("module", 24),
    Column("op", 14),
    Column("rule A", 13),
    Column("rule B", 13),
    Column("A R in", 9, right=True),
    Column("B R in", 9, right=True),
    Column("A R out", 9, right=True),
    Column("B R out", 9, right=True),
)

#: What makes two nodes the same, tried one after the other on what the one before leaves over.
_KEYS: tuple[Callable[[Row], Any], ...] = (
    lambda row: (row.module, row.op, row.shape),
    lambda row: (row.module, row.op),
    lambda row: (row.op, row.shape),
    lambda row: (row.op, row.path[-1:]),
)


@dataclass(frozen=True)
class Pair:
    """One node in two reports; None where a report does not have it."""

    a: Row | None
    b: Row | None

    @property
    def row(self) -> Row:
        """The node, as the first report that has it describes it."""
        row = self.a or self.b
        assert row is not None
        return row

    @property
    def same_rule(self) -> bool:
        """Whether both reports have it, under the same rule."""
        return self.a is not None and self.b is not None and self.a.rule == self.b.rule

    @property
    def gap(self) -> float:
        """The larger of the differences of relevance in and out; what is missing counts as 0."""
        return max(abs(p - q) for p, q in zip(_flow(self.a), _flow(self.b), strict=True))


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """Report A beside report B, node by node.

    Relevance is compared as a node's sums over the batch; maps may differ where sums do not. The
    first node to differ is the first that relevance comes to, the nearest to the output.

    Args:
        a: The one report.
        b: The other.
        pairs: Their nodes, aligned, in execution order.
        threshold: What counts as a difference of relevance; None if relevance is not compared,
            because one of the reports has no ledger.
        top: How many pairs are shown.
    """

    a: Rows
    b: Rows
    pairs: tuple[Pair, ...]
    threshold: float | None
    top: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs that could be compared."""
        return not self.differing

    @property
    def differing(self) -> tuple[Pair, ...]:
        """The pairs whose rules or relevance differ."""
        return tuple(p for p in self.pairs if not p.same_rule or self._parts(p))

    @property
    def first_rule(self) -> Pair | None:
        """Where the rules first differ, or a node is in one report only."""
        return next((p for p in reversed(self.pairs) if not p.same_rule), None)

    @property
    def first_relevance(self) -> Pair | None:
        """Where the relevance first differs."""
        return next((p for p in reversed(self.pairs) if self._parts(p)), None)

    @property
    def most(self) -> Pair | None:
        """Where the relevance differs most."""
        return max(filter(self._parts, self.pairs), key=lambda p: p.gap, default=None)

    def _parts(self, pair: Pair) -> bool:
        return self.threshold is not None and pair.gap > self.threshold

    def summary(self) -> list[str]:
        """The lines above the table."""
        aligned = [p for p in self.pairs if p.a and p.b]
        lines = [f"A        {_described(self.a)}", f"B        {_described(self.b)}"]
        lines.append(
            f"nodes    {len(aligned)} in both, {sum(p.same_rule for p in aligned)} of them under "
            f"equal rules; {sum(p.b is None for p in self.pairs)} only in A, "
            f"{sum(p.a is None for p in self.pairs)} only in B"
        )
        if self.threshold is None:
            lines.append(
                "note     relevance is not compared: both must be explained, with ledger=True"
            )
        if self.equal:
            return [*lines, "equal    nothing differs"]
        if self.first_rule:
            told = _told(self.first_rule, _rule)
            lines.append(f"rules    first part, from the output, at {told}")
        if self.first_relevance and self.most:
            told = _told(self.first_relevance, _in_and_out)
            lines.append(f"R        first parts, from the output, at {told}")
            lines.append(f"R        parts most at {_told(self.most, _in_and_out)}")
        hidden = len(self.differing) - self.top
        if hidden > 0:
            lines.append(f"shown    the {self.top} that differ most; {hidden} more differ")
        return lines

    def table(self) -> Table:
        """One line per pair that differs, in execution order."""
        columns = _COLUMNS if self.threshold is not None else _COLUMNS[:4]
        shown = sorted(self.differing, key=lambda p: -p.gap)[: self.top]
        cells = [
            [
                pair.row.label,
                pair.row.op,
                _rule(pair.a),
                _rule(pair.b),
                *("" if row is None else number(row.relevance_in) for row in (pair.a, pair.b)),
                *("" if row is None else number(row.relevance_out) for row in (pair.a, pair.b)),
            ][: len(columns)]
            for pair in self.pairs
            if pair in shown
        ]
        return Table(self.summary(), columns if cells else (), cells)


def compare(a: Rows, b: Rows, tolerance: float, top: int) -> Comparison:
    """Align two reports; relevance differs by more than ``tolerance`` times the largest."""
    pairs = tuple(_align(a.rows, b.rows, _KEYS))
    threshold = None
    if a.has_ledger and b.has_ledger:
        threshold = tolerance * max(
            (abs(value) for row in (*a.rows, *b.rows) for value in _flow(row)), default=0.0
        )
    return Comparison(a, b, pairs, threshold, top)


def _align(
    a: Sequence[Row], b: Sequence[Row], keys: Sequence[Callable[[Row], Any]]
) -> Iterator[Pair]:
    if not keys or not a or not b:
        yield from (Pair(row, None) for row in a)
        yield from (Pair(None, row) for row in b)
        return
    key, *looser = keys
    matcher = SequenceMatcher(None, [*map(key, a)], [*map(key, b)], autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            yield from map(Pair, a[a0:a1], b[b0:b1])
        else:
            yield from _align(a[a0:a1], b[b0:b1], looser)


def _flow(row: Row | None) -> tuple[float, float]:
    return ((row.relevance_in or 0.0), (row.relevance_out or 0.0)) if row else (0.0, 0.0)


def _described(report: Rows) -> str:
    if report.started is None or report.reached is None:
        return report.rules
    return (
        f"{report.rules}; {report.target}; started {report.started:.4g}, "
        f"reached the inputs {report.reached:.4g}"
    )


def _told(pair: Pair, side: Callable[[Row | None], str]) -> str:
    line = pair.row.place.partition("   ")[0]
    place = f"{pair.row.label} {pair.row.op}" + (f" ({line})" if line else "")
    return f"{place}: A {side(pair.a)}, B {side(pair.b)}"


def _rule(row: Row | None) -> str:
    return "not there" if row is None else row.rule or "no rule"


def _in_and_out(row: Row | None) -> str:
    if row is None:
        return "not there"
    return f"in {number(row.relevance_in)} out {number(row.relevance_out)}"
