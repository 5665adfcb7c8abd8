"""Curves of many samples as arrays -> a matplotlib figure with means and bands."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrpfx.draw.look import BLUE, INK, RED, Array

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
    ticks: Sequence[str] | None = None,
) -> Figure:
    """Draw the mean of each curve over samples, with a band of twice its standard error.

    Args:
        x: (S,).
        curves: By name, (N, S) each.
        xlabel: Below.
        ylabel: Beside.
        title: Above.
        path: Where to write the picture, if anywhere.
        ax: Axes of one's own.
        colors: One for each curve; they begin anew when they are used up.
        ticks: Names of the points on the x axis.
    """
    if ax is None:
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        ax = figure.add_subplot()
    for i, (name, values) in enumerate(curves.items()):
        color = colors[i % len(colors)]
        mean = values.mean(0)
        error = 2 * values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0 * mean
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.18, linewidth=0)
        ax.plot(x, mean, color=color, label=name, linewidth=1.5)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    if title:
        ax.set_title(title, color=INK, fontsize="medium")
    if ticks is not None:
        ax.set_xticks(x, ticks, rotation=45, ha="right", fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    whole = ax.get_figure(root=True)
    assert isinstance(whole, Figure)
    if path is not None:
        whole.savefig(path, dpi=150)
    return whole
