"""Where relevance stays on its way: the nodes that absorb most, and why."""

from __future__ import annotations

from dataclasses import dataclass

from lrpfx.errors import InputError
from lrpfx.report.rows import Row, Rows
from lrpfx.report.tables import Column, Table, Tabular, number

_COLUMNS = (
    Column("module", 24),
    Column("op", 14),
    Column("rule", 13),
    Column("cause", 10),
    Column("absorbed", 9, right=True),
    Column("share", 8, right=True),
    Column("source", 60),
)


@dataclass(frozen=True)
class Leak:
    """What one cause made stay at one node.

    Args:
        row: The node.
        cause: "bias", "stabilizer", "softmax", "dead", "constant" or "gradient".
        absorbed: Relevance, summed over the batch; negative where the node added some.
        share: Of the seed; None if that sums to zero.
    """

    row: Row
    cause: str
    absorbed: float
    share: float | None


@dataclass(frozen=True, repr=False)
class Leaks(Tabular):
    """The largest leaks of an explanation by absolute size, largest first.

    Args:
        entries: Those asked for; a node has one per cause, since causes may cancel.
        started: Seed relevance, summed over the batch.
        absorbed: What all nodes absorbed, summed.
        others: How many entries are left out.
    """

    entries: tuple[Leak, ...]
    started: float
    absorbed: float
    others: int

    @property
    def rest(self) -> float:
        """What was absorbed by the entries that are left out."""
        return self.absorbed - sum(leak.absorbed for leak in self.entries)

    def table(self) -> Table:
        """One line per leak."""
        whole = f"absorbed {self.absorbed:.4g} of {self.started:.4g} started"
        left = f"; {self.others} smaller ones absorb {self.rest:.3g}" if self.others else ""
        cells = [
            [
                leak.row.label,
                leak.row.op,
                leak.row.rule,
                leak.cause,
                number(leak.absorbed),
                "" if leak.share is None else f"{leak.share:.1%}",
                leak.row.place,
            ]
            for leak in self.entries
        ]
        return Table([f"leaks    {whole}{left}"], _COLUMNS, cells)


def find_leaks(report: Rows, top: int | None) -> Leaks:
    """The ``top`` largest leaks, None for all."""
    if top is not None and (not isinstance(top, int) or top < 0):
        raise InputError(f"leaks({top!r}).", fix="give how many are wanted, or None for all.")
    started = report.needs_ledger()
    leaks = [
        Leak(row, cause, value, value / started if started else None)
        for row in report.rows
        for cause, value in row.absorbed.items()
    ]
    leaks.sort(key=lambda leak: -abs(leak.absorbed))
    shown = tuple(leaks[:top])
    return Leaks(shown, started, sum(report.absorbed.values()), len(leaks) - len(shown))
