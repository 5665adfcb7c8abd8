"""Other pictures than maps beside inputs: matrices of tokens, curves with bands, mosaics.

What is drawn is matplotlib's; a figure is written with text as text, as journals want it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.heatmap import Clip, Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["colormap", "curves", "matrix", "mosaic", "palette"]


def colormap(source: str | Colormap | None = None) -> Colormap:
    """The colour map that is meant by a few words, for `cmap=` and for matplotlib itself.

    Args:
        source: One of matplotlib, or its name; None for blue to red through white; or colours by
            commas, such as "00f,fff,f00" or "navy,50%:white,darkred". A colour is three or six hex
            digits or a name of matplotlib; before it may stand its place and a colon: two hex
            digits (80 is the middle), one (a is aa), or a percentage. Colours between places are
            evenly spaced. zennit's names and codes serve, too.

    Raises:
        InputError: It is none of these.
    """
    from lrpfx.draw import look_of

    return look_of(source, 100.0, "each").colors


def palette(source: str | Colormap | None = None) -> NDArray[np.uint8]:
    """The 256 colours (256, 3) of a `mosaic`: 255 shades, zero in the middle, and white for gaps.

    Args:
        source: See `colormap`.
    """
    from lrpfx.draw import palette as colors_of

    return colors_of(colormap(source))


def mosaic(
    relevance: Tensor,
    *,
    path: str | os.PathLike[str] | None = None,
    cmap: str | Colormap | None = None,
    clip: Clip = 100.0,
    scale: Scale = "each",
    columns: int | None = None,
    gap: int = 1,
    zoom: int = 1,
) -> Image:
    """Maps of images side by side, a pixel for each value, as a picture with indexed colours.

    Small, exact, and quickly made: nothing is interpolated, and a PNG of it holds the palette.

    Args:
        relevance: (N, C, H, W), summed over channels, or (N, H, W).
        path: File to write to, such as "maps.png".
        cmap: See `colormap`.
        clip: See `lrpfx.heatmap.heatmap`.
        scale: See `lrpfx.heatmap.heatmap`.
        columns: How many maps side by side; by default about as many as one below the other.
        gap: Pixels between maps.
        zoom: Pixels of a value in height and width.

    Returns:
        A PIL image of mode "P".

    Raises:
        InputError: The relevance is of no images, empty or not finite, or an option does not fit.
    """
    from PIL import Image

    from lrpfx.draw import SHADES, look_of, positive, shape_error, values_of

    values = values_of("relevance", relevance)
    if values.ndim not in (3, 4):
        raise shape_error("relevance", values, "(N, C, H, W) or (N, H, W)")
    values = values.sum(axis=1) if values.ndim == 4 else values
    look = look_of(cmap, clip, scale)
    zoom, n = positive("zoom", zoom) or 1, len(values)
    if not isinstance(gap, int) or gap < 0:
        raise InputError(f"gap={gap!r}.", fix="give a number of pixels.")
    across = min(n, positive("columns", columns) or int(np.ceil(np.sqrt(n))))
    height, width = values.shape[1] * zoom + gap, values.shape[2] * zoom + gap
    cells = np.full((-(-n // across), across, height, width), SHADES, dtype=np.uint8)
    for i, limits in enumerate(look.limits(list(values))):
        place = np.clip(np.asarray(look.norm(limits)(values[i])), 0, 1)
        shade = np.rint(place * (SHADES - 1)).astype(np.uint8)
        shade = shade.repeat(zoom, axis=0).repeat(zoom, axis=1)
        cells[i // across, i % across, : height - gap, : width - gap] = shade
    rows = cells.transpose(0, 2, 1, 3).reshape(-1, across * width)
    picture = Image.fromarray(rows[: len(rows) - gap, : across * width - gap], mode="P")
    picture.putpalette(palette(cmap).tobytes())
    if path is not None:
        try:
            picture.save(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the picture cannot be written to {os.fspath(path)!s}: {error}",
                fix="give a path in a folder that exists, ending in .png or .gif.",
            ) from error
    return picture


def matrix(
    values: Tensor,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    cmap: str | Colormap | None = None,
    clip: Clip = 100.0,
    scale: Scale = "each",
    numbers: bool | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Relevance by two names: of tokens for tokens, of tokens by methods, of heads by layers.

    Args:
        values: (R, C).
        rows: A name for each row, on the left.
        columns: A name for each column, on top; long ones stand upright.
        title: Above it.
        path: File to write to; the ending names the format (png, pdf, svg).
        cmap: See `colormap`.
        clip: See `lrpfx.heatmap.heatmap`.
        scale: "each" and "shared" are the same here; or the relevance that has full colour.
        numbers: Whether each value is written into its cell; by default where there are at most
            120.
        ax: Axes of your own.

    Returns:
        The figure: a notebook displays it, `savefig` writes it.

    Raises:
        InputError: Shapes do not belong together, the values are empty or not finite, or an
            option does not fit.
    """
    from lrpfx.draw import check_count, draw_matrix, look_of, shape_error, values_of, written

    found = values_of("values", values)
    if found.ndim != 2:
        raise shape_error("values", found, "(R, C)")
    check_count("rows", rows, len(found), "row")
    check_count("columns", columns, found.shape[1], "column")
    if numbers is None:
        numbers = found.size <= 120
    look = look_of(cmap, clip, scale)
    return written(draw_matrix(found, rows, columns, title, look, numbers, ax), path)


def curves(
    lines: Mapping[str, Tensor],
    *,
    x: Tensor | Sequence[float] | None = None,
    band: float | None = 0.95,
    xlabel: str = "",
    ylabel: str = "",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Means over samples as lines, each with the band that its mean lies in.

    The band holds the means of samples drawn again with replacement (a percentile bootstrap of
    1000 draws, the same at every call).

    Args:
        lines: name -> (N, P), a curve of P points for each of N samples, or (P,) without a band.
        x: Where the points are, (P,); by default 0, 1, 2 ...
        band: The part of the means that it holds; None for none.
        xlabel: Below it.
        ylabel: Beside it.
        title: Above it.
        path: File to write to; the ending names the format (png, pdf, svg).
        ax: Axes of your own.

    Returns:
        The figure: a notebook displays it, `savefig` writes it.

    Raises:
        InputError: Curves have different lengths, are empty or not finite, or an option does not
            fit.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile intervals).
    """
    from lrpfx.draw import draw_curves, shape_error, values_of

    if not isinstance(lines, Mapping) or not lines:
        raise InputError("curves: no lines are given.", fix="give {name: (N, P) values}.")
    if band is not None and not 0 < band < 1:
        raise InputError(f"band={band!r}.", fix="give a part such as 0.95, or None.")
    found = {str(name): values_of(f"lines[{name!r}]", line) for name, line in lines.items()}
    first = next(iter(found.values()))
    for name, line in found.items():
        if line.ndim not in (1, 2) or line.shape[-1] != first.shape[-1]:
            raise shape_error(f"lines[{name!r}]", line, f"(N, {first.shape[-1]}), as others are")
    given = torch.arange(first.shape[-1]) if x is None else torch.as_tensor(x)
    places = values_of("x", given)
    if places.shape != (first.shape[-1],):
        raise shape_error("x", places, f"({first.shape[-1]},)")
    bands = {
        name: ends
        for name, line in found.items()
        if line.ndim == 2 and (ends := _band(line, band)) is not None
    }
    return draw_curves(
        places, found, xlabel=xlabel, ylabel=ylabel, title=title, path=path, ax=ax, bands=bands
    )


def _band(line: NDArray[np.float64], band: float | None) -> NDArray[np.float64] | None:
    """Low and high ends (2, P) of what holds that part of the means."""
    if band is None or len(line) < 2:
        return None
    draws = np.random.default_rng(0).multinomial(len(line), [1 / len(line)] * len(line), size=1000)
    tails = 50 * (1 - band)
    ends: NDArray[np.float64] = np.percentile(
        draws @ line / len(line), [tails, 100 - tails], axis=0
    )
    return ends
