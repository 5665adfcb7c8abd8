"""Parts of the inputs that are masked -> the output of a model that does not see them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.probe.subject import Subject, fitted, for_each

#: What takes the place of what is erased; see ``Eraser``.
Fill = Literal["mean", "blur"] | float | Tensor | Sequence[Any] | Mapping[str, Any]
#: How far the blur reaches, as a part of each side.
_BLUR = 0.1


def positions(leaf: Tensor, sequence: bool = False) -> tuple[int, ...]:
    """The dimensions that positions are counted in: neither samples nor channels.

    Args:
        leaf: An input.
        sequence: Whether (N, T, D) has features in its last dimension, and not time.
    """
    if not leaf.is_floating_point() or leaf.ndim < 3:
        return tuple(range(1, leaf.ndim))
    return (1,) if sequence and leaf.ndim == 3 else tuple(range(2, leaf.ndim))


class Eraser:
    """Fills in masked parts of the inputs.

    Args:
        subject: The model at its inputs.
        fill: A number; a tensor that can be broadcast to the input; "mean": of images and signals
            the mean of each channel of each sample, of tables that of each column over the batch,
            of token ids that of the sample's embeddings; "blur": what is left of each image or
            signal behind a Gaussian filter as wide as a tenth of it. For token ids an ``int`` is
            another id, a ``float`` fills in the embedding. One for all inputs, or structured like
            them.
        sequence: See ``positions``.

    Raises:
        InputError: The fill does not fit the inputs.
    """

    def __init__(self, subject: Subject, fill: Any, sequence: bool = False) -> None:
        self._subject = subject
        fills = for_each(subject, fill, "fill")
        explained = sorted({start.leaf for start in subject.starts} | subject.chosen_ids)
        #: The flat inputs that parts can be masked of.
        self.leaves: list[int] = explained
        self._by_leaf: dict[int, Tensor] = {}
        self._by_start: dict[int, Tensor] = {}
        for i in explained:
            leaf = subject.leaves[i]
            if leaf.is_floating_point():
                self._by_leaf[i] = _filled(leaf.detach(), fills[i], positions(leaf, sequence))
            elif isinstance(fills[i], int) or isinstance(fills[i], Tensor):
                self._by_leaf[i] = fitted(fills[i], leaf, "fill")
            else:
                rows = [k for k, start in enumerate(subject.starts) if start.leaf == i]
                self._by_start |= {k: _rows(subject, k, fills[i]) for k in rows}
                if not rows:
                    raise InputError(
                        f"{subject.paths[i]}: no embedding was seen that these ids index.",
                        fix="give fill= an int, the id that takes their place.",
                    )

    def __call__(self, masks: Mapping[int, Tensor], copies: int) -> Any:
        """What the model returns for so many copies of the batch.

        Args:
            masks: For each flat input what is erased, (copies * N, ...), which is broadcast to it.
            copies: How many there are.
        """
        subject = self._subject
        leaves = subject.repeated(copies)
        values: list[Tensor | None] = [None] * len(subject.starts)
        for i, new in self._by_leaf.items():
            if i in masks:
                leaves[i] = torch.where(masks[i], torch.cat([new] * copies), leaves[i])
        for k, new in self._by_start.items():
            start = subject.starts[k]
            if start.leaf in masks and start.places is not None:
                shape = subject.leaves[start.leaf].shape
                mask = masks[start.leaf].expand(copies * shape[0], *shape[1:])
                flat = mask.reshape(copies, -1)[:, start.places.clamp(min=0)]
                flat = flat & (start.places >= 0)
                old = torch.cat([start.value.detach()] * copies)
                gone = flat.reshape(*old.shape[:-1], 1)
                values[k] = torch.where(gone, torch.cat([new] * copies), old)
        return subject.run(values, leaves)


def _filled(leaf: Tensor, fill: Any, dims: Sequence[int]) -> Tensor:
    """What takes the place of a floating input, shaped like it."""
    if fill == "mean" if isinstance(fill, str) else False:
        if leaf.ndim > 2:
            return leaf.mean(tuple(dims), keepdim=True).expand_as(leaf)
        if len(leaf) < 2:
            raise InputError(
                'fill="mean" of a table is that of each column over the batch, and there is one '
                "row.",
                fix="give more rows, a number, or a tensor of the columns' means.",
            )
        return leaf.mean(0, keepdim=True).expand_as(leaf)
    if fill == "blur" if isinstance(fill, str) else False:
        if leaf.ndim < 3:
            raise InputError(
                f'fill="blur": an input {tuple(leaf.shape)} is no image and no signal.',
                fix='give a number, a tensor, or "mean".',
            )
        return _blurred(leaf, dims)
    if isinstance(fill, str) or fill is None:
        raise InputError(
            f"fill={fill!r} is not known.", fix='give a number, a tensor, "mean" or "blur".'
        )
    return fitted(fill, leaf, "fill")


def _blurred(leaf: Tensor, dims: Sequence[int]) -> Tensor:
    """A Gaussian filter along each of the dimensions; beyond the edge is what is at the edge."""
    for dim in dims:
        sigma = max(_BLUR * leaf.shape[dim], 1.0)
        reach = min(math.ceil(3 * sigma), leaf.shape[dim])
        at = torch.arange(-reach, reach + 1, dtype=leaf.dtype, device=leaf.device)
        kernel = torch.exp(-0.5 * (at / sigma) ** 2)
        moved = leaf.movedim(dim, -1)
        flat = moved.reshape(-1, 1, moved.shape[-1])
        flat = F.pad(flat, (reach, reach), mode="replicate")
        flat = F.conv1d(flat, (kernel / kernel.sum()).reshape(1, 1, -1))
        leaf = flat.reshape(moved.shape).movedim(-1, dim)
    return leaf


def _rows(subject: Subject, k: int, fill: Any) -> Tensor:
    """What takes the place of embeddings, shaped like them."""
    start = subject.starts[k]
    value, places = start.value.detach(), start.places
    if not isinstance(fill, str):
        return fitted(fill, value, "fill")
    if fill != "mean" or places is None:
        raise InputError(
            f"fill={fill!r} is not known for token ids.",
            fix='give an int (an id), a float, or "mean" (of the embeddings).',
        )
    # The mean over the tokens of a sample; what the model put in between is no token.
    rows = value.reshape(len(places), -1)
    per = subject.leaves[start.leaf][0].numel()
    sample = places.clamp(min=0) // per
    given = (places >= 0).to(rows.dtype)[:, None]
    sums = rows.new_zeros(subject.n, rows.shape[1]).index_add(0, sample, rows * given)
    counts = rows.new_zeros(subject.n, 1).index_add(0, sample, given).clamp(min=1)
    return (sums / counts)[sample].reshape(value.shape)
