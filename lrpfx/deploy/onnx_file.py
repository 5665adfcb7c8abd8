"""Program -> an ONNX file, run by onnxruntime before it is handed on."""

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
from lrpfx.errors import ExportError, InputError


def write_onnx(program: Program, path: Path, facts: str, cases: Sequence[Case]) -> None:
    """Write an ONNX file; facts are in its ``metadata_props``.

    Raises:
        ExportError: ONNX has no such op, or onnxruntime computes something else.
        InputError: A package of the extra ``export`` is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx writes by it
    except ImportError as error:
        raise InputError(
            f"ONNX files need {error.name}.", fix="pip install 'lrpfx[export]'."
        ) from error
    try:
        with tracing():
            made = torch.onnx.export(
                program.exported,
                dynamo=True,
                verbose=False,
                input_names=program.inputs,
                output_names=program.outputs,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"the program cannot be written as ONNX: {first_line(error)}",
            fix='export it to "model.pt2".',
        ) from error
    assert made is not None
    made.model.metadata_props[KEY] = facts
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        feeds = {name: t.cpu().numpy() for name, t in zip(program.inputs, given, strict=True)}
        return [torch.from_numpy(a) for a in session.run(None, feeds)]

    for case in cases:
        case.check(run, "onnxruntime")
