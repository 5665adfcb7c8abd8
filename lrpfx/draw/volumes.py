"""Maps of volumes and videos: a row of slices per sample, over the input in gray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrpfx.draw.colors import INK
from lrpfx.draw.images import gray, map_layers
from lrpfx.draw.look import Array, Look
from lrpfx.draw.sheet import Picture, Sheet, cut

_PAGE = 10.0  # no wider than this, as far as one can choose
_SPACE = 0.08
_OPACITY = 0.75


def draw_volumes(
    values: Array,
    inputs: Array | None,
    *,
    slices: Sequence[int],
    titles: Sequence[str] | None,
    look: Look,
    columns: int | None,
    note: str,
) -> Picture:
    """One cell per sample, with its slices side by side, wrapped.

    Args:
        values: Maps (N, D, H, W), sliced along D; a sample's slices share their colours.
        inputs: (N, D', H', W'), in gray below the maps; D' may be larger.
        slices: Which of D.
        titles: Per sample.
        look: Colours.
        columns: Slices of a row.
        note: Goes into the legend.
    """
    ratio = float(np.clip(values.shape[3] / values.shape[2], 0.5, 2.0))
    size = 1.5 if len(slices) <= 12 else 1.0
    width = size * ratio
    across = min(len(slices), columns or max(int(_PAGE / (width + _SPACE)), 1))
    rows = -(-len(slices) // across)
    across = -(-len(slices) // rows) if columns is None else across
    cell = across * (width + _SPACE), 0.27 + rows * (size + 0.2)
    sheet = Sheet(len(values), 1, *cell, foot=0.62)
    limits = look.limits(list(values))
    over = Look(look.cmap, look.clip, look.scale, look.overlay or _OPACITY)
    for i, limit in enumerate(limits):
        name = "" if titles is None else titles[i]
        image = None if inputs is None else gray(inputs[i][None])  # as a whole, not slice by slice
        said = cut(f"{name}   {look.said(limit)}".strip(), cell[0], 9)
        sheet.text(i, 0, 0.19, said, va="baseline", fontsize=9, color=INK)
        for p, k in enumerate(slices):
            row, column = divmod(p, across)
            box = column * (width + _SPACE), 0.27 + row * (size + 0.2), width, size
            under = None if image is None else image[k * len(image) // values.shape[1]]
            layers = map_layers(values[i, k], limit, over, under)
            sheet.images(i, box, layers, below=f"slice {k}")
    sheet.legend(look, note, all(map(look.centred, limits)))
    return sheet.figure
