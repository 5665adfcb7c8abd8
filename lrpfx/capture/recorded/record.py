"""nn.Module -> fx graph of ATen ops, by recording one run; the user's model is left as it was."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from lrpfx.capture.calls import own_backwards
from lrpfx.capture.captured import Captured, Trace
from lrpfx.capture.examples import batch_of, check_examples
from lrpfx.capture.forms import (
    PLAIN,
    AsDict,
    Inputs,
    Signature,
    copies,
    form_of,
    input_paths,
    is_dataclass,
    opened,
    split_inputs,
    tensors_in,
)
from lrpfx.capture.lines import first_line, raised_at
from lrpfx.capture.preserve import preserved
from lrpfx.capture.recorded.recorder import Recorder
from lrpfx.capture.recorded.watched import recording
from lrpfx.capture.running import run_given
from lrpfx.capture.tracing import tracing
from lrpfx.errors import CaptureError


class Recording:
    """The graph of a run, in the place of an ``ExportedProgram``.

    Args:
        module: The graph, with the model's own parameters. Sizes are as they were in the run.
        args: Positional arguments of the run.
        kwargs: Keyword arguments.
    """

    def __init__(
        self, module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.graph_module, self._args, self._kwargs = module, args, kwargs
        self.example_inputs = args, kwargs

    def module(self, check_guards: bool = False) -> fx.GraphModule:
        """The graph; there are no guards to check."""
        return self.graph_module

    def run_decompositions(self, decomp_table: dict[Any, Any]) -> ExportedProgram:
        """The graph without in-place ops, traced once more by torch.export."""
        program: ExportedProgram = torch.export.export(
            self.graph_module, self._args, self._kwargs, strict=False
        )
        functional: ExportedProgram = program.run_decompositions(decomp_table)
        return functional


def record(model: nn.Module, inputs: Inputs) -> Trace:
    """Capture what ``model(inputs)`` does this once, as a graph of the ops that it calls.

    Branches are taken as they are, loops are run as often as they are: the graph holds for these
    inputs, and for others only if no value was read on the way (``Captured.decisions``).

    Args:
        model: Any module; it is not modified.
        inputs: The inputs.

    Raises:
        CaptureError: The run cannot be recorded.
        InputError: No input can be explained, or the model itself fails on the inputs.
    """
    leaves, spec = check_examples(model, inputs)
    _refuse_objects(leaves, "the inputs hold", "give its tensors, and make it in a wrapper module.")
    with preserved(model, plainly=True) as bring_back:
        _draw()  # what the model draws at random by Python is then not what the record has
        with own_backwards() as backwards:
            output = run_given(model, leaves, spec)
        expected = copies(tensors_in(output))
        traced = AsDict(model) if any(map(is_dataclass, pytree.tree_leaves(output))) else None
        bring_back()  # what a model counts or keeps is part of the run
        recorder, arguments, out_spec = _record(traced or model, leaves, spec)
        if recorder.strange:  # what another thread or library makes of the inputs is seen by others
            bring_back()
            with contextlib.suppress(CaptureError):
                recorder.compare(_record(traced or model, list(map(_moved, leaves)), spec)[0])
    decisions = recorder.reads()
    with torch.inference_mode(False):
        graph = recorder.finish()
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, spec, out_spec)))
    module = _LazyGraphModule(recorder.attributes, graph)  # its code is not run
    module.train(model.training)
    captured = Captured(
        model=model,
        signature=Signature(
            spec,
            tuple(form_of(leaf, {}) for leaf in leaves),
            input_paths(inputs),
            tuple(split_inputs(inputs)[1]),
            batch_of(leaves),
        ),
        training=tuple((module, module.training) for module in model.modules()),
        output=output if traced else None,
        decisions=decisions,
        own_backwards=tuple(backwards),
    )
    args, kwargs = pytree.tree_unflatten(copies(leaves), spec)
    return Trace(captured, Recording(module, args, kwargs), expected)


def _refuse_objects(leaves: Sequence[Any], who: str, fix: str) -> None:
    """Raise CaptureError for what is no tensor and no constant: the run may write into it."""
    if odd := [type(v).__name__ for v in leaves if not isinstance(v, (Tensor, *PLAIN))]:
        raise CaptureError(f"{who} a {odd[0]}, which a recorded graph cannot hold.", fix=fix)


def _moved(leaf: Any) -> Any:
    """Numbers close by, for which hardly a branch is another; integers in another order."""
    if not isinstance(leaf, Tensor) or not leaf.ndim:
        return leaf
    if leaf.is_floating_point():
        return leaf + (1 + leaf.abs()) / 1024
    return leaf.roll(1, -1)


def _draw() -> None:
    """Let every generator go on by one number."""
    random.random()
    np.random.random()
    torch.rand(())


def _record(
    model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec
) -> tuple[Recorder, list[str], pytree.TreeSpec]:
    """What has recorded a run, the names of the model's arguments, and the form of its output."""
    given = copies(leaves)
    args, kwargs = pytree.tree_unflatten(given, spec)
    recorder = Recorder(model)
    arguments = [*_positional(model, len(args)), *kwargs]
    for name, leaf in zip(
        _leaf_names(arguments, opened([*args, *kwargs.values()])), given, strict=True
    ):
        recorder.take(name, leaf)
    try:
        with tracing(), recording(recorder, model):
            output = opened(model(*args, **kwargs))
            _refuse_objects(
                pytree.tree_leaves(output),
                "the model returns",
                "return tensors only, from a wrapper module; of a language model give "
                "use_cache=False with the inputs.",
            )
            recorder.returns(output)
    except CaptureError:
        raise
    except Exception as error:  # whatever the model makes of being watched
        raise CaptureError(
            f"the run of the model cannot be recorded: {type(error).__name__}: {first_line(error)}",
            where=raised_at(error) or [type(model).__name__],
            fix="rewrite that line with torch ops, or explain a wrapper module around the rest.",
        ) from error
    return recorder, arguments, pytree.tree_structure(output)


def _positional(model: nn.Module, count: int) -> list[str]:
    """What forward() calls its first arguments; those of ``*args`` are args_0, args_1, ..."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "arg")
    return [*named, *(f"{rest}_{i}" for i in range(count - len(named)))][:count]


def _leaf_names(arguments: Sequence[str], values: Sequence[Any]) -> list[str]:
    """A name for each leaf of the inputs, after the argument that it comes in."""
    names: list[str] = []
    for argument, value in zip(arguments, values, strict=True):
        several = not pytree.tree_is_leaf(value)
        for i in range(len(pytree.tree_leaves(value))):
            name = f"{argument}_{i}" if several else argument
            names.append(name + "_" * names.count(name))
    return names
