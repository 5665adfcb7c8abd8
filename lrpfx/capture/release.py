"""A trace that has ended -> its memory: what PyTorch would hold of it for good is let go."""

from __future__ import annotations

import ctypes
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextmanager
def released() -> Iterator[None]:
    """Let go of what the traces inside have held.

    A trace lists its inputs, whose sizes hold the trace: a circle through C++ that Python's
    collector does not see. Caches of a class hold further traces.
    """
    begun: list[ShapeEnv] = []
    plain = ShapeEnv.__init__

    def noted(env: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        begun.append(env)
        plain(env, *args, **kwargs)

    try:
        with mock.patch.object(ShapeEnv, "__init__", noted):
            yield
    finally:
        for env in begun:
            if env.tracked_fakes is not None:
                env.tracked_fakes.clear()
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


@contextmanager
def lines_forgotten() -> Iterator[None]:
    """Let go of the lines of code that are written inside.

    PyTorch keeps the code of each graph for good, for the lines of tracebacks.
    """
    kept = graph_module._loader.eval_cache
    before = set(kept)
    try:
        yield
    finally:
        for key in kept.keys() - before:
            kept.pop(key, None)
            linecache.cache.pop(key, None)


def trim() -> None:
    """Give memory that is free back to the system, where the allocator keeps it.

    A trace leaves small objects among the large tensors of its inputs, and what lies free between
    them is not used again: without this every trace takes an input's size.
    """
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if give_back is not None:
            give_back(0)
