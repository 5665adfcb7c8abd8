"""Ops that PyTorch writes in strides or into memory -> others, while a graph is written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

#: Of pools by mean, over how many dimensions. Down to one entry their result has strides of its own
#: for some layouts, and so has their derivative.
_POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}


class Spelled(TorchFunctionMode):
    """Such ops are run as others that give the same, whose derivatives are plain ops."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The op, or what stands for it."""
        if (dims := _POOLS.get(func)) is not None and {*args[1]} == {1}:
            return args[0].mean(list(range(-dims, 0)), keepdim=True)
        if func is aten.pad.default and args[2:3] == ("circular",):
            return _pad_circular(args[0], args[1])
        return func(*args, **(kwargs or {}))


def _pad_circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    """What goes over an edge comes in at the other; PyTorch writes that into an empty tensor."""
    for i in range(len(pad) // 2):
        dim, (low, high) = -1 - i, pad[2 * i : 2 * i + 2]
        begin = max(-low, 0)
        x = x.narrow(dim, begin, x.shape[dim] - begin - max(-high, 0))
        before = x.narrow(dim, x.shape[dim] - max(low, 0), max(low, 0))
        x = torch.cat([before, x, x.narrow(dim, 0, max(high, 0))], dim)
    return x
