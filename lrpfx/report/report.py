"""The graph pretty-printer: which rule each node got and why, and what became of the relevance."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrpfx.errors import InputError
from lrpfx.plan import Plan
from lrpfx.report.compare import Comparison, compare
from lrpfx.report.graph import to_dot, to_mermaid
from lrpfx.report.html import page
from lrpfx.report.leaks import Leaks, find_leaks
from lrpfx.report.rows import Row, Rows
from lrpfx.report.summary import Summary, summarize
from lrpfx.report.tables import Column, Table, Tabular, number
from lrpfx.rewrite import Booking

_COLUMNS = (
    Column("module", 24),
    Column("op", 14),
    Column("rule", 13),
    Column("why", 16),
    Column("shape", 12),
)
_PLANNED = (*_COLUMNS, Column("edge", 5))
_BOOKED = (
    *_COLUMNS,
    Column("R in", 9, right=True),
    Column("R out", 9, right=True),
    Column("absorbed", 9, right=True),
)


@dataclass(frozen=True, repr=False)
class Report(Rows, Tabular):
    """A table with one row per node that depends on the explained input.

    Sums that were not kept are computed when something first asks for ``rows``, or for what is
    computed of them; see ``ledger`` of ``lrpfx.explain``.

    Args:
        rows: In execution order.
        rules: How ``rules=`` was read.
        constant_nodes: How many nodes of the graph do not depend on the input; None of a method
            that has no graph.
        notes: Further facts one should know (static batch, picked output ...).
        target: What was explained, "" before an explanation.
        started: Seed relevance, summed over the batch; None before an explanation.
        reached: Relevance that reached the inputs.
    """

    def noting(self, notes: Sequence[str]) -> Report:
        """The report with further notes."""
        return replace(self, notes=(*self.notes, *notes)) if notes else self

    def table(self) -> Table:
        """One line per row, 120 characters wide; numbers where they are known."""
        if self.constant_nodes is None:
            return Table(self.summary(), (), (), width=120)
        if self.has_ledger:
            cells = [[*_cells(row), *_booked(row)] for row in self.rows]
            return Table(self.summary(), _BOOKED, cells, width=120)
        columns = _PLANNED if any(row.edge for row in self.rows) else _COLUMNS
        cells = [[*_cells(row), row.edge][: len(columns)] for row in self.rows]
        return Table(self.summary(), columns, cells, width=120)

    def leaks(self, top: int | None = 5) -> Leaks:
        """Where most relevance is absorbed, and by what cause; None for all such places.

        Raises:
            InputError: ``top`` is no number, or see ``needs_ledger``.
        """
        return find_leaks(self, top)

    def compare(self, other: Report, *, tolerance: float = 1e-5, top: int = 20) -> Comparison:
        """Where rules and relevance part between this report and another.

        Nodes are the same if module path with call, op and shape agree, in their order. What is
        left over is aligned without the shape, then without the module, then by the last part of
        the path without the shape: inside a wrapper, or in other widths, a node is still found.

        Args:
            other: Of the same model under other rules, or of another model.
            tolerance: What counts as equal relevance, relative to the largest of any node.
            top: How many differing nodes are shown.

        Raises:
            InputError: ``other`` is no report.
        """
        if not isinstance(other, Report):
            raise InputError(
                f"compare() takes a Report, not {type(other).__name__}.",
                fix="give explanation.report.",
            )
        return compare(self, other, tolerance, top)

    def summarize(self, depth: int = 1) -> Summary:
        """The nodes by the first ``depth`` parts of their module path, in execution order.

        Raises:
            InputError: ``depth`` is no number.
        """
        return summarize(self, depth)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page without scripts or other files: a tree of modules, bars, source lines.

        Args:
            path: Where to write it, if anywhere.

        Returns:
            The page.
        """
        text = page(self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def to_dot(self) -> str:
        """The graph for Graphviz, coloured by rule."""
        return to_dot(self)

    def to_mermaid(self) -> str:
        """The graph for Mermaid, coloured by rule."""
        return to_mermaid(self)


def make_report(
    plan: Plan,
    constant_nodes: int,
    notes: Sequence[str],
    multipliers: Mapping[str, bool] | None = None,
) -> Report:
    """The report before any explanation: coverage and rules.

    Args:
        plan: A rule for each live node.
        constant_nodes: See ``Report``.
        notes: See ``Report``.
        multipliers: By node name, whether a multiplier arrives where no ledger is kept.
    """
    edges = {name: "R / a" if taken else "R" for name, taken in (multipliers or {}).items()}
    rows = []
    for name, assignment in plan.assignments.items():
        r = assignment.record
        rows.append(
            Row(
                node=name,
                module=str(r.modules[-1]) if r.modules else "",
                op=r.op_name,
                kind=r.kind,
                rule=str(assignment.rule),
                why=assignment.why + (f"; not folded: {r.kept}" if r.kept else ""),
                shape=r.shape,
                folded=_innermost([c.path for c in r.folded if c not in r.modules]),
                source=r.source,
                inputs=r.inputs,
                edge=edges.get(name, ""),
            )
        )
    return Report(tuple(rows), plan.rules, constant_nodes, tuple(notes))


def with_ledger(
    report: Report,
    bookings: Mapping[str, Booking] | Callable[[], Mapping[str, Booking]],
    *,
    target: str,
    started: float,
    reached: float,
    notes: Sequence[str] = (),
) -> Report:
    """The report of one explanation: the plan's rows with what the ledger booked, or will."""
    rows = report.rows
    explained = replace(
        report,
        notes=(*report.notes, *notes),
        target=target,
        started=started,
        reached=reached,
    )
    if callable(bookings):
        return explained.on_demand(lambda: _booked_rows(rows, bookings()))
    return replace(explained, rows=_booked_rows(rows, bookings))


def _booked_rows(rows: tuple[Row, ...], bookings: Mapping[str, Booking]) -> tuple[Row, ...]:
    return tuple(_booked_row(row, bookings.get(row.node)) for row in rows)


def _booked_row(row: Row, booking: Booking | None) -> Row:
    if booking is None:
        return row
    return replace(
        row,
        relevance_in=booking.received,
        relevance_out=booking.passed,
        absorbed={c: v for c, v in booking.absorbed.items() if v != 0},
    )


def _cells(row: Row) -> list[str]:
    composite, _, entry = row.why.partition(": ")
    return [
        row.label,
        row.op,
        row.rule or "no rule",
        entry or composite,
        "x".join(str(size) for size in row.shape),
    ]


def _booked(row: Row) -> list[str]:
    return [
        number(row.relevance_in),
        number(row.relevance_out),
        number(sum(row.absorbed.values()) if row.relevance_in is not None else None),
    ]


def _innermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Those that none of the others is inside of."""
    return tuple(
        path for path in dict.fromkeys(paths) if not any(p.startswith(f"{path}.") for p in paths)
    )
