"""Numbers per sample -> intervals and tests, by scipy: ``pip install 'lrpfx[evaluate]'``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrpfx.errors import InputError

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, and between what it lies.

    Args:
        mean: Of the sample.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Paired(NamedTuple):
    """Whether one is larger than the other on the same samples.

    Args:
        difference: Mean of a - b, with its interval.
        p: Of the hypothesis that a and b could be exchanged in each sample, two-sided.
    """

    difference: Interval
    p: float

    def __str__(self) -> str:
        return f"{self.difference}, p = {self.p:.2g}"


def interval(values: Any, level: float = 0.95, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """A bootstrap interval of the mean.

    Args:
        values: One number per sample, (N,); or of S runs (seeds) each, (S, N): then runs and
            samples are both drawn anew, and the interval is one of percentiles.
        level: Of confidence.
        resamples: How many are drawn.
        seed: Of the draws.

    Raises:
        InputError: Another shape, NaN, or fewer than two numbers.
        ImportError: scipy is not installed.

    Source: Efron 1987, https://doi.org/10.2307/2289144 (BCa); Davison and Hinkley 1997, sect. 3.8
    (runs and samples).
    """
    array = _numbers(values)
    if np.ptp(array) == 0:
        return Interval(float(array.mean()), float(array.flat[0]), float(array.flat[0]))
    if array.ndim == 2:
        generator = np.random.default_rng(seed)
        runs, n = array.shape
        means = [
            array[np.ix_(generator.integers(runs, size=runs), generator.integers(n, size=n))].mean()
            for _ in range(resamples)
        ]
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return Interval(float(array.mean()), float(low), float(high))
    found = (
        scipy_stats()
        .bootstrap(
            (array,),
            np.mean,
            confidence_level=level,
            n_resamples=resamples,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return Interval(float(array.mean()), float(found.low), float(found.high))


def paired(a: Any, b: Any, *, resamples: int = 9999, seed: int = 0) -> Paired:
    """A paired permutation test of the means: the signs of the differences are drawn anew.

    Args:
        a: One number per sample, (N,).
        b: Of the same samples.
        resamples: How many are drawn; with few samples all signs are tried, and p is exact.
        seed: Of the draws.

    Raises:
        InputError: Other shapes, NaN, or fewer than two numbers.
        ImportError: scipy is not installed.

    Source: Fisher 1935, The Design of Experiments, sect. 21; Ernst 2004,
    https://doi.org/10.1214/088342304000000396, sect. 3.2.
    """
    first, second = _numbers(a).reshape(-1), _numbers(b).reshape(-1)
    if first.shape != second.shape:
        raise InputError(
            f"{len(first)} and {len(second)} numbers are no pairs.",
            fix="give what both methods have on the same samples.",
        )
    found = scipy_stats().permutation_test(
        (first - second,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return Paired(interval(first - second, seed=seed), float(found.pvalue))


def _numbers(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2) or array.size < 2 or not np.isfinite(array).all():
        raise InputError(
            f"values of shape {array.shape} have no interval"
            + ("" if np.isfinite(array).all() else ": some are NaN or infinite")
            + ".",
            fix="give two finite numbers or more, one per sample.",
        )
    return array


def scipy_stats() -> Any:
    """``scipy.stats``, or an error that says how it is installed."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "intervals, tests and ranks need scipy: pip install 'lrpfx[evaluate]'."
        ) from error
    return stats
