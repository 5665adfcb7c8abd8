"""An explanation, or relevance by itself -> one row of numbers per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import tensors_in
from lrpfx.errors import InputError
from lrpfx.explanation import Explanation
from lrpfx.run import Target


def relevance_of(explanation: Any) -> Any:
    """The relevance, structured as the inputs are.

    Raises:
        InputError: It is of several targets.
    """
    if not isinstance(explanation, Explanation):
        if isinstance(explanation, np.ndarray):
            return torch.from_numpy(explanation)
        return explanation
    pairs = zip(
        pytree.tree_leaves(explanation.relevance, is_leaf=_none),
        pytree.tree_leaves(explanation.inputs, is_leaf=_none),
        strict=False,
    )
    if any(isinstance(r, Tensor) and isinstance(x, Tensor) and r.ndim > x.ndim for r, x in pairs):
        raise InputError(
            "this explanation is of several targets.", fix="evaluate one of them at a time."
        )
    return explanation.relevance


def leaves_of(explanation: Any) -> list[Tensor]:
    """The tensors of relevance, of all inputs that were explained.

    Raises:
        InputError: There are none.
    """
    leaves = [
        torch.as_tensor(leaf).detach()
        for leaf in pytree.tree_leaves(relevance_of(explanation))
        if isinstance(leaf, (Tensor, np.ndarray))
    ]
    if not leaves or any(leaf.ndim < 1 for leaf in leaves):
        raise InputError(
            f"{type(explanation).__name__} holds no relevance.",
            fix="give an Explanation, or a tensor (N, ...).",
        )
    return leaves


def rows_of(explanation: Any) -> Tensor:
    """All of the relevance of each sample, (N, F), float64."""
    leaves = leaves_of(explanation)
    return torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in leaves], 1).cpu()


def target_of(explanation: Any) -> Target:
    """What an explanation is of, as a target for further outputs; None for bare relevance.

    Raises:
        InputError: It was explained by a callable, which the explanation does not have.
    """
    if not isinstance(explanation, Explanation) or explanation.target is not None:
        return explanation.target if isinstance(explanation, Explanation) else None
    seed = explanation.seed
    outputs = [t for t in tensors_in(explanation.output) if t.is_floating_point()]
    if isinstance(seed, Tensor) and outputs and outputs[0].shape == seed.shape:
        picked = seed != 0
        if torch.equal(torch.where(picked, outputs[0].detach(), torch.zeros_like(seed)), seed):
            return picked.to(seed.dtype)
    raise InputError(
        f"the explanation is of {explanation.report.target}, which it does not hold.",
        fix="give target= as it was explained.",
    )


def _none(leaf: Any) -> bool:
    return leaf is None
