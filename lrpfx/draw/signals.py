"""Relevance of signals (C, L): a strip per channel with the input as a line over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lrpfx.draw.colors import FRAME, INK
from lrpfx.draw.look import Array, Look, Range
from lrpfx.draw.sheet import Picture, Sheet, cut

_MAX_NAMES = 20  # more channels than this have strips too thin for names


def draw_signals(
    values: Sequence[Array],
    inputs: Sequence[Array] | None,
    *,
    titles: Sequence[str] | None,
    names: Sequence[str] | None,
    look: Look,
    columns: int | None,
    note: str,
) -> Picture:
    """One cell per sample."""
    n, channels = len(values), len(values[0])
    columns = columns or (1 if n <= 3 else 2)
    body = min(max(0.42 * channels, 0.8), 4.0)
    left = 0.3 if names is None else min(0.075 * max(map(len, names)) + 0.15, 1.6)
    width = 6.5 if columns == 1 else 4.6
    sheet = Sheet(n, columns, left + width + 0.2, 0.27 + body + 0.25, foot=0.75)
    limits = look.limits(values)
    for i, limit in enumerate(limits):
        ax = sheet.axes(i, left, 0.27, width, body)
        _show(ax, values[i], None if inputs is None else inputs[i], limit, look, names)
        ax.set_title(look.said(limit), loc="right", fontsize=7, pad=3)
        if titles is not None:
            ax.set_title(
                cut(titles[i], width - 1, 9), loc="left", fontsize=9, pad=3, parse_math=False
            )
        if i + columns >= n:
            ax.set_xlabel("position", fontsize=7, labelpad=1)
    sheet.legend(look, note, all(map(look.centred, limits)))
    return sheet.figure


def draw_signal(
    ax: Axes,
    values: Array,
    signal: Array | None,
    title: str | None,
    names: Sequence[str] | None,
    look: Look,
) -> None:
    """One signal (C, L) into the user's axes."""
    (limit,) = look.limits([values])
    _show(ax, values, signal, limit, look, names)
    ax.set_title(look.said(limit), loc="right", fontsize=7, pad=3)
    if title is not None:
        ax.set_title(title, loc="left", fontsize=9, pad=3, parse_math=False)


def _show(
    ax: Axes,
    values: Array,
    signal: Array | None,
    limit: Range,
    look: Look,
    names: Sequence[str] | None,
) -> None:
    channels, length = values.shape
    # Channel c fills the band from c - 0.5 to c + 0.5, the first one on top.
    ax.imshow(
        values,
        cmap=look.colors,
        norm=look.norm(limit),
        aspect="auto",
        interpolation="nearest",
    )
    if signal is not None:
        lines = np.arange(channels)[:, None] + 0.4 - 0.8 * _min_max(signal)
        ax.plot(np.arange(length), lines.T, color=INK, linewidth=1.0)
    ax.hlines(np.arange(1, channels) - 0.5, -0.5, length - 0.5, color=FRAME, linewidth=0.5)
    for spine in ax.spines.values():
        spine.set(color=FRAME, linewidth=0.6)
    ax.tick_params(labelsize=7, length=0, pad=2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if names is not None and channels <= _MAX_NAMES:
        ax.set_yticks(np.arange(channels), labels=names, parse_math=False)
    elif channels <= _MAX_NAMES:
        ax.set_yticks(np.arange(channels))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _min_max(values: Array) -> Array:
    """Each channel stretched to 0..1; constant ones become 0."""
    low = values.min(axis=-1, keepdims=True)
    span = values.max(axis=-1, keepdims=True) - low
    stretched: Array = (values - low) / np.where(span == 0, 1.0, span)
    return stretched
