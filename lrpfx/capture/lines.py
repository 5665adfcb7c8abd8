"""Stacks -> lines of the user's code: where an error came from, where a size was fixed."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

#: With the separator: other packages' names may begin alike.
_NOT_THE_USERS = tuple(
    str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)
#: Packages are installed inside.
_PYTHON = sysconfig.get_path("stdlib") + os.sep


def _is_users(file: str) -> bool:
    """Whether a file is neither PyTorch's, nor this library's, nor Python's."""
    if file.startswith(_PYTHON) and "-packages" not in file:
        return False
    return not file.startswith((*_NOT_THE_USERS, "<"))


def innermost(stack: Iterable[traceback.FrameSummary]) -> list[str]:
    """The innermost line of the user's code, if there is one."""
    own = [f for f in stack if _is_users(f.filename)]
    return [f"{own[-1].filename}:{own[-1].lineno}   {own[-1].line}"] if own else []


def raised_at(error: BaseException) -> list[str]:
    """The innermost line of the user's code that an error passed through."""
    return innermost(traceback.extract_tb(error.__traceback__))


@contextmanager
def sizes_fixed() -> Iterator[list[str]]:
    """Collects the lines of the user's code that fix a size while a model is traced."""
    lines: list[str] = []
    plain = ShapeEnv._set_replacement

    def noting(env: ShapeEnv, symbol: Any, value: Any, *rest: Any) -> None:
        if value.is_number:
            lines.extend(innermost(traceback.extract_stack()))
        plain(env, symbol, value, *rest)

    with mock.patch.object(ShapeEnv, "_set_replacement", noting):
        yield lines


def first_line(error: BaseException) -> str:
    """What an exception says, or is, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
