"""lrpfx.export: an Explainer as a file that runs without Python, PyTorch or the library."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lrpfx.capture import Inputs
from lrpfx.deploy.about import about
from lrpfx.deploy.check import Case, make_cases
from lrpfx.deploy.onnx_file import write_onnx
from lrpfx.deploy.program import Program, make_program
from lrpfx.deploy.torch_file import write_aoti, write_pt2
from lrpfx.errors import CaptureError, ExportError, InputError, TargetError, some, warn
from lrpfx.explain import Explainer

_Writer = Callable[[Program, Path, str, Sequence[Case]], None]
#: By ending, the first that fits: what writes a program, and what is to be known of it.
_WRITERS: dict[str, _Writer] = {
    ".onnx": write_onnx,
    ".aoti.pt2": write_aoti,
    ".pt2": write_pt2,
}


def export(
    explainer: Explainer,
    path: str | os.PathLike[str],
    inputs: Inputs,
    *,
    target: Literal["argmax"] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write output and relevance as one program, which runs without the library.

    The program takes what the model takes and then ``target``, a class per sample as int64 of
    shape (N,), and returns the model's output and the relevance of each explained input. It
    holds for every batch size, and for other sizes that the Explainer leaves open
    (``dynamic=``). Where a model fixes its sizes, or can be recorded only, it holds for those of
    ``inputs``, of which a warning tells. Parameters are those of this moment. What is written is
    run on ``inputs`` first and compared with the Explainer.

    Args:
        explainer: What explains.
        path: Where to; the ending says what: "model.onnx" for onnxruntime (inputs and outputs
            by name, ``output`` and ``relevance``; of several explained inputs
            ``relevance.<name>``), "model.pt2" for ``torch.export.load(path).module()(x, target)``,
            "model.aoti.pt2" for ``torch._inductor.aoti_load_package(path)(x, target)``, compiled
            for the device that the model is on.
        inputs: Example inputs, as the Explainer takes them.
        target: "argmax": there is no such input, and the strongest output of each sample is
            explained.
        class_names: Of the outputs, for the file's metadata, which holds rules and versions too.

    Raises:
        ExportError: Something cannot be written down in this form; all places are listed, and no
            file is written.
        InputError: An ending that is not known, inputs that do not fit, or a package that is not
            installed.
        TargetError: The output has no classes for a target per sample.
    """
    if not isinstance(explainer, Explainer):
        raise InputError(f"what is exported is an Explainer, not {_named(explainer)}.", fix=_CALL)
    path, write = _read_path(path)
    if not (target is None or isinstance(target, str) and target == "argmax"):
        raise TargetError(
            f"target={_named(target)} cannot be written down.",
            fix='leave it out for a target per sample as an input of the program, or give "argmax";'
            " for other scores export a wrapper module that returns (N, scores).",
        )
    _refuse_names(class_names)
    _refuse(explainer)
    explainer = _for_every_size(explainer)
    inputs = explainer._read_inputs(inputs)
    class_names = None if class_names is None else list(class_names)
    facts = about(explainer, target, class_names)
    by_input = target is None
    cases = make_cases(explainer, inputs, by_input, class_names)
    program = make_program(explainer, inputs, by_input)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lrpfx-") as folder:
        write(program, Path(folder) / path.name, facts, cases)
        for file in Path(folder).iterdir():  # weights of more than 2 GB have one of their own
            os.replace(file, path.parent / file.name)


_CALL = 'lrpfx.export(lrpfx.Explainer(model, x, rules), "model.onnx", x).'


def _named(value: Any) -> str:
    """What an argument is, in a few words."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def _read_path(path: Any) -> tuple[Path, _Writer]:
    """Where to write, and what does it."""
    try:
        path = Path(path)
    except TypeError as error:
        raise InputError(f"the path is no path, but {_named(path)}.", fix=_CALL) from error
    write = next((w for ending, w in _WRITERS.items() if path.name.endswith(ending)), None)
    if write is None:
        raise InputError(
            f"{path.name!r} does not say what to write.",
            fix=f"let the name end in {', '.join(_WRITERS)}.",
        )
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}.", fix="make it first.")
    if path.is_dir():
        raise InputError(f"{path} is a folder.", fix="name a file.")
    return path, write


def _refuse_names(names: Any) -> None:
    """Raise InputError for class names that are no sequence of names."""
    if names is None or not isinstance(names, (str, bytes, Mapping)) and hasattr(names, "__iter__"):
        return
    raise InputError(
        f"class_names is a {type(names).__name__}.",
        fix='give a list with a name for each output: ["cat", "dog"].',
    )


def _for_every_size(explainer: Explainer) -> Explainer:
    """An Explainer whose graph has no sizes of one run, where the model lets it be exported."""
    only = "the file holds for the sizes of the example inputs only: "
    try:
        explainer = explainer.exported()
    except CaptureError as error:
        warn(f"{only}the model was recorded, and cannot be exported: {error.what}")
        return explainer
    captured = explainer._engine.captured
    if captured.signature.batch is not None and captured.why_static:
        warn(f"{only}{captured.why_static}")
    return explainer


def _refuse(explainer: Explainer) -> None:
    """Raise ExportError for what a program of inputs and parameters cannot be."""
    if explainer._engine.by_batch:
        raise ExportError(
            'an Explainer of bn="batch" cannot be exported: each call changes running statistics.',
            fix="export one made in evaluation mode.",
        )
    if decided := [read for read in explainer._engine.captured.decisions or () if read.of_inputs]:
        raise ExportError(
            "the model was recorded, and its run was decided by values; a file would hold what it "
            "did for these inputs only.",
            where=some(list(map(str, decided))),
            fix='make the Explainer with capture="export", which says what is in the way.',
        )
