"""Relevance -> colour: a colour map that is white at zero, and the values its ends stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.colors import Colormap, Normalize, TwoSlopeNorm
from numpy.typing import NDArray

from lrpfx.draw.colors import colormap

Array = NDArray[np.float64]
#: The values that the ends of the colours stand for; twice zero for a map that is zero everywhere.
Range = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How values become colours and lengths.

    Args:
        cmap: What ``colormap`` takes; None for blue to red through white.
        clip: The percentile of the absolute relevance that has full colour; 100 for the largest. A
            pair: the percentiles of the relevance that the two ends of the colours stand for.
        scale: "each" map on its own scale, "shared" by all maps, or the value of full colour.
        overlay: 0 for a map beside the input, else the opacity of a map on the input.
    """

    cmap: str | Colormap | None = None
    clip: float | tuple[float, float] = 100.0
    scale: Literal["each", "shared"] | float = "each"
    overlay: float = 0.0

    @property
    def colors(self) -> Colormap:
        """The colour map."""
        return colormap(self.cmap)

    def limits(self, maps: Sequence[Array]) -> list[Range]:
        """What the ends of the colours stand for in each map."""
        if not isinstance(self.scale, str):
            size = float(self.scale)
            return [(-size, size) if np.any(values) else (0.0, 0.0) for values in maps]
        limits = [self._limits(values) for values in maps]
        if self.scale == "shared":
            low, high = min(low for low, _ in limits), max(high for _, high in limits)
            return [(low, high) if np.any(values) else (0.0, 0.0) for values in maps]
        return limits

    def _limits(self, values: Array) -> Range:
        # A map of few values is zero at most percentiles; it is then drawn by its largest.
        if not isinstance(self.clip, tuple):
            sizes = np.abs(values)
            size = float(np.percentile(sizes, self.clip)) or float(sizes.max())
            return -size, size
        low, high = map(float, np.percentile(values, self.clip))
        if low == high:
            low, high = float(values.min()), float(values.max())
        if self.cmap is None or low < 0 < high:  # zero has a place, and it is white
            return min(low, 0.0), max(high, 0.0)
        return low, high

    @staticmethod
    def centred(limits: Range) -> bool:
        """Whether zero has the middle colour."""
        return limits[0] <= 0 <= limits[1]

    def norm(self, limits: Range) -> Normalize:
        """Values -> 0..1, zero in the middle where it is within the limits."""
        low, high = limits
        if not self.centred(limits):
            return Normalize(low, high)
        if low < 0 < high and -low != high:
            return TwoSlopeNorm(0, low, high)
        size = max(-low, high) or 1.0
        return Normalize(-size, size)

    def strength(self, values: Array, limits: Range) -> Array:
        """How much colour each value has, 0..1."""
        place = np.asarray(self.norm(limits)(values), dtype=np.float64)
        shown = np.abs(2 * place - 1) if self.centred(limits) else place
        return np.clip(shown, 0, 1)

    @staticmethod
    def said(limits: Range) -> str:
        """What stands beside a map."""
        low, high = limits
        if low == high == 0:
            return "zero everywhere"
        if -low == high:
            return f"\N{PLUS-MINUS SIGN}{high:.2g}"
        return f"{low:.2g} to {high:.2g}"
