"""The graph pretty-printer: which rule each node got and why, and what became of the relevance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lrpfx.annotate import REGISTER
from lrpfx.assign import Plan
from lrpfx.errors import InputError
from lrpfx.ledger import Booking
from lrpfx.report_compare import Comparison, compare
from lrpfx.report_graph import to_dot, to_mermaid
from lrpfx.report_html import page
from lrpfx.report_leaks import Leaks, find_leaks
from lrpfx.report_summary import Summary, summarize
from lrpfx.report_text import Column, Table, Tabular, number

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


@dataclass(frozen=True)
class Row:
    """One node of the graph.

    Args:
        node: Name in the graph.
        module: Dotted path of the module it belongs to, with "@k" for the k-th further call.
        op: ATen op without namespace.
        kind: What selectors call it.
        rule: The rule with the parameters that differ from their defaults, "" if there is none.
        why: The entry of the composite it comes from.
        shape: Shape of the output, "N" for the batch.
        folded: Modules folded into it.
        source: Line of the user's code.
        relevance_in: Relevance that arrived at its output, summed over the batch; None before an
            explanation.
        relevance_out: Relevance handed on to its inputs.
        absorbed: What stayed, by cause.
        inputs: Names of the nodes its relevance goes to: further rows, or where it is wanted for.
        edge: What arrives at its output where no ledger is kept: relevance "R", or "R / a", the
            multiplier of the activation a.
    """

    node: str
    module: str
    op: str
    kind: str
    rule: str
    why: str
    shape: tuple[int | str, ...]
    folded: tuple[str, ...] = ()
    source: str = ""
    relevance_in: float | None = None
    relevance_out: float | None = None
    absorbed: dict[str, float] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    edge: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """The parts of the module path, whichever call it is."""
        path = re.sub(r"@\d+$", "", self.module)
        return tuple(path.split(".")) if path else ()

    @property
    def label(self) -> str:
        """The module path with what was folded into it."""
        folded = "".join(f"+{path.rsplit('.', 1)[-1]}" for path in self.folded)
        return (self.module or "(the model)") + folded

    @property
    def place(self) -> str:
        """The source line without the file's folders."""
        file, colon, code = self.source.partition(":")
        return os.path.basename(file) + colon + code


@dataclass(frozen=True, repr=False)
class Report(Tabular):
    """A table with one row per node that depends on the explained input.

    Args:
        rows: In execution order.
        rules: How ``rules=`` was read.
        constant_nodes: How many nodes of the graph do not depend on the input.
        notes: Further facts one should know (static batch, picked output ...).
        target: What was explained, "" before an explanation.
        started: Seed relevance, summed over the batch; None before an explanation.
        reached: Relevance that reached the inputs.
    """

    rows: tuple[Row, ...]
    rules: str
    constant_nodes: int
    notes: tuple[str, ...] = ()
    target: str = ""
    started: float | None = None
    reached: float | None = None

    @property
    def unsupported(self) -> tuple[Row, ...]:
        """The nodes without a rule, which only ``lrpfx.coverage`` lets into a report."""
        return tuple(row for row in self.rows if not row.rule)

    @property
    def ruled(self) -> float:
        """The fraction of the rows that have a rule."""
        return 1 - len(self.unsupported) / len(self.rows) if self.rows else 1.0

    @property
    def has_ledger(self) -> bool:
        """Whether relevance was booked node by node."""
        booked = any(row.relevance_in is not None for row in self.rows) or not self.rows
        return self.started is not None and booked

    def needs_ledger(self) -> float:
        """The seed relevance, of a report that knows what became of it.

        Raises:
            InputError: Nothing was explained yet, or it was explained without a ledger.
        """
        if self.started is None:
            raise InputError(
                "this report is of a plan, without relevance.",
                fix="take the report of an explanation: lrpfx.explain(...).report.",
            )
        if not self.has_ledger:
            raise InputError(
                "this explanation kept no ledger: what each node absorbed is not known.",
                fix="explain with ledger=True, and one target: several keep no ledger.",
            )
        return self.started

    @property
    def absorbed(self) -> dict[str, float]:
        """What was absorbed on the way, by cause, summed over all nodes.

        Raises:
            InputError: See ``needs_ledger``.
        """
        self.needs_ledger()
        total: dict[str, float] = {}
        for row in self.rows:
            for cause, value in row.absorbed.items():
                total[cause] = total.get(cause, 0.0) + value
        return total

    @property
    def unaccounted(self) -> float | None:
        """Seed relevance that neither reached the inputs nor was absorbed: round-off.

        None without a ledger.
        """
        if self.started is None or self.reached is None or not self.has_ledger:
            return None
        return self.started - self.reached - sum(self.absorbed.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            "rules": self.rules,
            "target": self.target,
            "notes": list(self.notes),
            "coverage": {
                "live_nodes": len(self.rows),
                "ruled_nodes": len(self.rows) - len(self.unsupported),
                "constant_nodes": self.constant_nodes,
            },
            "ledger": None
            if self.started is None
            else {
                "started": self.started,
                "reached": self.reached,
                "absorbed": self.absorbed if self.has_ledger else None,
                "unaccounted": self.unaccounted,
            },
            "rows": [
                {
                    "node": row.node,
                    "module": row.module,
                    "op": row.op,
                    "kind": row.kind,
                    "rule": row.rule,
                    "why": row.why,
                    "shape": list(row.shape),
                    "folded": list(row.folded),
                    "source": row.source,
                    "relevance_in": row.relevance_in,
                    "relevance_out": row.relevance_out,
                    "absorbed": dict(row.absorbed),
                    "inputs": list(row.inputs),
                    "edge": row.edge,
                }
                for row in self.rows
            ],
        }

    def summary(self) -> list[str]:
        """The lines above the table."""
        rules = {row.rule for row in self.rows if row.rule}
        missing = self.unsupported
        lines = [
            f"rules    {self.rules}",
            f"coverage {len(self.rows) - len(missing)} of {len(self.rows)} live nodes have a rule "
            f"({len(rules)} different); {self.constant_nodes} nodes are constant",
        ]
        if missing:
            lines.append(f"missing  {_counts(row.op for row in missing)}")
            lines += [f"missing  {row.why} at {row.label}   {row.place}" for row in missing]
            lines.append(f"fix      {REGISTER}")
        if self.started is None:
            lines.append(f"kinds    {_counts(row.kind for row in self.rows if row.rule)}")
        if self.target:
            lines.append(f"target   {self.target}")
        if self.started is not None and self.reached is not None:
            lines.append(f"ledger   started {self.started:.6g}" + self._became(self.reached))
        lines += [f"note     {note}" for note in self.notes]
        return lines

    def _became(self, reached: float) -> str:
        if self.started is None or not self.has_ledger:
            return f", reached the inputs {reached:.6g}; not kept by node, explain with ledger=True"
        worth = 1e-9 * max(abs(self.started), abs(reached))  # the rest is round-off
        causes = ", ".join(
            f"{cause} {value:.4g}" for cause, value in self.absorbed.items() if abs(value) > worth
        )
        return (
            f" = reached the inputs {reached:.6g} + absorbed {sum(self.absorbed.values()):.6g}"
            + (f" ({causes})" if causes else "")
            + f"; unaccounted {self.unaccounted:.1e}"
        )

    def table(self) -> Table:
        """One line per row, 120 characters wide; numbers where they are known."""
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
                why=assignment.why,
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
    bookings: Mapping[str, Booking],
    *,
    target: str,
    started: float,
    reached: float,
    notes: Sequence[str] = (),
) -> Report:
    """The report of one explanation: the plan's rows with what the ledger booked."""
    rows = report.rows
    if bookings:
        rows = tuple(_booked_row(row, bookings.get(row.node)) for row in rows)
    return replace(
        report,
        rows=rows,
        notes=(*report.notes, *notes),
        target=target,
        started=started,
        reached=reached,
    )


def _booked_row(row: Row, booking: Booking | None) -> Row:
    if booking is None:
        return row
    return replace(
        row,
        relevance_in=booking.received,
        relevance_out=booking.passed,
        absorbed={c: v for c, v in booking.absorbed.items() if v != 0},
    )


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{word} {n}" for word, n in Counter(words).most_common())


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
