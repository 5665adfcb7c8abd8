"""The ledger of one explanation: what each node received, handed on, and kept, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lrpfx.rules import Absorbed, Flow, size_of, sum_all


@dataclass(frozen=True)
class Booking:
    """One node's sums over the whole batch.

    Args:
        received: Relevance that arrived at the node's output.
        passed: Relevance handed to the node's live inputs.
        absorbed: What stayed, by cause ("bias", "stabilizer", "dead", "constant", "gradient"),
            computed from the rule's formula and not as a difference.
        size_in: Absolute relevance that arrived.
        size_out: Absolute relevance that was handed on.
    """

    received: float
    passed: float
    absorbed: dict[str, float]
    size_in: float
    size_out: float

    @property
    def total_absorbed(self) -> float:
        """Sum over the causes."""
        return sum(self.absorbed.values())


@dataclass
class Ledger:
    """Collects bookings while relevance is computed; one ledger per explanation.

    Sums are float64 tensors until ``bookings`` is read, so that a GPU is not waited for.
    """

    _sums: dict[str, tuple[Tensor, Tensor, Absorbed]] = field(default_factory=dict)
    _sizes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _kept_back: dict[str, list[tuple[Tensor, bool]]] = field(default_factory=dict)
    _unit: float = 1.0

    def start(self, unit: float) -> None:
        """Begin anew, for relevance that is ``unit`` times what is to be booked."""
        self._sums, self._sizes, self._kept_back, self._unit = {}, {}, {}, unit

    def book(self, name: str, received: tuple[Tensor, ...], flow: Flow) -> None:
        """Record what the node ``name`` made of the relevance it received."""
        absorbed = {cause: value.detach() for cause, value in flow.absorbed().items()}
        self._sums[name] = (sum_all(received), sum_all(flow.relevance), absorbed)
        self._sizes[name] = (size_of(received), size_of(flow.relevance))

    def keep_back(self, name: str, came: Tensor, kept: Tensor, *, arriving: bool) -> None:
        """Record what a condition kept back of the relevance that a node received or handed on.

        Args:
            name: The node.
            came: The relevance before the mask or gate.
            kept: What is left of it.
            arriving: Whether this is before the node's own rule, and not after it.
        """
        gone = sum_all((came,)) - sum_all((kept,))
        self._kept_back.setdefault(name, []).append((gone, arriving))

    def bookings(self) -> dict[str, Booking]:
        """Per node name, in the order of the backward pass."""
        return {name: self._booking(name) for name in self._sums}

    def _booking(self, name: str) -> Booking:
        received, passed, absorbed = self._sums[name]
        causes = {cause: value.item() for cause, value in absorbed.items()}
        came, went = received.item(), passed.item()
        for gone, arriving in self._kept_back.get(name, ()):
            causes["condition"] = causes.get("condition", 0.0) + gone.item()
            came, went = (came + gone.item(), went) if arriving else (came, went - gone.item())
        size_in, size_out = (size.item() / self._unit for size in self._sizes[name])
        causes = {cause: value / self._unit for cause, value in causes.items()}
        return Booking(came / self._unit, went / self._unit, causes, size_in, size_out)
