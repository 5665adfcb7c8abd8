"""Words for colour maps -> matplotlib's, and the palette of a picture with indexed colours."""

from __future__ import annotations

import re

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, is_color_like, to_rgb
from numpy.typing import NDArray

RED, BLUE, INK, FRAME = "#b2182b", "#2166ac", "#222222", "#c8c8c8"

_BLUES = ["#053061", BLUE, "#4393c3", "#92c5de", "#d1e5f0"]
_REDS = ["#fddbc7", "#f4a582", "#d6604d", RED, "#67001f"]

#: Names that matplotlib does not have; users of zennit know them.
_NAMED = {
    "wred": "fff,f00",
    "wblue": "fff,00f",
    "cold": "000,00f,0ff",
    "coldnhot": "0ff,00f,80:000,f00,ff0,fff",
    "france": "0055a4,80:fff,ef4135",
    "coolio": "00d0d0,80:d0d0d0,d000d0",
    "coleus": "00d000,80:d0d0d0,d000d0",
}
_NODE = re.compile(r"(?:(?P<at>[0-9a-fA-F]{1,2}|\d{1,3}%):)?#?(?P<color>\w+)")
_HEX = re.compile(r"[0-9a-fA-F]{3}|[0-9a-fA-F]{6}")

#: How many shades; odd, so that zero is one of them.
SHADES = 255


def colormap(source: str | Colormap | None) -> Colormap:
    """The colour map that is meant.

    Args:
        source: One of matplotlib, or its name; None for blue to red through white; or colours by
            commas, such as "00f,fff,f00" or "navy,50%:white,darkred". A colour is three or six hex
            digits or a name of matplotlib; before it may stand its place and a colon: two hex
            digits (80 is the middle), one (a is aa), or a percentage. Colours between places are
            evenly spaced.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(source, Colormap):
        return source
    if source is None:
        return LinearSegmentedColormap.from_list("relevance", [*_BLUES, "#ffffff", *_REDS], N=257)
    if source in colormaps:
        return colormaps[source]
    nodes = [_node(word.strip()) for word in _NAMED.get(source, source).split(",")]
    if len(nodes) < 2:
        raise ValueError(f"{source!r} is no colour map of matplotlib, and a single colour is none")
    places = _spaced([at for at, _ in nodes])
    colors = [color for _, color in nodes]
    if places[0] > 0:
        places, colors = [0.0, *places], [colors[0], *colors]
    if places[-1] < 1:
        places, colors = [*places, 1.0], [*colors, colors[-1]]
    return LinearSegmentedColormap.from_list(source, list(zip(places, colors, strict=True)), N=257)


def _node(word: str) -> tuple[float | None, str]:
    """A place, if one is given, and a colour."""
    found = _NODE.fullmatch(word)
    color = found["color"] if found else word
    color = f"#{color}" if _HEX.fullmatch(color) else color
    if found is None or not is_color_like(color):
        raise ValueError(f"{word!r} is no colour; three or six hex digits are, or names")
    at = found["at"]
    if at is None:
        return None, color
    if at.endswith("%"):
        place = int(at[:-1]) / 100
    else:
        # 80 of 00..ff is meant to be the middle.
        place = 0.5 if at == "80" else int(at * 2 if len(at) == 1 else at, 16) / 255
    return place, color


def _spaced(places: list[float | None]) -> list[float]:
    """The places in between filled in; those of the ends are 0 and 1 if they are not given."""
    first, last = places[0], places[-1]
    known = [0.0 if first is None else first, *places[1:-1], 1.0 if last is None else last]
    at = [i for i, place in enumerate(known) if place is not None]
    given = [place for place in known if place is not None]
    if given != sorted(given) or not 0 <= given[0] <= given[-1] <= 1:
        raise ValueError("the places of the colours are not in ascending order")
    filled: list[float] = np.interp(range(len(known)), at, given).tolist()
    return filled


def palette(source: str | Colormap | None, spare: str = "white") -> NDArray[np.uint8]:
    """The 256 colours (256, 3) of an indexed picture: shades, zero in the middle, and a spare one.

    Args:
        source: See ``colormap``.
        spare: The last colour, for what is no relevance.
    """
    shades = colormap(source)(np.linspace(0, 1, SHADES))[:, :3]
    colors = np.vstack([shades, to_rgb(spare)])
    found: NDArray[np.uint8] = np.rint(255 * colors).astype(np.uint8)
    return found
