"""A long report in a few lines: its nodes by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from lrpfx.errors import InputError
from lrpfx.report.rows import Row, Rows
from lrpfx.report.tables import Column, Table, Tabular, number

_COLUMNS = (
    Column("module", 32),
    Column("nodes", 6, right=True),
    Column("rules", 60),
    Column("R in", 9, right=True),
    Column("R out", 9, right=True),
    Column("absorbed", 9, right=True),
)


@dataclass(frozen=True)
class Group:
    """Nodes that follow each other in one module.

    Args:
        path: The first parts of their module path.
        rows: In execution order.
        relevance_in: Relevance that arrived at the nodes that are read outside of the group, or by
            nothing. A node that is read inside as well counts whole. None if none was booked.
    """

    path: tuple[str, ...]
    rows: tuple[Row, ...]
    relevance_in: float | None

    @property
    def absorbed(self) -> float | None:
        """What stayed in the group."""
        if self.relevance_in is None:
            return None
        return sum(sum(row.absorbed.values()) for row in self.rows)

    @property
    def relevance_out(self) -> float | None:
        """What the group handed on: all but what stayed."""
        if self.relevance_in is None or self.absorbed is None:
            return None
        return self.relevance_in - self.absorbed

    @property
    def rules(self) -> str:
        """The rules in it by number of nodes, the most frequent first."""
        counts = Counter(row.rule or "no rule" for row in self.rows)
        return ", ".join(f"{n} {rule}" if n > 1 else rule for rule, n in counts.most_common())


@dataclass(frozen=True, repr=False)
class Summary(Tabular):
    """A report's nodes by module.

    Args:
        lines: Those above the report's own table.
        groups: In execution order.
        explained: Whether there is relevance to show.
    """

    lines: tuple[str, ...]
    groups: tuple[Group, ...]
    explained: bool

    def table(self) -> Table:
        """One line per group."""
        columns = _COLUMNS if self.explained else _COLUMNS[:3]
        cells = [
            [
                ".".join(group.path) or "(the model)",
                str(len(group.rows)),
                group.rules,
                number(group.relevance_in),
                number(group.relevance_out),
                number(group.absorbed),
            ][: len(columns)]
            for group in self.groups
        ]
        return Table(self.lines, columns, cells)


def summarize(report: Rows, depth: int) -> Summary:
    """Group the rows by the first ``depth`` parts of their module path."""
    if not isinstance(depth, int) or depth < 0:
        raise InputError(f"summarize({depth!r}).", fix="give how many parts of the path count.")
    groups = tuple(group_by_module(report.rows, depth, readers(report.rows)))
    return Summary(tuple(report.summary()), groups, report.has_ledger)


def readers(rows: Sequence[Row]) -> dict[str, set[str]]:
    """The names of the nodes that read each node."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name in row.inputs:
            found.setdefault(name, set()).add(row.node)
    return found


def group_by_module(
    rows: Sequence[Row], depth: int, read_by: Mapping[str, set[str]]
) -> Iterator[Group]:
    """Runs of rows whose module paths share their first ``depth`` parts."""
    for path, run in groupby(rows, key=lambda row: row.path[:depth]):
        members = tuple(run)
        names = {row.node for row in members}
        ends = [r for r in members if r.node not in read_by or read_by[r.node] - names]
        arrived = [r.relevance_in for r in ends if r.relevance_in is not None]
        yield Group(path, members, sum(arrived) if arrived else None)
