"""``wrt=`` -> which of the inputs are explained, by their names or positions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from lrpfx.capture.forms.inputs import Inputs, flatten_inputs, form_of, key_paths, split_inputs
from lrpfx.capture.forms.opened import opened
from lrpfx.errors import InputError

#: Names or positions of inputs, None for all that can be explained.
Wrt = None | str | int | Sequence[str | int]


def chosen_inputs(model: nn.Module, inputs: Inputs, wrt: Wrt) -> dict[str, list[int]] | None:
    """The flat inputs that each entry of ``wrt`` stands for, None for all.

    Args:
        model: For the names of its parameters of forward().
        inputs: Example inputs.
        wrt: See ``lrpfx.explain``.

    Raises:
        InputError: An entry names nothing, or there is none.
    """
    if wrt is None:
        return None
    entries = [wrt] if isinstance(wrt, (str, int)) else wrt
    tops, paths = _dotted(model, inputs)
    number = max(tops, default=-1) + 1
    found: dict[str, list[int]] = {}
    good = isinstance(entries, (tuple, list)) and len(entries) > 0
    for entry in entries if good else ():
        if isinstance(entry, int) and not isinstance(entry, bool):
            position = entry + number if entry < 0 else entry
            leaves = [i for i, top in enumerate(tops) if top == position]
            entry = paths[leaves[0]][0] if leaves else entry
        else:
            keys = str(entry).split(".")
            leaves = [i for i, path in enumerate(paths) if path[: len(keys)] == keys]
        good = good and bool(leaves)
        found[str(entry)] = leaves
    if not good:
        leaves_there = zip(paths, flatten_inputs(inputs)[0], strict=True)
        raise InputError(
            f"wrt={wrt!r} does not name inputs of the model.",
            where=[f"{'.'.join(path)}: {form_of(leaf, {})}" for path, leaf in leaves_there],
            fix="give names from these, or positions from 0, such as wrt=(0,).",
        )
    return found


def dotted_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """The name of each leaf: of the parameter of forward(), then the keys, as in "batch.pixels"."""
    return [".".join(path) for path in _dotted(model, inputs)[1]]


def argument_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """What forward() calls its arguments, as identifiers."""
    args, kwargs = split_inputs(inputs)
    return [name.replace(".", "_") for name in (*_parameters(model, len(args)), *kwargs)]


def _dotted(model: nn.Module, inputs: Inputs) -> tuple[list[int], list[list[str]]]:
    """Of each leaf the position of its input, and its name in parts.

    That is the name of the parameter of forward(), then the keys.
    """
    args, kwargs = split_inputs(inputs)
    names = [*_parameters(model, len(args)), *map(str, kwargs)]
    with key_paths():
        keyed, _ = pytree.tree_flatten_with_path(opened([*args, *kwargs.values()]))
    tops = [top.idx for (top, *_), _ in keyed if isinstance(top, pytree.SequenceKey)]
    keys = [path[1:] for path, _ in keyed]
    return tops, [
        [*names[top].split("."), *(part for key in inner for part in _key(key))]
        for top, inner in zip(tops, keys, strict=True)
    ]


def _parameters(model: nn.Module, number: int) -> list[str]:
    """Names of as many positional arguments of forward()."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    fixed = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [fixed[i] if i < len(fixed) else f"{rest}.{i - len(fixed)}" for i in range(number)]


def _key(key: Any) -> list[str]:
    if isinstance(key, pytree.MappingKey):
        return [str(key.key)]
    if isinstance(key, pytree.SequenceKey):
        return [str(key.idx)]
    return str(getattr(key, "name", key)).split(".")
