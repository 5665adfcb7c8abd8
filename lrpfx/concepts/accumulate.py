"""Scores of samples, batch after batch -> the best samples of each concept, and sums by class.

Merging is associative and commutative: whichever way samples are parted, the same ones are best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

By = Literal["relevance", "activation"]
#: Of all classes together.
ALL = -1
#: Bits that scores are compared by: a sample's score depends on the batch it is in by round-off,
#: and what differs by no more than that is a tie, which the sample's number decides.
_BITS = 12


def rounded(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores to 12 binary digits, about four decimal ones."""
    fraction, exponent = np.frexp(np.asarray(scores, dtype=np.float64))
    kept: NDArray[np.float64] = np.ldexp(np.round(np.ldexp(fraction, _BITS)), exponent - _BITS)
    return kept


@dataclass(frozen=True)
class Best:
    """The best k samples of each of C concepts, best first; sample -1 where there are fewer.

    Args:
        scores: Shape (C, k).
        samples: Their numbers.
        positions: Where in the sample, flat; -1 where that is not known.
        labels: Their classes.
    """

    scores: NDArray[np.float64]
    samples: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.floating],
        samples: NDArray[np.int64],
        positions: NDArray[np.int64],
        labels: NDArray[np.int64],
    ) -> Best:
        """Of N samples with scores and positions (N, C); all of them, not in order."""
        shape = scores.T.shape
        wide = (np.broadcast_to(row, shape) for row in (samples, labels))
        numbers, classes = (np.ascontiguousarray(w, dtype=np.int64) for w in wide)
        return cls(rounded(scores).T, numbers, positions.T.astype(np.int64), classes)

    def joined(self, other: Best, k: int) -> Best:
        """The best k of both."""
        both = [
            np.concatenate([a, b], axis=1)
            for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        ]
        scores, samples = both[0], both[1]
        none = samples < 0
        order = np.lexsort((samples, np.where(none, np.inf, -scores), none), axis=1)[:, :k]
        return Best(*(np.take_along_axis(one, order, axis=1) for one in both))


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
        best: By layer, statistic and class; classes that no sample has had take no memory.
        sums: By layer and class.
    """

    k: int
    best: dict[Key, Best] = field(default_factory=dict)
    sums: dict[tuple[str, int], Sums] = field(default_factory=dict)

    def update(
        self,
        layer: str,
        by: By,
        scores: NDArray[np.floating],
        positions: NDArray[np.int64],
        samples: NDArray[np.int64],
        labels: NDArray[np.int64],
    ) -> None:
        """Take in scores of one batch.

        Args:
            layer: Its name.
            by: What the scores are of.
            scores: Shape (N, C).
            positions: Of the best score of each concept, flat, (N, C); -1 where not known.
            samples: Numbers of the samples in the data set, (N,).
            labels: Their classes, (N,); -1 without.
        """
        for label in (ALL, *np.unique(labels[labels >= 0]).tolist()):
            at = slice(None) if label == ALL else labels == label
            own = Best.of(scores[at], samples[at], positions[at], labels[at])
            self._join((layer, by, label), own)
            if by == "relevance":
                total = Sums(len(own.samples.T), np.asarray(scores[at], np.float64).sum(0))
                self._add((layer, label), total)

    def merge(self, others: Accumulator) -> None:
        """Take in what another has seen."""
        for key, best in others.best.items():
            self._join(key, best)
        for at, sums in others.sums.items():
            self._add(at, sums)

    def _join(self, key: Key, best: Best) -> None:
        known = self.best.get(key)
        first = best if known is None else known
        rest = Best(*(one[:, :0] for one in vars(best).values())) if known is None else best
        self.best[key] = first.joined(rest, self.k)

    def _add(self, at: tuple[str, int], more: Sums) -> None:
        known = self.sums.get(at)
        self.sums[at] = (
            more
            if known is None
            else Sums(known.count + more.count, known.relevance + more.relevance)
        )

    def columns(self) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """As flat columns of two tables: ``references`` and ``classes``."""
        references: dict[str, list[NDArray[Any]]] = {n: [] for n in REFERENCES}
        for (layer, by, label), best in sorted(self.best.items()):
            concept, rank = np.nonzero(best.samples >= 0)
            given = (
                np.full(len(rank), layer, dtype=object),
                np.full(len(rank), by, dtype=object),
                np.full(len(rank), label),
                concept,
                rank,
                *(one[concept, rank] for one in vars(best).values()),
            )
            for name, column in zip(REFERENCES, given, strict=True):
                references[name].append(column)
        classes: dict[str, list[NDArray[Any]]] = {n: [] for n in CLASSES}
        for (layer, label), sums in sorted(self.sums.items()):
            size = len(sums.relevance)
            given = (
                np.full(size, layer, dtype=object),
                np.full(size, label),
                np.arange(size),
                np.full(size, sums.count),
                sums.relevance,
            )
            for name, column in zip(CLASSES, given, strict=True):
                classes[name].append(column)
        return {
            table: {name: np.concatenate(parts) for name, parts in columns.items()}
            for table, columns in (("references", references), ("classes", classes))
        }

    @classmethod
    def of_columns(cls, k: int, tables: Mapping[str, Mapping[str, NDArray[Any]]]) -> Accumulator:
        """What ``columns`` was made of."""
        found = cls(k)
        given = tables["references"]
        for layer, by, label, at in _groups(given, ("layer", "by", "class")):
            concept, rank = given["concept"][at], given["rank"][at]
            shape = int(concept.max()) + 1, k
            scores = np.full(shape, -np.inf)
            scores[concept, rank] = given["score"][at]
            numbers = [np.full(shape, -1, dtype=np.int64) for _ in range(3)]
            for name, part in zip(("sample", "position", "label"), numbers, strict=True):
                part[concept, rank] = given[name][at]
            found.best[layer, by, int(label)] = Best(scores, *numbers)
        given = tables["classes"]
        for layer, label, at in _groups(given, ("layer", "class")):
            sums = Sums(int(given["count"][at][0]), given["relevance"][at].astype(np.float64))
            found.sums[layer, int(label)] = sums
        return found


#: Columns of the tables.
REFERENCES = (
    "layer",
    "by",
    "class",
    "concept",
    "rank",
    "score",
    "sample",
    "position",
    "label",
)
CLASSES = ("layer", "class", "concept", "count", "relevance")


def _groups(columns: Mapping[str, NDArray[Any]], by: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Runs of rows with equal values of some columns: these, and the slice."""
    keys = list(zip(*(columns[name].tolist() for name in by), strict=True))
    start = 0
    for end in range(1, len(keys) + 1):
        if end == len(keys) or keys[end] != keys[start]:
            yield (*keys[start], slice(start, end))
            start = end
