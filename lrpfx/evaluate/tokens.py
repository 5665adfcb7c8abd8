"""Model, token ids, explanation -> whether it agrees with leaving tokens out one by one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.attributors import occlusion
from lrpfx.capture import Inputs, Wrt
from lrpfx.errors import InputError
from lrpfx.evaluate.maps import leaves_of, target_of
from lrpfx.evaluate.ranks import spearman
from lrpfx.probe import Fill, ModelLike
from lrpfx.run import Target


@dataclass(frozen=True, repr=False)
class LeaveOneOut:
    """What the target loses without each token, and how far relevance agrees.

    Args:
        correlation: Of ranks, over the tokens of each sample, (N,).
        falls: By how much the target falls without each token, (N, T).
    """

    correlation: Tensor
    falls: Tensor

    def __repr__(self) -> str:
        n, length = self.falls.shape
        mean = float(self.correlation.nanmean())
        return f"LeaveOneOut({n} samples of {length} tokens, rank correlation {mean:.3g})"


def leave_one_out(
    model: ModelLike,
    x: Inputs,
    explanation: Any,
    target: Target = None,
    fill: Fill = "mean",
    *,
    skip: Collection[int] = (),
    wrt: Wrt = None,
    progress: bool = True,
) -> LeaveOneOut:
    """How far the relevance of tokens agrees with leaving each of them out.

    Args:
        model: See ``perturbation``; so are ``x``, ``explanation`` and ``target``.
        x: With one input of token ids (N, T), or of a sequence (N, T, D), that is explained.
        explanation: See ``perturbation``.
        target: See ``perturbation``.
        fill: What takes the place of a token: "mean" (of the sample's embeddings), an ``int`` (the
            id of a mask token), or a ``float`` (fills the embedding).
        skip: Positions that do not count, such as 0 for a token that every sentence begins with.
        wrt: As ``lrpfx.explain`` takes it.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Raises:
        InputError: There is not one such input; see ``perturbation``.
        ImportError: scipy is not installed.

    Source: Jain and Wallace 2019, https://arxiv.org/abs/1902.10186, sect. 4.1 (correlation with
    leave-one-out); Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928, sect. 5 (of ranks).
    """
    target = target_of(explanation) if target is None else target
    leaves = leaves_of(explanation)
    if len(leaves) != 1 or leaves[0].ndim not in (2, 3):
        raise InputError(
            f"leave_one_out() is of one input of tokens, and relevance is of shape "
            f"{[tuple(leaf.shape) for leaf in leaves]}.",
            fix="explain only the tokens, by wrt=.",
        )
    of_features = leaves[0].ndim == 3
    window = (1, None) if of_features else 1
    found = occlusion(model, x, target, window, window, fill, wrt=wrt, progress=progress)
    left = [r for r in pytree.tree_leaves(found.relevance) if isinstance(r, Tensor)]
    if len(left) != 1 or left[0].shape != leaves[0].shape:
        raise InputError(
            f"explained are inputs of {[tuple(r.shape) for r in left]}, and relevance is of "
            f"{tuple(leaves[0].shape)}.",
            fix="say which input by wrt=.",
        )
    falls = (left[0][..., 0] if of_features else left[0]).double().cpu()
    relevance = (leaves[0].sum(-1) if of_features else leaves[0]).double().cpu()
    length = falls.shape[1]
    passed = {position % length for position in skip}
    kept = torch.tensor([t for t in range(length) if t not in passed], dtype=torch.long)
    return LeaveOneOut(spearman(falls[:, kept], relevance[:, kept]), falls)
