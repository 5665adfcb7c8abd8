"""Tokens on their colours, as words in a line that wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from lrpfx.draw.colors import INK
from lrpfx.draw.sheet import Picture

_POINTS, _LINE, _EDGE, _GAP = 10, 0.26, 0.12, 0.05  # inches, but for the size of letters

#: A token and its colour, 0..255 each.
Word = tuple[str, tuple[int, int, int]]


def draw_tokens(
    lines: Sequence[Sequence[Word]], labels: Sequence[str], width: float, note: str
) -> Picture:
    """One paragraph per line of words, ``width`` inches wide; labels stand before them in bold."""
    figure = Picture(figsize=(width, 1.0), facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    style: dict[str, Any] = {"fontsize": _POINTS, "color": INK, "parse_math": False, "va": "center"}
    placed = []
    row = 0.0
    for i, words in enumerate(lines):
        x = _EDGE
        named: list[tuple[str, tuple[int, int, int] | None]] = []
        if labels:
            named.append((labels[i], None))
        for word, color in [*named, *words]:
            weight = "bold" if color is None else "normal"
            text = figure.text(0, 0, word, weight=weight, **style)
            size = text.get_window_extent(renderer).width / figure.dpi + 0.04
            if x > _EDGE and x + size > width - _EDGE:
                x, row = _EDGE, row + 1
            placed.append((text, x, row, size, color))
            x += size + (_GAP if color is not None else 3 * _GAP)
        row += 1.3
    height = row * _LINE + 2 * _EDGE + (0.2 if note else 0.0)
    figure.set_size_inches(width, height)
    for text, x, at, size, color in placed:
        middle = 1 - (_EDGE + (at + 0.5) * _LINE) / height
        text.set_position(((x + 0.02) / width, middle))
        if color is not None:
            half = 0.42 * _LINE / height
            shade = [part / 255 for part in color]
            figure.add_artist(
                Rectangle(
                    (x / width, middle - half), size / width, 2 * half, color=shade, linewidth=0,
                    zorder=0,
                )
            )  # fmt: skip
    if note:
        figure.text(_EDGE / width, 0.1 / height, note, fontsize=7, va="bottom", color=INK)
    return figure
