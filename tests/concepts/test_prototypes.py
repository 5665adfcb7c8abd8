"""Prototypes: the samples that a class is usually recognised by, and those that are odd."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

import lrpfx
from lrpfx.concepts import Prototypes


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Two classes, of which the second has two ways; vectors, classes, and ways."""
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0, 0], [0, 4, 0], [0, 0, 6]]).double()
    way = torch.arange(3).repeat_interleave(40)
    vectors = centres[way] + 0.3 * torch.randn(120, 3, generator=g).double()
    return vectors, torch.tensor([0, 1, 1])[way], way


def test_each_way_gets_its_prototype() -> None:
    vectors, labels, way = drawn()
    found = Prototypes({1: 2}).fit(vectors, labels)
    nearest = found.nearest(3)
    assert [p.label for p in nearest] == [0, 1, 1]
    assert {int(way[p.samples[0]]) for p in nearest} == {0, 1, 2}
    for p in nearest:
        own = vectors[way == way[p.samples[0]]]
        closest = (own - own.mean(0)).norm(dim=1).argmin()
        assert p.samples[0] == int((vectors == own[closest]).all(1).nonzero()[0])
        assert p.weight == pytest.approx(1.0 if p.label == 0 else 0.5)


def test_scores_are_log_likelihoods() -> None:
    vectors, labels, _ = drawn()
    found = Prototypes().fit(vectors, labels)
    X = vectors[labels == 0].numpy()
    exact = multivariate_normal(X.mean(0), np.cov(X.T, bias=True)).logpdf(X)
    scores = found.score(X, 0)
    # Of vectors that are divided by one number the density is larger by a constant.
    np.testing.assert_allclose(scores - scores.mean(), exact - exact.mean(), atol=1e-3)
    odd = X.mean(0, keepdims=True) + 3
    assert found.score(odd, 0)[0] < scores.min()


def test_any_scale_gives_the_same() -> None:
    vectors, labels, _ = drawn()
    one, other = (Prototypes(2).fit(vectors * s, labels) for s in (1.0, 1e-6))
    assert one.nearest(5) == other.nearest(5)
    np.testing.assert_allclose(one.score(vectors), other.score(vectors * 1e-6), rtol=1e-6)


def test_a_sample_is_compared_with_its_nearest_prototype() -> None:
    vectors, labels, way = drawn()
    found = Prototypes({1: 2}).fit(vectors, labels)
    odd = vectors[way == 2].mean(0) + torch.tensor([2.0, 0, 0]).double()
    np.testing.assert_allclose(found.difference(odd[None]), [[2.0, 0, 0]], atol=1e-6)
    assert found.predict(odd[None]) == [1]
    np.testing.assert_array_equal(found.predict(vectors), labels.numpy())


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda p, v, y: p.fit(v, y[:-1]), "integer class for each"),
        (lambda p, v, y: p.fit(v[0], y), r"finite numbers \(N, C\)"),
        (lambda p, v, y: Prototypes(60).fit(v, y), r"fewer samples[\s\S]*class 0: 40"),
        (lambda p, v, y: p.score(v), "not fitted"),
        (lambda p, v, y: p.fit(v, y).score(v, 7), r"no prototypes of class \[7\]"),
        (lambda p, v, y: p.fit(v, y).score(v[:, :2]), "2 concepts, and the prototypes 3"),
    ],
)
def test_what_is_wrong_is_said(act: Any, said: str) -> None:
    vectors, labels, _ = drawn()
    with pytest.raises(lrpfx.errors.InputError, match=said):
        act(Prototypes(), vectors, labels)
