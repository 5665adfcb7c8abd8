"""What is asked to be drawn -> arrays and a look, or what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lrpfx.draw.look import Array, Look
from lrpfx.errors import InputError

_DPI = 200
#: Journals take no fonts of type 3, and text in a drawing should stay text.
_FONTS: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}


def values_of(name: str, tensor: Tensor) -> Array:
    """The tensor as float64 on the host, refused if there is nothing that could be drawn."""
    if not isinstance(tensor, Tensor):
        raise InputError(
            f"{name} must be a tensor, not {type(tensor).__name__}.",
            fix="give explanation.relevance.",
        )
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise InputError(
            f"{name} {tuple(tensor.shape)} holds nothing to draw.",
            fix="give at least one sample (N, ...), and no empty dimension.",
        )
    values: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    finite = np.isfinite(values)
    if not finite.all():
        first = np.argwhere(~finite)[0, 0]
        raise InputError(
            f"{name}: {values.size - finite.sum()} of {values.size} values are not finite, "
            f"the first in sample {first}.",
            fix="draw finite values.",
        )
    return values


def check_count(name: str, given: Sequence[str] | None, count: int, of: str) -> None:
    """Raise InputError unless there is one for each."""
    if given is not None and len(given) != count:
        raise InputError(
            f"{name}: {len(given)} given, and there are {count}.", fix=f"give one per {of}."
        )


def shape_error(name: str, values: Array, expected: str) -> InputError:
    """That an array has another shape than it should."""
    return InputError(f"{name} has the shape {values.shape}.", fix=f"expected is {expected}.")


def positive(name: str, number: int | None) -> int | None:
    """The number, if it is above zero or None."""
    if number is not None and (not isinstance(number, int) or number < 1):
        raise InputError(f"{name}={number!r}.", fix="give a positive number.")
    return number


def look_of(
    cmap: str | Colormap | None,
    clip: float | tuple[float, float],
    scale: Literal["each", "shared"] | float,
    overlay: bool | float = False,
) -> Look:
    """The look that the options ask for.

    Raises:
        InputError: An option is out of range.
    """
    pair: Any = clip if isinstance(clip, (tuple, list)) else (0, clip)
    if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 100:
        raise InputError(
            f"clip={clip!r}.",
            fix="give a percentile, such as 99 (100 clips nothing), or two, such as (1, 99).",
        )
    if pair[1] <= 1:
        meant = tuple(100 * p for p in pair) if isinstance(clip, (tuple, list)) else 100 * clip
        raise InputError(
            f"clip={clip!r} is a percentile: nearly all would have full colour.",
            fix=f"percentiles go from 0 to 100: give {meant!r}, or 100 to clip nothing.",
        )
    if isinstance(scale, str) and scale not in ("each", "shared"):
        raise InputError(f"scale={scale!r}.", fix="give 'each', 'shared' or a number.")
    if not isinstance(scale, str) and not scale > 0:
        raise InputError(f"scale={scale!r}.", fix="give a positive number: what has full colour.")
    opacity = 0.75 if overlay is True else float(overlay)
    if not 0 <= opacity <= 1:
        raise InputError(f"overlay={overlay!r}.", fix="give True, or an opacity up to 1.")
    look = Look(cmap, tuple(clip) if isinstance(clip, (tuple, list)) else clip, scale, opacity)  # type: ignore[arg-type]  # of two
    try:
        _ = look.colors
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"cmap={cmap!r} is no colour map: {error}.",
            fix="give a name of matplotlib, or colours such as '00f,fff,f00'.",
        ) from error
    return look


def written(figure: Figure, path: str | os.PathLike[str] | None, dpi: int | None = None) -> Figure:
    """The figure, which is also written to a file if there is a path."""
    if path is not None:
        panels = sum(max(len(ax.images), 1) for ax in figure.axes)
        try:
            with rc_context(_FONTS):
                figure.savefig(path, dpi=dpi or (_DPI if panels <= 50 else _DPI // 2))
        except (OSError, ValueError) as error:  # ValueError: an ending that names no format
            raise InputError(
                f"the picture cannot be written to {os.fspath(path)!s}: {error}",
                fix="give a path in a folder that exists, ending in .png, .pdf or .svg.",
            ) from error
    return figure
