"""Clusterings as networks, which relevance can go through: k-means.

That a point belongs to a cluster is decided by distances, of which nothing can be traced to the
point's features. The same decision is a layer of linear functions and a pool by minimum, and these
have rules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lrpfx.errors import InputError

__all__ = ["KMeans", "LogMeanExp", "Offset"]


class Offset(nn.Module):
    """x + offset, of which x gets all relevance: the offset is a point of reference.

    Args:
        offset: A number, or a tensor that broadcasts to the shape of x.
    """

    offset: Tensor | float

    def __init__(self, offset: Tensor | float) -> None:
        super().__init__()
        if isinstance(offset, Tensor):
            self.register_buffer("offset", offset)
        else:
            self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Return x + offset."""
        return x + self.offset


class LogMeanExp(nn.Module):
    """A soft pool: f = log(mean_k exp(beta x_k)) / beta, of K values along ``dim``.

    It lies between the mean (beta near 0) and the maximum (beta large); below zero, between the
    mean and the minimum. By its rule x_k gets exp(beta x_k) / sum_l exp(beta x_l) of the relevance,
    and all of it is handed on.

    Args:
        size: K.
        beta: How sharp the pool is, in units of 1 / x.
        dim: The dimension that is pooled.

    Raises:
        InputError: beta is zero or not finite.

    Source: Kauffmann et al. 2022 (arXiv 1906.07633), sect. IV (min-take-most).
    """

    def __init__(self, size: int, beta: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        if not math.isfinite(beta) or beta == 0:
            raise InputError(
                f"LogMeanExp: beta={beta!r}.",
                fix="give a finite number: above zero for a soft maximum, below for a minimum.",
            )
        self.beta, self.dim = float(beta), dim
        self.mean = Offset(-math.log(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return f, without ``dim``."""
        pooled: Tensor = self.mean((self.beta * x).logsumexp(self.dim)) / self.beta
        return pooled


class KMeans(nn.Module):
    """k-means as a network: for each cluster c how much nearer its centre is than all others.

        w_k = 2 (m_c - m_k),  h_k = |x - m_k|^2 - |x - m_c|^2 = w_k . (x - (m_c + m_k) / 2)
        f_c = -log(mean_{k != c} exp(-beta h_k)) / beta

    The largest f_c is that of the nearest centre, whatever beta is, so ``argmax(1)`` is the
    assignment of k-means. f_c goes to the h_k by LogMeanExp's rule, the nearest competitors get
    most; h_k goes to the features by their part in w_k . (x - (m_c + m_k) / 2), from the point
    halfway between the two centres, where h_k is zero. Relevance sums to f_c.

    Args:
        centroids: (K, D) with K >= 2, such as a codebook; or a fitted estimator of scikit-learn
            that assigns by the nearest centre (``KMeans``, ``MiniBatchKMeans``, ``MeanShift``,
            ``AffinityPropagation``, ``NearestCentroid`` ...). Their dtype is that of the
            computation, which holds N K (K - 1) D numbers.
        beta: How sharp the pool over competitors is, in units of 1 / squared distance. The
            source takes 1 / mean of f_c over the data.

    Raises:
        InputError: There are no centres, or fewer than two, or some are not finite.

    Source: Kauffmann et al. 2022, "From clustering to cluster explanations via neural networks"
    (arXiv 1906.07633), sect. III and IV.

    Example:
        >>> net = lrpfx.neuralize.KMeans(sklearn.cluster.KMeans(8).fit(points), beta=0.1)
        >>> lrpfx.explain(net, torch.from_numpy(points)).relevance  # why these clusters
    """

    weight: Tensor

    def __init__(self, centroids: Any, beta: float = 1.0) -> None:
        super().__init__()
        centres = _centres(centroids)
        count = len(centres)
        if not beta > 0:
            raise InputError(f"KMeans: beta={beta!r}.", fix="give a positive number.")
        others = torch.tensor([[k for k in range(count) if k != c] for c in range(count)])
        own, other = centres[:, None], centres[others]  # (K, 1, D), (K, K - 1, D)
        self.register_buffer("weight", 2 * (own - other))
        self.from_halfway = Offset(-(own + other) / 2)
        self.pool = LogMeanExp(count - 1, -beta)

    def forward(self, x: Tensor) -> Tensor:
        """Return f, (N, K), of points (N, D)."""
        x = x.to(self.weight.dtype)
        x = x[:, None, None, :].expand(-1, *self.weight.shape)
        h = (self.from_halfway(x) * self.weight).sum(-1)
        nearer: Tensor = self.pool(h)
        return nearer


def _centres(given: Any) -> Tensor:
    """(K, D) floating numbers of a tensor, an array, or a fitted estimator."""
    names = ("cluster_centers_", "centroids_")
    found = next((getattr(given, name) for name in names if hasattr(given, name)), given)
    fix = "give centres (K, D), K >= 2, or a fitted estimator that has cluster_centers_."
    if hasattr(given, "fit") and found is given:
        raise InputError(f"KMeans: this {type(given).__name__} has no cluster_centers_.", fix=fix)
    if (metric := getattr(given, "metric", "euclidean")) != "euclidean":
        raise InputError(
            f"KMeans: this {type(given).__name__} measures distance by {metric!r}.",
            fix="only of Euclidean distances the differences are linear.",
        )
    try:
        centres = torch.as_tensor(found).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"KMeans: {type(found).__name__} holds no centres.", fix=fix) from error
    if centres.ndim != 2 or len(centres) < 2:
        raise InputError(f"KMeans: centres of shape {tuple(centres.shape)}.", fix=fix)
    if not centres.is_floating_point():
        centres = centres.to(torch.get_default_dtype())
    if not centres.isfinite().all():
        raise InputError("KMeans: some centres are not finite.", fix=fix)
    return centres
