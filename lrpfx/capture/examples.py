"""Model and example inputs -> flat inputs, if these are such as can be captured."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.capture.forms import Inputs, copies, flatten_inputs, form_of, input_paths, is_explained
from lrpfx.errors import CaptureError, InputError, some


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
            where=some(described(leaves, inputs)),
            fix=fix,
        )
    if batch_of(leaves) == 0:
        raise InputError("the inputs hold no samples.", fix="give a batch of at least one.")
    return copies(leaves), spec


def described(leaves: Sequence[Any], inputs: Inputs) -> list[str]:
    """Path and form of each leaf, as errors list them."""
    named = zip(input_paths(inputs), leaves, strict=True)
    return [f"{path}: {form_of(leaf, {})}" for path, leaf in named]


def batch_of(leaves: Sequence[Any]) -> int | None:
    """How many samples the inputs hold; None if they have no dimensions."""
    sized = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0]
    sized.sort(key=lambda leaf: not is_explained(leaf))  # floating inputs tell before token ids
    return sized[0].shape[0] if sized else None


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
