"""Model, inputs, target -> by how much the target falls where a window is filled in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrpfx.attributors.result import Found, explanations
from lrpfx.capture import Inputs, Wrt
from lrpfx.errors import InputError
from lrpfx.explanation import Explanation
from lrpfx.probe import MEMORY, Eraser, Fill, ModelLike, Score, per_sample, positions, subject_of
from lrpfx.progress import shown
from lrpfx.run import Target

#: A window of one flat input.
_Window = tuple[int, tuple[slice, ...]]


def occlusion(
    model: ModelLike,
    x: Inputs,
    target: Target = None,
    window: int | Sequence[int | None] = 8,
    stride: int | Sequence[int | None] = 8,
    fill: Fill = 0.0,
    *,
    wrt: Wrt = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Explanation:
    """How much the target falls where a window of the input is filled in.

    Needs no gradient: the model may be any function. Each entry gets the mean over the windows that
    it is in.

    Args:
        model: A module in evaluation mode, any function of tensors, or an Explainer, which stands
            for its model. It is not modified.
        x: A tensor (N, ...), a tuple of positional or a dict of keyword arguments; of several
            inputs one is occluded at a time. Token ids are occluded token by token.
        target: As ``lrpfx.explain`` takes it; None is the strongest output at ``x``.
        window: Its size, in each dimension but samples and channels: of images (N, C, H, W) in
            height and width, of signals (N, C, L) in time, of tables (N, F) in columns. A tuple
            has one size for each of these dimensions, or for all but the samples, as (1, 4, 4)
            for single channels or (2, None) for steps of (N, T, D). None is the whole side; what
            is larger is cut off.
        stride: From window to window, likewise. The last may reach over the edge, where it is cut.
        fill: What is filled in: a number, a tensor that can be broadcast to ``x``, "mean" or
            "blur", see ``lrpfx.evaluate.perturbation``. For token ids an ``int`` is an id, a
            ``float`` fills the embedding.
        wrt: As ``lrpfx.explain`` takes it.
        memory: Bytes that activations may take, about: so many windows are computed together.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Returns:
        The explanation; its report has no rows.

    Raises:
        InputError: The model fails on the inputs; windows or fill do not fit them.
        TargetError: The target does not fit the output, or is one number for several samples.
        TrainingModeError: The model's output is random, or mixes the batch.

    Source: Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901, sect. 4.2.
    """
    with subject_of(model, x, wrt, slopes=False) as subject:
        eraser = Eraser(subject, fill)
        windows = [
            (i, slices)
            for i in eraser.leaves
            for slices in _windows(subject.leaves[i], window, stride)
        ]

        def find(score: Score) -> Found:
            whole = per_sample(score, subject.output, subject.n)
            leaves = subject.leaves
            sums = {i: _zeros(leaves[i], whole) for i in eraser.leaves}
            counts = {i: _zeros(leaves[i][:1], whole) for i in eraser.leaves}
            copies = subject.copies(score, memory, len(windows))
            for first in shown(range(0, len(windows), copies), "occlusion", progress):
                some = windows[first : first + copies]
                output = eraser(_masks(some, leaves), len(some))
                for (i, slices), values in zip(some, score(output).chunk(len(some)), strict=True):
                    here = (slice(None), *slices)
                    sums[i][here] += _column(whole - values, leaves[i])
                    counts[i][here] += 1
            relevance: list[Tensor | None] = [None] * len(leaves)
            for i in eraser.leaves:
                relevance[i] = sums[i] / counts[i]
            return Found(relevance, [None] * len(leaves))

        return explanations(subject, target, "occlusion", find)


def _windows(
    leaf: Tensor, window: int | Sequence[int | None], stride: int | Sequence[int | None]
) -> list[tuple[slice, ...]]:
    """All windows of an input, without the dimension of the samples."""
    if leaf.ndim < 2:
        raise InputError(
            f"an input of shape {tuple(leaf.shape)} has nothing to occlude beside its samples.",
            fix="give a batch (N, ...).",
        )
    sides = []
    sizes, steps = (_per_dimension(v, leaf, n) for v, n in ((window, "window"), (stride, "stride")))
    for length, size, step in zip(leaf.shape[1:], sizes, steps, strict=True):
        size = length if size is None else min(size, length)
        step = length if step is None else step
        number = max(0, math.ceil((length - size) / step)) + 1
        if number > 1 and step > size:
            raise InputError(
                f"between windows of {size} at a distance of {step} something is never occluded.",
                fix="give a stride that is not larger than the window.",
            )
        sides.append([slice(k * step, min(k * step + size, length)) for k in range(number)])
    return list(itertools.product(*sides))


def _per_dimension(value: Any, leaf: Tensor, name: str) -> list[int | None]:
    """One size for each dimension but that of the samples."""
    dims = positions(leaf)
    if isinstance(value, int) and not isinstance(value, bool):
        found = [value if d in dims else None for d in range(1, leaf.ndim)]
    else:
        given = list(value) if isinstance(value, (tuple, list)) else []
        if len(given) == len(dims) < leaf.ndim - 1:
            given = [None, *given]
        found = given
    bad = len(found) != leaf.ndim - 1 or any(
        v is not None and (not isinstance(v, int) or isinstance(v, bool) or v < 1) for v in found
    )
    if bad:
        raise InputError(
            f"{name}={value!r} does not fit an input {tuple(leaf.shape)}.",
            fix=f"give a positive int, or one for each of {len(dims)} or {leaf.ndim - 1} "
            "dimensions.",
        )
    return found


def _masks(windows: Sequence[_Window], leaves: Sequence[Any]) -> dict[int, Tensor]:
    """For each input what is occluded, one copy of the batch for each window."""
    masks = {}
    for i in {i for i, _ in windows}:
        leaf = leaves[i]
        mask = torch.zeros(len(windows), 1, *leaf.shape[1:], dtype=torch.bool, device=leaf.device)
        for k, (j, slices) in enumerate(windows):
            if i == j:
                mask[k][(slice(None), *slices)] = True
        masks[i] = mask.expand(-1, len(leaf), *leaf.shape[1:]).reshape(-1, *leaf.shape[1:])
    return masks


def _zeros(leaf: Tensor, values: Tensor) -> Tensor:
    dtype = leaf.dtype if leaf.is_floating_point() else values.dtype
    return torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)


def _column(values: Tensor, leaf: Tensor) -> Tensor:
    return values.detach().to(leaf.device).reshape(-1, *[1] * (leaf.ndim - 1))
