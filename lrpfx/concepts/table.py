"""What a scan found: reference samples, concepts of a class, classes of a concept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lrpfx.concepts.accumulate import ALL, BY, By, by_key
from lrpfx.concepts.bar import shown
from lrpfx.concepts.page import Page
from lrpfx.concepts.store import Columns, read_columns, read_manifest, told, write_whole, written
from lrpfx.concepts.views import Crop, Reference, Viewer, draw
from lrpfx.conditions import Concept
from lrpfx.errors import InputError
from lrpfx.explain import Explainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Names by number.
Names = Mapping[int, str] | Sequence[str] | None


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
        concepts: Sequence[int],
        *,
        dataset: Any,
        explainer: Explainer,
        k: int = 6,
        by: By = "relevance",
        crop: Crop = None,
        target: int | None = None,
        explained: Any = None,
        kinds: Mapping[str, Concept] | None = None,
        class_names: Names = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Reference samples of concepts, and below each what the concept saw in it.

        A map is that of the whole explanation under the condition of the concept and of the class
        that was explained.

        Args:
            layer: One of those that were scanned.
            concepts: Their numbers; two rows for each.
            dataset: That was scanned.
            explainer: That it was scanned with.
            k: How many samples of each.
            by: See ``references``.
            crop: "field": to the receptive field of the position where the concept is strongest.
                "relevance": to the box that holds most of the map. None: whole samples.
            target: References of this class only.
            explained: What is explained, if the scan was of a callable.
            kinds: As in the scan.
            class_names: By class; None for those of ``dataset.classes``, if it has them.
            path: Where to write the figure, if anywhere; the ending names the format.
        """
        viewer = self._viewer(explainer, dataset, explained, kinds, crop, 32)
        rows = {}
        for concept in concepts:
            most = min(k, self.facts["k"])
            found = self.references(layer, concept, k=most, by=by, target=target)
            pairs = [(concept, reference) for reference in found]
            rows[f"{layer}: {concept}"] = list(viewer.views(layer, pairs))
        if not rows:
            raise InputError("there are no concepts to draw.", fix="give at least one.")
        figure = draw(rows, _names(class_names, getattr(dataset, "classes", None)))
        if path is not None:
            with written(path):
                figure.savefig(path, dpi=150)
        return figure

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        dataset: Any,
        explainer: Explainer,
        layers: Sequence[str] | None = None,
        most: int | None = None,
        k: int = 8,
        by: By = "relevance",
        crop: Crop = None,
        target: int | None = None,
        explained: Any = None,
        kinds: Mapping[str, Concept] | None = None,
        class_names: Names = None,
        sample_names: Names = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        """Write a page of all concepts: references with maps, classes, and links between them.

        The page is one file that loads nothing. Its pictures are made small enough for 30 MB.

        Args:
            path: Where to write it.
            dataset: That was scanned.
            explainer: That it was scanned with.
            layers: Those that are shown; None for all.
            most: So many of each layer, the most relevant first; None for all, in their order.
            k: How many references of each concept.
            by: See ``references``.
            crop: See ``plot``.
            target: See ``plot``.
            explained: See ``plot``.
            kinds: See ``plot``.
            class_names: See ``plot``.
            sample_names: By number; None for the file names in ``dataset.samples``, if it has them.
            batch_size: How many references are explained at a time.
            progress: Whether to show a progress bar.
        """
        viewer = self._viewer(explainer, dataset, explained, kinds, crop, batch_size)
        concepts = {
            layer: list(range(self.size(layer)))
            if most is None
            else [concept for concept, _ in self.top(layer, k=most)]
            for layer in (self.layers if layers is None else layers)
        }
        files = getattr(dataset, "samples", None)
        own = [os.path.basename(str(f[0])) for f in files] if isinstance(files, list) else None
        names = _names(class_names, getattr(dataset, "classes", None)), _names(sample_names, own)
        page = Page(self, viewer, concepts, min(k, self.facts["k"]), by, target, names)
        count = sum(map(len, concepts.values()))
        with told(Path(path).parent), shown(count, 0, progress, "concepts") as tell:

            def write(file: Any) -> None:
                for line in page.lines():
                    file.write(line.encode())
                    tell(line.startswith('<article id="c'))

            write_whole(Path(path), write)

    def _viewer(
        self,
        explainer: Explainer,
        dataset: Any,
        explained: Any,
        kinds: Mapping[str, Concept] | None,
        crop: Crop,
        batch_size: int,
    ) -> Viewer:
        given = {layer: repr(kind) for layer, kind in (kinds or {}).items()}
        if given != (known := self.facts["kinds"]):
            raise InputError(
                f"the scan was of other kinds of concepts: {known or 'channels'}.",
                where=[f"given: {given}"],
                fix="give kinds= as in scan().",
            )
        rule = self.facts["target"]
        if explained is None and rule not in ("label", "predicted"):
            raise InputError(
                f"the scan explained a callable, {rule}.", fix="give it again as explained=."
            )
        return Viewer(
            explainer,
            dataset,
            rule if explained is None else explained,
            kinds or {},
            crop,
            batch_size,
        )

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


def _names(given: Names, own: Any) -> dict[int, str]:
    names = own if given is None else given
    if isinstance(names, Mapping):
        return {int(number): str(name) for number, name in names.items()}
    return {i: str(name) for i, name in enumerate(names)} if isinstance(names, Sequence) else {}


def load(folder: str | os.PathLike[str]) -> ConceptTable:
    """Read a finished scan.

    Raises:
        InputError: The folder holds no scan, or one that is not finished.
    """
    return ConceptTable(folder)
