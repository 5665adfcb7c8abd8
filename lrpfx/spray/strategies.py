"""Clusters of maps -> what is in each: size, purity, accuracy, the mean map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike
from torch import Tensor

from lrpfx.report import Column, Table, Tabular
from lrpfx.spray.page import write_page
from lrpfx.spray.strategy import Strategy


@dataclass(frozen=True, repr=False, eq=False)
class Strategies(Tabular):
    """The clusters of many maps, the largest first."""

    clusters: tuple[Strategy, ...]

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        maps: Tensor | ArrayLike | None = None,
        images: Tensor | ArrayLike | None = None,
        placed: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        title: str = "Strategies",
        k: int = 8,
    ) -> None:
        """Write a page that loads nothing: the table, mean maps, samples, and all in a plane.

        Args:
            path: Where to write it.
            maps: Those that were clustered, (N, C, H, W) or (N, H, W); some of each are shown.
            images: The samples, (N, C, H, W), shown above their maps.
            placed: All samples in two dimensions, (N, 2), as ``SpectralRelevance.embed`` gives it.
            names: Of the samples; None for their numbers.
            title: Of the page.
            k: How many samples of each cluster, those nearest to its mean first.
        """
        write_page(self.clusters, path, maps, images, placed, names, title, k)

    def table(self) -> Table:
        """One line per cluster."""
        columns = [
            Column("cluster", 8, right=True),
            Column("size", 8, right=True),
            Column("purity", 8, right=True),
            Column("accuracy", 8, right=True),
            Column("samples", 40),
        ]
        cells = [
            [
                "noise" if s.cluster < 0 else str(s.cluster),
                str(len(s.samples)),
                "" if s.purity is None else f"{s.purity:.0%}",
                "" if s.accuracy is None else f"{s.accuracy:.0%}",
                ", ".join(map(str, s.samples[:8])) + (" ..." if len(s.samples) > 8 else ""),
            ]
            for s in self.clusters
        ]
        return Table([f"strategies  {len(self.clusters)}"], columns, cells)
