"""Scores of samples, batch after batch -> the best samples of each concept, and sums by class.

Merging is associative and commutative: whichever way samples are parted, the same ones are best.
Scores of one sample differ by round-off with the batch that it is in. So what differs by no more
than that is a tie, as are samples with the same content; the smaller number wins it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        scores, positions = (np.ascontiguousarray(a.T) for a in (seen.scores, seen.positions))
        samples, contents = (
            np.broadcast_to(a, scores.shape) for a in (seen.samples, seen.contents)
        )
        return cls(scores, samples, positions, contents)._ranked(k, tie)

    @classmethod
    def joined(cls, all_of_them: Sequence[Best], k: int, tie: float) -> Best:
        """The best k of several."""
        pairs = zip(*(vars(one).values() for one in all_of_them), strict=True)
        return cls(*(np.concatenate(pair, axis=1) for pair in pairs))._ranked(k, tie)

    def _ranked(self, k: int, tie: float) -> Best:
        """In order, cut to k."""
        most = k + 16
        if self.scores.shape[1] <= 2 * most:
            return self._sorted(k, tie)
        # Not all have to be sorted, if few come into question.
        some = np.argpartition(-self.scores, most, axis=1)[:, :most]
        best = np.sort(np.take_along_axis(self.scores, some, axis=1), axis=1)
        worst = best[:, -k]
        # Where many scores are equal, such as those of a dead unit, their numbers decide.
        close = best[:, 0] >= worst - _SLACK * np.abs(worst)
        few, many = np.flatnonzero(~close), np.flatnonzero(close)
        parts = self._rows(few)._taken(some[few])._sorted(k, tie), self._rows(many)._sorted(k, tie)
        back = np.argsort(np.concatenate([few, many]))
        pairs = zip(*(vars(part).values() for part in parts), strict=True)
        return Best(*(np.concatenate(pair)[back] for pair in pairs))

    def _sorted(self, k: int, tie: float) -> Best:
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
        return replace(self._taken(order[:, :k]), scores=scores[:, :k])

    def _rows(self, concepts: NDArray[np.int64]) -> Best:
        return Best(*(one[concepts] for one in vars(self).values()))

    def _taken(self, at: NDArray[np.int64]) -> Best:
        """Of each concept some, by where they stand."""
        rows = np.arange(len(at))[:, None]
        return Best(*(one[rows, at] for one in vars(self).values()))


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

    def merge(self, *others: Accumulator) -> None:
        """Take in what others have seen."""
        for one in (self, *others):
            one.settle()
        for key in dict.fromkeys(key for one in others for key in one.best):
            self._join(key, *(one.best[key] for one in others if key in one.best))
        for one in others:
            for at, sums in one.sums.items():
                self._add(at, sums)

    def settle(self) -> None:
        """Rank all that wait."""
        for layer, by in list(self._waiting):
            self._rank(layer, by)

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write it, whole or not at all, with facts to go with it."""
        self.settle()
        keys, sums = self._keys(), self._classes()
        numbers = [(*self._order(key), *self.best[key].scores.shape) for key in keys]
        counts = [
            (self.layers.index(at[0]), at[1], self.sums[at].count, len(self.sums[at].relevance))
            for at in sums
        ]
        each = [vars(self.best[key]).values() for key in keys]
        tables = {
            "keys": _named(_KEYS, np.array(numbers, dtype=np.int64).reshape(-1, 5).T),
            "best": _named(_KEPT, map(_flat, zip(*each, strict=True))),
            "counts": _named(_COUNTS, np.array(counts, dtype=np.int64).reshape(-1, 4).T),
            "sums": {"relevance": _flat([self.sums[at].relevance for at in sums])},
        }
        write_tables(path, tables, facts)

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
        found, tables, at = cls(k, layers, tie), read_tables(path), 0
        for layer, by, label, concepts, ranks in zip(
            *(tables["keys"][name].tolist() for name in _KEYS), strict=True
        ):
            rows = slice(at, at := at + concepts * ranks)
            kept = (tables["best"][name][rows].reshape(concepts, ranks) for name in _KEPT)
            found.best[layers[layer], BY[by], label] = Best(*kept)
        at = 0
        for layer, label, count, size in zip(
            *(tables["counts"][name].tolist() for name in _COUNTS), strict=True
        ):
            sums = tables["sums"]["relevance"][at : (at := at + size)]
            found.sums[layers[layer], label] = Sums(count, sums)
        return found

    def columns(self) -> dict[str, dict[str, NDArray[Any]]]:
        """As flat columns of two tables, ``references`` and ``classes``; layers by number."""
        self.settle()
        references, classes = [], []
        for key in self._keys():
            best = self.best[key]
            concepts, ranks = best.samples.shape
            references.append(
                (
                    *(np.full(best.samples.size, number) for number in self._order(key)),
                    np.repeat(np.arange(concepts), ranks),
                    np.tile(np.arange(ranks), concepts),
                    *(one.reshape(-1) for one in (best.scores, best.samples, best.positions)),
                )
            )
        for layer, label in self._classes():
            sums = self.sums[layer, label]
            size = len(sums.relevance)
            numbers = (self.layers.index(layer), label)
            given = (np.full(size, n) for n in numbers)
            classes.append((*given, np.arange(size), np.full(size, sums.count), sums.relevance))
        return {
            "references": _named(_REFERENCES, map(_flat, zip(*references, strict=True))),
            "classes": _named(_CLASSES, map(_flat, zip(*classes, strict=True))),
        }

    def _rank(self, layer: str, by: By) -> None:
        pairs = zip(*(vars(one).values() for one in self._waiting.pop((layer, by))), strict=True)
        seen = _Seen(*(np.concatenate(pair) for pair in pairs))
        self._join((layer, by, ALL), Best.of(seen, self.k, self.tie))
        for label in np.unique(seen.classes[seen.classes >= 0]).tolist():
            own = seen.some(seen.classes == label)
            self._join((layer, by, label), Best.of(own, self.k, self.tie))

    def _join(self, key: Key, *more: Best) -> None:
        known = [self.best[key]] if key in self.best else []
        parts = [*known, *more]
        self.best[key] = parts[0] if len(parts) == 1 else Best.joined(parts, self.k, self.tie)

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

    def _keys(self) -> list[Key]:
        return sorted(self.best, key=self._order)

    def _classes(self) -> list[tuple[str, int]]:
        return sorted(self.sums, key=lambda at: (self.layers.index(at[0]), at[1]))


#: Columns of the tables.
_KEYS = ("layer", "by", "class", "concepts", "ranks")
_KEPT = ("score", "sample", "position", "content")
_COUNTS = ("layer", "class", "count", "size")
_REFERENCES = ("layer", "by", "class", "concept", "rank", "score", "sample", "position")
_CLASSES = ("layer", "class", "concept", "count", "relevance")


def _named(names: Sequence[str], columns: Iterable[Any]) -> dict[str, NDArray[Any]]:
    return dict(zip(names, map(np.ascontiguousarray, columns), strict=True))


def _flat(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([part.reshape(-1) for part in parts])


def by_key(columns: Mapping[str, NDArray[Any]], by: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Runs of rows with equal values of some columns: these, and the slice."""
    size = len(columns[by[0]])
    changes = np.zeros(max(size - 1, 0), dtype=bool)
    for name in by:
        changes |= columns[name][1:] != columns[name][:-1]
    starts = [0, *(np.flatnonzero(changes) + 1).tolist(), size] if size else []
    for start, end in zip(starts, starts[1:], strict=False):
        yield (*(columns[name][start].item() for name in by), slice(start, end))
