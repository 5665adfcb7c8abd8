"""Reference samples -> what the concept saw in them: pictures, conditional maps, crops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lrpfx.concepts.samples import Samples
from lrpfx.concepts.work import as_given
from lrpfx.conditions import Concept
from lrpfx.errors import InputError
from lrpfx.explain import Explainer
from lrpfx.heatmap import explained_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Crop = Literal["field", "relevance"] | None
#: The share of absolute relevance that a crop by relevance holds, of each dimension.
_HELD = 0.9


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


@dataclass(frozen=True, eq=False)
class View:
    """A reference sample as people see it.

    Args:
        reference: The sample, and why it was chosen.
        image: Shape (H, W, 3), 0 to 1; None where the input is no image.
        relevance: What the concept saw, (H, W); None as above.
    """

    reference: Reference
    image: NDArray[np.float32] | None
    relevance: NDArray[np.float64] | None


@dataclass(frozen=True)
class Viewer:
    """Makes views of references.

    A map is that of the whole explanation, under the condition of the concept and of the class that
    was explained: it does not begin anew at the concept's activation.

    Args:
        explainer: That the data set was scanned with.
        dataset: That was scanned.
        target: What was explained: "label", "predicted", or as in ``lrpfx.explain``.
        kinds: By layer, the kind of concepts; channels elsewhere.
        crop: "field": to the receptive field of the position where the concept is strongest.
            "relevance": to the box that holds most of the map.
        batch_size: How many samples are explained at a time.
    """

    explainer: Explainer
    dataset: Any
    target: Any
    kinds: Mapping[str, Concept]
    crop: Crop = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.crop not in (None, "field", "relevance"):
            raise InputError(
                f"crop={self.crop!r} is not known.", fix='give "field", "relevance", or None.'
            )

    def views(self, layer: str, pairs: Sequence[tuple[int, Reference]]) -> Iterator[View]:
        """Of concepts of a layer with a reference each, in their order."""
        samples = Samples(self.dataset, None)
        for first in range(0, len(pairs), self.batch_size):
            some = pairs[first : first + self.batch_size]
            batch = samples.some([reference.sample for _, reference in some])
            inputs = as_given(self.explainer, batch)
            target = self.target
            if isinstance(target, str):
                target = batch.labels if target == "label" else None
            explanation = self.explainer(
                inputs,
                target,
                conditions=[self._condition(layer, concept) for concept, _ in some],
                pairing="zip",
                ledger=False,
            )
            shown = next(
                (
                    (r.detach().cpu().double().sum(1).numpy(), x.detach().cpu())
                    for _, r, x in explained_pairs(explanation.relevance, inputs)
                    if r.ndim == 4 and r.shape == x.shape
                ),
                None,
            )
            for i, (_, reference) in enumerate(some):
                if shown is None:
                    yield View(reference, None, None)
                else:
                    yield self._view(layer, reference, _image(shown[1][i]), shown[0][i])

    def _condition(self, layer: str, concept: int) -> dict[str, Any]:
        kind = self.kinds.get(layer)
        return {layer: [concept] if kind is None else (kind, [concept])}

    def _view(
        self, layer: str, reference: Reference, image: NDArray[Any], relevance: NDArray[Any]
    ) -> View:
        box = None
        if self.crop == "field":
            box = self.explainer.places.receptive_field(layer, reference.position)
        elif self.crop == "relevance":
            box = tuple(_middle(np.abs(relevance).sum(axis)) for axis in (1, 0))
        if box is not None and len(box) == 2:
            (top, bottom), (left, right) = box
            at = slice(top, bottom + 1), slice(left, right + 1)
            image, relevance = image[at], relevance[at]
        return View(reference, image, relevance)


def draw(views: Mapping[str, Sequence[View]], names: Mapping[int, str]) -> Figure:
    """A figure with two rows for each concept: samples, and what it saw in them."""
    from matplotlib.figure import Figure

    from lrpfx.draw import Look

    most = max(len(row) for row in views.values())
    figure = Figure(figsize=(1.0 + 1.3 * most, 2.95 * len(views)), layout="constrained")
    axes = figure.subplots(2 * len(views), most, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for r, (title, row) in enumerate(views.items()):
        for c, view in enumerate(row):
            above, below = axes[2 * r, c], axes[2 * r + 1, c]
            told = view.reference
            name = names.get(told.label, "" if told.label < 0 else f"class {told.label}")
            text = f"{told.sample}: {name[:14]}\n{told.score:.3g}"
            above.set_title(text, fontsize=8, parse_math=False)
            if view.image is None or view.relevance is None:
                continue
            above.imshow(view.image)
            limit = float(np.abs(view.relevance).max()) or 1.0
            below.imshow(view.relevance, cmap=Look().colors, vmin=-limit, vmax=limit)
        for ax, text in ((axes[2 * r, 0], title), (axes[2 * r + 1, 0], "relevance")):
            ax.text(
                -0.08, 0.5, text, rotation=90, ha="right", va="center", fontsize=8,
                transform=ax.transAxes, parse_math=False,
            )  # fmt: skip
    return figure


def _image(x: torch.Tensor) -> NDArray[np.float32]:
    """As colours from the darkest to the brightest value; grey where there are not three."""
    values = x.float().numpy()
    if len(values) != 3:
        values = np.repeat(values.mean(0, keepdims=True), 3, axis=0)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / ((high - low) or 1.0)
    return np.asarray(scaled.transpose(1, 2, 0), dtype=np.float32)


def _middle(sums: NDArray[Any]) -> tuple[int, int]:
    """The indices between which most of a positive sum is."""
    if not sums.any():
        return 0, len(sums) - 1
    share = np.cumsum(sums) / sums.sum()
    edge = (1 - _HELD) / 2
    return int(np.searchsorted(share, edge)), int(np.searchsorted(share, 1 - edge))
