"""Matrices of values by two names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrpfx.draw.colors import INK
from lrpfx.draw.look import Array, Look
from lrpfx.draw.sheet import Picture, frame


def draw_matrix(
    values: Array,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    title: str | None,
    look: Look,
    numbers: bool,
    ax: Axes | None,
) -> Figure:
    """Values (R, C) as coloured cells."""
    count, across = values.shape
    longest = max((len(name) for name in columns or ()), default=0)
    upright = longest > 5
    if ax is None:
        size = 0.42 if numbers else max(0.12, min(0.3, 8 / max(count, across)))
        left = 0.075 * max((len(name) for name in rows or ()), default=0) + 0.2
        top = (0.075 * longest if upright else 0.15) + 0.2 + 0.25 * (title is not None)
        width, height = max(left + across * size + 0.75, 2.0), top + count * size + 0.15
        width = max(width, left + 0.07 * len(title or "") + 0.1)
        figure = Picture(figsize=(width, height), facecolor="white")
        body = across * size / width, count * size / height
        ax = figure.add_axes((left / width, 0.15 / height, *body))
        bar = figure.add_axes(
            ((left + across * size + 0.1) / width, 0.15 / height, 0.1 / width, body[1])
        )
    else:
        bar = None
    (limits,) = look.limits([values])
    norm = look.norm(limits)
    shown = ax.imshow(values, cmap=look.colors, norm=norm, aspect="auto", interpolation="nearest")
    frame(ax)
    ax.tick_params(length=0, pad=3, labelsize=8, top=True, labeltop=True, labelbottom=False)
    if rows is not None:
        ax.set_yticks(np.arange(count), labels=rows, parse_math=False)
    if columns is not None:
        turned = 90 if upright else 0
        ax.set_xticks(np.arange(across), labels=columns, rotation=turned, parse_math=False)
    if numbers:
        for (i, j), value in np.ndenumerate(values):
            red, green, blue, _ = look.colors(norm(value))
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
            color = INK if light else "white"
            ax.text(j, i, _short(value), ha="center", va="center", fontsize=6.5, color=color)
    if title is not None:
        ax.set_title(title, fontsize=9, loc="left", parse_math=False)
    found = ax.get_figure(root=True)
    assert found is not None  # axes that were removed from theirs
    if bar is not None:
        found.colorbar(shown, cax=bar)
        bar.tick_params(labelsize=7, length=2, pad=2)
        bar.spines[:].set_visible(False)
    return found


def _short(value: float) -> str:
    text = (
        f"{value:.2f}"
        if abs(value) < 10
        else f"{value:.0f}"
        if abs(value) < 1e4
        else f"{value:.0e}"
    )
    return text.replace("-0.00", "0.00")
