"""Program -> an ONNX file, run by onnxruntime before it is handed on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lrpfx.capture import first_line, tracing
from lrpfx.deploy.about import KEY
from lrpfx.deploy.check import Case
from lrpfx.deploy.program import Program
from lrpfx.errors import ExportError, InputError, some


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
    with tracing():
        made = _translated(program)
    made.model.metadata_props[KEY] = facts
    made.save(path)
    sessions: list[Any] = []

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        try:
            if not sessions:
                providers = ["CPUExecutionProvider"]
                sessions.append(onnxruntime.InferenceSession(path, providers=providers))
            feeds = {name: t.cpu().numpy() for name, t in zip(program.inputs, given, strict=True)}
            return [torch.from_numpy(a) for a in sessions[0].run(None, feeds)]
        except Exception as error:  # its classes are of its own, as those of numpy
            single = all(t.dtype == torch.float32 for t in given if t.is_floating_point())
            raise ExportError(
                f"onnxruntime cannot run what was written: {first_line(error)}",
                fix=_FIX if single else f'{_SINGLE} or to "model.pt2".',
            ) from error

    for case in cases:
        case.check(run, "onnxruntime")


def _translated(program: Program) -> Any:
    """The program in the ops of ONNX."""
    try:
        made = torch.onnx.export(
            program.exported,
            dynamo=True,
            verbose=False,
            input_names=program.inputs,
            output_names=program.outputs,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        lacking = _lacking(program.exported)
        if not lacking:
            raise ExportError(
                f"the program cannot be written as ONNX: {_cause(error)}", fix=_FIX
            ) from error
        raise ExportError(
            f"ONNX has nothing for {len(lacking)} of the ops that the explanation comes to.",
            where=some(program.places(lacking)),
            fix=_FIX,
        ) from error
    assert made is not None
    _name_sizes(made.model, program)
    return made


_SINGLE = "export it in float32, for whose ops onnxruntime has kernels: model.float();"
_FIX = 'export it to "model.pt2", or give the module another rule.'


def _lacking(exported: ExportedProgram) -> list[Any]:
    """Ops that torch.onnx has no words for, each as it was before it was taken apart."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib()
    known = _decomp.get_onnx_implemented_overloads(registry)
    table = _decomp.create_onnx_friendly_decomposition_table(set(known))
    written = {node.name: node.target for node in exported.graph.nodes}
    found: dict[Any, None] = {}
    try:
        exported = exported.run_decompositions(table)
    except Exception:  # may be what failed, and raises anything
        return []
    for node in exported.graph.nodes:
        op = node.target
        if isinstance(op, torch._ops.OpOverload) and not registry.is_registered(op):
            origins = node.meta.get("from_node") or [node]
            found[written.get(origins[0].name, op)] = None
    return list(found)


def _cause(error: BaseException) -> str:
    """The first line of what an error was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _name_sizes(model: Any, program: Program) -> None:
    """Call sizes that may vary by their letters, in every shape of the file."""
    values = list(model.graph.inputs) + [v for node in model.graph for v in node.outputs]
    named = {
        str(value.shape[dim]): letter
        for value, each in zip(model.graph.inputs, program.letters, strict=True)
        for dim, letter in each.items()
    }
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, named)) + r")\b")
    for value in values if named else ():
        for dim, size in enumerate(value.shape or ()):
            # A size without a name is known to nobody, and no two of these are the same.
            if not isinstance(size, int) and size.value is not None:
                text = pattern.sub(lambda found: named[found[0]], str(size))
                value.shape[dim] = text
