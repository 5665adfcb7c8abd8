"""The user's model on the user's inputs, and the repair where it fails on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.capture.forms import copies, form_of
from lrpfx.capture.lines import first_line, raised_at
from lrpfx.capture.preserve import preserved
from lrpfx.errors import InputError, LrpError, TrainingModeError, counted


def run_model(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """What the model returns for the flat inputs; InputError if it fails on them."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # the model is the user's, and may raise anything
        mixing = [
            ("batch_norm uses the statistics of the batch", name or "(the model)", "")
            for name, module in model.named_modules()
            if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if mixing:  # in training mode batch norm refuses single samples
            raise TrainingModeError(
                f"the model is in training mode and fails: {first_line(error)}",
                where=counted(mixing),
                fix="call model.eval() first, or give more samples.",
            ) from error
        raise InputError(
            f"the model itself fails on these inputs: {type(error).__name__}: {first_line(error)}",
            where=raised_at(error)
            + [f"inputs: {', '.join(str(form_of(leaf, {})) for leaf in leaves)}"],
            fix="check that model(...) runs on them: shapes, dtypes and devices.",
        ) from error


def run_given(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """As ``run_model`` on the user's own inputs: its error says what they lack, if that is found.

    It is found by trying: what the model takes is what it runs on.
    """
    try:
        return run_model(model, copies(leaves), spec)
    except InputError as error:
        fix = _missing(model, leaves, spec) or _by_trying(model, leaves, spec) or error.fix
        raise InputError(error.what, where=error.where, fix=fix) from error.__cause__


def run_twice(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """What the second run returns: what changes from call to call is no function of the inputs."""
    run_given(model, leaves, spec)
    return run_model(model, copies(leaves), spec)


def _missing(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> str:
    """What is said if ``forward`` takes other arguments than are given, "" if it takes these."""
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        parameters = signature.parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
        given = " and ".join([f"{len(args)} by position"] * bool(args) + list(kwargs))
        return (
            f"forward{signature} needs {', '.join(needed) or 'nothing'}: give "
            f"({', '.join(needed)}{',' * (len(needed) == 1)}) as the inputs, or a dict with these "
            f"names; given: {given or 'nothing'}."
        )
    return ""


def _by_trying(model: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> str:
    for told, change in _changes(model, leaves):
        try:
            changed = [change(leaf) for leaf in leaves]
            first = next(
                (new for old, new in zip(leaves, changed, strict=True) if old is not new), None
            )
            if first is None:
                continue
            with preserved(model):
                run_model(model, copies(changed), spec)
        except (LrpError, RuntimeError, TypeError):  # arrays of objects, tensors without values
            continue
        return f"{told}; the model runs on {form_of(first, {})}."
    return ""


_Change = Callable[[Any], Any]


def _changes(model: nn.Module, leaves: Sequence[Any]) -> list[tuple[str, _Change]]:
    """What inputs often lack, as words and as a function of one of them."""
    floating = [t for t in model.parameters() if t.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    device = floating[0].device if floating else torch.device("cpu")
    own = f"dtype {str(dtype).removeprefix('torch.')}"

    def of_tensors(change: Callable[[Tensor], Tensor]) -> _Change:
        return lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf

    def of_images(change: Callable[[Tensor], Tensor]) -> _Change:
        return of_tensors(lambda t: change(t) if t.ndim in (3, 4) else t)

    alone = of_tensors(lambda t: t[None])
    typed = of_tensors(lambda t: t.to(dtype) if _differs(t, dtype) else t)
    placed = of_tensors(lambda t: t.to(device) if t.device != device else t)
    channels = of_images(lambda t: t.movedim(-1, -3))
    coloured = of_tensors(lambda t: t.repeat(1, 3, 1, 1) if t.ndim == 4 and t.shape[1] == 1 else t)
    gray = of_tensors(
        lambda t: (
            t.mean(1, keepdim=True)
            if t.ndim == 4 and t.shape[1] in (3, 4) and t.is_floating_point()
            else t
        )
    )
    one_image = of_images(lambda t: t.movedim(-1, -3)[None] if t.ndim == 3 else t)
    missing, order = "add the batch dimension: x[None]", "put channels first: x.movedim(-1, -3)"
    return [
        ("give tensors: torch.from_numpy(x)", _from_numpy),
        (
            f"give tensors of the model's {own}: torch.as_tensor(x, dtype={dtype})",
            lambda leaf: typed(_from_numpy(leaf)),
        ),
        (missing, alone),
        (f"convert to the model's {own}: x.to({dtype})", typed),
        (f"move to the model's device: x.to('{device}')", placed),
        (order, channels),
        ("add the batch dimension and put channels first: x.movedim(-1, -3)[None]", one_image),
        ("give the gray image three channels: x.repeat(1, 3, 1, 1)", coloured),
        ("give the image one channel: x.mean(1, keepdim=True)", gray),
        (f"{missing}, and convert to the model's {own}", lambda leaf: alone(typed(leaf))),
    ]


def _differs(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is of numbers in another dtype; integers may be ids, bytes are pixels."""
    return t.dtype != dtype and (t.is_floating_point() or t.dtype == torch.uint8)


def _from_numpy(leaf: Any) -> Any:
    return torch.from_numpy(leaf.copy()) if isinstance(leaf, np.ndarray) else leaf
