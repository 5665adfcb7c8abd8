"""Stacks -> lines of the user's code: where an error came from, where a size was fixed."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

#: With the separator: other packages' names may begin alike.
_TORCH_CODE = str(Path(torch.__file__).parent) + os.sep
_OWN_CODE = str(Path(__file__).parents[1]) + os.sep
#: What stands between an op and the line that calls it while a run is recorded.
_RECORDED = Path(__file__).with_name("recorded")
_BETWEEN = {__file__, str(_RECORDED / "recorder.py"), str(_RECORDED / "watched.py")}
#: Packages are installed inside.
_PYTHON = sysconfig.get_path("stdlib") + os.sep


def _is_users(file: str) -> bool:
    """Whether a file is neither PyTorch's, nor this library's, nor Python's."""
    if file.startswith(_PYTHON) and "-packages" not in file:
        return False
    return not file.startswith((_TORCH_CODE, _OWN_CODE, "<"))


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


def called_at() -> str:
    """The innermost line outside torch, as a traceback shows it; "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if (kind := _kind_of(file)) == "own":
            return ""
        if kind == "user's":
            line = linecache.getline(file, frame.f_lineno).strip()
            return f'File "{file}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {line}\n'
        frame = frame.f_back
    return ""


@functools.cache
def _kind_of(file: str) -> str:
    """Whose code a file has: "own", "user's", or that of what is in between."""
    if file in _BETWEEN or file.startswith((_TORCH_CODE, "<")):
        return "between"
    return "own" if file.startswith(_OWN_CODE) else "user's"


def source_of(trace: str) -> str:
    """As messages show it."""
    if not trace:
        return ""
    head, _, code = trace.partition("\n")
    _, file, rest = head.split('"')
    return f"{file}:{rest.split()[2].rstrip(',')}   {code.strip()}"
