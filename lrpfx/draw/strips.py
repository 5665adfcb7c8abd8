"""Small pictures and maps -> one picture of rows of squares, as text for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lrpfx.draw.look import Look

#: Quality and side of the squares, tried in this order.
_SMALLER = ((80, 96), (80, 64), (60, 64), (60, 48), (45, 48), (40, 32), (10, 32))


def draw_strip(rows: Sequence[Sequence[NDArray[Any]]], side: int, most: int) -> tuple[str, int]:
    """Rows of squares as one picture.

    Args:
        rows: Of pictures (H, W, 3) between 0 and 1, or maps (H, W), each on its own scale.
        side: Of a square, in pixels, at most.
        most: Bytes of the picture at most; where it would be larger, squares are smaller.

    Returns:
        A data URL, and the side of a square.
    """
    colours = Look().colors

    def picture(values: NDArray[Any]) -> NDArray[Any]:
        if values.ndim == 3:
            return values
        limit = float(np.abs(values).max()) or 1.0
        return np.asarray(colours(values / limit / 2 + 0.5))[..., :3]

    pictures = [[picture(values) for values in row] for row in rows]
    found, small = b"", side
    for quality, size in _SMALLER:
        if size > side:
            continue
        small = size
        squares = [np.concatenate([_fitted(p, small) for p in row], axis=1) for row in pictures]
        file = io.BytesIO()
        whole = Image.fromarray(np.concatenate(squares))
        whole.save(file, "WEBP", quality=quality, method=2)
        found = file.getvalue()
        if len(found) <= most:
            break
    return f"data:image/webp;base64,{base64.b64encode(found).decode()}", small


def _fitted(picture: NDArray[Any], side: int) -> NDArray[np.uint8]:
    """In a square, in its own proportions."""
    whole = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    square = Image.new("RGB", (side, side), (128, 128, 128))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    square.paste(whole.resize(size, how), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)
