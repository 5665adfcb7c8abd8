"""Maps of many samples -> clusters of them, by the spectrum of their neighbourhood graph."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lrpfx.errors import InputError
from lrpfx.spray.strategies import Strategies
from lrpfx.spray.strategy import Strategy

try:
    from scipy.sparse import csgraph, identity
    from scipy.sparse.linalg import eigsh
    from sklearn.base import BaseEstimator, ClusterMixin
    from sklearn.cluster import HDBSCAN, KMeans
    from sklearn.manifold import TSNE
    from sklearn.neighbors import kneighbors_graph
except ImportError as error:
    raise ImportError("lrpfx.spray needs scikit-learn: pip install 'lrpfx[spray]'.") from error

Array = NDArray[np.float64]

#: Up to this many samples all eigenvectors are computed, beyond the smallest only.
_DENSE = 1000


class SpectralRelevance(ClusterMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """Clusters of relevance maps by the spectrum of their neighbourhood graph.

    Maps are summed over channels, made small, and divided by their sum of absolute values. Each is
    joined with its nearest neighbours; of the graph's normalised Laplacian the eigenvectors with
    the smallest eigenvalues are what is clustered. As many eigenvalues near zero as there are, so
    many clusters there are: the first large gap between them tells.

    Args:
        n_clusters: None: by the largest gap between eigenvalues.
        n_neighbors: Of each sample.
        size: Height and width that maps are made small to; None: 16 by 16, and no larger than they
            are. Vectors (N, F) stay as they are.
        max_clusters: The most that the gap may tell.
        clusterer: "kmeans", or "hdbscan", which finds the number itself and calls -1 what is noise.
        random_state: Seed of the clustering.

    Attributes:
        labels_: Cluster of each sample, (N,), the largest cluster first.
        n_clusters_: How many there are.
        eigenvalues_: The smallest, ascending.
        embedding_: The eigenvectors, rows of unit length, (N, n_clusters_).
        features_: The maps as they were clustered, flat, (N, F).
        shape_: Of one of them, (height, width), or (F,) of vectors.

    Source: Lapuschkin et al. 2019; von Luxburg 2007, https://doi.org/10.1007/s11222-007-9033-z,
    section 8.3 (the gap).
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        n_neighbors: int = 10,
        size: tuple[int, int] | None = None,
        max_clusters: int = 10,
        clusterer: Literal["kmeans", "hdbscan"] = "kmeans",
        random_state: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.size = size
        self.max_clusters = max_clusters
        self.clusterer = clusterer
        self.random_state = random_state

    def fit(self, X: Tensor | ArrayLike, y: Any = None) -> SpectralRelevance:
        """Cluster maps.

        Args:
            X: Shape (N, C, H, W), (N, H, W), or (N, F), usually of one class.
            y: Not read.

        Raises:
            InputError: Maps of another shape, too few of them, or not finite; unknown options.
        """
        features = self._features(X)
        n = len(features)
        neighbors = min(self.n_neighbors, n - 1)
        joined = kneighbors_graph(features, neighbors, mode="connectivity", include_self=False)
        affinity = 0.5 * (joined + joined.T)
        number = self.max_clusters if self.n_clusters is None else self.n_clusters
        if not 1 <= number < n:
            raise InputError(
                f"{number} clusters of {n} maps.", fix="give fewer clusters, or more maps."
            )
        values, vectors = _smallest(csgraph.laplacian(affinity, normed=True), number + 1)
        self.eigenvalues_ = values
        if self.n_clusters is None:
            number = int(np.argmax(np.diff(values))) + 1
        rows = vectors[:, :number]
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        self.embedding_ = rows / np.where(length == 0, 1, length)
        if self.clusterer == "kmeans":
            clusters = KMeans(number, n_init=10, random_state=self.random_state)
        else:
            clusters = HDBSCAN(min_cluster_size=max(2, neighbors), copy=True)
        self.labels_ = _by_size(clusters.fit(self.embedding_).labels_)
        self.n_clusters_ = int(self.labels_.max()) + 1
        self.features_ = features
        return self

    def embed(self, method: Literal["tsne", "umap"] = "tsne") -> Array:
        """The maps in two dimensions, for a picture: (N, 2).

        Args:
            method: "umap" needs umap-learn: ``pip install 'lrpfx[umap]'``.

        Raises:
            InputError: The method is not known, or its package is not there.
        """
        if method == "tsne":
            perplexity = min(30.0, (len(self.embedding_) - 1) / 3)
            found = TSNE(perplexity=perplexity, random_state=self.random_state, init="pca")
            placed: Array = found.fit_transform(self.features_)
            return placed
        if method != "umap":
            raise InputError(f"embed({method!r}) is not known.", fix='give "tsne" or "umap".')
        try:
            from umap import UMAP
        except ImportError as error:
            raise InputError(
                'embed("umap") needs umap-learn.', fix="pip install 'lrpfx[umap]'."
            ) from error
        placed = UMAP(random_state=self.random_state).fit_transform(self.features_)
        return placed

    def summary(
        self,
        labels: ArrayLike | Tensor | None = None,
        predictions: ArrayLike | Tensor | None = None,
    ) -> Strategies:
        """What is in each cluster.

        Args:
            labels: The class of each sample, (N,).
            predictions: What the model says, (N,).
        """
        given = {"labels": labels, "predictions": predictions}
        read = {k: None if v is None else np.asarray(v) for k, v in given.items()}
        for name, value in read.items():
            if value is not None and value.shape != self.labels_.shape:
                raise InputError(
                    f"{name} are {value.shape}, and there are {len(self.labels_)} samples.",
                    fix="give one for each sample.",
                )
        true, told = read["labels"], read["predictions"]
        found = []
        for cluster in np.unique(self.labels_):
            at = np.flatnonzero(self.labels_ == cluster)
            purity = accuracy = None
            if true is not None:
                purity = float(np.unique(true[at], return_counts=True)[1].max() / len(at))
            if true is not None and told is not None:
                accuracy = float((true[at] == told[at]).mean())
            mean = self.features_[at].mean(0).reshape(self.shape_)
            found.append(Strategy(int(cluster), tuple(at.tolist()), purity, accuracy, mean))
        return Strategies(tuple(found))

    def _features(self, X: Tensor | ArrayLike) -> Array:
        maps = torch.as_tensor(X).detach().cpu().double()
        if maps.ndim not in (2, 3, 4) or len(maps) < 3:
            raise InputError(
                f"SpRAy clusters at least three maps (N, C, H, W), (N, H, W) or (N, F), not "
                f"{tuple(maps.shape)}.",
                fix="give explanation.relevance of many samples.",
            )
        if not bool(maps.isfinite().all()):
            raise InputError("some maps have NaN or infinite entries.", fix="leave these out.")
        if self.clusterer not in ("kmeans", "hdbscan"):
            raise InputError(
                f"clusterer={self.clusterer!r} is not known.", fix='give "kmeans" or "hdbscan".'
            )
        if maps.ndim == 4:
            maps = maps.sum(1)
        if maps.ndim == 3:
            height, width = self.size or (16, 16)
            small = min(height, maps.shape[1]), min(width, maps.shape[2])
            maps = F.adaptive_avg_pool2d(maps, small)
        self.shape_ = tuple(maps.shape[1:])
        flat = maps.flatten(1)
        total = flat.abs().sum(1, keepdim=True)
        features: Array = (flat / torch.where(total == 0, 1, total)).numpy()
        return features


def _smallest(laplacian: Any, number: int) -> tuple[Array, Array]:
    """The smallest eigenvalues, ascending, and their eigenvectors as columns."""
    n = laplacian.shape[0]
    if n <= _DENSE:
        values, vectors = np.linalg.eigh(laplacian.toarray())
        return values[:number], vectors[:, :number]
    # The largest of 2 - L are found more easily than the smallest of L; a fixed start vector
    # makes them the same every time.
    start = np.random.default_rng(0).normal(size=n)
    values, vectors = eigsh(2 * identity(n) - laplacian, k=number, which="LA", v0=start)
    order = np.argsort(2 - values)
    return (2 - values)[order], vectors[:, order]


def _by_size(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Clusters numbered by size, the largest first; of equal ones the first sample's."""
    found, first, counts = np.unique(labels, return_index=True, return_counts=True)
    order = sorted(range(len(found)), key=lambda i: (-counts[i], first[i]))
    numbers = {int(found[i]): -1 if found[i] < 0 else 0 for i in order}
    ranked = [int(found[i]) for i in order if found[i] >= 0]
    numbers.update({label: k for k, label in enumerate(ranked)})
    return np.array([numbers[int(label)] for label in labels], dtype=np.int64)
