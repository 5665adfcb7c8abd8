"""Maps of images: one cell per sample, the input and its maps side by side, wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lrpfx.draw.colors import INK
from lrpfx.draw.look import Array, Look, Range
from lrpfx.draw.sheet import Picture, Sheet, cut, frame

_SPACE = 0.08  # between the panels of a cell
_BELOW = 0.22  # below a panel, for its scale
_PAGE = 10.0  # no wider than this, as far as one can choose


def draw_images(
    maps: Sequence[Sequence[Array]],
    inputs: Sequence[Array] | None,
    *,
    names: Sequence[str],
    titles: Sequence[str] | None,
    look: Look,
    columns: int | None,
    note: str,
) -> Picture:
    """One cell per sample: the input (C, H, W), where given, and its maps (H, W).

    Args:
        maps: Per sample one map for each name.
        inputs: Per sample.
        names: Titles of the maps; [""] for none.
        titles: Per sample.
        look: Colours; "shared" is across maps and samples.
        columns: Panels of a row where there are several names, else samples.
        note: Goes into the legend.
    """
    n, several = len(maps), len(names) > 1
    beside = inputs is not None and not look.overlay
    first = inputs[0] if inputs is not None else maps[0][0]
    panels = len(names) + beside
    size = 3.0 if n * panels <= 2 else 2.0 if n * panels <= 20 else 1.5 if n * panels <= 60 else 1.0
    width = _width(first, size)
    space = _SPACE if width > 0.8 else 0.4
    across = panels
    if several:
        across = min(panels, columns or max(int(_PAGE / (width + space)), 2))
    rows = -(-panels // across)
    named = 0.22 if rows > 1 else 0.0
    head = 0.25 if titles is not None and not several else 0.0
    side = _side(titles) if several and titles is not None else 0.0
    cell = across * (width + space) + 0.1, head + rows * (size + named + _BELOW)
    samples = 1 if several else columns or max(int(_PAGE / cell[0]), 1)
    if not several and columns is None and n > 1:
        samples = min(samples, max(int(np.ceil(np.sqrt(n * cell[1] / cell[0]))), 2))
    sheet = Sheet(
        n,
        samples,
        *cell,
        left=side,
        foot=0.62,
        gap=0.12 * (rows > 1),
        top=0.22 * (several and rows == 1),
    )
    limits = look.limits([values for sample in maps for values in sample])
    for i in range(n):
        if titles is not None and several:
            anchor = dict(ha="right", va="center", fontsize=9, color=INK)
            sheet.text(i, -0.08, named + size / 2, cut(titles[i], side, 9), **anchor)
        elif titles is not None:
            sheet.text(i, 0, 0.19, cut(titles[i], cell[0], 9), va="baseline", fontsize=9, color=INK)
        for p in range(panels):
            row, column = divmod(p, across)
            x, y = column * (width + space), head + row * (named + size + _BELOW) + named
            box = x, y, width, size
            k = p - beside
            above = ""
            if several and (i == 0 or rows > 1):
                above = cut("input" if k < 0 else names[k], width + space, 8)
            under = None if inputs is None else inputs[i]
            if k < 0:
                sheet.images(i, box, input_layers(first if under is None else under), above)
                continue
            limit = limits[i * len(names) + k]
            under = gray(under) if under is not None and look.overlay else None
            layers = map_layers(maps[i][k], limit, look, under)
            sheet.images(i, box, layers, above, look.said(limit))
    sheet.legend(look, note, all(map(look.centred, limits)))
    return sheet.figure


def draw_image(ax: Axes, values: Array, image: Array | None, title: str | None, look: Look) -> None:
    """One map (H, W) into the user's axes; over its image (C, H, W) if ``look`` overlays."""
    (limit,) = look.limits([values])
    under = gray(image) if look.overlay and image is not None else None
    layers = map_layers(values, limit, look, under)
    height, width = layers[0]["X"].shape
    for layer in layers:  # a map of an inner layer is coarser than its image
        ax.imshow(**layer, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    frame(ax)
    ax.set_xlabel(look.said(limit), fontsize=7, labelpad=2)
    if title is not None:
        ax.set_title(title, loc="left", fontsize=9, parse_math=False)


def _width(panel: Array, height: float) -> float:
    """The width in inches that gives (..., H, W) the height of a panel, within reason."""
    return height * float(np.clip(panel.shape[-1] / panel.shape[-2], 0.5, 2.0))


def _side(titles: Sequence[str]) -> float:
    return min(0.09 * max(map(len, titles)) + 0.2, 2.0)


def input_layers(image: Array) -> list[dict[str, Any]]:
    """Image (C, H, W), stretched to the full range: colour for three channels, else gray."""
    if len(image) == 3:
        return [{"X": _min_max(image).transpose(1, 2, 0)}]
    return [_gray_layer(gray(image))]


def map_layers(
    values: Array, limit: Range, look: Look, under: Array | None
) -> list[dict[str, Any]]:
    """One map (H, W), over a gray image (H', W') of values in 0..1 if there is one."""
    layer = {"X": values, "cmap": look.colors, "norm": look.norm(limit)}
    if under is None:
        return [layer]
    opacity = look.overlay * look.strength(values, limit)
    return [_gray_layer(under), layer | {"alpha": opacity}]


def _gray_layer(values: Array) -> dict[str, Any]:
    return {"X": values, "cmap": "gray", "vmin": 0, "vmax": 1}


def gray(image: Array) -> Array:
    """The mean (H, W) of the channels, stretched to 0..1; constant values become 0."""
    return _min_max(image.mean(axis=0))


def _min_max(values: Array) -> Array:
    """Stretched to 0..1; constant values become 0."""
    low, high = values.min(), values.max()
    stretched: Array = (values - low) / ((high - low) or 1.0)
    return stretched
