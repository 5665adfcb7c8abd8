"""Relevance of rows of a table: a bar per feature, the largest on top, with its value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lrpfx.draw.colors import BLUE, FRAME, INK, RED
from lrpfx.draw.look import Array, Look
from lrpfx.draw.sheet import Picture, Sheet, cut

_LABEL = 2.2  # no label is wider, in inches
_TOGETHER, _GREY = "others together", "#999999"


def draw_tables(
    values: Array,
    inputs: Array | None,
    *,
    titles: Sequence[str] | None,
    names: Sequence[str] | None,
    top: int | None,
    sort: bool,
    look: Look,
    columns: int | None,
    note: str,
) -> Picture:
    """One cell per sample of values (N, F)."""
    n = len(values)
    bars = [
        _bars(values[i], None if inputs is None else inputs[i], names, top, sort) for i in range(n)
    ]
    longest = max(len(label) for labels, _ in bars for label in labels)
    left = min(0.075 * longest + 0.1, _LABEL)
    count = len(bars[0][0])
    body = min(max(0.17 * count, 0.4), 12.0)
    columns = columns or (1 if n == 1 else 2 if n <= 4 else 3)
    width = 4.0 if columns == 1 else 2.4
    head = 0.27 if titles is not None else 0.08
    sheet = Sheet(n, columns, left + width + 0.25, head + body + 0.3, foot=0.2)
    for i, (_, limit) in enumerate(look.limits([lengths for _, lengths in bars])):
        ax = sheet.axes(i, left, head, width, body)
        _show(ax, *bars[i], limit, left)
        if titles is not None:
            sheet.text(
                i,
                0.0,
                0.19,
                cut(titles[i], left + width, 9),
                va="baseline",
                fontsize=9,
                color=INK,
            )
    says = "red speaks for the target, blue against it"
    sheet.legend(None, f"{says}; {note}" if note else says)
    return sheet.figure


def draw_table(
    ax: Axes,
    values: Array,
    inputs: Array | None,
    title: str | None,
    names: Sequence[str] | None,
    top: int | None,
    sort: bool,
    look: Look,
) -> None:
    """One row (F,) into the user's axes."""
    labels, lengths = _bars(values, inputs, names, top, sort)
    ((_, limit),) = look.limits([lengths])
    _show(ax, labels, lengths, limit, _LABEL)
    if title is not None:
        ax.set_title(title, loc="left", fontsize=9, parse_math=False)


def _bars(
    values: Array,
    inputs: Array | None,
    names: Sequence[str] | None,
    top: int | None,
    sort: bool,
) -> tuple[list[str], Array]:
    """Labels and lengths of the bars, the first on top; those below ``top`` as one."""
    count = len(values)
    order = np.argsort(-np.abs(values), kind="stable") if sort or top is not None else range(count)
    shown = list(order)[:top]
    if not sort:
        shown.sort()
    labels = [f"feature {j}" if names is None else names[j] for j in shown]
    if inputs is not None:
        labels = [f"{label} = {inputs[j]:.3g}" for label, j in zip(labels, shown, strict=True)]
    lengths = values[shown]
    if len(shown) < count:
        rest = count - len(shown)
        labels.append(f"{rest} {_TOGETHER}")
        lengths = np.append(lengths, values.sum() - lengths.sum())
    return labels, lengths


def _show(ax: Axes, labels: Sequence[str], lengths: Array, limit: float, left: float) -> None:
    count = len(labels)
    colors = np.where(lengths < 0, BLUE, RED).tolist()
    if labels[-1].endswith(_TOGETHER):
        colors[-1] = _GREY
    ax.barh(np.arange(count), lengths, color=colors, height=0.75)
    end = 1.05 * (limit or 1.0)
    ax.set(xlim=(-end, end), ylim=(count - 0.5, -0.5))
    ax.axvline(0, color=INK, linewidth=0.6)
    ax.spines[:].set_visible(False)
    ax.grid(axis="x", color=FRAME, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=7, length=0, pad=2)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
    ax.set_yticks(
        np.arange(count), labels=[cut(label, left - 0.1, 7) for label in labels], parse_math=False
    )
    if not limit:
        ax.set_xticks([])
        ax.set_xlabel("zero everywhere", fontsize=7)
