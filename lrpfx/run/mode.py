"""A model that is being trained: what a note says of its mode, and what forgotten graphs end in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import Captured, opened
from lrpfx.errors import InputError


def mode_notes(captured: Captured) -> list[str]:
    """What is explained is the model in the mode that it was captured in."""
    turned = [now.training for now, was in captured.training if now.training != was]
    if not turned:
        return []
    if any(turned):
        return [
            "the model is in training mode now and was captured in evaluation mode: output and "
            "relevance are those of evaluation mode, with running statistics and without dropout"
        ]
    return [
        "the model is in evaluation mode now and was captured in training mode: output and "
        "relevance are those of training mode; make a new Explainer for the other"
    ]


def is_being_trained(captured: Captured) -> bool:
    """Whether a module was turned to training mode since."""
    return any(now.training and not was for now, was in captured.training)


def without_graph(relevance: Any) -> Any:
    """The same values, of which a loss cannot be differentiated without a word.

    A penalty on them would give no gradient: added to another loss it would do nothing at all.
    """

    def refuse(gradient: Tensor) -> Tensor:
        raise InputError(
            "a loss depends on relevance that was computed without its graph, so it would give "
            "the model no gradient.",
            fix="explainer(x, target, create_graph=True), or relevance.detach() in the loss.",
        )

    def watched(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().requires_grad_()
        leaf.register_hook(refuse)
        return leaf

    return pytree.tree_map(watched, opened(relevance))
