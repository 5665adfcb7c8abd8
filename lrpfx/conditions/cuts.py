"""Conditioned places -> the edges on which no relevance may go: those beside the places.

Relevance follows paths from the outputs to the inputs. A path stays if it passes as many of the
places as it can: no place that it leaves out is above or below all of those that it passes. So of
places one above the other it passes all, and of places in parallel branches the one it comes to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import fx

from lrpfx.errors import SelectorError
from lrpfx.ops import reachable
from lrpfx.rewrite import Edge

#: The places that a path has passed so far.
Passed = frozenset[fx.Node]


def find_cuts(
    graph: fx.Graph,
    live: Collection[fx.Node],
    starts: Collection[fx.Node],
    ends: Sequence[fx.Node],
    places: Collection[fx.Node],
) -> set[Edge]:
    """The edges that lead from paths that stay to none that does.

    Args:
        graph: A canonized, annotated graph.
        live: The nodes that carry relevance.
        starts: Where relevance is wanted.
        ends: Where relevance comes from.
        places: Those that are conditioned.

    Raises:
        SelectorError: Which paths pass the places cannot be told edge by edge.
    """
    below = {node: _below(node, live, starts) for node in live}
    return _Paths(graph, below, starts, ends, frozenset(places)).cuts()


def check_on_path(
    live: Collection[fx.Node],
    starts: Collection[fx.Node],
    ends: Sequence[fx.Node],
    places: Collection[fx.Node],
) -> None:
    """Raise SelectorError for places that relevance from the ends does not come to."""
    reached = reachable(ends, lambda node: _below(node, live, starts))
    if missed := [place.name for place in places if place not in reached]:
        raise SelectorError(
            f"{len(missed)} conditioned place(s) lie on no path of relevance.",
            where=sorted(missed),
            fix="condition a place between what is explained and the inputs.",
        )


def _below(node: fx.Node, live: Collection[fx.Node], starts: Collection[fx.Node]) -> list[fx.Node]:
    """What a node hands relevance to."""
    if node in starts:
        return []
    return [n for n in dict.fromkeys(node.all_input_nodes) if n in live]


class _Paths:
    def __init__(
        self,
        graph: fx.Graph,
        below: Mapping[fx.Node, Sequence[fx.Node]],
        starts: Collection[fx.Node],
        ends: Sequence[fx.Node],
        places: Passed,
    ) -> None:
        self.below, self.starts, self.ends, self.places = below, starts, ends, places
        self.upward = [n for n in graph.nodes if n in below]
        #: The places that a path comes to from a node on, itself included.
        self.ahead: dict[fx.Node, Passed] = {}
        for node in self.upward:
            own = {node} if node in places else set()
            self.ahead[node] = frozenset(own.union(*(self.ahead[n] for n in below[node])))
        self.states = self._walk(set())

    def related(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether one of two places is above the other."""
        return a in self.ahead[b] or b in self.ahead[a]

    def left_out(self, passed: Passed, ahead: Passed) -> bool:
        """Whether some place that a path can no longer pass is related to all that it may."""
        return any(
            all(self.related(p, q) for q in passed | ahead) for p in self.places - passed - ahead
        )

    def enter(self, passed: Passed, node: fx.Node) -> Passed:
        return passed | {node} if node in self.places else passed

    def _walk(self, cut: Collection[Edge]) -> dict[fx.Node, set[Passed]]:
        """By node, what paths have passed when they come to it, without hopeless ones."""
        states: dict[fx.Node, set[Passed]] = {node: set() for node in self.upward}
        for end in self.ends:
            if (None, end) not in cut:
                states[end].add(self.enter(frozenset(), end))
        for node in reversed(self.upward):
            for below in self.below[node]:
                if (node, below) not in cut:
                    states[below] |= {self.enter(q, below) for q in states[node]}
            states[node] = {q for q in states[node] if self._hopeful(q, node)}
        return states

    def _hopeful(self, passed: Passed, node: fx.Node) -> bool:
        ahead = self.ahead[node] - passed
        return not self.left_out(passed, ahead)

    def cuts(self) -> set[Edge]:
        kept = self._kept()
        cut: set[Edge] = {(None, end) for end in self.ends if not kept[end]}
        for node in self.upward:
            for below in self.below[node] if kept[node] else ():
                if not any(self.enter(q, below) in kept[below] for q in kept[node]):
                    cut.add((node, below))
        mixed = [n.name for n, q in self._walk(cut).items() if q - kept[n]]
        if mixed:
            raise SelectorError(
                "paths that pass the conditioned places and paths that do not share their edges.",
                where=mixed[:5],
                fix='condition fewer places at a time, or take through="all".',
            )
        return cut

    def _kept(self) -> dict[fx.Node, set[Passed]]:
        """By node, those of its states from which a whole path stays."""
        kept: dict[fx.Node, set[Passed]] = {}
        for node in self.upward:
            if node in self.starts:
                whole = (q for q in self.states[node] if q)
                kept[node] = {q for q in whole if not self.left_out(q, frozenset())}
            else:
                kept[node] = {
                    q
                    for q in self.states[node]
                    if any(self.enter(q, n) in kept[n] for n in self.below[node])
                }
        return kept


def cuts_of_all(cuts: Iterable[Collection[Edge]]) -> list[Edge]:
    """The edges that some condition cuts, once each and in the order they were found."""
    return list(dict.fromkeys(edge for some in cuts for edge in sorted(some, key=_named)))


def _named(edge: Edge) -> tuple[str, str]:
    reader, node = edge
    return (reader.name if reader is not None else "", node.name)
