"""Tables as text that fits a terminal, and the same tables as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Column(NamedTuple):
    """A title, the most characters of a cell below it, and whether cells line up on the right."""

    title: str
    most: int
    right: bool = False


@dataclass(frozen=True)
class Table:
    """Lines, and a table below them.

    Args:
        lines: What is said above the table.
        columns: Of the first, a path, the end is kept where a cell is too long; of the others the
            beginning. Without columns there is no table.
        cells: Per row, one text per column.
        width: The most characters of a line of text.
    """

    lines: Sequence[str]
    columns: Sequence[Column]
    cells: Sequence[Sequence[str]]
    width: int = 100

    def text(self) -> str:
        """Lines of at most ``width`` characters."""
        lines = [wrap(line, self.width) for line in self.lines]
        if self.columns:
            widths = self._widths()
            lines.append(self._line([column.title for column in self.columns], widths))
            lines.append("  ".join("-" * width for width in widths))
            lines += [self._line(cells, widths) for cells in self.cells]
        return "\n".join(line.rstrip() for line in lines)

    def html(self) -> str:
        """A paragraph and a table without attributes."""
        lines = "<br>".join(html.escape(line) for line in self.lines)
        if not self.columns:
            return f"<p>{lines}</p>"
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self.cells
        )
        return f"<p>{lines}</p><table><tr>{head}</tr>{body}</table>"

    def _widths(self) -> list[int]:
        widths = [
            min(column.most, max([len(column.title), *(len(cells[i]) for cells in self.cells)]))
            for i, column in enumerate(self.columns)
        ]
        while sum(widths) + 2 * (len(widths) - 1) > self.width:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        shown = []
        for i, (column, cell, width) in enumerate(zip(self.columns, cells, widths, strict=True)):
            text = _cut(cell, width, keep_end=i == 0)
            shown.append(text.rjust(width) if column.right else text.ljust(width))
        return "  ".join(shown)


class Tabular:
    """What shows itself as a table: text in a terminal, HTML in a notebook."""

    def table(self) -> Table:
        """What is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def number(value: float | None) -> str:
    """Three significant digits, nothing for None."""
    return "" if value is None else f"{value:.3g}"


def wrap(line: str, width: int) -> str:
    """Break a line at spaces; what follows is indented below the line's first word."""
    if len(line) <= width:
        return line
    head, rest = line[:width], line[width:]
    cut = head.rfind(" ")
    cut = cut if cut > 9 else width
    return head[:cut] + "\n" + wrap(" " * 9 + (head[cut:] + rest).strip(), width)


def _cut(text: str, width: int, keep_end: bool) -> str:
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"
