"""Curves of many samples as arrays -> a matplotlib figure with means and bands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrpfx.draw.colors import BLUE, FRAME, INK, RED
from lrpfx.draw.given import written
from lrpfx.draw.look import Array
from lrpfx.draw.sheet import Picture

#: Of the curves, one after the other.
COLORS = (RED, BLUE, "#4d4d4d", "#1b7837", "#762a83", "#e08214", "#35978f", "#c51b7d")


def draw_curves(
    x: Array,
    curves: Mapping[str, Array],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
    colors: Sequence[str] = COLORS,
    bands: Mapping[str, Array] | None = None,
    ticks: Sequence[str] | None = None,
) -> Figure:
    """Draw the mean of each curve over samples, with a band of twice its standard error.

    Args:
        x: (S,).
        curves: By name, (N, S) each, or (S,) without a band.
        xlabel: Below.
        ylabel: Beside.
        title: Above.
        path: Where to write the picture, if anywhere.
        ax: Axes of one's own.
        colors: One for each curve; they begin anew when they are used up.
        bands: By name, low and high end (2, S), in the place of twice the standard error.
        ticks: Names of the points on the x axis.
    """
    if ax is None:
        figure = Picture(figsize=(4.8, 3.4), facecolor="white", layout="constrained")
        ax = figure.add_subplot()
    for i, (name, values) in enumerate(curves.items()):
        color = colors[i % len(colors)]
        mean = values.mean(0) if values.ndim == 2 else values
        dash = ("-", "--", ":")[i // len(colors) % 3]
        ax.plot(x, mean, color=color, linestyle=dash, label=name, linewidth=1.5)
        band = _twice_the_error(values, mean) if bands is None else bands.get(name)
        if band is not None:
            ax.fill_between(x, *band, color=color, alpha=0.18, linewidth=0)
    ax.set_xlabel(xlabel, color=INK, parse_math=False)
    ax.set_ylabel(ylabel, color=INK, parse_math=False)
    if title:
        ax.set_title(title, color=INK, fontsize="medium", parse_math=False)
    if ticks is not None:
        ax.set_xticks(x, ticks, rotation=45, ha="right", fontsize="small", parse_math=False)
    ax.grid(color=FRAME, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    for text in ax.legend(frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)
    whole = ax.get_figure(root=True)
    assert whole is not None  # axes that were removed from theirs
    return written(whole, path)


def _twice_the_error(values: Array, mean: Array) -> Array | None:
    if values.ndim == 1 or len(values) < 2:
        return None
    error = 2 * values.std(0, ddof=1) / np.sqrt(len(values))
    return np.stack([mean - error, mean + error])
