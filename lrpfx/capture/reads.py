"""Ops whose result, or the size of it, depends on values of tensors: where a run reads these."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrpfx.ops import NAMED

aten = torch.ops.aten


class Read(NamedTuple):
    """A place where values of tensors, and not only their form, decided what the run did.

    Args:
        how: The op or function that read them.
        source: Line of the user's code.
        of_inputs: Whether they depend on the inputs, or on parameters and buffers only.
        leaves: Whether they left PyTorch as an array or a list.
    """

    how: str
    source: str
    of_inputs: bool
    leaves: bool

    def __str__(self) -> str:
        """The op, and the line where it is called."""
        return f"{self.how} at {self.source}" if self.source else self.how


#: How users know an op that reads a number.
HOW = {"item": "a number", "is_nonzero": "a condition", "index": "a mask"}
#: What reads a mask, and not the values of what it picks.
MASKED = {aten.index.Tensor, aten.masked_select.default}
#: Whether values decide the form of the result, for which PyTorch has no tag.
_UNTAGGED = {aten._pack_padded_sequence.default, aten.tensor_split.tensor_indices_or_sections}
_DECIDING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def takes_values(func: Any, flat: Sequence[Any]) -> bool:
    """Whether an op's result is a number, or of a size, that values of its arguments decide."""
    return any(map(is_mask, flat[1:])) if func is aten.index.Tensor else _decides(func)


@functools.cache
def _decides(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return False
    known = func.namespace in ("aten", "prim", "prims") or func._schema.name in NAMED
    return not known or func in _UNTAGGED or any(tag in func.tags for tag in _DECIDING)


def is_mask(value: Any) -> bool:
    """Whether a value is a tensor that picks elements by being true there."""
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
