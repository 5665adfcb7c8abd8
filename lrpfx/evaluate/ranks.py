"""Two explanations -> how far they agree, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.evaluate.maps import rows_of
from lrpfx.evaluate.statistics import scipy_stats


@dataclass(frozen=True, repr=False)
class Agreement:
    """How far two explanations agree; each number is (N,), NaN where a map is constant.

    Args:
        pearson: Correlation.
        spearman: Correlation of ranks; ties have their mean rank.
        cosine: Of the angle between them.
        top: The part of the most relevant entries that both have.
        sign: The part of entries that are among the most relevant of both, with the same sign.
    """

    pearson: Tensor
    spearman: Tensor
    cosine: Tensor
    top: Tensor
    sign: Tensor

    def __repr__(self) -> str:
        names = ("pearson", "spearman", "cosine", "top", "sign")
        means = [f"{name} {float(getattr(self, name).nanmean()):.3g}" for name in names]
        return f"Agreement of {len(self.pearson)} samples, on average: {', '.join(means)}"


def agreement(a: Any, b: Any, *, top: float = 0.1) -> Agreement:
    """How far two explanations of the same inputs agree.

    Args:
        a: An Explanation, or relevance (N, ...); of several inputs all entries count together.
        b: Likewise.
        top: The part of all entries that counts as most relevant, by absolute value.

    Raises:
        InputError: They are not shaped alike.
        ImportError: scipy is not installed.

    Source: Adebayo et al. 2018, https://arxiv.org/abs/1810.03292, sect. 3 (rank correlation);
    Krishna et al. 2022, https://arxiv.org/abs/2202.01602, sect. 3.2 (top features, signs).
    """
    first, second = rows_of(a), rows_of(b)
    if first.shape != second.shape:
        raise InputError(
            f"relevance of {tuple(first.shape)} and {tuple(second.shape)} entries cannot be "
            "compared.",
            fix="give two explanations of the same inputs.",
        )
    if not 0 < top <= 1:
        raise InputError(f"top={top!r} is no part of the entries.", fix="give 0 < top <= 1.")
    k = max(1, round(top * first.shape[1]))
    chosen = [torch.zeros_like(r, dtype=torch.bool) for r in (first, second)]
    for mask, r in zip(chosen, (first, second), strict=True):
        mask.scatter_(1, r.abs().topk(k, dim=1).indices, True)
    both = chosen[0] & chosen[1]
    same = both & (first.sign() == second.sign())
    return Agreement(
        pearson=_correlation(first, second),
        spearman=spearman(first, second),
        cosine=_cosine(first, second),
        top=both.sum(1) / k,
        sign=same.sum(1) / k,
    )


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the ranks in each row."""
    ranks = [torch.from_numpy(scipy_stats().rankdata(r.numpy(), axis=1)) for r in (a, b)]
    return _correlation(*ranks)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """NaN, where one of them is zero."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    sizes = (a.shape[1] ** 0.5) * a.abs().amax(1) * b.abs().amax(1)
    cosine = (a * b).sum(1) / lengths
    return torch.where(lengths > 1e-12 * sizes.clamp(min=1e-300), cosine, torch.nan)
