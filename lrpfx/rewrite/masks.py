"""Conditions in the phantom stream: masks at places, gates on edges.

How much of each concept is kept is no constant of the graph: it comes as the gradient of an output
of its own. So one forward pass serves all conditions, also several in one backward pass, and the
kept relevance can be differentiated.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lrpfx.rewrite.fast_twins import FastStep
from lrpfx.rewrite.twins import Arrival, Step


class Kind(Protocol):
    """A kind of concept as masks use it: see ``conditions.Concept``."""

    def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
        """Relevance of each concept, (N, C)."""

    def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
        """The relevance that is left."""


#: From a node to one of those that it hands relevance to; None is where relevance starts.
Edge = tuple[fx.Node | None, fx.Node]


@dataclass(frozen=True)
class Edits:
    """What conditions change in a graph.

    Args:
        masks: Places, each with the kinds of concepts that are masked there.
        gates: Edges on which relevance may be kept back.
        begin: The place that relevance starts from, None for the outputs.
        by_sample: Whether gates are open for some samples and closed for others.
    """

    masks: Mapping[fx.Node, Sequence[Kind]] = field(default_factory=dict)
    gates: Collection[Edge] = ()
    begin: fx.Node | None = None
    by_sample: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells these edits from others of the same graph."""
        return tuple(self.masks.items()), tuple(self.gates), self.begin, self.by_sample

    @property
    def touched(self) -> set[fx.Node]:
        """The nodes at which relevance itself is read."""
        ends = {n for edge in self.gates for n in edge if n is not None}
        return {*self.masks, *ends, *([] if self.begin is None else [self.begin])}


#: No conditions.
UNCHANGED = Edits()


@dataclass(frozen=True, eq=False)
class Form:
    """Clean value of a place -> zeros (N, C): the form of the weights of a mask there."""

    kind: Kind

    def __post_init__(self) -> None:
        """Name the callable for fx."""
        object.__setattr__(self, "__name__", "form_of_weights")

    def __call__(self, clean: Tensor) -> Tensor:
        """The zeros."""
        nothing = torch.zeros((), dtype=clean.dtype, device=clean.device).expand(clean.shape)
        return torch.zeros_like(self.kind.encode(nothing, clean.detach()))


def form_of_gate(clean: Tensor, by_sample: bool) -> Tensor:
    """Zeros, (N,) or (1,): the form of the weights of a gate."""
    return clean.new_zeros(len(clean) if by_sample else 1)


@dataclass(frozen=True, eq=False)
class Mask(Step):
    """Keeps some concepts of the relevance that arrives at a place.

    Called as ``step((clean, weights), phantom, clean)``; the weights' gradient says what is kept.

    Args:
        kind: The kind of concepts.
        node: The place, for the ledger.
    """

    kind: Kind
    node: str

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """What is left of R."""
        (R, weights), (a,) = given.R, given.values
        kept = self.kind.mask(R, a, weights)
        if given.ledger is not None:
            given.ledger.keep_back(self.node, R, kept, arriving=True)
        return (kept,)


@dataclass(frozen=True, eq=False)
class Gate(Step):
    """Lets relevance through an edge, or does not.

    Called as ``step((clean, weights), phantom)``.

    Args:
        node: What hands relevance to the edge, for the ledger; "" if it starts there.
    """

    node: str

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """R or nothing."""
        R, weights = given.R
        kept = R * weights.reshape(-1, *[1] * (R.ndim - 1))
        if given.ledger is not None and self.node:
            given.ledger.keep_back(self.node, R, kept, arriving=False)
        return (kept,)


@dataclass(frozen=True, eq=False)
class FastMask(Mask, FastStep):
    """A mask whose phantom is the activation."""


@dataclass(frozen=True, eq=False)
class FastGate(Gate, FastStep):
    """A gate whose phantom is the activation."""


class Conditions:
    """Puts masks and gates into a phantom stream.

    Args:
        graph: What is built.
        edits: What to put in.
        fast: Whether phantoms are activations.
        keywords: How steps are told of the ledger.
    """

    def __init__(
        self, graph: fx.Graph, edits: Edits, *, fast: bool, keywords: Mapping[str, Any]
    ) -> None:
        self._graph, self._edits, self._keywords = graph, edits, keywords
        self._mask, self._gate = (FastMask, FastGate) if fast else (Mask, Gate)
        self._weights: dict[Any, fx.Node] = {}
        #: The phantoms of the places behind their masks: what the masks let through.
        self.passed: dict[fx.Node, fx.Node] = {}

    def mask(self, place: fx.Node, clean: fx.Node, phantom: fx.Node) -> fx.Node:
        """The phantom of a place with its masks before it."""
        for k, kind in enumerate(self._edits.masks.get(place, ())):
            self.passed.setdefault(place, phantom)
            step = self._mask(f"{place.name}_mask{k}", 1, False, kind, place.name)
            made = self._graph.call_function(Form(kind), (clean,))
            phantom = self._beside((place, k), step, clean, made, phantom, clean)
        return phantom

    def gate(self, reader: fx.Node | None, node: fx.Node, clean: Any, phantom: fx.Node) -> fx.Node:
        """The phantom of a node as ``reader`` has it: behind a gate, if there is one."""
        if (reader, node) not in self._edits.gates:
            return phantom
        name = "" if reader is None else reader.name
        step = self._gate(f"{node.name}_to_{name or 'output'}", 1, False, name)
        made = self._graph.call_function(form_of_gate, (clean, self._edits.by_sample))
        return self._beside((reader, node), step, clean, made, phantom)

    def _beside(
        self, key: Any, step: Step, clean: fx.Node, weights: fx.Node, *rest: fx.Node
    ) -> fx.Node:
        args: Any = ((clean, weights), *rest)
        both = self._graph.create_node("call_function", step, args, dict(self._keywords))
        self._weights[key] = self._graph.call_function(operator.getitem, (both, 1))
        return self._graph.call_function(operator.getitem, (both, 0))

    def weights(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Of the masks and of the gates, in the order of the edits."""
        masks = self._edits.masks.items()
        return (
            [self._weights[place, k] for place, kinds in masks for k in range(len(kinds))],
            [self._weights[edge] for edge in self._edits.gates],
        )
