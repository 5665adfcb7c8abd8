"""What a model returns -> what torch.export can flatten, and its tensors; and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.capture.forms.opened import tensors_of


class AsDict(nn.Module):
    """The model with the dataclasses in its output as dicts, which torch.export can flatten."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # not train(), which would set the submodules too

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, without dataclasses."""
        return to_dicts(self.model(*args, **kwargs))


def is_dataclass(output: Any) -> bool:
    """An instance of a dataclass; those that a library has registered are no leaves of a pytree."""
    return dataclasses.is_dataclass(output) and not isinstance(output, type)


def to_dicts(output: Any) -> Any:
    """The output with each dataclass as a dict of its fields."""
    return pytree.tree_map(
        lambda leaf: (
            {k: to_dicts(v) for k, v in _fields(leaf).items()} if is_dataclass(leaf) else leaf
        ),
        output,
    )


def _fields(instance: Any) -> dict[str, Any]:
    # A field that __init__ leaves alone has its default in the class, not in the instance.
    own = getattr(instance, "__dict__", None)
    names = [f.name for f in dataclasses.fields(instance)]
    return {name: getattr(instance, name) for name in names if own is None or name in own}


def from_dicts(like: Any, output: Any) -> Any:
    """The inverse of ``to_dicts``, with the structure of ``like``."""
    leaves, spec = pytree.tree_flatten(like)
    found = []
    for leaf, value in zip(leaves, spec.flatten_up_to(output), strict=True):
        if is_dataclass(leaf):
            rebuilt = object.__new__(type(leaf))
            for name, field in _fields(leaf).items():  # not by __init__, which may compute some
                object.__setattr__(rebuilt, name, from_dicts(field, value[name]))
            value = rebuilt
        found.append(value)
    return pytree.tree_unflatten(found, spec)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors of a model's output, of whatever type it is, in order."""
    return tensors_of(to_dicts(output))
