"""Program -> the two files of PyTorch's own: an exported program, and a compiled package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import first_line, tracing
from lrpfx.deploy.about import KEY
from lrpfx.deploy.check import Case
from lrpfx.deploy.program import Program
from lrpfx.errors import ExportError


def write_pt2(program: Program, path: Path, facts: str, cases: Sequence[Case]) -> None:
    """Write what ``torch.export.load`` reads; facts are an extra file, "lrpfx.json"."""
    with tracing():
        torch.export.save(program.exported, path, extra_files={f"{KEY}.json": facts})
        loaded = torch.export.load(path).module()
    _check(loaded, cases, "the exported program")


def write_aoti(program: Program, path: Path, facts: str, cases: Sequence[Case]) -> None:
    """Write what ``torch._inductor.aoti_load_package`` reads; facts are in its metadata."""
    try:
        with tracing():
            torch._inductor.aoti_compile_and_package(
                program.exported,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {KEY: facts}},
            )
    except Exception as error:  # compilers may raise anything
        raise ExportError(
            f"the program cannot be compiled: {type(error).__name__}: {first_line(error)}",
            fix='export it to "model.pt2", which needs no compiler.',
        ) from error
    _check(torch._inductor.aoti_load_package(str(path)), cases, "the compiled package")


def _check(loaded: Any, cases: Sequence[Case], what: str) -> None:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            found = pytree.tree_leaves(loaded(*args, **kwargs))
        return [t for t in found if isinstance(t, Tensor)]

    for case in cases:
        case.check(run, what)
