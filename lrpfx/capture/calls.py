"""A run of the model -> the autograd functions of its own that it calls, with the lines."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

#: The packages whose functions have the gradient, or hand on what is given to them.
_KNOWN = ("torch.", "lrpfx.")


@contextmanager
def own_backwards() -> Iterator[dict[str, None]]:
    """Collect the functions with a backward of their own that are called meanwhile, by lines."""
    found: dict[str, None] = {}
    apply = vars(torch.autograd.Function)["apply"]  # a method of C since torch 2.14

    def noting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith(_KNOWN):
            frame = sys._getframe(1)
            file, line = frame.f_code.co_filename, frame.f_lineno
            code = linecache.getline(file, line).strip()
            found[f"{cls.__name__} at {file}:{line}   {code}"] = None
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(noting)):
        yield found
