"""Model, inputs, explanation -> how the target falls while what is relevant is erased."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import Inputs, Wrt
from lrpfx.display import layout
from lrpfx.errors import InputError
from lrpfx.evaluate.curves import Curves, Order
from lrpfx.evaluate.maps import relevance_of, target_of
from lrpfx.evaluate.units import Units, erased_when, units_of
from lrpfx.explanation import Explanation
from lrpfx.probe import (
    MEMORY,
    Eraser,
    Fill,
    ModelLike,
    Score,
    Subject,
    per_sample,
    subject_of,
)
from lrpfx.progress import shown
from lrpfx.run import Target, is_several


class _Job(NamedTuple):
    """One step of one of the curves."""

    curve: int
    step: int
    erased: int


def perturbation(
    model: ModelLike,
    x: Inputs,
    explanation: Any,
    target: Target = None,
    steps: int = 50,
    order: Order = "most",
    fill: Fill | Literal["drop"] = "mean",
    *,
    patch: int | Sequence[int] = 1,
    kind: Literal["signal", "sequence"] | None = None,
    seed: int = 0,
    wrt: Wrt = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Curves:
    """How the target falls while more and more of the input is erased, in order of relevance.

    The opposite order is run as well, for the area between the two.

    Args:
        model: A module in evaluation mode, any function of tensors, or an Explainer, which stands
            for its model. It is not modified.
        x: What was explained: a tensor (N, ...), a tuple of positional or a dict of keyword
            arguments. Of several inputs the parts of all are ranked together.
        explanation: An Explanation, or relevance structured like ``x``.
        target: As ``lrpfx.explain`` takes it. None is what the explanation is of; of relevance by
            itself, the strongest output at ``x``.
        steps: In how many equal steps all is erased; no more than there are parts.
        order: "most" relevant first, "least", or "random" (another order for each sample).
        fill: What takes the place of what is erased. "mean": of images and signals the mean of
            each channel of each sample, of tables that of each column over the batch, of token ids
            that of the sample's embeddings. "blur": of images and signals what is left behind a
            Gaussian filter as wide as a tenth of them. A number, or a tensor that can be broadcast
            to ``x``. For token ids an ``int`` is an id (a mask token, say), a ``float`` fills the
            embedding, and "drop" takes tokens out, so that the sequence gets shorter. One for all
            inputs, or structured like them.
        patch: Parts are squares of this side in images, windows in signals; one size for all
            dimensions, or one for each. Channels are erased together, tables column by column.
        kind: Whether (N, ., .) is a "signal" (N, C, L) or a "sequence" (N, T, D); by default as
            the report of the explanation tells, else a signal.
        seed: Of the random order, and of that of equal parts.
        wrt: As ``lrpfx.explain`` takes it.
        memory: Bytes that activations may take, about: so many steps are computed together.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Returns:
        The curves of each sample.

    Raises:
        InputError: Relevance, patch or fill that do not fit the inputs.
        TargetError: The target does not fit the output, or is one number for several samples.

    Source: Samek et al. 2017, https://arxiv.org/abs/1509.06321, sect. III; Blücher et al. 2024,
    https://arxiv.org/abs/2401.06654 (both orders, and why the fill then matters less).
    """
    if order not in ("most", "least", "random"):
        raise InputError(f"order={order!r} is not known.", fix='give "most", "least" or "random".')
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps={steps!r} is no number of them.", fix="give at least 1.")
    if is_several(target):
        raise InputError("target asks for several classes.", fix="evaluate one of them at a time.")
    target = target_of(explanation) if target is None else target
    with subject_of(model, x, wrt, slopes=False) as subject:
        score = Score(subject.output, target, subject.n)
        units = _units(subject, explanation, patch, kind)
        turns = erased_when(torch.cat([u.relevance for u in units], 1), order, seed)
        number = turns.shape[1]
        drop = isinstance(fill, str) and fill == "drop"
        steps = min(steps, number)
        counts = torch.linspace(0, number, steps + 1).round().long()
        if drop:
            counts = counts.clamp(max=number - 1).unique()  # something is left
        first = per_sample(score, subject.output, subject.n).detach()
        found = [torch.stack([first] * len(counts), 1) for _ in range(2)]
        jobs = [_Job(c, s, int(k)) for c in range(2) for s, k in enumerate(counts) if s]
        if not drop:
            jobs.remove(_Job(1, len(counts) - 1, number))  # the same as that of the other curve
        both = turns, number - 1 - turns
        if drop:
            made = _dropped(subject, score, units, both, jobs, progress)
        else:
            eraser = Eraser(subject, fill, _is_sequence(subject, explanation, kind))
            copies = subject.copies(score, memory, len(jobs))
            made = _erased(subject, score, eraser, units, both, jobs, copies, progress)
        for job, values in made:
            found[job.curve][:, job.step] = values.detach().to(first.dtype)
        if not drop:
            found[1][:, -1] = found[0][:, -1]
        return Curves(found[0], found[1], counts / number, order)


def _units(
    subject: Subject,
    explanation: Any,
    patch: int | Sequence[int],
    kind: str | None,
) -> list[Units]:
    flat = pytree.tree_leaves(relevance_of(explanation), is_leaf=lambda leaf: leaf is None)
    if len(flat) != len(subject.leaves):
        raise InputError(
            f"relevance of {len(flat)} inputs, and there are {len(subject.leaves)}.",
            fix="give relevance structured like the inputs, None for what is not explained.",
        )
    sequence = _is_sequence(subject, explanation, kind)
    units = [
        units_of(i, subject.leaves[i], r, patch, sequence)
        for i, r in enumerate(flat)
        if r is not None
    ]
    if not units:
        raise InputError("the explanation holds no relevance.", fix="explain these inputs.")
    return units


def _is_sequence(subject: Subject, explanation: Any, kind: str | None) -> bool:
    if kind is not None or not isinstance(explanation, Explanation):
        return kind == "sequence"
    rows = explanation.report.planned().rows
    flat = pytree.tree_leaves(explanation.relevance)
    return any(layout(rows, r) == "sequence" for r in flat if isinstance(r, Tensor))


def _erased(
    subject: Subject,
    score: Score,
    eraser: Eraser,
    units: Sequence[Units],
    turns: Sequence[Tensor],
    jobs: Sequence[_Job],
    copies: int,
    progress: bool,
) -> Iterator[tuple[_Job, Tensor]]:
    """The scores of each job, several together."""
    sizes = [u.relevance.shape[1] for u in units]
    for begin in shown(range(0, len(jobs), copies), "perturbation", progress):
        some = jobs[begin : begin + copies]
        gone = torch.cat([turns[job.curve] < job.erased for job in some])
        masks = {}
        for unit, part in zip(units, gone.split(sizes, 1), strict=True):
            leaf = subject.leaves[unit.leaf]
            masks[unit.leaf] = unit.mask(part, leaf.ndim).to(leaf.device)
        values = score(eraser(masks, len(some)))
        yield from zip(some, values.chunk(len(some)), strict=True)


def _dropped(
    subject: Subject,
    score: Score,
    units: Sequence[Units],
    turns: Sequence[Tensor],
    jobs: Sequence[_Job],
    progress: bool,
) -> Iterator[tuple[_Job, Tensor]]:
    """The scores of sequences that tokens are taken out of."""
    (unit, *more), n = units, subject.n
    ids = subject.leaves[unit.leaf]
    if more or ids.is_floating_point() or ids.ndim != 2:
        raise InputError(
            'fill="drop" takes tokens out of one input of token ids (N, T).',
            fix="explain only that input, by wrt=; or give another fill.",
        )
    length = ids.shape[1]
    for job in shown(jobs, "perturbation", progress):
        kept = (turns[job.curve] >= job.erased).nonzero()[:, 1].reshape(n, -1).to(ids.device)
        leaves = [
            leaf[torch.arange(n, device=ids.device)[:, None], kept]
            if isinstance(leaf, Tensor) and leaf.shape[:2] == (n, length)
            else leaf
            for leaf in subject.leaves
        ]
        yield job, score(subject.run([None] * len(subject.starts), leaves))
