"""Which nodes an entry of a composite is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrpfx.ops import Record

#: An op kind, a module class, a module-path glob, "*", or a predicate on the node's record; or
#: several of these, of which any may match.
Selector = str | type[nn.Module] | Callable[[Record], bool] | tuple[Any, ...]


@dataclass(frozen=True)
class First:
    """Selects the first layers of the given kinds, in execution order.

    First are the nodes that the explained input reaches through no other conv or linear; a model
    with several inputs or parallel stems has several.

    Args:
        kinds: Op kinds; one may be given by itself.
    """

    kinds: tuple[str, ...] = ("conv", "linear")

    def __post_init__(self) -> None:
        """Take one kind for a tuple of it."""
        if isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", (self.kinds,))

    def __call__(self, node: Record) -> bool:
        """Whether the node is a first layer of one of the kinds."""
        return node.first and node.kind in self.kinds

    def __str__(self) -> str:
        return f"first {' or '.join(self.kinds)}"


@dataclass(frozen=True)
class Attending:
    """Selects the nodes of a kind, or family, that some attention stands before or behind.

    Attention is a softmax beside products of matrices.
    """

    kind: str

    def __call__(self, node: Record) -> bool:
        """Whether the node is of the kind, and attention on a way through it."""
        return node.attending and self.kind in (node.kind, node.family)

    def __str__(self) -> str:
        return f"{self.kind} beside attention"


def gates(node: Record) -> bool:
    """Selects the activations that gate a product, such as silu(a) in silu(a) * b."""
    return node.gate


def recurrent_gates(node: Record) -> bool:
    """Selects the gates of recurrent layers, PyTorch's own and those written by hand.

    They are sigmoids (or hard ones, or clamps from zero) by which a state or a signal is
    multiplied, and whose weights gate again, later on, what they have gated. Those of gated MLPs
    and of squeeze and excitation do not.
    """
    return node.recurrent


def patch_embeddings(node: Record) -> bool:
    """Selects first convolutions whose output enters attention as it is: those of a ViT's patches.

    Only linear layers read it, moved, normalised or shifted maybe; no activation, pooling or
    further convolution.
    """
    return node.first and node.tokenwise


def pointwise_convolutions(node: Record) -> bool:
    """Selects convolutions with a kernel of one that stand for linear layers of a transformer.

    There no wider convolution stands before or behind them, but for patch embeddings.
    """
    return node.tokenwise and not node.first


def input_scales(node: Record) -> bool:
    """Selects what shifts or scales an input by channel before its first layer.

    Such as ``(x - mean) / std``, ``x * 2 - 1``, ``x / 255``, or a batch norm.
    """
    return node.preparing


def describe(selector: Selector) -> str:
    """How reports and errors name a selector."""
    if isinstance(selector, tuple):
        return " or ".join(map(describe, selector))
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, (First, Attending)):
        return str(selector)
    return getattr(selector, "__name__", repr(selector))
