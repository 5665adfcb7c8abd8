"""A target and an output -> one number per sample, of this output and of those to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import from_dicts, to_dicts
from lrpfx.errors import TargetError
from lrpfx.run import Seed, Slope, Target, each_target, is_several, make_seed


class Score:
    """What is explained of an output, fixed for the outputs of changed inputs.

    None is the class that is strongest in this output, also where another is in the next. A
    callable is called with each output.

    Args:
        output: What the model returned for the inputs.
        target: See ``lrpfx.explain``; not several.
        n: How many samples there are.

    Raises:
        TargetError: The target does not fit the output.
    """

    def __init__(self, output: Any, target: Target, n: int) -> None:
        leaves, rebuild = _flat(output)
        leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]

        def batched(index: int) -> bool:
            return bool(leaves[index].ndim) and len(leaves[index]) == n

        with torch.no_grad():
            self.seed: Seed = make_seed(leaves, target, rebuild, batched)
            slope = make_seed(leaves, Slope(target), rebuild, batched)
        found = [(i, s) for i, s in enumerate(slope.seeds) if s is not None]
        self.target = target
        self.description = slope.description
        self.called = callable(target) and not isinstance(target, Tensor)
        self._n = n
        # Of a callable it may be several, and none is read.
        self._leaf: int
        self._mask: Tensor | None
        self._leaf, self._mask = found[0] if found else (0, None)

    @property
    def seeds(self) -> list[Tensor]:
        """The relevance that an explanation by rules would begin with."""
        return [s for s in self.seed.seeds if s is not None]

    def __call__(self, output: Any) -> Tensor:
        """One number for each sample of one or several copies of the batch, (N,); else one, (1,).

        Raises:
            TargetError: A callable does not return that.
        """
        if self.called:
            value: Tensor = self.target(output)  # type: ignore[operator, misc]
            return value.reshape(-1)
        assert self._mask is not None
        leaf = _flat(output)[0][self._leaf]
        mask = self._mask
        if len(leaf) != len(mask):
            mask = torch.cat([mask] * (len(leaf) // len(mask)))
        picked = torch.where(mask == 0, torch.zeros_like(leaf), leaf * mask)
        return (
            picked.reshape(len(picked), -1).sum(1) if self.repeats(self._n) else picked.sum()[None]
        )

    def repeats(self, n: int) -> bool:
        """Whether scores of several copies of n samples can be told apart."""
        mask = self._mask
        return not self.called and mask is not None and mask.ndim > 0 and len(mask) == n

    def slope(self) -> Slope:
        """The target of an Explainer whose rules modify a gradient: that of the score."""
        return Slope(self.target if self.called else self._mask)

    def fixed(self) -> Target:
        """The target of an Explainer for changed inputs."""
        if self.target is not None:
            return self.target
        if self.seed.classes is not None:
            return self.seed.classes
        return self


def scores(output: Any, target: Target, n: int) -> list[Score]:
    """One for each of several targets; else one."""
    if not is_several(target):
        return [Score(output, target, n)]
    leaves = [t.detach() if isinstance(t, Tensor) else t for t in _flat(output)[0]]
    return [Score(output, classes, n) for classes in each_target(leaves, target)]


def per_sample(score: Score, output: Any, n: int) -> Tensor:
    """The scores, (N,).

    Raises:
        TargetError: There is one number for several samples.
    """
    values = score(output)
    if len(values) != n:
        raise TargetError(
            f"{score.description} is {len(values)} number(s) for {n} samples, and each sample is "
            "changed by itself here.",
            fix="give one sample, or a target of one number per sample.",
        )
    return values


def _flat(output: Any) -> tuple[Sequence[Any], Any]:
    """The leaves of an output, dataclasses opened, and what makes an output of them."""
    leaves, spec = pytree.tree_flatten(to_dicts(output))
    return leaves, lambda new: from_dicts(output, pytree.tree_unflatten(list(new), spec))
