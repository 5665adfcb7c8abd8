"""nn.Module -> fx graph of ATen ops, by torch.export; the user's model is left as it was."""

from __future__ import annotations

import inspect
import io
import keyword
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lrpfx.capture.calls import own_backwards
from lrpfx.capture.constants import Answers
from lrpfx.capture.inputs import (
    Inputs,
    Signature,
    TensorForm,
    copies,
    flatten_inputs,
    form_of,
    input_paths,
    is_explained,
    key_paths,
    split_inputs,
)
from lrpfx.capture.lines import first_line, raised_at, sizes_fixed
from lrpfx.capture.outputs import AsDict, from_dicts, is_dataclass, tensors_in
from lrpfx.capture.preserve import preserved, reachable_only
from lrpfx.capture.reads import Read
from lrpfx.capture.release import released
from lrpfx.capture.running import run_twice
from lrpfx.errors import CaptureError, InputError, some
from lrpfx.ops import letters_of

#: Held while a model is traced: torch.export is not re-entrant, and puts fake tensors into the
#: model's place of parameters for the time being.
TRACING = threading.RLock()


@dataclass(frozen=True)
class Captured:
    """A model that was captured, and how.

    Args:
        model: The model.
        signature: What inputs it takes.
        output: What the model returns, if there are dataclasses in it that the graph has as
            dicts; else None.
        why_static: Why the batch size is fixed, "" if it is not.
        training: Whether each module was in training mode.
        read: Copies of the parameters and buffers that a branch has been taken by.
        decisions: Where values decided what a recorded run did; None if the model was exported.
        own_backwards: Functions with a backward of their own that it calls, with the lines.
    """

    model: nn.Module
    signature: Signature
    training: tuple[tuple[nn.Module, bool], ...]
    output: Any = None
    why_static: str = ""
    read: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: tuple[Read, ...] | None = None
    own_backwards: tuple[str, ...] = ()

    @property
    def batch_varies(self) -> bool:
        """Whether the graph holds for any number of samples."""
        forms = [form for form in self.signature.leaves if isinstance(form, TensorForm)]
        return any(form.shape[:1] == ("N",) for form in forms)

    @property
    def prefix(self) -> str:
        """What stands before every module path in the graph."""
        return "model." if self.output is not None else ""

    def rebuild(self, output: Any) -> Any:
        """The model's own output from the graph's."""
        return output if self.output is None else from_dicts(self.output, output)


class Program(Protocol):
    """What is used of an ``ExportedProgram``; a recorded run has it, too."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph as it was traced."""

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What it was traced with: positional arguments and keywords."""

    def module(self, check_guards: bool) -> fx.GraphModule | nn.Module:
        """The graph with the model's own parameters."""

    def run_decompositions(self, decomp_table: dict[Any, Any]) -> ExportedProgram:
        """The graph without in-place ops, and without the ops of the table."""


class Trace(NamedTuple):
    """What comes out of a capture.

    Args:
        captured: The model, and how it was captured.
        program: The graph, one node per ATen call.
        expected: The tensors that the model returned for the example inputs.
    """

    captured: Captured
    program: Program
    expected: list[Tensor]


def export(model: nn.Module, inputs: Inputs, dynamic: Sequence[int] = ()) -> Trace:
    """Capture ``model`` as a graph that computes what ``model(inputs)`` computes.

    Args:
        model: Any module that torch.export can trace; it is not modified.
        inputs: Example inputs; tensors of the batch's leading size get a dynamic batch dimension.
        dynamic: Further dimensions that may vary, of every tensor that has them.

    Returns:
        The trace; ``check_faithful`` compares the outputs of its graph with the expected ones.

    Raises:
        CaptureError: The model cannot be traced.
        InputError: No input can be explained, or the model itself fails on the inputs.
    """
    leaves, spec = check_examples(model, inputs)
    _check_dynamic(dynamic, leaves, inputs)
    batch = batch_of(leaves)
    # Each on its own: a cache that the run fills would be a constant of the trace.
    with preserved(model), own_backwards() as backwards:
        output = run_twice(model, leaves, spec)
        expected = copies(tensors_in(output))  # the output may be a buffer that is to be restored
    traced = AsDict(model) if any(map(is_dataclass, pytree.tree_leaves(output))) else None
    with preserved(model):
        program, why_static, read = _export(traced or model, leaves, spec, batch, dynamic)
    forms = _forms(program, leaves)
    keywords = tuple(split_inputs(inputs)[1])
    captured = Captured(
        model=model,
        signature=Signature(
            spec, forms, input_paths(inputs), keywords, batch if why_static else None
        ),
        training=tuple((module, module.training) for module in model.modules()),
        output=output if traced else None,
        why_static=why_static,
        own_backwards=tuple(backwards),
        read={name.removeprefix("model.") if traced else name: t for name, t in read.items()},
    )
    return Trace(captured, program, expected)


def check_examples(model: nn.Module, inputs: Inputs) -> tuple[list[Any], pytree.TreeSpec]:
    """Copies of the flat inputs, and their tree, if model and inputs are such as can be captured.

    Raises:
        CaptureError: The model cannot be traced.
        InputError: No input can be explained.
    """
    _refuse_untraceable(model)
    leaves, spec = flatten_inputs(inputs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        fix = "give at least one floating tensor, or token ids that feed an embedding."
        if any(isinstance(leaf, np.ndarray) for leaf in leaves):
            fix = "give tensors: torch.from_numpy(x)."
        elif all(isinstance(leaf, (int, float)) for leaf in leaves) and not spec.is_leaf():
            fix = "give a tensor in place of lists of numbers: torch.tensor(x)."
        raise InputError(
            "there is nothing to explain: no input is a tensor.",
            where=some(_described(leaves, inputs)),
            fix=fix,
        )
    if batch_of(leaves) == 0:
        raise InputError("the inputs hold no samples.", fix="give a batch of at least one.")
    return copies(leaves), spec


def _described(leaves: Sequence[Any], inputs: Inputs) -> list[str]:
    named = zip(input_paths(inputs), leaves, strict=True)
    return [f"{path}: {form_of(leaf, {})}" for path, leaf in named]


def _check_dynamic(dynamic: Any, leaves: Sequence[Any], inputs: Inputs) -> None:
    """Raise InputError unless ``dynamic`` names dimensions of the inputs."""
    wrong = not isinstance(dynamic, (tuple, list, range)) or any(
        not isinstance(d, int) or isinstance(d, bool) or d < 1 for d in dynamic
    )
    if wrong:
        raise InputError(
            f"dynamic={dynamic!r} is no sequence of dimensions beside the batch.",
            fix="give positive numbers, such as (1,) for the tokens of (N, T, D).",
        )
    lacking = [d for d in dynamic if all(d >= t.ndim for t in leaves if isinstance(t, Tensor))]
    if lacking:
        raise InputError(
            f"dynamic={dynamic!r}: no input has a dimension {lacking[0]}.",
            where=_described(leaves, inputs),
            fix="name dimensions that some input has; the batch, 0, varies by itself.",
        )


def batch_of(leaves: Sequence[Any]) -> int | None:
    """How many samples the inputs hold; None if they have no dimensions."""
    sized = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
    sized.sort(key=lambda leaf: not is_explained(leaf))  # floating inputs tell before token ids
    return sized[0].shape[0] if sized else None


def _forms(program: ExportedProgram, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The leaves' forms, with the letters of the sizes that the graph left open."""
    letters = letters_of(program.graph)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"][-len(leaves) :]
    forms = []
    for leaf, node in zip(leaves, placeholders, strict=True):
        shape = node.meta["val"].shape if isinstance(leaf, Tensor) else ()
        open_dims = {d: letters[str(s)] for d, s in enumerate(shape) if not isinstance(s, int)}
        forms.append(form_of(leaf, open_dims))
    return tuple(forms)


def _dispatches(t: Tensor) -> bool:
    """Whether a tensor's class says itself what ops do."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _observes(module: nn.Module) -> bool:
    """Whether a module quantises by the statistics of what it sees."""
    enabled = getattr(module, "observer_enabled", None)
    return isinstance(enabled, Tensor) and bool(enabled.any())


def _breaks_code(path: str) -> bool:
    return bool(set(path) & set("\"'\\\n\r")) or any(map(keyword.iskeyword, path.split(".")))


def _refuse_untraceable(model: nn.Module) -> None:
    """Raise CaptureError for modules that hide their computation from every tracer."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}.",
            fix="give an instance; wrap a function into the forward() of a module.",
        )
    state = [*model.named_parameters(), *model.named_buffers()]
    lazy = [n for n, t in state if nn.parameter.is_lazy(t)]
    if lazy:
        raise InputError(
            "the model has parameters that are not initialised yet.",
            where=some(lazy),
            fix="run the model once on some input first.",
        )
    classes = [f"{name} ({type(t).__name__})" for name, t in state if _dispatches(t)]
    if classes:
        raise CaptureError(
            "the model has parameters that are no plain tensors: their class says what ops make of "
            "them, as that of quantised weights does.",
            where=some(classes),
            fix="put plain tensors in their place, such as weight.dequantize(), or explain the "
            "model as it was before quantisation.",
        )
    empty = [name for name, t in state if t.is_meta]
    if empty:
        raise InputError(
            "the model has parameters without values, on the meta device.",
            where=some(empty),
            fix="load the weights onto a real device first.",
        )
    made = [name for name, t in state if t.is_inference()]
    if made:
        raise CaptureError(
            "the model was made in inference mode; what is made there never works with autograd.",
            where=some(made),
            fix="make or load it outside torch.inference_mode(), or copy.deepcopy(model) there.",
        )
    odd = [repr(name) for name, _ in state if _breaks_code(name)]
    if odd:
        raise CaptureError(
            "parameters have names that cannot stand in code, and a graph is code.",
            where=some(odd),
            fix="use no quotes, backslashes, line breaks and Python keywords.",
        )
    watching = [name for name, module in model.named_modules() if _observes(module)]
    if watching:
        raise CaptureError(
            "observers of a quantisation are on: the model's output changes from call to call.",
            where=some(watching),
            fix="model.apply(torch.ao.quantization.disable_observer) first.",
        )
    bad = {
        f"{name or '(the model)'} ({type(module).__name__})": module
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) or ".quantized." in type(module).__module__
    }
    if bad:
        raise CaptureError(
            "scripted and quantised modules cannot be captured.",
            where=list(bad),
            fix="explain the model as it was before torch.jit.script or quantisation.",
        )


def _export(
    model: nn.Module,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    batch: int | None,
    dynamic: Sequence[int],
) -> tuple[ExportedProgram, str, dict[str, Tensor]]:
    """The exported model, why its batch size is fixed ("" if it is not), and what it has read."""
    why = "no explained input has a batch dimension"
    for batched in _batchings(leaves, batch):
        if not batched:
            break
        with sizes_fixed() as lines:
            try:
                program, read = _export_once(
                    model, _widened(leaves, batched), spec, batched, dynamic
                )
                return program, "", read
            except Exception as error:  # whatever the tracer raises: the next attempt may do
                why = _why_static(error, lines)
    try:
        program, read = _export_once(model, list(leaves), spec, set(), dynamic)
        return program, why, read
    except Exception as error:  # the tracer, and the model in it, may raise anything
        raise _capture_error(model, error) from error


def _why_static(error: Exception, lines: Sequence[str]) -> str:
    """Why the batch cannot vary: where the code fixes its size, or what the tracer says."""
    said = first_line(error)
    if not said.startswith("Constraints violated"):
        return f"with sizes that vary torch.export fails: {type(error).__name__}: {said}"
    place = f"at {lines[0]}" if lines else "in forward()"
    return f"the size is fixed {place}; make an Explainer for each size of the batch"


def _batchings(leaves: Sequence[Any], batch: int | None) -> list[set[int]]:
    """Which leaves to give a dynamic batch dimension, most likely first."""
    if batch is None:
        return []
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim]
    matching = {i for i in tensors if leaves[i].shape[0] == batch}
    explained = {i for i in matching if is_explained(leaves[i])}
    return [matching] if explained in (matching, set()) else [matching, explained]


def _widened(leaves: Sequence[Any], batched: set[int]) -> list[Any]:
    """Two samples at least: torch.export specialises a batch of one without a word."""
    return [
        torch.cat([leaf, leaf]) if i in batched and leaf.shape[0] == 1 else leaf
        for i, leaf in enumerate(leaves)
    ]


def _export_once(
    model: nn.Module,
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    batched: set[int],
    further: Sequence[int],
) -> tuple[ExportedProgram, dict[str, Tensor]]:
    # Fresh copies: the tracer marks the dimensions of the tensors it is given as dynamic.
    args, kwargs = pytree.tree_unflatten(copies(leaves), spec)
    dynamic = None
    dims = [_open_dims(leaf, i in batched, further) for i, leaf in enumerate(leaves)]
    if any(dims):
        shapes_args, shapes_kwargs = _shapes(spec, iter(dims))
        # torch.export wants the shapes by parameter of forward(), *args and **kwargs gathered.
        bound = inspect.signature(model.forward).bind(*shapes_args, **shapes_kwargs)
        dynamic = dict(bound.arguments)
    answers = Answers(model)
    with (
        tracing(),
        reachable_only(model),
        torch.inference_mode(False),  # whatever stands around the call is no part of the model
        torch.enable_grad(),
        answers,
    ):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    return program, answers.read


def _shapes(spec: pytree.TreeSpec, dims: Iterator[Any]) -> Any:
    """The leaves' sizes in the inputs' structure; torch.export wants lists for classes."""
    if spec.is_leaf():
        return next(dims)
    children = [_shapes(child, dims) for child in spec.children()]
    if spec.type not in pytree.BUILTIN_TYPES:
        return children
    return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(children, spec.context)


def _open_dims(leaf: Any, batched: bool, further: Sequence[int]) -> dict[int, Any] | None:
    """What torch.export is told of a leaf's sizes; those it cannot leave open it fixes."""
    if not isinstance(leaf, Tensor):
        return None
    dims: dict[int, Any] = {d: torch.export.Dim.AUTO for d in further if 0 < d < leaf.ndim}
    return dims | ({0: torch.export.Dim.DYNAMIC} if batched else {})


class _Unchecked:
    """Stands for reentrant checkpointing while a model is traced.

    That runs its function under no_grad, and leaves the rest of the trace under it.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """The function itself: what is kept for the backward pass does not concern a trace."""
        return function(*args)


@contextmanager
def tracing() -> Iterator[None]:
    """One trace at a time, without the tracer's log: what goes wrong is raised as one error."""
    logger = logging.getLogger("torch")
    nowhere = io.StringIO()  # a failing trace prints its graph
    with (
        TRACING,
        released(),
        key_paths(),
        warnings.catch_warnings(),
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        mock.patch("torch.utils.checkpoint.CheckpointFunction", _Unchecked),
    ):
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    text = str(error)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        what = "forward() branches on values of tensors, and a graph holds one branch only."
        fix = (
            "move the branch out of forward(), or write it with torch.where; "
            "or explain a wrapper module around the part that has none."
        )
    elif unknown := re.search(r"Found <class '([\w.]+)'> in output", text):
        what = f"the model returns a {unknown[1]}, which torch.export does not know."
        fix = "return tensors only, from a wrapper module" + (
            "; of a language model give use_cache=False with the inputs."
            if "Cache" in unknown[1]
            else "."
        )
    else:
        what = f"torch.export cannot trace the model: {first_line(error)}"
        fix = "rewrite that line with torch ops, or explain a wrapper module around the rest."
    owner = model.model if isinstance(model, AsDict) else model
    where = raised_at(error) or [type(owner).__name__]
    return CaptureError(what, where=where, fix=fix)
