"""The user's inputs: their structure, their forms, and whether they fit a captured graph."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture.forms.opened import PLAIN, opened
from lrpfx.errors import InputError, NonFiniteError

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class TensorForm:
    """Shape (with a letter for a size that may vary), dtype and device of an input tensor."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dims = ", ".join(map(str, self.shape))
        return f"{str(self.dtype).removeprefix('torch.')}[{dims}] on {self.device}"


@dataclass(frozen=True)
class Signature:
    """What the graph was captured for: the inputs' structure and each leaf's form.

    Args:
        spec: Tree structure of ``(args, kwargs)``.
        leaves: Per leaf: a TensorForm, or for what is no tensor the value itself, which is a
            constant of the graph.
        paths: Per leaf, the name that messages use: "x", "inputs[1]", "inputs['mask']".
        keywords: Keyword arguments in their captured order.
        batch: Batch size, if the graph holds for that size only; None if for any.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    keywords: tuple[str, ...]
    batch: int | None


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what the user gave as ``inputs``."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InputError(
        f"inputs must be a tensor, a tuple or a dict, not {type(inputs).__name__}.",
        fix=_as_tensor(inputs)
        or "give model(x) as x, model(x, y) as (x, y), model(a=x) as {'a': x}.",
    )


def _as_tensor(inputs: Any) -> str:
    """How a tensor is made of what holds numbers in another form, "" if it holds none."""
    if isinstance(inputs, np.ndarray):
        return "give a tensor: torch.from_numpy(x), of the model's dtype: .float() as a rule."
    if isinstance(inputs, str):
        return "give tensors; or a pipeline of transformers in the place of the model."
    if not hasattr(inputs, "__array__") and not hasattr(inputs, "__array_interface__"):
        return ""
    if hasattr(inputs, "getbands"):  # an image of Pillow
        return (
            "give a tensor (N, C, H, W) as the model was trained on, such as "
            "torchvision.transforms.functional.to_tensor(x)[None], normalised."
        )
    return (
        "give a tensor: torch.tensor(numpy.asarray(x)), of the model's dtype: .float() as a rule."
    )


def flatten_inputs(inputs: Inputs) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of ``inputs``, and their tree."""
    return pytree.tree_flatten(opened(split_inputs(inputs)))


def input_paths(inputs: Inputs) -> tuple[str, ...]:
    """A name for each leaf of ``inputs``."""
    if isinstance(inputs, Tensor):
        return ("the input",)
    with key_paths():
        keyed, _ = pytree.tree_flatten_with_path(opened(split_inputs(inputs)))
    # The first two keys of a path say "args or kwargs" and which; users know them as inputs[...].
    return tuple("inputs" + pytree.keystr(path[1:]) for path, _ in keyed)


_REGISTERING = threading.RLock()


@contextmanager
def key_paths() -> Iterator[None]:
    """Numbers the leaves of classes that are registered without paths, which torch.export needs."""

    def numbered(flatten: Any) -> Any:
        def with_keys(value: Any) -> Any:
            leaves, context = flatten(value)
            return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context

        return with_keys

    known = pytree.SUPPORTED_NODES
    with _REGISTERING:
        lacking = [node for node in list(known.values()) if node.flatten_with_keys_fn is None]
        for node in lacking:
            known[node.type] = node._replace(flatten_with_keys_fn=numbered(node.flatten_fn))
        try:
            yield
        finally:
            known.update({node.type: node for node in lacking})


def is_explained(leaf: Any) -> bool:
    """Floating tensors are explained; everything else is a constant."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def form_of(leaf: Any, letters: Mapping[int, str]) -> Any:
    """What a signature remembers of a leaf; ``letters`` names its dimensions that may vary."""
    if not isinstance(leaf, Tensor):
        return leaf
    shape = tuple(letters.get(dim, size) for dim, size in enumerate(leaf.shape))
    return TensorForm(shape, leaf.dtype, leaf.device)


def copies(leaves: Sequence[Any]) -> list[Any]:
    """Detached copies: a model may write into its inputs, and the user's are not to change."""
    with torch.inference_mode(False):
        return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def check_inputs(signature: Signature, inputs: Inputs) -> list[Any]:
    """The flat inputs, if they are what the graph was captured for.

    Raises:
        InputError: Another structure, shape, dtype, device, constant or batch size.
        NonFiniteError: NaN or infinity.
    """
    if isinstance(inputs, Mapping) and set(inputs) == set(signature.keywords):
        inputs = {key: inputs[key] for key in signature.keywords}
    leaves, spec = flatten_inputs(inputs)
    if spec != signature.spec:
        raise InputError(
            "the inputs are structured otherwise than those the model was captured with.",
            where=[
                f"captured: {', '.join(signature.paths)}",
                f"given: {', '.join(input_paths(inputs))}",
            ],
            fix="give (x, y) for model(x, y), {'a': x} for model(a=x), all that were captured; or "
            "make an Explainer for this structure.",
        )
    bad = []
    for leaf, form, path in zip(leaves, signature.leaves, signature.paths, strict=True):
        if not isinstance(form, TensorForm):
            if isinstance(leaf, Tensor) or leaf != form:
                bad.append(f"{path}: {leaf!r}, captured with the constant {form!r}")
        elif not isinstance(leaf, Tensor) or not _has_form(leaf, form):
            bad.append(f"{path}: {_describe(leaf)}, captured with {form}")
    if bad:
        raise InputError(
            "the inputs do not fit what the model was captured with.",
            where=bad,
            fix=_conversion(leaves, signature)
            or "convert them, or make an Explainer for inputs of this form"
            + _lengths(leaves, signature),
        )
    for letter, sizes in varying_sizes(signature, leaves).items():
        if len(sizes) > 1 or 0 in sizes:
            what = "batch sizes" if letter == "N" else f"sizes {letter}"
            raise InputError(
                f"the inputs have {what} {sorted(sizes)}.", fix="give one size, at least 1."
            )
    _refuse_infinite(leaves, signature.paths)
    return leaves


def has_form(signature: Signature, inputs: Inputs) -> bool:
    """Whether the inputs are of exactly the structure, shapes, dtypes and constants captured."""
    leaves, spec = flatten_inputs(inputs)
    if spec != signature.spec:
        return False
    pairs = list(zip(leaves, signature.leaves, strict=True))
    return all(
        isinstance(leaf, Tensor) and _has_form(leaf, form)
        if isinstance(form, TensorForm)
        else type(leaf) is type(form) and isinstance(leaf, PLAIN) and leaf == form
        for leaf, form in pairs
    )


def varying_sizes(signature: Signature, leaves: Sequence[Any]) -> dict[str, set[int]]:
    """The sizes that stand for each letter of the signature."""
    sizes: dict[str, set[int]] = {}
    for leaf, form in zip(leaves, signature.leaves, strict=True):
        if isinstance(form, TensorForm):
            for size, letter in zip(leaf.shape, form.shape, strict=True):
                if isinstance(letter, str):
                    sizes.setdefault(letter, set()).add(size)
    return sizes


def _refuse_infinite(leaves: Sequence[Any], paths: Sequence[str]) -> None:
    infinite = [
        f"{path}: {int((~leaf.isfinite()).sum())} of {leaf.numel()} entries"
        for leaf, path in zip(leaves, paths, strict=True)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not is_finite(leaf)
    ]
    if infinite:
        raise NonFiniteError(
            "the inputs have NaN or infinite entries.", where=infinite, fix="clean them first."
        )


def is_finite(t: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, in a tenth of the time that isfinite takes."""
    if not t.numel():
        return True
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(t.detach()))


def _has_form(leaf: Tensor, form: TensorForm) -> bool:
    same_shape = len(leaf.shape) == len(form.shape) and all(
        isinstance(size, str) or size == given
        for size, given in zip(form.shape, leaf.shape, strict=True)
    )
    same_kind = leaf.dtype == form.dtype and leaf.device == form.device
    return same_shape and same_kind and leaf.layout == torch.strided


def _lengths(leaves: Sequence[Any], signature: Signature) -> str:
    """What lets a size vary, if sizes are all that differs."""
    other = set()
    for leaf, form in zip(leaves, signature.leaves, strict=True):
        if isinstance(form, TensorForm) and isinstance(leaf, Tensor) and leaf.ndim:
            if len(leaf.shape) != len(form.shape) or leaf.dtype != form.dtype:
                return "."
            pairs = enumerate(zip(leaf.shape, form.shape, strict=True))
            other |= {d for d, (n, m) in pairs if d and isinstance(m, int) and n != m}
    dims = ", ".join(map(str, sorted(other))) + ("," if len(other) == 1 else "")
    return f"; one for sizes of many kinds is Explainer(..., dynamic=({dims}))." if other else "."


def _conversion(leaves: Sequence[Any], signature: Signature) -> str:
    """What gives all inputs the form that was captured, if one of the usual steps does."""
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        return ""  # there are no values to convert
    for told, change in _STEPS:
        if all(
            _has_form(change(leaf, form), form)
            if isinstance(form, TensorForm) and isinstance(leaf, (Tensor, np.ndarray))
            else leaf == form
            for leaf, form in zip(leaves, signature.leaves, strict=True)
        ):
            return told
    return ""


def _as_captured(leaf: Any, form: TensorForm) -> Tensor:
    return torch.as_tensor(leaf).to(form.device, form.dtype)


#: Words, and the step itself.
_STEPS: tuple[tuple[str, Callable[[Any, TensorForm], Tensor]], ...] = (
    (
        "add the batch dimension: x[None].",
        lambda leaf, form: torch.as_tensor(leaf)[None],
    ),
    ("give the dtype and device captured: torch.as_tensor(x, dtype=, device=).", _as_captured),
    (
        "add the batch dimension, x[None], and give the dtype and device captured.",
        lambda leaf, form: _as_captured(leaf, form)[None],
    ),
)


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    form = str(TensorForm(tuple(leaf.shape), leaf.dtype, leaf.device))
    return form if leaf.layout == torch.strided else f"{leaf.layout} {form}"
