"""A program against the Explainer it was made of: on the example inputs, and at other sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import (
    Inputs,
    argument_names,
    check_inputs,
    rounded,
    tensors_in,
    worst_difference,
)
from lrpfx.deploy.program import Letters, letters_of, target_name, with_target
from lrpfx.deploy.seeds import check_output
from lrpfx.errors import ExportError, InputError
from lrpfx.explain import Explainer
from lrpfx.explanation import Explanation

#: How much farther from the Explainer's relevance that of a program may be than that of rounded
#: inputs.
_CHAOS = 10.0
#: Takes inputs as the program does, and returns tensors.
Run = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """Inputs, and what is to come of them.

    Args:
        args: Positional arguments of the program.
        kwargs: Keyword arguments.
        expected: Output and relevance, the tensors of both.
        near: What comes of rounded inputs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: list[Tensor]
    near: Callable[[], list[Tensor]]

    def check(self, run: Run, what: str) -> None:
        """Raise ExportError unless ``run`` gives the expected tensors."""
        got = [t.to(self.expected[0].device) for t in run(self.args, self.kwargs)]
        worst = worst_difference(self.expected, got)
        if worst <= 1:
            return
        if math.isfinite(worst):
            if worst <= _CHAOS * worst_difference(self.expected, self.near()):
                return
        raise ExportError(
            f"{what} gives another output or relevance than the Explainer "
            f"({worst:.1e} times the tolerance).",
            where=[
                f"inputs: {', '.join(map(_form, pytree.tree_leaves((self.args, self.kwargs))))}"
            ],
            fix="report this, please.",
        )


def make_cases(
    explainer: Explainer,
    inputs: Inputs,
    by_input: bool,
    class_names: Sequence[str] | None = None,
) -> list[Case]:
    """The example inputs, a single sample, and more samples at larger sizes, where these vary.

    Raises:
        TargetError: There are no classes for a target per sample.
        InputError: Inputs that do not fit, or not as many names as there are classes.
    """
    signature = explainer._engine.captured.signature
    leaves = check_inputs(signature, inputs)
    letters = letters_of(signature)
    sizes = {
        name: leaf.shape[dim]
        for leaf, each in zip(leaves, letters, strict=True)
        for dim, name in each.items()
    }
    classes = _classes(explainer, leaves) if by_input else None
    if class_names is not None and classes not in (None, len(class_names)):
        raise InputError(
            f"there are {len(class_names)} class_names, and {classes} classes.",
            fix="give one for each.",
        )
    cases = [_case(explainer, leaves, classes)]
    if "N" in sizes:
        counts = 1, max(2, sizes["N"]) + 1
        given = [_resized(leaves, letters, {"N": count}) for count in counts]
        cases += [_case(explainer, each, classes) for each in given]
    if others := {name: size + 1 for name, size in sizes.items() if name != "N"}:
        with contextlib.suppress(InputError):  # the model wants other sizes
            cases.append(_case(explainer, _resized(leaves, letters, others), classes))
    return cases


def _classes(explainer: Explainer, leaves: Sequence[Any]) -> int:
    """How many classes the explained output has."""
    outputs = tensors_in(_explained(explainer, leaves, None).output)
    index = next(i for i, t in enumerate(outputs) if t.is_floating_point())
    check_output(outputs[index], explainer._engine.is_batched(leaves, index))
    return outputs[index].shape[1]


def _case(explainer: Explainer, leaves: Sequence[Any], classes: int | None) -> Case:
    args, kwargs = pytree.tree_unflatten(list(leaves), explainer._engine.captured.signature.spec)
    target: Tensor | None = None
    if classes is not None:
        first = next(t for t in leaves if isinstance(t, Tensor) and t.ndim)
        target = torch.arange(len(first), device=first.device) % classes
        name = target_name(argument_names(explainer.model, kwargs or args))
        args, kwargs = with_target(args, kwargs, target, name)

    def found(leaves: Sequence[Any]) -> list[Tensor]:
        explanation = _explained(explainer, leaves, target)
        relevance = pytree.tree_leaves(explanation.relevance)
        return [
            *tensors_in(explanation.output),
            *(r for r in relevance if isinstance(r, Tensor)),
        ]

    return Case(args, kwargs, found(leaves), lambda: found([rounded(leaf) for leaf in leaves]))


def _explained(
    explainer: Explainer, leaves: Sequence[Any], target: Tensor | None
) -> Explanation[Any]:
    args, kwargs = pytree.tree_unflatten(list(leaves), explainer._engine.captured.signature.spec)
    return explainer(kwargs or args, target, ledger=False)


def _resized(leaves: Sequence[Any], letters: Sequence[Letters], sizes: dict[str, int]) -> list[Any]:
    """The inputs at other sizes, their entries repeated."""
    found = []
    for leaf, each in zip(leaves, letters, strict=True):
        for dim, name in each.items():
            if name in sizes:
                places = torch.arange(sizes[name], device=leaf.device) % leaf.shape[dim]
                leaf = leaf.index_select(dim, places)
        found.append(leaf)
    return found


def _form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
