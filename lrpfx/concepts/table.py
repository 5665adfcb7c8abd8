"""What a scan found: reference samples, concepts of a class, classes of a concept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrpfx.concepts.accumulate import ALL, BY, By, by_key
from lrpfx.concepts.store import Columns, read_columns, read_manifest
from lrpfx.errors import InputError
from lrpfx.explain import Explainer
from lrpfx.heatmap import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Reference:
    """A sample that shows a concept.

    Args:
        sample: Its number in the data set.
        score: What it was ranked by.
        position: Where in the layer's output the concept was strongest, flat; -1 if not known.
        label: Its class, -1 without.
    """

    sample: int
    score: float
    position: int
    label: int


class ConceptTable:
    """The result of a scan.

    Args:
        folder: That it is stored in.

    Attributes:
        facts: What was scanned, and how.
        layers: Those that were scanned.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self._bounds: list[int] = manifest["bounds"]
        if not manifest["complete"]:
            raise InputError(
                f"the scan in {self.folder} is not finished.", fix="call scan() again: it goes on."
            )
        self.facts: dict[str, Any] = manifest["facts"]
        self.layers: tuple[str, ...] = tuple(self.facts["layers"])

    @cached_property
    def _references(self) -> Columns:
        names = ("layer", "by", "class", "concept", "score", "sample", "position", "label")
        return read_columns([self.folder / "references.parquet"], names)

    @cached_property
    def _classes(self) -> Columns:
        names = ("layer", "class", "concept", "count", "relevance")
        return read_columns([self.folder / "classes.parquet"], names)

    @cached_property
    def _runs(self) -> dict[tuple[int, ...], slice]:
        """Rows of the references by layer, statistic and class."""
        return {tuple(key): at for *key, at in by_key(self._references, ("layer", "by", "class"))}

    @cached_property
    def _sums(self) -> dict[tuple[int, int], slice]:
        """Rows of the classes by layer and class."""
        return {tuple(key): at for *key, at in by_key(self._classes, ("layer", "class"))}

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("samples-*.parquet"))

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(read_columns(self._parts, ["sample"])["sample"], kind="stable")

    @cached_property
    def samples(self) -> Columns:
        """Columns ``sample``, ``label``, ``predicted``: one entry for each sample."""
        found = read_columns(self._parts, ["sample", "label", "predicted"])
        return {name: column[self._order] for name, column in found.items()}

    def vectors(self, layer: str) -> NDArray[np.float32]:
        """Concept relevance of every sample at a layer, (N, C), for prototypes and clusters."""
        self._check(layer)
        name = f"vectors:{layer}"
        found: NDArray[np.float32] = read_columns(self._parts, [name])[name][self._order]
        return found

    def size(self, layer: str) -> int:
        """How many concepts a layer has."""
        self._check(layer)
        run = self._sums[self.layers.index(layer), ALL]
        return int(run.stop - run.start)

    @cached_property
    def targets(self) -> list[int]:
        """The classes that there are samples of."""
        return sorted({label for _, label in self._sums} - {ALL})

    def references(
        self,
        layer: str,
        concept: int,
        *,
        k: int | None = None,
        by: By = "relevance",
        target: int | None = None,
    ) -> list[Reference]:
        """The samples that show a concept best, best first.

        Args:
            layer: One of those that were scanned.
            concept: Its number.
            k: How many, at most as many as were kept; None for all.
            by: "relevance" (RelMax) or "activation" (ActMax).
            target: Of one class only.

        Raises:
            InputError: There is no such layer, concept or class, or fewer samples were kept.
        """
        self._check(layer, concept)
        if by not in ("relevance", "activation"):
            raise InputError(f"by={by!r} is not known.", fix='give "relevance" or "activation".')
        if k is not None and k > self.facts["k"]:
            raise InputError(
                f"{k} references are asked for, and {self.facts['k']} were kept.",
                fix=f"give at most {self.facts['k']}, or scan with a larger k.",
            )
        label = ALL if target is None else target
        run = self._runs.get((self.layers.index(layer), BY.index(by), label))
        if run is None:
            raise InputError(
                f"layer {layer!r} has no references by {by} of class {target}.",
                fix=f"there are classes {self.targets[:20]}.",
            )
        each = (run.stop - run.start) // self.size(layer)
        first = run.start + concept * each
        at = slice(first, first + (each if k is None else min(k, each)))
        kept = ("sample", "score", "position", "label")
        columns = (self._references[name][at].tolist() for name in kept)
        return [Reference(*row) for row in zip(*columns, strict=True)]

    def top(
        self,
        layer: str,
        *,
        target: int | None = None,
        sample: int | None = None,
        k: int = 10,
    ) -> list[tuple[int, float]]:
        """The most relevant concepts with their relevance, largest first.

        Args:
            layer: One of those that were scanned.
            target: Of a class: the mean over its samples. None: over all.
            sample: Of one sample instead.
            k: How many.
        """
        self._check(layer)
        if sample is not None:
            (at,) = np.nonzero(self.samples["sample"] == sample)
            if not len(at):
                raise InputError(
                    f"there is no sample {sample}.", fix=f"give 0 to {self.facts['samples'] - 1}."
                )
            scores = self._vector(layer, int(at[0])).astype(np.float64)
        else:
            scores = self._means(layer, ALL if target is None else target)
        order = np.argsort(-scores, kind="stable")[:k]
        return [(int(c), float(scores[c])) for c in order]

    def classes(self, layer: str, concept: int) -> list[tuple[int, float]]:
        """The classes that a concept is relevant for, with its mean relevance, largest first."""
        self._check(layer, concept)
        means = np.array([self._means(layer, label)[concept] for label in self.targets])
        order = np.argsort(-means, kind="stable")
        return [(self.targets[i], float(means[i])) for i in order]

    def _vector(self, layer: str, row: int) -> NDArray[np.float32]:
        """That of one sample: only the part that it is in is read."""
        self._check(layer)
        at, name = int(self._order[row]), f"vectors:{layer}"
        part = int(np.searchsorted(self._bounds, at, side="right")) - 1
        rows = read_columns([self._parts[part]], [name])[name]
        return np.asarray(rows[at - self._bounds[part]])

    def _means(self, layer: str, label: int) -> NDArray[np.float64]:
        run = self._sums.get((self.layers.index(layer), label))
        if run is None:
            raise InputError(
                f"no sample was of class {label}.", fix=f"there are {self.targets[:20]}."
            )
        means: NDArray[np.float64] = self._classes["relevance"][run] / self._classes["count"][run]
        return means

    def plot(
        self,
        layer: str,
        concepts: list[int],
        *,
        dataset: Any,
        explainer: Explainer,
        k: int = 6,
        by: By = "relevance",
        path: str | os.PathLike[str] | None = None,
    ) -> dict[int, Figure]:
        """Reference samples of concepts with the maps of what each concept saw in them.

        A map is that of the whole explanation under the condition of this concept.

        Args:
            layer: One of those that were scanned.
            concepts: Their numbers; a figure for each.
            dataset: That was scanned.
            explainer: That it was scanned with.
            k: How many samples of each.
            by: See ``references``.
            path: Where to write the figures, if anywhere: "grid.png" becomes "grid-4.png" ...
        """
        figures = {}
        for concept in concepts:
            found = self.references(layer, concept, k=min(k, self.facts["k"]), by=by)
            items = [dataset[r.sample] for r in found]
            images = torch.stack([i[0] if isinstance(i, (tuple, list)) else i for i in items])
            labels = [r.label for r in found]
            target = labels if self.facts["target"] == "label" else None
            e = explainer(images, target, conditions=[{layer: [concept]}], ledger=False)
            titles = [f"{r.sample}: class {r.label}, {r.score:.2f}" for r in found]
            name = f"concept {concept}"
            figures[concept] = grid(images, {name: e.relevance[0]}, titles)
            if path is not None:
                where = Path(path)
                figures[concept].savefig(where.with_name(f"{where.stem}-{concept}{where.suffix}"))
        return figures

    def _check(self, layer: str, concept: int | None = None) -> None:
        if layer not in self.layers:
            raise InputError(
                f"layer {layer!r} was not scanned.", fix=f"there are {', '.join(self.layers)}."
            )
        if concept is not None:
            size = self.size(layer)
            if not 0 <= concept < size:
                raise InputError(
                    f"layer {layer!r} has no concept {concept}.", fix=f"give 0 to {size - 1}."
                )

    def __repr__(self) -> str:
        facts = self.facts
        return (
            f"ConceptTable({facts['model']}, {facts['samples']} samples, "
            f"layers {', '.join(self.layers)}, k={facts['k']}, target {facts['target']})"
        )


def load(folder: str | os.PathLike[str]) -> ConceptTable:
    """Read a finished scan.

    Raises:
        InputError: The folder holds no scan, or one that is not finished.
    """
    return ConceptTable(folder)
