"""Relevance -> colour: a colour map that is white at zero, and the value its ends stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from numpy.typing import NDArray

Array = NDArray[np.float64]

RED, BLUE, INK, FRAME = "#b2182b", "#2166ac", "#222222", "#c8c8c8"

_BLUES = ["#053061", BLUE, "#4393c3", "#92c5de", "#d1e5f0"]
_REDS = ["#fddbc7", "#f4a582", "#d6604d", RED, "#67001f"]


@dataclass(frozen=True)
class Look:
    """How values become colours and lengths.

    Args:
        cmap: A colour map or its name; None for blue to red through white.
        clip: The percentile of the absolute relevance that has full colour; 100 for the largest.
        scale: "each" map on its own scale, "shared" by all maps, or the value of full colour.
        overlay: 0 for a map beside the input, else the opacity of a map on the input.
    """

    cmap: str | Colormap | None = None
    clip: float = 100.0
    scale: Literal["each", "shared"] | float = "each"
    overlay: float = 0.0

    @property
    def colors(self) -> Colormap:
        """The colour map; an odd number of colours puts zero on one of them, which is white."""
        if self.cmap is None:
            return LinearSegmentedColormap.from_list(
                "relevance", [*_BLUES, "#ffffff", *_REDS], N=257
            )
        return colormaps[self.cmap] if isinstance(self.cmap, str) else self.cmap

    def limits(self, maps: Sequence[Array]) -> list[float]:
        """The value of full colour for each map; 0 for a map that is zero everywhere."""
        if not isinstance(self.scale, str):
            return [float(self.scale) if np.any(values) else 0.0 for values in maps]
        limits = [self._limit(values) for values in maps]
        if self.scale == "shared":
            return [max(limits) if limit else 0.0 for limit in limits]
        return limits

    def _limit(self, values: Array) -> float:
        sizes = np.abs(values)
        # A map of few values is zero at most percentiles; it is then drawn by its largest.
        return float(np.percentile(sizes, self.clip)) or float(sizes.max())

    def said(self, limit: float) -> str:
        """What stands beside a map."""
        return f"\N{PLUS-MINUS SIGN}{limit:.2g}" if limit else "zero everywhere"
