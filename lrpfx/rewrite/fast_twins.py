"""Steps of the phantom stream where relevance is wanted fast: see ``shortcuts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrpfx.ops import AffineMap, Call, fill
from lrpfx.rewrite.ledger import Ledger
from lrpfx.rewrite.twins import Arrival, Step, Twin
from lrpfx.rules import Carry, finite, share


def begin(clean: Tensor) -> Tensor:
    """A phantom that is a leaf, and has the value of ``clean``."""
    return clean.detach().requires_grad_()


def scaled(value: Tensor, share: float) -> Tensor:
    """The value, whose gradient is ``share`` times what arrives; with autograd on."""
    value = value.view_as(value)
    value.register_hook(lambda m: m * share)
    return value


def add_to(own: Tensor, other: Tensor) -> Tensor:
    """The sum, in the memory of ``own`` unless autocast has made that too short."""
    return own.add_(other) if torch.result_type(own, other) == own.dtype else own + other


@dataclass(frozen=True, eq=False)
class FastStep(Step):
    """A step whose phantom is the activation itself, for ops that are run on it.

    It is called with autograd on.
    """

    def __call__(self, clean: Any, *rest: Any, ledger: Ledger | None = None) -> Any:
        """Values that carry a graph of their own are read without it."""
        phantoms, values = rest[: self.arity], rest[self.arity :]
        return self._apply(ledger, _plain(clean), *phantoms, *map(_plain, values))

    def phantom(self, clean: Tensor) -> Tensor:
        """The activation, as a start of a graph."""
        return clean


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True, eq=False)
class Exchange(FastStep):
    """Between two ops: turns R into R / a, or c into a c.

    Args:
        into: "multiplier" or "relevance".
    """

    into: str

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """What the one phantom gets."""
        (m,) = given.R
        if self.into == "relevance":
            return (finite(given.z) * m,)
        return (share(m, given.z, 0.0, False),)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a constant is computed from parameters.

    Args:
        steps: Calls, op, arguments and keywords each. The slots in them are the parameters, then
            the results of the steps before.
    """

    steps: Sequence[tuple[Callable[..., Tensor], Any, Any]]

    def __call__(self, *leaves: Tensor) -> Tensor:
        """The last step's result."""
        values = list(leaves)
        for op, args, keywords in self.steps:
            given = fill((args, keywords), values)
            values.append(op(*given[0], **given[1]))
        return values[-1]


#: How a slot is computed from values that are given after the slots: its index, the recipe, and
#: the places of its parameters.
Derived = tuple[int, Recipe, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class FastTwin(Twin, FastStep):
    """A twin whose edges carry multipliers or relevance.

    Args:
        carry: What it receives and hands on.
        memory: Where it may keep a map whose weights stay as they are, else None.
        derived: The slots that are computed again.
        addend: The place of what the given output has too much, None if it is the node's own.
    """

    carry: Carry
    memory: list[AffineMap] | None
    derived: Sequence[Derived]
    addend: int | None

    def hand_on(self, given: Arrival) -> tuple[Tensor, ...]:
        """Multipliers or relevance of the live inputs, as each edge carries it."""
        slots, z = list(given.values), given.z
        for index, make, places in self.derived:
            slots[index] = make(*(given.values[i] for i in places))
        if self.addend is not None:
            z = z - slots[self.addend]
        call = Call(self.site, tuple(slots), self.memory)
        x, m, carry = self.live_inputs(slots, given.forms), self.received(given.R), self.carry
        if not self.rule.carries(self.site, carry.takes):
            return self.rule.relevance(call, x, z, m, carry)
        found = self.rule.multiply(call, x, z, m, carry)
        return tuple(
            c if gives else self.rule.weigh(a, c)
            for a, c, gives in zip(x, found, carry.gives, strict=True)
        )
