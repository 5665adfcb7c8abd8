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

from lrpfx.concepts.accumulate import ALL, By
from lrpfx.concepts.store import read_manifest, read_table
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
        if not manifest["complete"]:
            raise InputError(
                f"the scan in {self.folder} is not finished.", fix="call scan() again: it goes on."
            )
        self.facts: dict[str, Any] = manifest["facts"]
        self.layers: tuple[str, ...] = tuple(self.facts["layers"])

    @cached_property
    def _references(self) -> dict[str, NDArray[Any]]:
        return read_table(self.folder, "references")

    @cached_property
    def _classes(self) -> dict[str, NDArray[Any]]:
        return read_table(self.folder, "classes")

    @cached_property
    def samples(self) -> dict[str, NDArray[Any]]:
        """Columns ``sample``, ``label``, ``predicted``: one entry for each sample."""
        return read_table(self.folder, "samples")

    def vectors(self, layer: str) -> NDArray[np.float32]:
        """Concept relevance of every sample at a layer, (N, C), for prototypes and clusters."""
        self._check(layer)
        return np.asarray(self.samples[f"vectors:{layer}"], dtype=np.float32)

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
        table = self._references
        label = ALL if target is None else target
        of_layer = (table["layer"] == layer) & (table["by"] == by) & (table["class"] == label)
        if not of_layer.any():
            raise InputError(
                f"layer {layer!r} has no references by {by} of class {target}.",
                fix=f"there are classes {sorted(set(table['class'].tolist()) - {ALL})[:20]}.",
            )
        at = np.flatnonzero(of_layer & (table["concept"] == concept))
        columns = (table[name][at].tolist() for name in ("sample", "score", "position", "label"))
        return [Reference(*row) for row in zip(*columns, strict=True)][:k]

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
            scores = self.vectors(layer)[at[0]].astype(np.float64)
        else:
            table = self._classes
            label = ALL if target is None else target
            rows = (table["layer"] == layer) & (table["class"] == label)
            if not rows.any():
                raise InputError(
                    f"no sample was of class {target}.",
                    fix=f"there are {sorted(set(table['class'].tolist()) - {ALL})[:20]}.",
                )
            scores = table["relevance"][rows] / table["count"][rows]
        order = np.argsort(-scores, kind="stable")[:k]
        return [(int(c), float(scores[c])) for c in order]

    def classes(self, layer: str, concept: int) -> list[tuple[int, float]]:
        """The classes that a concept is relevant for, with its mean relevance, largest first."""
        self._check(layer, concept)
        table = self._classes
        at = np.flatnonzero(
            (table["layer"] == layer) & (table["concept"] == concept) & (table["class"] != ALL)
        )
        means = table["relevance"][at] / table["count"][at]
        order = np.argsort(-means, kind="stable")
        return [(int(table["class"][at[i]]), float(means[i])) for i in order]

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
            table = self._classes
            size = int(table["concept"][table["layer"] == layer].max()) + 1
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
