"""One tree of errors; every message says what happened, where, and what to do about it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence

__all__ = [
    "CaptureError",
    "CompileError",
    "ExplosionWarning",
    "ExportError",
    "InputError",
    "LrpError",
    "LrpWarning",
    "NonFiniteError",
    "RuleError",
    "SelectorError",
    "TargetError",
    "TrainingModeError",
    "UnsupportedOpError",
]


class LrpError(Exception):
    """Base of every error that lrpfx raises on purpose.

    Args:
        what: One sentence that says what happened.
        where: Places it happened at, most useful first (module path, op, shape, source line).
        fix: What the caller can do about it.
    """

    def __init__(self, what: str, *, where: Sequence[str] = (), fix: str = "") -> None:
        self.what = what
        self.where = tuple(where)
        self.fix = fix
        lines = [what]
        lines += [f"  where: {place}" for place in self.where]
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """What notebooks show: the user's lines and the message, without the library's own."""
        own = os.path.dirname(__file__) + os.sep
        shown = traceback.TracebackException.from_exception(self, compact=True)
        frames = [f for f in shown.stack if not f.filename.startswith(own)]
        shown.stack = traceback.StackSummary.from_list(frames)
        shown.__cause__ = shown.__context__ = None  # the message says what is of use in it
        return [line for part in shown.format() for line in part.rstrip().split("\n")]


def some(places: Sequence[str], most: int = 5) -> list[str]:
    """The first of many places, and how many more there are."""
    more = len(places) - most
    return [*places[:most], *([f"and {more} more"] if more > 0 else [])]


def counted(found: Iterable[tuple[str, str, str]], most: int = 3) -> list[str]:
    """One line for each kind of fault, however many places it is found at.

    Args:
        found: What it is, where, and the source line ("" if unknown), for each place.
        most: How many places are named.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for what, path, line in found:
        kinds.setdefault(what, []).append((path, line))
    lines = []
    for what, places in kinds.items():
        more = len(places) - most
        named = ", ".join(path for path, _ in places[:most])
        told = f"{named} and {more} more" if more > 0 else named
        lines.append(f"{told}: {what}   {places[0][1]}".rstrip())
    return lines


class LrpWarning(UserWarning):
    """Base of what lrpfx warns of: a map may tell something else than it seems to."""


class ExplosionWarning(LrpWarning):
    """Absolute relevance has grown a thousandfold: at a node, or from the output to the map."""


def warn(text: str, category: type[LrpWarning] = LrpWarning) -> None:
    """Warn at the line that called the library."""
    own, frame, level = os.path.dirname(__file__) + os.sep, sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"lrpfx: {text}", category, stacklevel=level)


class CaptureError(LrpError):
    """The model could not be captured as a graph, or the graph does not compute what it does."""


class TrainingModeError(CaptureError):
    """The model is in training mode and holds layers that are random or mix the batch."""


class UnsupportedOpError(LrpError):
    """Operations that depend on the explained input have no relevance rule."""


class CompileError(LrpError):
    """The explanation cannot be compiled, or would be another."""


class ExportError(LrpError):
    """The explanation cannot be written into a file, or would be another there."""


class InputError(LrpError, ValueError):
    """An input has the wrong structure, shape, dtype, device or values."""


class TargetError(LrpError, ValueError):
    """The target does not fit the model's output."""


class RuleError(LrpError, ValueError):
    """A rule has illegal parameters, or is assigned to an op that it does not fit."""


class SelectorError(LrpError, ValueError):
    """A selector, composite name or layer path names nothing in this model."""


class NonFiniteError(LrpError, ValueError):
    """NaN or infinity in an input, an activation or the relevance."""
