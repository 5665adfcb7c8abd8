"""Arguments of an op that picks by size -> what each output is picked from, side by side.

The candidates of an output lie along a last dimension. They are moved there and nothing else, so
that what each candidate gets goes back to where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]  # the call's arguments by schema name, live ones included


class Candidates(NamedTuple):
    """What every output of a pool is picked from.

    Args:
        values: The candidates, (..., K); the other dimensions hold as many entries as the output.
        inside: Which of them there are, broadcasting to ``values``: windows at an edge have fewer.
    """

    values: Tensor
    inside: Tensor


Lister = Callable[[Arguments], Candidates]


class Pool(NamedTuple):
    """How an op picks.

    Args:
        candidates: Lists them.
        sign: 1 if the largest is picked, -1 if the smallest.
    """

    candidates: Lister
    sign: int = 1


def windows(n: int) -> Lister:
    """Of a max pool over the last n dimensions."""

    def candidates(args: Arguments) -> Candidates:
        x: Tensor = args["self"]
        first = x.ndim - n
        sizes = x.shape[first:]
        inside = torch.ones((), dtype=torch.bool, device=x.device)
        for i, size in enumerate(sizes):
            at = _windows(args, i, n, size).to(x.device)
            there = (at >= 0) & (at < size)
            picked = x.index_select(first + i, at.clamp(0, size - 1).flatten())
            x = picked.unflatten(first + i, at.shape).movedim(first + i + 1, -1)
            outputs, taps = [1] * n, [1] * n
            outputs[i], taps[i] = at.shape
            inside = inside & there.reshape(*outputs, *taps)
        return Candidates(x.flatten(-n), inside.flatten(-n))

    return candidates


def _windows(args: Arguments, i: int, n: int, size: int) -> Tensor:
    """Along dimension i of n, the places (outputs, taps) in each window; those outside, too."""
    if "output_size" in args:
        count: int = _each(args["output_size"], i, n) or size
        starts = [k * size // count for k in range(count)]
        ends = [-(-(k + 1) * size // count) for k in range(count)]
        most = max(end - start for start, end in zip(starts, ends, strict=True))
        taps = torch.arange(most)
        at = torch.tensor(starts)[:, None] + taps
        return at.masked_fill(at >= torch.tensor(ends)[:, None], -1)
    kernel: int = _each(args["kernel_size"], i, n)
    stride: int = _each(args["stride"] or args["kernel_size"], i, n)
    padding: int = _each(args["padding"], i, n)
    dilation: int = _each(args["dilation"], i, n)
    room: int = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if args["ceil_mode"] else room // stride) + 1
    if args["ceil_mode"] and (count - 1) * stride >= size + padding:
        count -= 1  # a window has to begin inside, or in the padding before
    starts_at = torch.arange(count)[:, None] * stride - padding
    return starts_at + torch.arange(kernel) * dilation


def _each(setting: Any, i: int, n: int) -> Any:
    values = [setting] * n if isinstance(setting, int) else list(setting)
    return values[i] if len(values) > 1 else values[0]


def reduced(args: Arguments) -> Candidates:
    """Of a maximum over dimensions, all if none are named."""
    x: Tensor = args["self"]
    dim = args.get("dim", [])
    dims = [dim] if isinstance(dim, int) else list(dim)
    over = sorted({d % x.ndim for d in dims} or range(x.ndim)) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in over]
    values = x.permute(*kept, *over).reshape(*(x.shape[d] for d in kept), -1)
    return _all(values)


def pairs(names: Sequence[str]) -> Lister:
    """Of the larger one of two tensors, by the names of the arguments."""

    def candidates(args: Arguments) -> Candidates:
        a, b = (args[name] for name in names)
        dtype = torch.result_type(a, b)
        return _all(torch.stack(torch.broadcast_tensors(a.to(dtype), b.to(dtype)), -1))

    return candidates


def _all(values: Tensor) -> Candidates:
    return Candidates(values, torch.ones((), dtype=torch.bool, device=values.device))
