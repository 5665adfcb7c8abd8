"""What is done of what there is -> a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lrpfx.errors import InputError


@contextlib.contextmanager
def shown(
    size: int, done: int, progress: bool, unit: str = "samples"
) -> Iterator[Callable[[int], Any]]:
    """A progress bar in units per second, with the time that is left."""
    if not progress:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise InputError(
            "the progress bar needs tqdm.", fix="pip install 'lrpfx[concepts]', or progress=False."
        ) from error
    with tqdm(total=size, initial=done, unit=f" {unit}") as bar:
        yield bar.update
