"""Conditions and the places where relevance starts -> the seeds of a conditioned backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrpfx.conditions import Conditions
from lrpfx.errors import TargetError
from lrpfx.run.backward import Run
from lrpfx.run.targets import Seed, is_several

#: What relevance starts from at an inner place.
Init = str | Tensor | Callable[[Tensor], Tensor]


def condition_seeds(
    conditions: Conditions, run: Run, names: Sequence[str], seeds: Sequence[Seed], init: Init
) -> list[Seed]:
    """A seed for each condition, with what its masks and gates let through.

    Args:
        conditions: As they are laid on the graph.
        run: The forward pass.
        names: Of the run's taps.
        seeds: At the output: one for all conditions, or one for each.
        init: See ``lrpfx.Explainer``.

    Raises:
        TargetError: There are targets for another number of conditions, or the seed does not fit
            the place.
        SelectorError: See ``Conditions.kept``.
    """
    shapes = {n: phantom.shape[1:] for n, (_, phantom, _) in zip(names, run.taps, strict=True)}
    kept = conditions.kept(run.masks, shapes, run.gates)
    if len(seeds) not in (1, len(kept)):
        raise TargetError(
            f"there are {len(seeds)} targets for each sample, and {len(kept)} conditions.",
            fix="give one target for all conditions, or one for each.",
        )
    if run.begin:
        seeds = [_at_place(conditions, run, names, seed, init) for seed in seeds]
    seeds = [*seeds] * (len(kept) if len(seeds) == 1 else 1)
    return [replace(seed, kept=weights) for seed, weights in zip(seeds, kept, strict=True)]


def target_per_condition(target: Any, conditions: Conditions, samples: int) -> list[Any]:
    """One target for each condition if there are as many, and not as many samples; else the one.

    Args:
        target: See ``lrpfx.explain``.
        conditions: As they are laid on the graph.
        samples: How many there are.
    """
    each = isinstance(target, (list, Tensor, np.ndarray)) and not is_several(target)
    if each and conditions.several and len(target) == conditions.count != samples:
        if not isinstance(target, list) and "float" in str(target.dtype):
            return [target]  # a seed
        return list(target)
    return [target]


def _at_place(
    conditions: Conditions, run: Run, names: Sequence[str], seed: Seed, init: Init
) -> Seed:
    """The seed at the place where relevance starts."""
    assert conditions.start is not None
    activation = run.begin[0][0]
    if isinstance(init, str) and init == "activation":
        return Seed([activation], None, f"starts at {conditions.start} from its activation")
    if isinstance(init, str) and init == "relevance":
        opened = tuple(torch.ones_like(w) for w in (*run.masks, *run.gates))
        (whole,) = replace(run, begin=[]).pull(
            [replace(seed, kept=opened)], create_graph=torch.is_grad_enabled(), keep=True
        )
        arrived = whole.taps[names.index(conditions.start)]
        told = f"starts at {conditions.start} from what arrives there of {seed.description}"
        return Seed([arrived], seed.classes, told)
    given = init(activation) if callable(init) and not isinstance(init, Tensor) else init
    if not isinstance(given, Tensor) or given.shape != activation.shape:
        form = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
        raise TargetError(
            f"init= at {conditions.start!r} is {form}, and the activation there "
            f"{tuple(activation.shape)}.",
            fix='give a tensor of that shape, a function of the activation, "activation", or '
            '"relevance".',
        )
    return Seed([given.to(activation)], None, f"starts at {conditions.start} from what was given")
