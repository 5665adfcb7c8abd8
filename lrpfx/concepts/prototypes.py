"""Concept relevance of many samples -> what is ordinary for a class, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrpfx.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prototype:
    """The centre of one way in which a class is recognised.

    Args:
        label: The class.
        component: Which of the class's prototypes.
        weight: The share of the class's samples.
        samples: Those nearest to it, nearest first.
    """

    label: int
    component: int
    weight: float
    samples: tuple[int, ...]


class Prototypes:
    """A Gaussian mixture per class over concept relevance (PCX). It needs scikit-learn.

    Args:
        n_components: Prototypes of each class; a dict gives a number for each.
        covariance: Of a prototype: "full", "tied", "diag" or "spherical".
        random_state: Seed of the fit.

    Source: Dreyer et al. 2024 (PCX), https://arxiv.org/abs/2311.16681, section 3.2.
    """

    def __init__(
        self,
        n_components: int | Mapping[int, int] = 1,
        *,
        covariance: str = "full",
        random_state: int = 0,
    ) -> None:
        self.n_components, self.covariance = n_components, covariance
        self.random_state = random_state
        self._mixtures: dict[int, Any] = {}

    def fit(self, vectors: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> Prototypes:
        """Fit a mixture to the vectors of each class.

        Args:
            vectors: Concept relevance of each sample, (N, C), as ``explanation.concepts`` gives it.
            labels: Class of each sample, (N,).

        Raises:
            InputError: The two do not belong together, or a class has too few samples.
        """
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise InputError(
                "Prototypes needs scikit-learn.", fix="pip install 'lrpfx[concepts]'."
            ) from error
        X, y = _array(vectors), np.asarray(labels)
        if y.shape != X.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise InputError(
                f"labels are {y.dtype} of shape {y.shape}, and vectors {X.shape}.",
                fix="give an integer class for each vector.",
            )
        # One number for all, so that what is added to a covariance means the same at any scale.
        self._scale = float(X.std()) or 1.0
        self._vectors, self._labels = X, y
        numbers = {int(label): self._number(int(label)) for label in np.unique(y)}
        counts = {label: int((y == label).sum()) for label in numbers}
        if few := [label for label, number in numbers.items() if counts[label] < max(number, 2)]:
            raise InputError(
                f"{len(few)} class(es) have fewer samples than prototypes, or one only.",
                where=[f"class {label}: {counts[label]} sample(s)" for label in few[:5]],
                fix="leave them out, or give fewer components.",
            )
        self._mixtures = {
            label: GaussianMixture(
                number, covariance_type=self.covariance, random_state=self.random_state
            ).fit(X[y == label] / self._scale)
            for label, number in numbers.items()
        }
        return self

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that there are prototypes of."""
        return tuple(self._mixtures)

    @property
    def means(self) -> dict[int, Array]:
        """By class, the concept relevance of its prototypes, (components, C)."""
        return {label: m.means_ * self._scale for label, m in self._mixtures.items()}

    def score(self, vectors: Tensor | ArrayLike, labels: Tensor | ArrayLike | None = None) -> Array:
        """How ordinary samples are: their log-likelihood, (N,), up to one constant for all.

        Args:
            vectors: Shape (N, C).
            labels: The class under whose mixture each is looked at; None: the best.

        Raises:
            InputError: A class that has no prototypes, or vectors of another length.
        """
        X = self._checked(vectors)
        each = np.stack([m.score_samples(X / self._scale) for m in self._mixtures.values()], 1)
        if labels is None:
            best: Array = each.max(1)
            return best
        return each[np.arange(len(X)), self._columns(labels, len(X))]

    def predict(self, vectors: Tensor | ArrayLike) -> NDArray[np.int64]:
        """The class under whose prototypes each sample is most ordinary, (N,)."""
        X = self._checked(vectors)
        each = np.stack([m.score_samples(X / self._scale) for m in self._mixtures.values()], 1)
        best: NDArray[np.int64] = np.array(self.classes)[each.argmax(1)]
        return best

    def nearest(self, k: int = 1) -> list[Prototype]:
        """Every prototype with the k samples of its class that are nearest to it."""
        found = []
        for label, mixture in self._mixtures.items():
            at = np.flatnonzero(self._labels == label)
            own = mixture.predict(self._vectors[at] / self._scale)
            for component, mean in enumerate(mixture.means_ * self._scale):
                far = np.linalg.norm(self._vectors[at] - mean, axis=1)
                order = sorted(range(len(at)), key=lambda i: (far[i], at[i]))
                samples = tuple(int(at[i]) for i in order[:k])
                found.append(Prototype(label, component, float((own == component).mean()), samples))
        return found

    def difference(
        self, vectors: Tensor | ArrayLike, labels: Tensor | ArrayLike | None = None
    ) -> Array:
        """What each sample has more, and less, of each concept than its nearest prototype: (N, C).

        Args:
            vectors: Shape (N, C).
            labels: The class of each; None: that under which it is most ordinary.
        """
        X = self._checked(vectors)
        columns = self._columns(self.predict(X) if labels is None else labels, len(X))
        means = list(self.means.values())
        nearest = [
            means[c][np.linalg.norm(means[c] - x, axis=1).argmin()]
            for x, c in zip(X, columns, strict=True)
        ]
        more: Array = X - np.stack(nearest)
        return more

    def __repr__(self) -> str:
        if not self._mixtures:
            return f"Prototypes(n_components={self.n_components}, not fitted)"
        number = sum(len(m.weights_) for m in self._mixtures.values())
        return f"Prototypes({number} of {len(self._mixtures)} classes, {len(self._labels)} samples)"

    def _number(self, label: int) -> int:
        if isinstance(self.n_components, Mapping):
            return self.n_components.get(label, 1)
        return self.n_components

    def _checked(self, vectors: Tensor | ArrayLike) -> Array:
        if not self._mixtures:
            raise InputError("these prototypes are not fitted.", fix="call fit() first.")
        X = _array(vectors)
        if X.shape[1] != self._vectors.shape[1]:
            raise InputError(
                f"vectors have {X.shape[1]} concepts, and the prototypes {self._vectors.shape[1]}.",
                fix="give vectors of the same layer and kind.",
            )
        return X

    def _columns(self, labels: Tensor | ArrayLike, n: int) -> NDArray[np.int64]:
        y = np.broadcast_to(np.asarray(labels), (n,))
        places = {label: k for k, label in enumerate(self._mixtures)}
        if missing := sorted({int(label) for label in y} - set(places)):
            raise InputError(
                f"there are no prototypes of class {missing}.", fix=f"there are {list(places)}."
            )
        return np.array([places[int(label)] for label in y], dtype=np.int64)


def _array(vectors: Tensor | ArrayLike) -> Array:
    X = np.asarray(torch.as_tensor(vectors).detach().cpu().double().numpy())
    if X.ndim != 2 or not len(X) or not np.isfinite(X).all():
        raise InputError(
            f"vectors are finite numbers (N, C), not of shape {X.shape}.",
            fix="give explanation.concepts(layer).",
        )
    return X
