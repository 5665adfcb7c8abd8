"""One cluster of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Strategy:
    """One cluster.

    Args:
        cluster: Its number, -1 for noise.
        samples: Indices of its samples.
        purity: The share of its most frequent class; None without labels.
        accuracy: The share of samples that the model gets right; None without predictions.
        mean: The mean of its maps as they were clustered, (height, width), or (F,) of vectors.
    """

    cluster: int
    samples: Sequence[int]
    purity: float | None
    accuracy: float | None
    mean: NDArray[np.float64]
