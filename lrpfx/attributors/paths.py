"""Values along a path -> the gradient at each, plain or modified by rules, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.errors import RuleError, TargetError
from lrpfx.explain import Explainer
from lrpfx.plan import RulesLike
from lrpfx.probe import Lookups, Score, Subject, structured
from lrpfx.progress import shown
from lrpfx.run import Target


class Along(Protocol):
    """What is wanted of a point: values of what is explained, (N, ...) each."""

    def __call__(self, step: int) -> Sequence[Tensor]:
        """The values at a step."""


def slopes_along(
    subject: Subject, score: Score, along: Along, steps: int, memory: int, progress: bool
) -> Iterator[Sequence[Tensor]]:
    """The gradient of the score at each step, (N, ...) for each start.

    Args:
        subject: The model at its inputs.
        score: What is explained.
        along: The path.
        steps: How many there are.
        memory: See ``Subject.copies``.
        progress: Whether a bar is shown if it takes long.
    """
    copies = subject.copies(score, memory, steps)
    for first in shown(range(0, steps, copies), "gradients", progress):
        points = [along(step) for step in range(first, min(first + copies, steps))]
        k = len(points)
        values = [torch.cat(list(column)).requires_grad_() for column in zip(*points, strict=True)]
        total = score(subject.run(values, subject.repeated(k))).sum()
        yield from zip(*(g.chunk(k) for g in gradients(total, values)), strict=True)


def gradients(total: Tensor, values: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """Of a number, by each of the values; zeros for what it does not depend on.

    Raises:
        TargetError: It depends on none.
    """
    if not total.requires_grad:
        raise TargetError(
            "this output does not depend on the explained inputs by differentiable ops.",
            fix="choose another output by a callable target; occlusion() needs no gradient.",
        )
    found = torch.autograd.grad(total, values, retain_graph=keep, allow_unused=True)
    if all(g is None for g in found):
        raise TargetError(
            "this output does not depend on the explained inputs.",
            fix="choose another output by a callable target.",
        )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]


class Ruled:
    """The relevance of changed inputs under rules.

    Args:
        subject: The model at its inputs.
        rules: See ``lrpfx.explain``.
        modifies: Whether rules must be such as modify a gradient.

    Raises:
        RuleError: They must, and are not.
        LrpError: As ``lrpfx.explain``, for what concerns model and rules.
    """

    def __init__(self, subject: Subject, rules: RulesLike, modifies: bool) -> None:
        self._subject = subject
        self._rows = [s for s in subject.starts if s.places is not None]
        model, wrt = subject.model, subject.wrt
        if self._rows:
            model = _of_rows(subject)
            floating = [s.leaf for s in subject.starts if s.places is None]
            number = len(subject.leaves)
            wrt = (*floating, *range(number, number + len(self._rows)))
        values = [value.detach() for value in subject.values]
        self._explainer = Explainer(model, self._inputs(values), rules, wrt=wrt)
        if modifies and not self._explainer.modifies_gradient:
            raise RuleError(
                f"integrated gradients along {self._explainer.report.rules}: these rules give "
                "relevance, which is multiplied by the input already.",
                fix='give rules that modify a gradient, such as "beta_smooth" or '
                '"guided_backprop"; smoothgrad(rules=...) takes any.',
            )

    @property
    def rules(self) -> str:
        """How they were read."""
        return self._explainer.report.rules

    def at(self, values: Sequence[Tensor], target: Target) -> list[Tensor]:
        """The relevance at other values of what is explained, one tensor for each start."""
        explanation = self._explainer(self._inputs(values), target, ledger=False)
        flat = pytree.tree_leaves(explanation.relevance, is_leaf=lambda leaf: leaf is None)
        if self._rows:
            floating = [flat[s.leaf] for s in self._subject.starts if s.places is None]
            return [*floating, *flat[len(self._subject.leaves) :]]
        return [r for r in flat if r is not None]

    def _inputs(self, values: Sequence[Tensor]) -> Any:
        subject = self._subject
        flat = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in subject.leaves]
        rows = []
        for start, value in zip(subject.starts, values, strict=True):
            if start.places is None:
                flat[start.leaf] = value.detach()
            else:
                rows.append(value.detach())
        if rows:
            return (*flat, *rows)
        return structured(flat, subject)


def _of_rows(subject: Subject) -> nn.Module:
    """The model as a function of its flat inputs and what token ids pick from embeddings.

    It is the model to everything else: of its class, with its modules under their paths.
    """
    kind, spec, ids, number = type(subject.model), subject.spec, subject.ids, len(subject.leaves)

    def forward(self: nn.Module, *flat: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(flat[:number]), spec)
        with Lookups({i: flat[i] for i in ids}, flat[number:]):
            return kind.forward(self, *args, **kwargs)

    made: nn.Module = object.__new__(type(kind.__name__, (kind,), {"forward": forward}))
    made.__dict__ = dict(subject.model.__dict__)
    return made
