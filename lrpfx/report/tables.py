"""Tables as text that fits a terminal, and the same tables as HTML."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from shutil import get_terminal_size
from typing import NamedTuple

#: A notebook's own style cuts tables off, and puts words on the right.
_STYLE = (
    "<style>div.lrpfx { overflow: auto; max-height: 40em; max-width: 100%; }"
    "table.lrpfx { font-size: 12px; border-collapse: collapse; margin: 0; }"
    "table.lrpfx tr th, table.lrpfx tr td { text-align: left; padding: .1em .6em .1em 0; "
    "max-width: 15em; white-space: normal; min-width: 5.5em; overflow-wrap: anywhere; }"
    "table.lrpfx tr td.n { text-align: right; white-space: nowrap; min-width: 0; }</style>"
)
_MOST = 60  # rows that are shown without being asked for
_LEAST = 6  # characters of a column of words


class Column(NamedTuple):
    """A title, characters of a line where room is scarce, and whether its numbers line up right."""

    title: str
    most: int
    right: bool = False


@dataclass(frozen=True)
class Table:
    """Lines, and a table below them.

    Args:
        lines: What is said above the table.
        columns: Without columns there is no table.
        cells: Per row, one text per column.
        width: The most characters of a line of text. A cell that is too long for its column goes
            on in the next line; nothing is cut off.
    """

    lines: Sequence[str]
    columns: Sequence[Column]
    cells: Sequence[Sequence[str]]
    width: int = 100

    def text(self, most: int | None = None) -> str:
        """Lines of at most ``width`` characters; at most so many rows, and how many there are."""
        room = _room(self.width)
        lines = [wrap(line, room) for line in self.lines]
        if self.columns:
            widths = self._widths(room)
            lines += self._row([column.title for column in self.columns], widths)
            lines.append("  ".join("-" * width for width in widths))
            for cells in self.cells[:most]:
                lines += self._row(cells, widths)
        if most is not None and len(self.cells) > most:
            lines.append(f"... and {len(self.cells) - most} more rows: print() shows all")
        return "\n".join(line.rstrip() for line in lines)

    def html(self) -> str:
        """Lines and a table that wraps its words, and scrolls where there is no room for it."""
        lines = "<br>".join(f"<b>{w}</b>{rest}" for w, rest in map(_key, self.lines))
        if not self.columns:
            return f"<p>{lines}</p>"
        head = "".join(f"<th>{html.escape(column.title)}</th>" for column in self.columns)
        body = "".join(f"<tr>{self._cells(cells)}</tr>" for cells in self.cells)
        return (
            f"{_STYLE}<p>{lines}</p>"
            f'<div class="lrpfx"><table class="lrpfx"><tr>{head}</tr>{body}</table></div>'
        )

    def _cells(self, cells: Sequence[str]) -> str:
        return "".join(
            f'<td class="n">{html.escape(cell)}</td>'
            if column.right
            else f"<td>{html.escape(cell)}</td>"
            for column, cell in zip(self.columns, cells, strict=True)
        )

    def _widths(self, room: int) -> list[int]:
        """As wide as the cells; where there is no room, what is over ``most`` gives way first."""
        widths = [
            max([len(column.title), *(len(cells[i]) for cells in self.cells)])
            for i, column in enumerate(self.columns)
        ]
        widths = [
            min(width, column.most) if column.right else width
            for column, width in zip(self.columns, widths, strict=True)
        ]
        words = [i for i, column in enumerate(self.columns) if not column.right] or [0]
        while sum(widths) + 2 * (len(widths) - 1) > room:
            over = max(words, key=lambda i: (max(0, widths[i] - self.columns[i].most), widths[i]))
            if widths[over] <= _LEAST:
                break
            widths[over] -= 1
        return widths

    def _row(self, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
        """The lines of a row: what is too long for its column goes on below, in its column."""
        broken = [fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
        return [
            "  ".join(
                text.rjust(width) if column.right else text.ljust(width)
                for column, text, width in zip(self.columns, line, widths, strict=True)
            )
            for line in zip_longest(*broken, fillvalue="")
        ]


class Tabular:
    """What shows itself as a table: text in a terminal, HTML in a notebook."""

    def table(self) -> Table:
        """What is shown."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table().text()

    def __repr__(self) -> str:
        return self.table().text(_MOST)

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


def _key(line: str) -> tuple[str, str]:
    """The first word of a line and the rest, as HTML."""
    word, space, rest = line.partition(" ")
    return html.escape(word), html.escape(space + rest.strip())


def fold(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters, broken behind spaces and marks where there are any."""
    lines = []
    while len(text) > width:
        cut = max((text.rfind(mark, 0, width) + 1 for mark in " .,:;/_-("), default=0)
        cut = cut if cut >= width // 3 else width
        lines.append(text[:cut])
        text = text[cut:]
    return [*lines, text]


def _room(most: int) -> int:
    """Characters of a line: those of the terminal, if it is one and narrower."""
    return min(most, get_terminal_size().columns) if sys.stdout.isatty() else most
