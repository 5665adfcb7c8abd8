"""Quantus' own metrics call lrpfx: arrays in and out, live weights, keywords that are not ours."""

import numpy as np
import pytest
import torch
from torch import nn

import lrpfx
from lrpfx.adapters.quantus import explain

quantus = pytest.importorskip("quantus", reason="pip install 'lrpfx[quantus]'")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval()


def batch() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).normal(size=(4, 1, 8, 8)), np.array([0, 1, 2, 1])


def test_arrays_come_and_go_and_unknown_keywords_are_ignored() -> None:
    net, (x, y) = model(), batch()
    found = explain(net, x, y, method="LRP", softmax=False, device="cpu", item=3)
    assert isinstance(found, np.ndarray) and found.shape == x.shape
    plain = lrpfx.explain(net, torch.tensor(x, dtype=torch.float32), y).relevance
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)


def test_rules_with_large_tensors_are_told_apart() -> None:
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2888, 3)
    net, x = nn.Sequential(*layers).eval(), np.random.default_rng(0).normal(size=(2, 1, 40, 40))
    low, high = torch.full((1, 40, 40), -9.0), torch.full((1, 40, 40), 9.0)
    other = high.clone()
    other[:, 10:30, 10:30] = 20.0
    boxes = [[("conv", lrpfx.ZBox(low, bound))] for bound in (high, other)]
    assert repr(boxes[0]) == repr(boxes[1])  # torch prints corners only
    one, another = (explain(net, x, [0, 1], rules=rules) for rules in boxes)
    plain = lrpfx.explain(net, torch.tensor(x).float(), [0, 1], rules=boxes[1]).relevance
    np.testing.assert_allclose(another, plain, rtol=1e-4, atol=1e-7)
    assert not np.allclose(one, another)


def test_live_weights_are_read() -> None:
    net, (x, y) = model(), batch()
    before = explain(net, x, y)
    with torch.no_grad():
        net[5].weight.mul_(3)
        net[5].bias.mul_(3)
    np.testing.assert_allclose(explain(net, x, y), 3 * before, rtol=1e-4, atol=1e-6)


def test_faithfulness_is_measured() -> None:
    net, (x, y) = model(), batch()
    metric = quantus.FaithfulnessCorrelation(
        nr_runs=5, subset_size=8, disable_warnings=True, return_aggregate=False
    )
    scores = metric(
        model=net, x_batch=x, y_batch=y, a_batch=None, explain_func=explain, device="cpu",
        explain_func_kwargs={"rules": "epsilon_plus"},
    )  # fmt: skip
    assert len(scores) == 4 and np.isfinite(scores).all()


def test_randomised_weights_change_the_maps() -> None:
    net, (x, y) = model(), batch()
    metric = quantus.MPRT(disable_warnings=True, return_average_correlation=False)
    scores = metric(
        model=net, x_batch=x, y_batch=y, a_batch=None, explain_func=explain, device="cpu"
    )
    found = np.array(list(scores.values()), dtype=float)
    assert len(found) >= 3 and np.isfinite(found).all() and found.min() < 0.9
