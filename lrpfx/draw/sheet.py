"""A figure of cells of fixed size, side by side and row by row, with a legend below them.

Positions are computed, in inches, and all images stand in the same axes: a layout engine takes
seconds for dozens of axes, and so do the axes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lrpfx.draw.colors import FRAME, INK
from lrpfx.draw.look import Look

_EDGE = 0.12


class Picture(Figure):
    """A figure that notebooks show, whatever the backend, and without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


class Sheet:
    """Cells in columns; sizes in inches.

    Args:
        count: How many cells.
        columns: In how many columns.
        width: Of a cell.
        height: Of a cell.
        left: Room beside the first column.
        foot: Room below the last row, for the legend.
        gap: Room between rows.
        top: Room above the first row.
    """

    def __init__(
        self,
        count: int,
        columns: int,
        width: float,
        height: float,
        *,
        left: float = 0.0,
        foot: float = 0.0,
        gap: float = 0.0,
        top: float = 0.0,
    ) -> None:
        self.columns = min(columns, count)
        self._cell, self._left, self._gap, self._top = (width, height), left, gap, top
        rows = -(-count // self.columns)
        self.width = max(self.columns * width + left + 2 * _EDGE, 2.6)
        self.height = top + rows * height + (rows - 1) * gap + foot + 2 * _EDGE
        self.figure = Picture(figsize=(self.width, self.height), facecolor="white")
        self.figure.suppressComposite = True  # a PDF keeps every image as it is

    def axes(self, cell: int, x: float, y: float, width: float, height: float) -> Axes:
        """New axes, their upper left corner at (x, y) from that of the cell."""
        left, top = self._corner(cell)
        box = (left + x, self.height - top - y - height, width, height)
        across, up = self.width, self.height
        return self.figure.add_axes((box[0] / across, box[1] / up, box[2] / across, box[3] / up))

    @cached_property
    def _canvas(self) -> Axes:
        """Axes over the whole sheet, in inches from its upper left corner."""
        canvas = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        canvas.set_axis_off()
        return canvas

    def images(
        self,
        cell: int,
        box: tuple[float, float, float, float],
        layers: Sequence[Mapping[str, Any]],
        above: str = "",
        below: str = "",
    ) -> None:
        """Images one over the other in a frame, as large as the box allows.

        Args:
            cell: Which.
            box: x and y of the upper left corner, from that of the cell; width and height.
            layers: What ``imshow`` takes of each; the frame has the shape of the first.
            above: Written over it.
            below: Written under it.
        """
        x, y, width, height = box
        rows, columns = layers[0]["X"].shape[:2]
        scale = min(width / columns, height / rows)
        left, top = self._corner(cell)
        left, top = left + x + (width - scale * columns) / 2, top + y + (height - scale * rows) / 2
        width, height = scale * columns, scale * rows
        for layer in layers:
            place = (left, left + width, top + height, top)
            self._canvas.imshow(**layer, extent=place, aspect="auto")
        edge = Rectangle((left, top), width, height, fill=False, color=FRAME, linewidth=0.6)
        self._canvas.add_patch(edge)
        for words, size, y, va in (
            (above, 8, top - 3 / 72, "baseline"),
            (below, 7, top + height + 2 / 72, "top"),
        ):
            if words:
                style: Any = dict(fontsize=size, ha="center", va=va, parse_math=False)
                middle = (left + width / 2) / self.width
                self.figure.text(middle, 1 - y / self.height, words, **style)

    def text(self, cell: int, x: float, y: float, words: str, **style: Any) -> None:
        """Text with its anchor at (x, y) from the cell's upper left corner."""
        left, top = self._corner(cell)
        place = (left + x) / self.width, 1 - (top + y) / self.height
        self.figure.text(*place, words, parse_math=False, **style)

    def legend(self, look: Look | None, note: str, centred: bool = True) -> None:
        """The colours and a note, in the foot; ``centred`` if zero is in their middle."""
        if look is not None:
            wide = min(1.6, self.width - 2 * _EDGE)
            left, low = (self.width - wide) / 2, _EDGE + 0.3
            box = (left / self.width, low / self.height, wide / self.width, 0.07 / self.height)
            bar = self.figure.add_axes(box)
            bar.imshow(np.linspace(-1, 1, 257)[None], cmap=look.colors, aspect="auto")
            bar.set_yticks([])
            words = ["against", "0", "for the target"] if centred else ["low", "", "high"]
            bar.set_xticks([0, 128, 256], labels=words)
            bar.tick_params(labelsize=7, length=0, pad=2)
            bar.spines[:].set_visible(False)
        if note:
            self.figure.text(
                0.5, _EDGE / 2 / self.height, note, fontsize=7, ha="center", va="bottom", color=INK
            )

    def _corner(self, cell: int) -> tuple[float, float]:
        row, column = divmod(cell, self.columns)
        width, height = self._cell
        return _EDGE + self._left + column * width, _EDGE + self._top + row * (height + self._gap)


def frame(ax: Axes) -> None:
    """A hairline in place of axes; a white map would otherwise have no border."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=FRAME, linewidth=0.6)


def cut(text: str, inches: float, points: float) -> str:
    """The text as far as it fits a width; a letter is a little over half as wide as it is high."""
    most = max(int(inches * 72 / (0.56 * points)), 4)
    return text if len(text) <= most else text[: most - 1] + "…"
