"""The ledger of one explanation: what each node received, handed on, and kept, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lrpfx.rules import Absorbed, Flow, sum_all


@dataclass(frozen=True)
class Booking:
    """One node's sums over the whole batch.

    Args:
        received: Relevance that arrived at the node's output.
        passed: Relevance handed to the node's live inputs.
        absorbed: What stayed, by cause ("bias", "stabilizer", "dead", "constant", "gradient"),
            computed from the rule's formula and not as a difference.
    """

    received: float
    passed: float
    absorbed: dict[str, float]

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

    def book(self, name: str, received: tuple[Tensor, ...], flow: Flow) -> None:
        """Record what the node ``name`` made of the relevance it received."""
        absorbed = {cause: value.detach() for cause, value in flow.absorbed().items()}
        self._sums[name] = (sum_all(received), sum_all(flow.relevance), absorbed)

    def bookings(self) -> dict[str, Booking]:
        """Per node name, in the order of the backward pass."""
        return {
            name: Booking(
                received.item(),
                passed.item(),
                {cause: value.item() for cause, value in absorbed.items()},
            )
            for name, (received, passed, absorbed) in self._sums.items()
        }
