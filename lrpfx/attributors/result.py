"""What was found for each tensor that is explained -> Explanation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.explanation import Explanation, stacked
from lrpfx.probe import Score, Subject, scores, structured
from lrpfx.report import Report
from lrpfx.run import Target, absorbed_of, is_several


class Found(NamedTuple):
    """What a method found.

    Args:
        relevance: Per flat input, None for what is not explained.
        features: Likewise of token ids per embedding feature.
        notes: What the user may not expect.
    """

    relevance: list[Tensor | None]
    features: list[Tensor | None]
    notes: tuple[str, ...] = ()


def by_input(subject: Subject, values: Sequence[Tensor], notes: Sequence[str] = ()) -> Found:
    """What was found for the starts, by input: that of a token is its embedding's, summed."""
    number = len(subject.leaves)
    relevance: list[Tensor | None] = [None] * number
    features: list[Tensor | None] = [None] * number
    for start, value in zip(subject.starts, values, strict=True):
        i = start.leaf
        if start.places is None:
            relevance[i] = value
            continue
        ids = subject.leaves[i]
        rows = value.reshape(len(start.places), -1)
        given = start.places >= 0
        vectors = rows.new_zeros(ids.numel(), rows.shape[1])
        vectors = vectors.index_add(0, start.places[given], rows[given])
        vectors = vectors.reshape(*ids.shape, -1)
        before = features[i]
        if before is None:
            features[i] = vectors
        elif before.shape == vectors.shape:
            features[i] = before + vectors
        else:
            features[i] = torch.cat([before, vectors], -1)
        total = relevance[i]
        relevance[i] = vectors.sum(-1) if total is None else total + vectors.sum(-1)
    return Found(relevance, features, tuple(notes))


def explanations(
    subject: Subject, target: Target, method: str, find: Callable[[Score], Found]
) -> Explanation:
    """What a method finds, as an explanation; of several targets with a leading dimension.

    Args:
        subject: The model at its inputs.
        target: See ``lrpfx.explain``.
        method: Its name, for the report.
        find: The method, of one target.
    """
    found = [
        _explanation(subject, score, method, find(score))
        for score in scores(subject.output, target, subject.n)
    ]
    if not is_several(target):
        return found[0]
    several = f"{len(found)} target{'s' * (len(found) > 1)} of each sample"
    whole = stacked(found)
    return replace(whole, report=replace(whole.report, target=several))


def _explanation(subject: Subject, score: Score, method: str, found: Found) -> Explanation:
    relevance = [None if r is None else r.detach() for r in found.relevance]
    features = [None if r is None else r.detach() for r in found.features]
    arrived = [r for r in relevance if r is not None]
    absorbed = absorbed_of(score.seeds, arrived)
    report = Report(
        rows=(),
        rules=method,
        constant_nodes=None,
        notes=(*score.seed.notes, *found.notes),
        target=score.description,
        started=_total(score.seeds),
        reached=_total(arrived),
    )
    output = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, subject.output)
    return Explanation(
        relevance=structured(relevance, subject),
        output=output,
        target=score.seed.classes,
        seed=score.seeds[0] if len(score.seeds) == 1 else tuple(score.seeds),
        absorbed=absorbed,
        report=report,
        embeddings=structured(features, subject) if any(f is not None for f in features) else None,
        inputs=subject.inputs,
    )


def _total(tensors: Sequence[Tensor]) -> float:
    return sum(t.sum(dtype=torch.float64).item() for t in tensors)
