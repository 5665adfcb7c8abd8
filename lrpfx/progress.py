"""Long work -> a progress bar where it has parts and tqdm is installed, else a line of words."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")
#: Seconds before anything is shown.
_PATIENCE = 3.0


def shown(items: Sequence[_Item], what: str, progress: bool = True) -> Iterator[_Item]:
    """The items, one after the other, with a bar on the error stream if they take long.

    Args:
        items: What is worked on.
        what: The name of the bar.
        progress: False for no bar in any case.
    """
    if not progress or len(items) < 2:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(total=len(items), desc=what, delay=_PATIENCE, leave=False) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say once what is being done, if it takes more than seconds and somebody watches.

    Args:
        what: One line. It is written to the error stream where that is a terminal or a notebook's,
            and TQDM_DISABLE, which silences bars, is not set.
    """
    stream = sys.stderr  # that of now: capture may put another in its place
    watched = getattr(stream, "isatty", bool)() or "ipykernel" in sys.modules
    if stream is None or not watched or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        yield
        return
    timer = threading.Timer(_PATIENCE, lambda: print(f"lrpfx: {what}", file=stream, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
