"""Model, inputs, target -> gradient, gradient times input, integrated gradients, SmoothGrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrpfx.attributors.paths import Ruled, gradients, slopes_along
from lrpfx.attributors.result import Found, by_input, explanations
from lrpfx.capture import Inputs, Wrt
from lrpfx.errors import InputError
from lrpfx.explanation import Explanation
from lrpfx.plan import RulesLike
from lrpfx.probe import MEMORY, ModelLike, Score, Subject, fitted, for_each, subject_of
from lrpfx.progress import shown
from lrpfx.run import Target, is_several


def gradient(model: ModelLike, x: Inputs, target: Target = None, *, wrt: Wrt = None) -> Explanation:
    """The gradient of the target by the inputs (sensitivity).

    A softmax at the output is part of the model here, unlike under rules.

    Args:
        model: A module in evaluation mode, any function of tensors, or an Explainer, which stands
            for its model. It is not modified, and need not be such as can be captured.
        x: A tensor (N, ...), a tuple of positional or a dict of keyword arguments. Of token ids
            the gradient is that of the embeddings that they pick: per feature in
            ``explanation.embeddings``, summed over features in ``explanation.relevance``.
        target: As ``lrpfx.explain`` takes it; a floating tensor weights the outputs.
        wrt: As ``lrpfx.explain`` takes it.

    Returns:
        The explanation; its report has no rows.

    Raises:
        InputError: There is nothing to explain, or the model fails on the inputs.
        TargetError: The target does not fit the output, or does not depend on the inputs.
        TrainingModeError: The model's output is random, or mixes the batch.

    Source: Simonyan et al. 2014, https://arxiv.org/abs/1312.6034, sect. 3.
    """
    with subject_of(model, x, wrt) as subject:

        def find(score: Score) -> Found:
            return by_input(subject, _slopes(subject, score, is_several(target)))

        return explanations(subject, target, "gradient", find)


def gradient_x_input(
    model: ModelLike, x: Inputs, target: Target = None, *, wrt: Wrt = None
) -> Explanation:
    """The gradient times the input: LRP-0 in a network of ReLUs.

    Args:
        model: See ``gradient``; so are ``x``, ``target`` and ``wrt``.
        x: Token ids: gradient times embedding.
        target: See ``gradient``.
        wrt: See ``gradient``.

    Raises:
        LrpError: As ``gradient``.

    Source: Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713, sect. 2; Ancona et al. 2018,
    https://arxiv.org/abs/1711.06104, prop. 1 (the same as LRP-0).
    """
    with subject_of(model, x, wrt) as subject:

        def find(score: Score) -> Found:
            slopes = _slopes(subject, score, is_several(target))
            products = [v * s for v, s in zip(subject.values, slopes, strict=True)]
            return by_input(subject, products)

        return explanations(subject, target, "gradient x input", find)


def integrated_gradients(
    model: ModelLike,
    x: Inputs,
    target: Target = None,
    steps: int = 64,
    baseline: Any = 0.0,
    *,
    rules: RulesLike = None,
    wrt: Wrt = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Explanation:
    """The gradient along the straight line from a baseline, times the way.

    It sums to the target's value less that of the baseline; how far it is off is noted. The
    integral is taken by Gauss-Legendre quadrature.

    Args:
        model: See ``gradient``; so are ``x``, ``target`` and ``wrt``.
        x: Of token ids the line is one of embeddings.
        target: None is the strongest output at ``x``, all along the line.
        steps: Points on the line.
        baseline: Where the line begins: a number, a tensor that can be broadcast to ``x``, or one
            of either for each input, structured like ``x``. Integers for token ids are ids.
        rules: What the gradient is modified by, such as "beta_smooth"; None for the gradient
            itself. Of rules that give relevance, which has the input in it, there is no integral.
        wrt: See ``gradient``.
        memory: Bytes that activations may take, about: so many steps are computed together.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Raises:
        LrpError: As ``gradient``; InputError for a baseline that does not fit; RuleError for rules
            that give relevance.

    Source: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, eq. 1 and 3.
    """
    _check_count("steps", steps)
    with subject_of(model, x, wrt) as subject:
        begin = _baseline(subject, baseline)
        way = [v.detach() - b for v, b in zip(subject.values, begin, strict=True)]
        points, weights = np.polynomial.legendre.leggauss(steps)
        ruled = None if rules is None else Ruled(subject, rules, modifies=True)

        def along(step: int) -> list[Tensor]:
            t = float(points[step] + 1) / 2
            return [b + t * w for b, w in zip(begin, way, strict=True)]

        def find(score: Score) -> Found:
            total = [torch.zeros_like(w) for w in way]
            if ruled is None:
                slopes = slopes_along(subject, score, along, steps, memory, progress)
            else:
                at = shown(range(steps), "modified gradients", progress)
                slopes = (ruled.at(along(step), score.slope()) for step in at)
            for step, found in enumerate(slopes):
                for sum_, slope in zip(total, found, strict=True):
                    sum_ += float(weights[step]) / 2 * slope
            parts = [w * t for w, t in zip(way, total, strict=True)]
            with torch.no_grad():
                values = score(subject.output), score(subject.run(begin))
            return by_input(subject, parts, [_completeness(parts, *values, rules is None)])

        name = "integrated gradients" + _along(ruled)
        return explanations(subject, target, name, find)


def smoothgrad(
    model: ModelLike,
    x: Inputs,
    target: Target = None,
    samples: int = 20,
    noise: float = 0.1,
    seed: int = 0,
    rules: RulesLike = None,
    *,
    wrt: Wrt = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Explanation:
    """The mean gradient, or relevance, of noisy copies of the inputs.

    Args:
        model: See ``gradient``; so are ``x``, ``target`` and ``wrt``. Of an Explainer the rules do
            not count; give them as ``rules``.
        x: Of token ids the embeddings are what noise is added to.
        target: None is the strongest output at ``x``, for all copies.
        samples: How many copies are drawn.
        noise: Standard deviation of the noise, as a part of the range (the largest less the
            smallest entry) of each sample.
        seed: Of a generator of its own; the same numbers are drawn on every device.
        rules: None for the gradient, else as ``lrpfx.explain`` takes them: the mean is one of
            relevance.
        wrt: See ``gradient``.
        memory: Bytes that activations may take, about: so many copies are computed together.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Raises:
        LrpError: As ``gradient``, and as ``lrpfx.explain`` for rules.

    Source: Smilkov et al. 2017, https://arxiv.org/abs/1706.03825, sect. 2.1.
    """
    _check_count("samples", samples)
    if not isinstance(noise, (int, float)) or not noise >= 0:
        raise InputError(f"noise={noise!r} is no standard deviation.", fix="give a number >= 0.")
    with subject_of(model, x, wrt) as subject:
        ruled = None if rules is None else Ruled(subject, rules, modifies=False)
        values = [value.detach() for value in subject.values]
        spread = [noise * _range(value) for value in values]

        def find(score: Score) -> Found:
            generator = torch.Generator().manual_seed(seed)

            def along(step: int) -> list[Tensor]:
                pairs = zip(values, spread, strict=True)
                return [v + s * _normal(v, generator) for v, s in pairs]

            total = [torch.zeros_like(v) for v in values]
            if ruled is None:
                found = slopes_along(subject, score, along, samples, memory, progress)
            else:
                at = shown(range(samples), "relevance of noisy copies", progress)
                found = (ruled.at(along(step), score.fixed()) for step in at)
            for one in found:
                for sum_, slope in zip(total, one, strict=True):
                    sum_ += slope / samples
            return by_input(subject, total)

        return explanations(subject, target, "SmoothGrad" + _along(ruled), find)


def _slopes(subject: Subject, score: Score, keep: bool) -> list[Tensor]:
    return gradients(score(subject.output).sum(), subject.values, keep)


def _along(ruled: Ruled | None) -> str:
    return "" if ruled is None else f" of {ruled.rules}"


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} is no number of them.", fix="give at least 1.")


def _range(value: Tensor) -> Tensor:
    """The largest less the smallest entry of each sample, to be broadcast to it."""
    if value.ndim < 2:
        return value.max() - value.min()
    flat = value.flatten(1)
    width = flat.amax(1) - flat.amin(1)
    return width.reshape(-1, *[1] * (value.ndim - 1))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _completeness(parts: Sequence[Tensor], end: Tensor, begin: Tensor, plain: bool) -> str:
    """What it should sum to, and how far it is off."""
    n = len(end)
    if all(len(part) % n == 0 for part in parts if part.ndim):
        sums = torch.stack([part.reshape(n, -1).sum(1) for part in parts]).sum(0)
    else:
        end, begin = end.sum()[None], begin.sum()[None]
        sums = torch.stack([part.sum() for part in parts]).sum()[None]
    should = end - begin
    off = float((sums - should).abs().max())
    size = float(should.abs().max())
    note = f"the target is {float(begin.mean()):.4g} at the baseline, on average over samples; "
    if plain:
        return note + f"the sum is off by {off:.2g} at most, of {size:.4g} to be explained"
    return note + "the sum of modified gradients along a line has no such value to meet"


def _baseline(subject: Subject, baseline: Any) -> list[Tensor]:
    """The baseline of each start.

    Raises:
        InputError: It does not fit the inputs.
    """
    leaves, given = subject.leaves, for_each(subject, baseline, "the baseline")
    ids = {
        i: value
        for i, value in enumerate(given)
        if i in subject.ids and isinstance(value, Tensor) and not value.is_floating_point()
    }
    rows: list[Tensor] = []
    if ids:
        other = list(leaves)
        for i, value in ids.items():
            other[i] = fitted(value, leaves[i], "the baseline")
        rows = subject.looked_up(other)
    found = []
    for k, start in enumerate(subject.starts):
        if start.leaf in ids:
            found.append(rows[k - (len(subject.starts) - len(rows))].detach())
        else:
            found.append(fitted(given[start.leaf], start.value.detach(), "the baseline"))
    return found
