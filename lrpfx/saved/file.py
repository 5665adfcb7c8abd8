"""A recipe <-> a ``.lrpfx`` file: JSON and safetensors in a zip archive, and no code.

``explainer.json`` says what the Explainer was made of, and whose weights it saw, by their digests;
``tensors.safetensors`` has the example inputs and tensors of rules; ``weights.safetensors``, if it
was asked for, parameters and buffers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrpfx.capture import Inputs, state_of
from lrpfx.errors import InputError, LrpError, some
from lrpfx.plan import read_rules
from lrpfx.saved.recipe import OPTIONS, Recipe
from lrpfx.saved.rules import restored, written

#: Of the layout of the file; a file of a later one is refused.
FORMAT = 1
#: What ``load`` does with weights: those of the model must be those that were saved; the file's
#: are written into the model; or the model's are taken as they are.
Weights = Literal["same", "file", "model"]


def write_file(path: str | os.PathLike[str], recipe: Recipe, weights: bool) -> None:
    """Write a recipe to a file.

    Args:
        path: Of the file.
        recipe: The recipe.
        weights: Whether the model's parameters and buffers are written, too.

    Raises:
        InputError: Rules or inputs hold what cannot be stored without code.
        ImportError: safetensors is not installed.
    """
    save = _safetensors().save
    tensors: dict[str, Tensor] = {}
    rules = None if recipe.rules is None else written(read_rules(recipe.rules), tensors)
    device = _device(recipe.model)
    about = {
        "format": FORMAT,
        "lrpfx": sys.modules["lrpfx"].__version__,
        "torch": torch.__version__,
        "model": type(recipe.model).__name__,
        "device": str(device),
        "rules": rules,
        "inputs": _written_inputs(recipe.inputs, tensors),
        "options": dict(recipe.options),
        "training": dict(recipe.training),
        "compiled": recipe.compiled is not None,
        "devices": {name: str(t.device) for name, t in tensors.items()},
        "state": {name: _about(t) for name, t in state_of(recipe.model).items()},
    }
    members = {
        "explainer.json": json.dumps(about, indent=1).encode(),
        "tensors.safetensors": save(_plain(tensors)),
    }
    if weights:
        members["weights.safetensors"] = save(_plain(_each_once(state_of(recipe.model))))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def read_file(
    path: str | os.PathLike[str], model: nn.Module, weights: Weights, rules: Any
) -> Recipe:
    """The recipe that ``write_file`` wrote, for a model with these weights.

    Args:
        path: Of the file.
        model: The model.
        weights: See ``Weights``.
        rules: In the place of those of the file, if they are not None.

    Raises:
        InputError: The file is no such file, or of a later version; or the model is another.
        SelectorError: The rules name classes of modules that the model does not have.
        ImportError: safetensors is not installed.
    """
    load = _safetensors().load
    if weights not in ("same", "file", "model"):
        raise InputError(f"weights={weights!r}.", fix='give "same", "file" or "model".')
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}.",
            fix="give the model that the Explainer is of: a file holds no code.",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("explainer.json"))
            if about["format"] > FORMAT:
                raise InputError(
                    f"{os.fspath(path)!s} is of format {about['format']}, written by lrpfx "
                    f"{about['lrpfx']}; this version reads format {FORMAT}.",
                    fix="update lrpfx, or make a new Explainer.",
                )
            tensors = _placed(load(archive.read("tensors.safetensors")), about, model)
            _refuse_another(about, model, values=weights == "same")
            stored = load(archive.read("weights.safetensors")) if weights == "file" else {}
        inputs = _restored_inputs(about["inputs"], tensors)
        given = restored(about["rules"], tensors, model) if rules is None else rules
        options = {name: about["options"][name] for name in OPTIONS if name in about["options"]}
        compiled: dict[str, Any] | None = {} if about["compiled"] else None
        recipe = Recipe(model, inputs, given, options, dict(about["training"]), compiled)
        if weights == "file":
            _write_into(model, stored)
        return recipe
    except LrpError:
        raise
    except Exception as error:  # whatever a missing, damaged or hostile file leads to
        raise InputError(
            f"{os.fspath(path)!s} holds no Explainer"
            + (" with weights" if weights == "file" else "")
            + f": {type(error).__name__}: {error}",
            fix="give a file written by Explainer.save().",
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Explainers are saved by safetensors: pip install 'lrpfx[save]'."
        ) from error
    return safetensors.torch


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in state_of(model).values()), torch.device("cpu"))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: each with memory of its own."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied parameters under the first of their names."""
    first: dict[int, str] = {}
    return {name: t for name, t in state.items() if first.setdefault(id(t), name) == name}


def _placed(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """Tensors on the devices that they were on; those that were with the model are so again."""
    moved = {about["device"]: _device(model)}
    devices = about["devices"]
    return {n: t.to(moved.get(devices[n], torch.device(devices[n]))) for n, t in tensors.items()}


# -- inputs -------------------------------------------------------------------------------------


def _written_inputs(inputs: Inputs, tensors: dict[str, Tensor]) -> Any:
    def written(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": [[k, written(v, f"{name}.{k}")] for k, v in value.items()]}
        if type(value) in (tuple, list):
            kind = type(value).__name__
            return {kind: [written(v, f"{name}.{i}") for i, v in enumerate(value)]}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        raise InputError(
            f"the inputs hold a {type(value).__name__}, which a file without code cannot hold.",
            where=[name],
            fix="make the Explainer for inputs of tensors, tuples, lists and dicts.",
        )

    return written(inputs, "inputs")


def _restored_inputs(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _restored_inputs(v, tensors) for key, v in value}
    if kind in ("list", "tuple"):
        items = [_restored_inputs(v, tensors) for v in value]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return value
    raise KeyError(kind)


# -- weights ------------------------------------------------------------------------------------


def _about(tensor: Tensor) -> list[Any]:
    """Dtype, shape, and a digest of the values."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(plain.numpy().data).hexdigest()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest]


def _refuse_another(about: Mapping[str, Any], model: nn.Module, values: bool) -> None:
    """Raise InputError unless the model's parameters and buffers are those that were saved."""
    saved, own = about["state"], state_of(model)
    bad = [f"{name}: is not in this model" for name in saved if name not in own]
    bad += [f"{name}: is not in the file" for name in own if name not in saved]
    for name in [name for name in own if name in saved]:
        dtype, shape = str(own[name].dtype).removeprefix("torch."), list(own[name].shape)
        if [dtype, shape] != saved[name][:2]:
            bad.append(f"{name}: {dtype}{shape}, saved as {saved[name][0]}{saved[name][1]}")
    if bad:
        raise InputError(
            f"the model is another than the {about['model']} that the Explainer was saved of.",
            where=some(bad),
            fix="give a model with the same parameters and buffers.",
        )
    other = [name for name in own if values and _about(own[name]) != saved[name]]
    if other:
        raise InputError(
            f"{len(other)} of {len(own)} parameters and buffers have other values than those of "
            f"the {about['model']} that the Explainer was saved of.",
            where=some(other),
            fix='load the same weights into the model first; or Explainer.load(..., weights="file")'
            ' writes those of a file that was saved with weights=True into it, and weights="model" '
            "takes the model's as they are.",
        )


def _write_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    pairs = [(t, weights[name]) for name, t in _each_once(state_of(model)).items()]
    with torch.no_grad():
        for tensor, value in pairs:
            tensor.copy_(value)
