"""Relevance and masks of what should be relevant -> how much of the one is inside of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.evaluate.maps import leaves_of


@dataclass(frozen=True, repr=False)
class Localization:
    """How much of the relevance is where it should be; each number is (N,).

    Args:
        pointing: 1 where the largest relevance is inside, else 0; of several largest ones the part
            that is inside.
        mass: The part of all positive relevance that is inside; 0 where there is none.
        rank: Of as many of the largest entries as the mask has, the part that is inside; of equal
            ones so many as would be by chance.
    """

    pointing: Tensor
    mass: Tensor
    rank: Tensor

    def __repr__(self) -> str:
        means = [f"{n} {float(getattr(self, n).mean()):.3g}" for n in ("pointing", "mass", "rank")]
        return f"Localization of {len(self.mass)} samples, on average: {', '.join(means)}"


def localization(explanation: Any, mask: Any, *, tolerance: int = 0) -> Localization:
    """How much of the relevance is inside of masks that are known to matter.

    Args:
        explanation: An Explanation of one input, or its relevance: (N, C, H, W), (N, C, L), (N, T)
            or (N, F). Channels are summed, if the mask has none.
        mask: Where it should be: true or not zero, shaped like the relevance, or without channels
            (N, H, W), or with one.
        tolerance: By so many positions in each direction the largest may miss the mask.

    Raises:
        InputError: Masks that do not fit, or are empty.

    Source: Zhang et al. 2018, https://arxiv.org/abs/1608.00507, sect. 4.2 (pointing game);
    Kohlbrenner et al. 2020, https://arxiv.org/abs/1910.09840, eq. 10 (mass inside); Arras et al.
    2022, https://arxiv.org/abs/2003.07258, sect. 4.2 (mass accuracy, rank accuracy).
    """
    leaves = leaves_of(explanation)
    if len(leaves) != 1:
        raise InputError(
            f"localization() is of one input, and this explanation has {len(leaves)}.",
            fix="give the relevance of one of them.",
        )
    relevance = leaves[0].double().cpu()
    inside, relevance = _aligned(relevance, mask)
    empty = (~inside.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"the masks of {len(empty)} sample(s) are empty.",
            where=[f"samples {empty[:8]}"],
            fix="leave these samples out: nothing of them should be relevant.",
        )
    r, m = relevance.flatten(1), inside.flatten(1)
    near = _grown(inside, tolerance).flatten(1)
    largest = r == r.amax(1, keepdim=True)
    positive = r.clamp(min=0)
    total = positive.sum(1)
    mass = (positive * m).sum(1) / torch.where(total > 0, total, 1.0)
    return Localization((largest & near).sum(1) / largest.sum(1), mass, _rank(r, m))


def _rank(r: Tensor, m: Tensor) -> Tensor:
    """The part of the K largest entries that are inside, K the size of the mask."""
    number = m.sum(1, keepdim=True)
    least = r.sort(1, descending=True).values.gather(1, number - 1)
    above, equal = r > least, r == least
    open_places = number - above.sum(1, keepdim=True)
    chance = (equal & m).sum(1, keepdim=True) / equal.sum(1, keepdim=True).double()
    by_chance = open_places * chance
    return (((above & m).sum(1, keepdim=True) + by_chance) / number.double())[:, 0]


def _aligned(relevance: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The mask and the relevance in the same shape."""
    given = torch.as_tensor(np.asarray(mask) if not isinstance(mask, Tensor) else mask).cpu() != 0
    n, *rest = relevance.shape
    if given.shape == relevance.shape:
        return given, relevance
    if relevance.ndim > 2:
        spatial = (n, *rest[1:])
        if given.shape in (spatial, (n, 1, *rest[1:])):
            return given.reshape(spatial), relevance.sum(1)
    raise InputError(
        f"masks of shape {tuple(given.shape)} do not fit relevance of {tuple(relevance.shape)}.",
        fix="give one mask per sample, of the same height and width.",
    )


def _grown(mask: Tensor, by: int) -> Tensor:
    """The mask with all that is not farther away than ``by`` positions in any direction."""
    if not isinstance(by, int) or by < 0:
        raise InputError(f"tolerance={by!r} is no number of positions.", fix="give 0 or more.")
    if by == 0 or mask.ndim < 2:
        return mask
    grown = mask.double()
    for dim in range(1, mask.ndim):
        moved = grown.movedim(dim, -1)
        flat = moved.reshape(1, -1, moved.shape[-1])
        wide = F.max_pool1d(F.pad(flat, (by, by)), 2 * by + 1, stride=1)
        grown = wide.reshape(moved.shape).movedim(-1, dim)
    return grown > 0
