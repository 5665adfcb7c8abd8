"""Relevance that has grown beyond measure -> a note that names the place, and one warning.

This is the net under everything that recognition misses. Rules conserve relevance, more or less;
where a thousand times of it comes out something was divided by next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from lrpfx.capture import leaves_in
from lrpfx.errors import ExplosionWarning, some, warn
from lrpfx.explanation import Explanation
from lrpfx.plan import Plan
from lrpfx.rewrite import Booking
from lrpfx.rules import size_of
from lrpfx.run.targets import Seed

#: How many times the absolute relevance that came to it a node, or all together, may hand on.
MOST = 1000.0
#: Less than this part of what relevance began with is round-off.
_LEAST = 1e-6

Booked = Mapping[str, Booking]


class Alarm:
    """Watches the explanations of one Explainer.

    Args:
        plan: A rule for each live node.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._warned = False
        self._where = ""  # the places of the first that has grown

    def notes(
        self,
        parts: Sequence[Explanation],
        seeds: Sequence[Seed],
        booked: Booked,
        book: Callable[[Seed], Booked],
    ) -> tuple[str, ...]:
        """A note if relevance has grown; none where it is a gradient, which has no measure.

        Args:
            parts: What is explained, one for each seed.
            seeds: What relevance began with.
            booked: What each node made of it; empty if no ledger is kept.
            book: Makes the ledger of one seed. It is called for the first map that has grown.
        """
        if self._plan.by_gradient:
            return ()
        begun = [_size(seed.seeds) for seed in seeds]
        came = [_size(leaves_in(part.relevance)) for part in parts]
        times = [c / b if b else 0.0 for c, b in zip(came, begun, strict=True)]
        worst = max(range(len(times)), key=times.__getitem__)
        grown = times[worst] > MOST
        if grown and not booked and not self._where:
            booked = book(seeds[worst])
        where = self._places(booked, begun[worst]) if booked else self._where if grown else ""
        if not grown and not where:
            return ()
        self._where = self._where or where
        maps = f", in {sum(t > MOST for t in times)} of {len(times)} maps" * (len(times) > 1)
        note = (
            f"relevance grew to {times[worst]:.3g} times what it began with, by absolute sums{maps}"
            if grown
            else "relevance grew on its way"
        )
        note += f": {where}" * bool(where)
        if not self._warned:
            self._warned = True
            warn(f"{note}. Such maps are mostly noise; look at the rule there.", ExplosionWarning)
        return (note,)

    def _places(self, booked: Booked, begun: float) -> str:
        """The nodes that handed on too much, or the first at which too much had gathered."""
        steep = {
            name: b.size_out / b.size_in if b.size_in else float("inf")
            for name, b in booked.items()
            if b.size_out > MOST * b.size_in and b.size_out > _LEAST * begun
        }
        if steep:
            first = sorted(steep, key=lambda name: -steep[name])
            said = [f"{self._place(n)} handed on {steep[n]:.3g} times what it got" for n in first]
            return "; ".join(some(said, 3))
        past = next((n for n, b in booked.items() if b.size_out > MOST * begun), None)
        return (
            ""
            if past is None
            else f"little by little, and past {MOST:g} times at {self._place(past)}"
        )

    def _place(self, name: str) -> str:
        assignment = self._plan.assignments[name]
        place = f"{assignment.record} under {assignment.rule}"
        return place + f" ({assignment.record.source})" * bool(assignment.record.source)


def _size(tensors: Iterable[Tensor | None]) -> float:
    return size_of([t for t in tensors if isinstance(t, Tensor)]).item()
