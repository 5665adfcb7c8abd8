"""nn.Module -> fx graph of ATen ops, by torch.export; the user's model is left as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lrpfx.capture.calls import own_backwards
from lrpfx.capture.captured import Captured, Trace
from lrpfx.capture.examples import batch_of, check_examples, described
from lrpfx.capture.exported.constants import Answers
from lrpfx.capture.forms import (
    AsDict,
    Inputs,
    Signature,
    copies,
    form_of,
    input_paths,
    is_dataclass,
    is_explained,
    split_inputs,
    tensors_in,
)
from lrpfx.capture.lines import first_line, raised_at, sizes_fixed
from lrpfx.capture.preserve import preserved, reachable_only
from lrpfx.capture.running import run_twice
from lrpfx.capture.tracing import tracing
from lrpfx.errors import CaptureError, InputError
from lrpfx.ops import letters_of


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
            where=described(leaves, inputs),
            fix="name dimensions that some input has; the batch, 0, varies by itself.",
        )


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
