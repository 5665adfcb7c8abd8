"""A model -> one that shares everything with it, and whose forward is another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def around(model: nn.Module, forward: Callable[..., Any], **modules: nn.Module) -> nn.Module:
    """A module with the model's parameters, buffers and module paths.

    Args:
        model: The model, which is not modified.
        forward: In the place of its own.
        **modules: Further modules, by name.
    """
    outer = inner(model)
    outer._modules.update(modules)
    outer.forward = forward
    return outer


def inner(module: nn.Module) -> nn.Module:
    """A module of its own with the same parameters, buffers and modules."""
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own
