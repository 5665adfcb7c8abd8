"""Scores of samples, batch after batch -> the best samples of each concept, and sums by class.

Merging is associative and commutative: whichever way samples are parted, the same ones are best.
Scores of one sample differ by round-off with the batch that it is in. So what differs by no more
than that is a tie, as are samples with the same content; the smaller number wins it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lrpfx.concepts.store import read_tables, write_tables

By = Literal["relevance", "activation"]
BY: tuple[By, ...] = ("relevance", "activation")
#: Of all classes together.
ALL = -1
#: How far the scores of samples with the same content can be apart, relative.
_SLACK = 1e-3
#: So many scores of a layer wait at most until they are ranked together.
_WAITING = 2**20


@dataclass(frozen=True)
class Best:
    """The best samples of each of C concepts, best first.

    Args:
        scores: Shape (C, k), or fewer where there are not as many samples.
        samples: Their numbers.
        positions: Where in the sample, flat; -1 where that is not known.
        contents: A hash of each sample.
    """

    scores: NDArray[np.floating]
    samples: NDArray[np.int64]
    positions: NDArray[np.int32]
    contents: NDArray[np.int64]

    @classmethod
    def of(cls, seen: _Seen, k: int, tie: float) -> Best:
        """Of N samples the best k."""
        scores = np.ascontiguousarray(seen.scores.T)
        positions = np.ascontiguousarray(seen.positions.T)
        n, most = scores.shape[1], k + 16
        everything = np.broadcast_to(np.arange(n), scores.shape)

        def taken(rows: NDArray[Any], at: NDArray[np.int64]) -> Best:
            found = (np.take_along_axis(one[rows], at, axis=1) for one in (scores, positions))
            some, places = found
            return cls(some, seen.samples[at], places, seen.contents[at])._ranked(k, tie)

        if n <= 2 * most:
            return taken(np.arange(len(scores)), everything)
        worst = np.partition(scores, n - k, axis=1)[:, n - k]
        close = (scores >= (worst - _SLACK * np.abs(worst))[:, None]).sum(1)
        few, many = np.flatnonzero(close <= most), np.flatnonzero(close > most)
        at = np.argpartition(-scores[few], most, axis=1)[:, :most]
        # Where many scores are equal, such as those of a dead unit, their numbers decide.
        parts = taken(few, at), taken(many, everything[many])
        back = np.argsort(np.concatenate([few, many]))
        joined = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(pair)[back] for pair in joined))

    def joined(self, other: Best, k: int, tie: float) -> Best:
        """The best k of both."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Best(*(np.concatenate(pair, axis=1) for pair in pairs))._ranked(k, tie)

    def _ranked(self, k: int, tie: float) -> Best:
        """In order, cut to k."""
        scores = _of_twins(self.scores, self.samples, self.contents)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores = np.take_along_axis(scores, order, axis=1)
        near = scores[:, :-1] - scores[:, 1:] <= tie * np.abs(scores[:, :-1])
        if len(tied := np.flatnonzero(near.any(1))):
            groups = _groups(scores[tied], tie)
            samples = np.take_along_axis(self.samples[tied], order[tied], axis=1)
            again = np.lexsort((samples, groups), axis=1)
            order[tied] = np.take_along_axis(order[tied], again, axis=1)
            scores[tied] = np.take_along_axis(scores[tied], again, axis=1)
        order = order[:, :k]

        def taken(one: NDArray[Any]) -> NDArray[Any]:
            found: NDArray[Any] = np.take_along_axis(one, order, axis=1)
            return found

        rest = taken(self.samples), taken(self.positions), taken(self.contents)
        return Best(scores[:, :k], *rest)


def _of_twins(
    scores: NDArray[np.floating], samples: NDArray[np.int64], contents: NDArray[np.int64]
) -> NDArray[np.floating]:
    """Samples of the same content have the score of that with the smallest number."""
    alike = np.sort(contents, axis=1)
    rows = np.flatnonzero((alike[:, :-1] == alike[:, 1:]).any(1))
    if len(rows):
        scores = scores.copy()
    for row in rows:
        order = np.argsort(samples[row], kind="stable")
        _, first, of = np.unique(contents[row][order], return_index=True, return_inverse=True)
        scores[row, order] = scores[row, order][first[of]]
    return scores


def _groups(scores: NDArray[np.floating], tie: float) -> NDArray[np.int64]:
    """Which scores of a descending row are ties: all within round-off of the group's first."""
    first, group = scores[:, 0], np.zeros(scores.shape, dtype=np.int64)
    for i in range(1, scores.shape[1]):
        own = scores[:, i]
        new = first - own > tie * np.abs(first)
        first = np.where(new, own, first)
        group[:, i] = group[:, i - 1] + new
    return group


@dataclass(frozen=True)
class _Seen:
    """Samples that were not ranked yet: scores and positions (N, C), the others (N,)."""

    scores: NDArray[np.floating]
    positions: NDArray[np.int32]
    samples: NDArray[np.int64]
    classes: NDArray[np.int64]
    contents: NDArray[np.int64]

    def some(self, at: NDArray[np.bool_]) -> _Seen:
        return _Seen(*(one[at] for one in vars(self).values()))


@dataclass
class Sums:
    """Of the samples of a class: how many there are, and the sum of their relevance, (C,)."""

    count: int
    relevance: NDArray[np.float64]


#: Layer, what it is ranked by, and class.
Key = tuple[str, By, int]


@dataclass
class Accumulator:
    """The best samples of each concept of several layers, and sums of relevance by class.

    Args:
        k: How many samples are kept of each concept.
        layers: Their names.
        tie: Relative difference of scores that counts as none.
        best: By layer, statistic and class; classes that no sample has had take no memory.
        sums: By layer and class.
    """

    k: int
    layers: tuple[str, ...]
    tie: float = 2.0**-18
    best: dict[Key, Best] = field(default_factory=dict)
    sums: dict[tuple[str, int], Sums] = field(default_factory=dict)
    _waiting: dict[tuple[str, By], list[_Seen]] = field(default_factory=dict)

    def update(
        self,
        layer: str,
        by: By,
        scores: NDArray[np.floating],
        positions: NDArray[np.integer],
        samples: NDArray[np.int64],
        classes: NDArray[np.int64],
        contents: NDArray[np.int64],
    ) -> None:
        """Take in scores of one batch.

        Args:
            layer: Its name.
            by: What the scores are of.
            scores: Shape (N, C).
            positions: Of the best score of each concept, flat, (N, C); -1 where not known.
            samples: Numbers of the samples in the data set, (N,).
            classes: Of each, (N,); -1 without.
            contents: A hash of each, (N,).
        """
        seen = _Seen(scores, positions.astype(np.int32), samples, classes, contents)
        waiting = self._waiting.setdefault((layer, by), [])
        waiting.append(seen)
        if by == "relevance":
            for label in (ALL, *np.unique(classes[classes >= 0]).tolist()):
                own = scores if label == ALL else scores[classes == label]
                self._add((layer, label), Sums(len(own), own.sum(0, dtype=np.float64)))
        if sum(one.scores.size for one in waiting) > _WAITING:
            self._rank(layer, by)

    def merge(self, others: Accumulator) -> None:
        """Take in what another has seen."""
        for one in (self, others):
            one.settle()
        for key, best in others.best.items():
            self._join(key, best)
        for at, sums in others.sums.items():
            self._add(at, sums)

    def settle(self) -> None:
        """Rank all that wait."""
        for layer, by in list(self._waiting):
            self._rank(layer, by)

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write it, whole or not at all, with facts to go with it."""
        self.settle()
        write_tables(path, self.columns(), facts)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        k: int,
        layers: tuple[str, ...],
        tie: float = 2.0**-18,
    ) -> Accumulator:
        """Read what ``save`` has written.

        Raises:
            InputError: The file is missing or damaged.
        """
        found, tables = cls(k, layers, tie), read_tables(path)
        given = tables["references"]
        for layer, by, label, at in by_key(given, ("layer", "by", "class")):
            count = int(given["concept"][at][-1]) + 1
            rows = (given[name][at].reshape(count, -1) for name in _KEPT)
            found.best[layers[layer], BY[by], int(label)] = Best(*rows)
        given = tables["classes"]
        for layer, label, at in by_key(given, ("layer", "class")):
            sums = Sums(int(given["count"][at][0]), given["relevance"][at].copy())
            found.sums[layers[layer], int(label)] = sums
        return found

    def columns(self) -> dict[str, dict[str, NDArray[Any]]]:
        """As flat columns of two tables, ``references`` and ``classes``; layers by number."""
        self.settle()
        references: dict[str, list[NDArray[Any]]] = {n: [] for n in _REFERENCES}
        for layer, by, label in sorted(self.best, key=self._order):
            best = self.best[layer, by, label]
            concepts, ranks = best.samples.shape
            given = (
                *(np.full(best.samples.size, n) for n in self._order((layer, by, label))),
                np.repeat(np.arange(concepts), ranks),
                np.tile(np.arange(ranks), concepts),
                *(one.reshape(-1) for one in vars(best).values()),
            )
            for name, column in zip(_REFERENCES, given, strict=True):
                references[name].append(column)
        classes: dict[str, list[NDArray[Any]]] = {n: [] for n in _CLASSES}
        for layer, label in sorted(self.sums, key=lambda at: (self.layers.index(at[0]), at[1])):
            sums = self.sums[layer, label]
            size = len(sums.relevance)
            given = (
                *(np.full(size, n) for n in (self.layers.index(layer), label)),
                np.arange(size),
                np.full(size, sums.count),
                sums.relevance,
            )
            for name, column in zip(_CLASSES, given, strict=True):
                classes[name].append(column)
        return {
            table: {name: np.concatenate(parts) for name, parts in columns.items()}
            for table, columns in (("references", references), ("classes", classes))
        }

    def _rank(self, layer: str, by: By) -> None:
        pairs = zip(*(vars(one).values() for one in self._waiting.pop((layer, by))), strict=True)
        seen = _Seen(*(np.concatenate(pair) for pair in pairs))
        self._join((layer, by, ALL), Best.of(seen, self.k, self.tie))
        for label in np.unique(seen.classes[seen.classes >= 0]).tolist():
            own = seen.some(seen.classes == label)
            self._join((layer, by, label), Best.of(own, self.k, self.tie))

    def _join(self, key: Key, best: Best) -> None:
        known = self.best.get(key)
        self.best[key] = best if known is None else known.joined(best, self.k, self.tie)

    def _add(self, at: tuple[str, int], more: Sums) -> None:
        known = self.sums.get(at)
        self.sums[at] = (
            more
            if known is None
            else Sums(known.count + more.count, known.relevance + more.relevance)
        )

    def _order(self, key: Key) -> tuple[int, int, int]:
        layer, by, label = key
        return self.layers.index(layer), BY.index(by), label


#: Columns of the tables.
_KEPT = ("score", "sample", "position", "content")
_REFERENCES = ("layer", "by", "class", "concept", "rank", *_KEPT)
_CLASSES = ("layer", "class", "concept", "count", "relevance")


def by_key(columns: Mapping[str, NDArray[Any]], by: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Runs of rows with equal values of some columns: these, and the slice."""
    size = len(columns[by[0]])
    changes = np.zeros(max(size - 1, 0), dtype=bool)
    for name in by:
        changes |= columns[name][1:] != columns[name][:-1]
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), size] if size else []
    for start, end in zip(starts, starts[1:], strict=False):
        yield (*(columns[name][start].item() for name in by), slice(start, end))
