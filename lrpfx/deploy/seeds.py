"""What is explained, as ops of a graph: a class per sample that is an input, or the strongest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrpfx.errors import TargetError
from lrpfx.run import Seed, unit_of


def seed_in_graph(leaves: Sequence[Any], target: Tensor | None) -> Seed:
    """The seed relevance: one-hot times output, as ``run.make_seed`` makes it of values.

    A class that is out of range is an index out of range, which runtimes refuse.

    Args:
        leaves: Output leaves of the graph; the first floating one is explained.
        target: A class per sample, (N,), an index into dimension 1; negative ones count from the
            end. None for the strongest output of each sample.
    """
    index = next(i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point())
    output: Tensor = leaves[index]
    seeds: list[Tensor | None] = [None] * len(leaves)
    seeds[index] = _strongest(output) if target is None else _of_class(output, target)
    return Seed(seeds, None, "")


def scaled_in_graph(leaves: Sequence[Any], seed: Seed, size: float) -> tuple[Seed, Tensor]:
    """The seed at a size for float16, and the power of two that it was multiplied by.

    As ``run.pull_scaled`` does it of values: relevance neither vanishes on its way nor overflows.
    """
    unit = unit_of(seed, leaves, size)
    seeds = [None if s is None else (s.float() * unit).to(s.dtype) for s in seed.seeds]
    return replace(seed, seeds=seeds), unit


def first_finite(found: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Relevance by the first of several sizes if all of it is finite there, else by the next."""
    *before, chosen = map(list, found)
    for earlier in reversed(before):
        finite = [r.isfinite().all() for r in earlier if r is not None]
        fine = torch.stack(finite).all()
        pairs = zip(earlier, chosen, strict=True)
        chosen = [
            None if r is None or other is None else torch.where(fine, r, other)
            for r, other in pairs
        ]
    return chosen


def check_output(output: Tensor, batched: bool) -> None:
    """Raise TargetError where a class per sample is no entry of the output.

    Args:
        output: What is explained.
        batched: Whether its first dimension is that of the samples.
    """
    shape = tuple(output.shape)
    if not batched:
        raise TargetError(
            f"dimension 0 of the output {shape} is not the samples'.",
            fix="export a wrapper module that returns (N, classes).",
        )
    if output.ndim in (2, 4, 5):
        return
    if output.ndim < 2:
        raise TargetError(
            f"the output {shape} has no class dimension for a target per sample.",
            fix='give target="argmax", which explains the value itself.',
        )
    raise TargetError(
        f"classes per sample may stand in dimension 1 or 2 of the output {shape}.",
        fix='give target="argmax" for the strongest entry of each sample, or export a wrapper '
        "module that returns (N, classes), such as the logits after the last position.",
    )


def _of_class(output: Tensor, target: Tensor) -> Tensor:
    size = output.shape[1]
    classes = torch.where(target < 0, target + size, target)
    classes = torch.where(classes < 0, size, classes)  # else it would count from the end twice
    shape = (-1, 1) + (1,) * (output.ndim - 2)
    places = classes.reshape(shape).expand(-1, 1, *output.shape[2:])
    picked = output.gather(1, places)
    numbers = torch.arange(size, device=output.device).reshape(1, -1, *shape[2:])
    return torch.where(numbers == classes.reshape(shape), picked, torch.zeros_like(picked))


def _strongest(output: Tensor) -> Tensor:
    if output.ndim < 2:
        return output
    flat = output.flatten(1)
    best = flat.argmax(1, keepdim=True)
    numbers = torch.arange(flat.shape[1], device=output.device)
    seed = torch.where(numbers == best, flat, torch.zeros_like(flat))
    return seed.reshape(output.shape)
