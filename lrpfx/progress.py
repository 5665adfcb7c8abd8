"""Long work -> a progress bar, where tqdm is installed and the work takes more than seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")
#: Seconds before a bar is shown.
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
