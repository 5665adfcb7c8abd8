"""SpRAy finds the strategies that were planted, and says what is in each."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import lrpfx
from lrpfx.spray import SpectralRelevance


def planted(sizes: tuple[int, ...] = (30, 20, 12), noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Maps (N, 2, 20, 24) with a blob in another corner for each strategy, in mixed order."""
    g = torch.Generator().manual_seed(0)
    corners = [(0, 0), (12, 14), (0, 14), (12, 0)]
    maps, labels = [], []
    for k, size in enumerate(sizes):
        y, x = corners[k]
        one = torch.randn(size, 2, 20, 24, generator=g) * noise
        one[:, :, y : y + 8, x : x + 8] += 1 + torch.rand(size, 1, 1, 1, generator=g)
        maps.append(one)
        labels += [k] * size
    order = torch.randperm(len(labels), generator=g)
    return torch.cat(maps)[order], torch.tensor(labels)[order]


@pytest.mark.parametrize("clusterer", ["kmeans", "hdbscan"])
def test_planted_strategies_are_found(clusterer: Any) -> None:
    maps, labels = planted()
    found = SpectralRelevance(clusterer=clusterer).fit(maps)
    assert adjusted_rand_score(labels, found.labels_) == 1.0
    assert found.n_clusters_ == 3
    assert [int((found.labels_ == k).sum()) for k in range(3)] == [30, 20, 12]


def test_the_gap_is_where_the_eigenvalues_leave_zero() -> None:
    found = SpectralRelevance().fit(planted()[0])
    assert (found.eigenvalues_[:3] < 1e-6).all() and found.eigenvalues_[3] > 0.05


def test_the_number_of_clusters_can_be_given() -> None:
    maps, labels = planted()
    assert SpectralRelevance(2).fit(maps).n_clusters_ == 2
    again = SpectralRelevance(3).fit(maps).labels_
    np.testing.assert_array_equal(again, SpectralRelevance(3).fit(maps).labels_)
    assert adjusted_rand_score(labels, SpectralRelevance(3).fit_predict(maps)) == 1.0


def test_many_maps_are_clustered_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, labels = planted()
    dense = SpectralRelevance().fit(maps)
    monkeypatch.setattr("lrpfx.spray.cluster._DENSE", 10)
    sparse = SpectralRelevance().fit(maps)
    np.testing.assert_allclose(sparse.eigenvalues_, dense.eigenvalues_, atol=1e-8)
    np.testing.assert_array_equal(sparse.labels_, dense.labels_)


def test_many_maps_in_parts_that_nothing_joins() -> None:
    """As many eigenvalues of zero as there are parts, which an iteration finds one by one."""
    maps, labels = planted((500, 400, 300, 150))
    found = SpectralRelevance().fit(maps)
    assert found.n_clusters_ == 4 and adjusted_rand_score(labels, found.labels_) == 1.0


def test_a_plane_by_umap() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed: pip install 'lrpfx[umap]'")
    maps, labels = planted()
    placed = SpectralRelevance().fit(maps).embed("umap")
    centres = np.stack([placed[labels.numpy() == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(placed[:, None] - centres, axis=2).argmin(1)
    np.testing.assert_array_equal(nearest, labels.numpy())


def test_scales_of_maps_and_their_order_do_not_count() -> None:
    maps, _ = planted()
    one = SpectralRelevance().fit(maps).labels_
    scaled = maps * torch.linspace(0.1, 50, len(maps))[:, None, None, None]
    np.testing.assert_array_equal(SpectralRelevance().fit(scaled).labels_, one)
    turned = SpectralRelevance().fit(maps.flip(0)).labels_
    np.testing.assert_array_equal(turned[::-1], one)


def test_a_summary_says_what_is_in_each() -> None:
    maps, labels = planted()
    wrong = torch.where(labels == 2, 7, labels)
    summary = SpectralRelevance().fit(maps).summary(labels, wrong)
    assert [s.purity for s in summary.clusters] == [1.0, 1.0, 1.0]
    assert [s.accuracy for s in summary.clusters] == [1.0, 1.0, 0.0]
    assert [labels[s.samples[0]].item() for s in summary.clusters] == [0, 1, 2]
    assert "accuracy" in repr(summary) and "30" in repr(summary)
    for cluster in summary.clusters:
        own = maps[list(cluster.samples)].double().sum(1)
        small = torch.nn.functional.adaptive_avg_pool2d(own, (16, 16))
        shares = small / small.abs().sum((1, 2), keepdim=True)
        np.testing.assert_allclose(cluster.mean, shares.mean(0), atol=1e-12)


def test_a_picture_keeps_strategies_apart() -> None:
    maps, labels = planted()
    placed = SpectralRelevance().fit(maps).embed()
    centres = np.stack([placed[labels.numpy() == k].mean(0) for k in range(3)])
    nearest = np.linalg.norm(placed[:, None] - centres, axis=2).argmin(1)
    np.testing.assert_array_equal(nearest, labels.numpy())


@pytest.mark.parametrize(
    "options, maps, said",
    [
        ({}, torch.ones(2, 4), "at least three maps"),
        ({}, torch.full((5, 4), torch.nan), "NaN"),
        ({"n_clusters": 9}, torch.rand(5, 4), "9 clusters of 5 maps"),
        ({"clusterer": "means"}, torch.rand(50, 4), "'means' is not known"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], maps: Tensor, said: str) -> None:
    with pytest.raises(lrpfx.errors.InputError, match=said):
        SpectralRelevance(**options).fit(maps)
