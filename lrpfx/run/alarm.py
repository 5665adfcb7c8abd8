"""Relevance that has grown beyond measure -> a note that names the place, and one warning.

This is the net under everything that recognition misses. Rules conserve relevance, more or less;
where a thousand times of it comes out something was divided by next to nothing. An output that is
itself next to nothing beside its summands is no such case: its relevance is measured by these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lrpfx.capture import leaves_in
from lrpfx.errors import ExplosionWarning, some, warn
from lrpfx.explanation import Explanation
from lrpfx.plan import Plan
from lrpfx.rewrite import Booking
from lrpfx.rules import size_of
from lrpfx.run.gauge import Gauge
from lrpfx.run.halves import in_float16
from lrpfx.run.summands import Summands
from lrpfx.run.targets import Seed

#: How many times the absolute relevance that came to it a node, or all together, may hand on.
MOST = 1000.0
#: Less than this part of what relevance began with is round-off.
_LEAST = 1e-6

Booked = Mapping[str, Booking]


@dataclass(frozen=True)
class Watched:
    """What is known of how relevance came about.

    Args:
        leaves: Flat inputs.
        seeds: What relevance began with.
        booked: What each node made of it; empty if no ledger is kept.
        gauge: What ran the graph, if its edges were measured.
        again: What is run once more for one seed, if they were not; None where that says nothing.
        book: Makes the ledger of one seed.
    """

    leaves: Sequence[Any]
    seeds: Sequence[Seed]
    booked: Booked
    gauge: Gauge | None
    again: nn.Module | None
    book: Callable[[Seed], Booked]


class Alarm:
    """Watches the explanations of one Explainer.

    Maps are watched in every call, nodes wherever a ledger is made. In the first call of each form
    that keeps none the edges are measured, of several targets for the one that has grown the most,
    and a ledger is made if one is steep; so it is for the first map that has grown.

    Args:
        module: The canonical graph.
        plan: A rule for each live node.
        live: These nodes.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, live: set[fx.Node]) -> None:
        self._graph, self._plan, self._live = module.graph, plan, live
        self._summands = Summands(module, live)
        self._gauged: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._warned = False
        self._where = ""  # the places of the first that has grown

    def gauge(self, module: nn.Module) -> Gauge | None:
        """What runs a rewritten graph that keeps no ledger, until it once has; then None."""
        return None if self._plan.by_gradient or module in self._gauged else Gauge(module)

    def forget(self) -> None:
        """Let the edges of each form be measured once more."""
        self._gauged.clear()

    def notes(self, parts: Sequence[Explanation], watched: Watched) -> tuple[str, ...]:
        """A note if relevance has grown; none where it is a gradient, which has no measure.

        Args:
            parts: What is explained, one for each seed.
            watched: How it came about.
        """
        if self._plan.by_gradient:
            return ()
        seeds, booked = watched.seeds, watched.booked
        times, ratios = [0.0] * len(parts), [0.0] * len(parts)
        for k, (part, seed) in enumerate(zip(parts, seeds, strict=True)):
            begun, came = _size(seed.seeds), _size(leaves_in(part.relevance))
            ratios[k] = came / begun if begun else 0.0
            if ratios[k] > MOST and came > MOST * self._summands.size(watched.leaves, seed):
                times[k] = ratios[k]
        worst = max(range(len(times)), key=lambda k: (times[k], ratios[k]))
        grown = times[worst] > 0
        gauge, steep = watched.gauge, False
        if watched.again is not None and (gauge := self.gauge(watched.again)) is not None:
            gauge.measure(watched.leaves, seeds[worst], in_float16(self._plan, watched.leaves))
        if gauge is not None and gauge.measured:
            self._gauged.add(gauge.module)
            steep = gauge.steepest(self._graph, self._live) > MOST
        if not booked and (steep or (grown and not self._where)):
            booked = watched.book(seeds[worst])
        where = self.places(booked, watched.leaves, seeds[worst]) or self._where * grown
        if not grown and not where:
            return ()
        self._where = self._where or where
        maps = f", in {sum(t > 0 for t in times)} of {len(times)} maps" * (len(times) > 1)
        note = (
            f"relevance grew to {times[worst]:.3g} times what it began with, by absolute sums{maps}"
            if grown
            else "relevance grew on its way"
        )
        note += f": {where}" * bool(where)
        self._warn(note)
        return (note,)

    def look(self, booked: Booked, leaves: Sequence[Any], seed: Seed) -> None:
        """Warn of what a ledger shows that was made after the explanation."""
        if not self._plan.by_gradient and (where := self.places(booked, leaves, seed)):
            self._warn(f"relevance grew on its way: {where}")

    def _warn(self, note: str) -> None:
        if not self._warned:
            self._warned = True
            warn(f"{note}. Such maps are mostly noise; look at the rule there.", ExplosionWarning)

    def places(self, booked: Booked, leaves: Sequence[Any], seed: Seed) -> str:
        """The nodes that handed on too much, or the first at which too much had gathered.

        Args:
            booked: What each node made of relevance.
            leaves: Flat inputs.
            seed: What it began with.
        """
        begun = _size(seed.seeds)
        if all(b.size_out <= MOST * min(b.size_in, begun) for b in booked.values()):
            return ""
        begun = max(begun, self._summands.size(leaves, seed))
        steep = {}
        for name, b in booked.items():
            got = max(b.size_in, begun) if name in self._summands.names else b.size_in
            if b.size_out > MOST * got and b.size_out > _LEAST * begun:
                steep[name] = b.size_out / b.size_in if b.size_in else float("inf")
        if steep:
            first = sorted(steep, key=lambda name: -steep[name])
            said = [f"{self._place(n)} handed on {steep[n]:.3g} times what it got" for n in first]
            return "; ".join(some(said, 3))
        past = next((n for n, b in booked.items() if b.size_out > MOST * begun), None)
        if past is None:
            return ""
        return f"little by little, and past {MOST:g} times at {self._place(past)}"

    def _place(self, name: str) -> str:
        assignment = self._plan.assignments[name]
        place = f"{assignment.record} under {assignment.rule}"
        return place + f" ({assignment.record.source})" * bool(assignment.record.source)


def _size(tensors: Iterable[Tensor | None]) -> float:
    return size_of([t for t in tensors if isinstance(t, Tensor)]).item()
