"""The graph pretty-printer: which rule each node got and why, and what became of the relevance."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrpfx.assign import Plan
from lrpfx.ledger import Booking

WIDTH = 120
#: Column titles, and the most characters a cell may take.
_COLUMNS = (
    ("module", 24),
    ("op", 14),
    ("rule", 13),
    ("why", 16),
    ("shape", 12),
    ("R in", 9),
    ("R out", 9),
    ("absorbed", 9),
)


@dataclass(frozen=True)
class Row:
    """One node of the graph.

    Args:
        node: Name in the graph.
        module: Dotted path of the module it belongs to, with "@k" for the k-th further call.
        op: ATen op without namespace.
        kind: What selectors call it.
        rule: The rule with the parameters that differ from their defaults.
        why: The entry of the composite it comes from.
        shape: Shape of the output, "N" for the batch.
        folded: Modules folded into it.
        source: Line of the user's code.
        relevance_in: Relevance that arrived at its output, summed over the batch; None before an
            explanation.
        relevance_out: Relevance handed on to its inputs.
        absorbed: What stayed, by cause.
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


@dataclass(frozen=True)
class Report:
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
    def absorbed(self) -> dict[str, float]:
        """What was absorbed on the way, by cause, summed over all nodes."""
        total: dict[str, float] = {}
        for row in self.rows:
            for cause, value in row.absorbed.items():
                total[cause] = total.get(cause, 0.0) + value
        return total

    @property
    def unaccounted(self) -> float | None:
        """Seed relevance that neither reached the inputs nor was absorbed: round-off."""
        if self.started is None or self.reached is None:
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
                "ruled_nodes": len(self.rows),
                "constant_nodes": self.constant_nodes,
            },
            "ledger": None
            if self.started is None
            else {
                "started": self.started,
                "reached": self.reached,
                "absorbed": self.absorbed,
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
                }
                for row in self.rows
            ],
        }

    def summary(self) -> list[str]:
        """The lines above the table."""
        rules = sorted({row.rule for row in self.rows})
        lines = [
            f"rules    {self.rules}",
            f"coverage {len(self.rows)} of {len(self.rows)} live nodes have a rule "
            f"({len(rules)} different); {self.constant_nodes} nodes are constant",
        ]
        if self.target:
            lines.append(f"target   {self.target}")
        if self.started is not None and self.reached is not None:
            worth = 1e-9 * max(abs(self.started), abs(self.reached))  # the rest is round-off
            causes = ", ".join(
                f"{cause} {value:.4g}"
                for cause, value in self.absorbed.items()
                if abs(value) > worth
            )
            lines.append(
                f"ledger   started {self.started:.6g} = reached the inputs {self.reached:.6g} "
                f"+ absorbed {sum(self.absorbed.values()):.6g}"
                + (f" ({causes})" if causes else "")
                + f"; unaccounted {self.unaccounted:.1e}"
            )
        lines += [f"note     {note}" for note in self.notes]
        return lines

    def __repr__(self) -> str:
        table = [_cells(row) for row in self.rows]
        titles = [title for title, _ in _COLUMNS]
        if self.started is None:
            titles, table = titles[:5], [cells[:5] for cells in table]
        widths = [
            min(most, max([len(title), *(len(cells[i]) for cells in table)]))
            for i, (title, (_, most)) in enumerate(zip(titles, _COLUMNS, strict=False))
        ]
        lines = [_wrap(line) for line in self.summary()]
        lines.append(_line(titles, widths))
        lines.append("  ".join("-" * width for width in widths))
        lines += [_line(cells, widths) for cells in table]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(title)}</th>" for title, _ in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
            for row in self.rows
        )
        lines = "<br>".join(html.escape(line) for line in self.summary())
        return f"<p>{lines}</p><table><tr>{head}</tr>{body}</table>"


def make_report(plan: Plan, constant_nodes: int, notes: Sequence[str]) -> Report:
    """The report before any explanation: coverage and rules."""
    rows = []
    for name, assignment in plan.assignments.items():
        r = assignment.record
        call = r.modules[-1].call if r.modules else 0
        rows.append(
            Row(
                node=name,
                module=r.module + (f"@{call}" if call else ""),
                op=r.op_name,
                kind=r.kind,
                rule=str(assignment.rule),
                why=assignment.why,
                shape=r.shape,
                folded=tuple(dict.fromkeys(c.path for c in r.folded[-1:])),
                source=r.source,
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
    rows = []
    for row in report.rows:
        booking = bookings.get(row.node)
        values = {**row.__dict__}
        if booking is not None:
            values.update(
                relevance_in=booking.received,
                relevance_out=booking.passed,
                absorbed={c: v for c, v in booking.absorbed.items() if v != 0},
            )
        rows.append(Row(**values))
    return Report(
        rows=tuple(rows),
        rules=report.rules,
        constant_nodes=report.constant_nodes,
        notes=(*report.notes, *notes),
        target=target,
        started=started,
        reached=reached,
    )


def _cells(row: Row) -> list[str]:
    folded = "".join(f"+{path.rsplit('.', 1)[-1]}" for path in row.folded)
    composite, _, entry = row.why.partition(": ")
    return [
        (row.module or "(the model)") + folded,
        row.op,
        row.rule,
        entry or composite,
        "x".join(str(size) for size in row.shape),
        _number(row.relevance_in),
        _number(row.relevance_out),
        _number(sum(row.absorbed.values()) if row.relevance_in is not None else None),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    # Of a module path the end is the telling part, of a rule or a selector the beginning.
    shown = [
        _cut(cell, width, keep_end=i == 0)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    # Numbers are the last three columns of a full table; they line up on the right.
    return "  ".join(
        cell.rjust(width) if i >= 5 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(shown, widths, strict=True))
    )


def _cut(text: str, width: int, keep_end: bool) -> str:
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"


def _wrap(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    head, rest = line[:WIDTH], line[WIDTH:]
    cut = head.rfind(" ")
    cut = cut if cut > 9 else WIDTH
    return head[:cut] + "\n" + _wrap(" " * 9 + (head[cut:] + rest).strip())
