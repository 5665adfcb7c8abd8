"""k-means as a network: the same assignment, and the relevance that the paper's sums give."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestCentroid
from torch import nn

import lrpfx
from lrpfx import composites, errors
from lrpfx.neuralize import KMeans as Neuralized
from lrpfx.neuralize import LogMeanExp

POINTS = np.random.default_rng(0).normal(size=(80, 3))


def fitted(clusters: int = 4) -> KMeans:
    return KMeans(clusters, n_init=1, random_state=0).fit(POINTS)


def by_the_paper(m: np.ndarray, x: np.ndarray, c: int, beta: float) -> tuple[float, np.ndarray]:
    """f_c and its relevance of one point, a competitor after the other."""
    others = [k for k in range(len(m)) if k != c]
    h = np.array([((x - m[k]) ** 2).sum() - ((x - m[c]) ** 2).sum() for k in others])
    f = -np.log(np.mean(np.exp(-beta * h))) / beta
    R = np.zeros_like(x)
    for k, h_k in zip(others, h, strict=True):
        R_k = f * np.exp(-beta * h_k) / np.exp(-beta * h).sum()
        parts = 2 * (m[c] - m[k]) * (x - (m[c] + m[k]) / 2)
        R += parts / parts.sum() * R_k
    return f, R


@pytest.mark.parametrize("beta", [0.05, 1.0, 50.0])
def test_the_largest_output_is_the_nearest_centre(beta: float) -> None:
    for estimator in (
        fitted(),
        fitted(2),
        MiniBatchKMeans(5, n_init=1, random_state=0).fit(POINTS),
    ):
        net = Neuralized(estimator, beta)
        assert (net(torch.from_numpy(POINTS)).argmax(1).numpy() == estimator.predict(POINTS)).all()


def test_nearest_centroids_are_classes() -> None:
    labels = fitted().predict(POINTS) * 10
    classifier = NearestCentroid().fit(POINTS, labels)
    found = Neuralized(classifier)(torch.from_numpy(POINTS)).argmax(1).numpy()
    assert (classifier.classes_[found] == classifier.predict(POINTS)).all()
    with pytest.raises(errors.InputError, match="'manhattan'"):
        Neuralized(NearestCentroid(metric="manhattan").fit(POINTS, labels))


@pytest.mark.parametrize("clusters", [2, 4])
def test_relevance_is_that_of_the_paper(clusters: int) -> None:
    estimator, beta = fitted(clusters), 0.7
    net, x = Neuralized(estimator, beta).eval(), torch.from_numpy(POINTS[:10])
    rules = composites.EpsilonAll(1e-12)
    for c in (0, 1):
        got = lrpfx.explain(net, x, c, rules=rules)
        for i, point in enumerate(POINTS[:10]):
            f, R = by_the_paper(estimator.cluster_centers_, point, c, beta)
            assert got.output[i, c] == pytest.approx(f)
            np.testing.assert_allclose(got.relevance[i], R, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rules", [None, "epsilon_plus", "attnlrp", "epsilon_alpha2_beta1_flat"])
def test_relevance_sums_to_what_is_explained_behind_a_network_too(rules: Any) -> None:
    torch.manual_seed(0)
    features = nn.Linear(5, 3, bias=False)
    net = nn.Sequential(features, Neuralized(fitted().cluster_centers_, 0.5)).double().eval()
    got = lrpfx.explain(net, torch.randn(4, 5).double(), layers=["0"], rules=rules)
    sums = got.layers["0"].relevance.sum(1)
    torch.testing.assert_close(sums, got.output.amax(1), rtol=1e-3, atol=1e-3)


def test_centres_and_points_may_be_of_different_precision() -> None:
    centres = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    x = torch.tensor([[0.1, 1.2]])
    want = Neuralized(centres.double())(x.double())
    assert Neuralized(centres.numpy().astype(np.float64))(x).dtype == torch.float64
    torch.testing.assert_close(Neuralized(centres.tolist())(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [2.0, -2.0])
def test_a_log_mean_exp_hands_on_all_of_its_relevance(beta: float) -> None:
    x, R = torch.randn(3, 4).double(), torch.randn(3).double()
    pool = LogMeanExp(4, beta)
    torch.testing.assert_close(pool(x), torch.exp(beta * x).mean(1).log() / beta)
    got = lrpfx.explain(pool.eval(), x, R, rules=composites.EpsilonAll(0.0))
    torch.testing.assert_close(got.relevance, R[:, None] * (beta * x).softmax(1))


@pytest.mark.parametrize(
    ("centroids", "says"),
    [
        (KMeans(3), "no cluster_centers_"),
        ([[1.0, 2.0]], r"\(1, 2\)"),
        (torch.ones(3), r"\(3,\)"),
        ("centres", "holds no centres"),
        ([[1.0], [float("nan")]], "not finite"),
    ],
)
def test_what_has_no_centres_is_refused(centroids: Any, says: str) -> None:
    with pytest.raises(errors.InputError, match=says):
        Neuralized(centroids)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sharpness_without_meaning_is_refused(beta: float) -> None:
    with pytest.raises(errors.InputError, match="beta"):
        Neuralized([[0.0], [1.0], [2.0]], beta)
