"""Relevance -> the order in which patches, steps, columns or tokens are erased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.probe import positions


@dataclass(frozen=True)
class Units:
    """What is erased as one of an input.

    Args:
        leaf: The number of the flat input.
        dims: Its dimensions that positions are counted in.
        index: For each position the number of its unit.
        relevance: Of each unit of each sample, (N, U).
    """

    leaf: int
    dims: tuple[int, ...]
    index: Tensor
    relevance: Tensor

    def mask(self, gone: Tensor, ndim: int) -> Tensor:
        """Units (K, U) that are gone as a mask that is broadcast to K of the input."""
        positions = gone[:, self.index]
        shape = [len(gone), *[1] * (ndim - 1)]
        for size, dim in zip(self.index.shape, self.dims, strict=True):
            shape[dim] = size
        return positions.reshape(shape)


def units_of(
    leaf: int, value: Tensor, relevance: Any, patch: int | Sequence[int], sequence: bool
) -> Units:
    """The units of one input.

    Args:
        leaf: The number of the flat input.
        value: The input.
        relevance: Shaped like it.
        patch: Side of a unit, one for all dimensions or one for each.
        sequence: See ``probe.positions``.

    Raises:
        InputError: Shapes that do not fit.
    """
    if not isinstance(relevance, Tensor) or relevance.shape != value.shape:
        shape = tuple(relevance.shape) if isinstance(relevance, Tensor) else relevance
        raise InputError(
            f"relevance of shape {shape} is not that of an input {tuple(value.shape)}.",
            fix="give the explanation of these inputs.",
        )
    if not bool(relevance.isfinite().all()):
        raise InputError("the relevance has NaN or infinite entries.", fix="leave them out.")
    dims = positions(value, sequence)
    sides = [patch] * len(dims) if isinstance(patch, int) else list(patch)
    if len(sides) != len(dims) or any(not isinstance(s, int) or s < 1 for s in sides):
        raise InputError(
            f"patch={patch!r} does not fit an input {tuple(value.shape)}.",
            fix=f"give a positive int, or one for each of {len(dims)} dimensions.",
        )
    index = torch.zeros((), dtype=torch.long)
    for dim, side in zip(dims, sides, strict=True):
        size = value.shape[dim]
        index = index[..., None] * -(-size // side) + torch.arange(size) // side
    number = int(index.max()) + 1
    others = tuple(d for d in range(1, value.ndim) if d not in dims)
    r = relevance.detach().double()
    flat = (r.sum(others) if others else r).reshape(len(r), -1).cpu()
    summed = flat.new_zeros(len(flat), number).index_add(1, index.flatten(), flat)
    return Units(leaf, dims, index, summed)


def erased_when(relevance: Tensor, order: str, seed: int) -> Tensor:
    """The turn of each unit, (N, U): 0 for what is erased first.

    Equal units are in a random order, the same for all samples.

    Args:
        relevance: (N, U).
        order: "most" relevant first, "least", or "random".
        seed: Of the random order.
    """
    generator = torch.Generator().manual_seed(seed)
    n, number = relevance.shape
    if order == "random":
        return torch.rand(n, number, generator=generator).argsort(1).argsort(1)
    shuffled = torch.randperm(number, generator=generator)
    sorted_ = relevance[:, shuffled].argsort(dim=1, descending=True, stable=True)
    turns = torch.empty_like(sorted_)
    turns.scatter_(1, shuffled[sorted_], torch.arange(number).expand(n, -1))
    return turns if order == "most" else number - 1 - turns
