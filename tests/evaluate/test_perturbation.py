"""Perturbation curves against loops in numpy, and models whose best order is known."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.evaluate import perturbation
from tests.conftest import Apply, assert_untouched

double = torch.float64
WEIGHT = torch.tensor([3.0, -1.0, 0.5, 4.0, -2.0], dtype=double)


def _linear(x: Tensor) -> Tensor:
    return torch.stack([x @ WEIGHT, x.sum(1)], 1)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(6, 5, dtype=double)


def _by_hand(f: Any, x: np.ndarray, relevance: np.ndarray, steps: int, fill: Any) -> np.ndarray:
    """One sample, one step after the other: what is most relevant is filled in first."""
    rows = []
    for row, r in zip(x, relevance, strict=True):
        order = np.argsort(-r)
        changed, scores = row.copy(), [f(row)]
        for k in range(1, steps + 1):
            gone = order[: round(k * len(row) / steps)]
            changed[gone] = np.broadcast_to(fill, row.shape)[gone]
            scores.append(f(changed))
        rows.append(scores)
    return np.array(rows)


def test_curves_are_those_of_a_loop_in_numpy(x: Tensor) -> None:
    relevance, w = torch.randn(6, 5, dtype=double), WEIGHT.numpy()
    for fill, value in ((0.0, 0.0), ("mean", x.mean(0).numpy()), (WEIGHT, w)):
        for memory in (1, 2**28):
            curves = perturbation(_linear, x, relevance, 0, 5, "most", fill, memory=memory)
            most = _by_hand(lambda row: row @ w, x.numpy(), relevance.numpy(), 5, value)
            least = _by_hand(lambda row: row @ w, x.numpy(), -relevance.numpy(), 5, value)
            np.testing.assert_allclose(curves.scores, most, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(curves.opposite, least, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(curves.aopc, (most[:, :1] - most).mean(1), atol=1e-12)
            np.testing.assert_allclose(curves.abpc, (least - most).mean(1), atol=1e-12)
            other = perturbation(_linear, x, relevance, 0, 5, "least", fill)
            np.testing.assert_allclose(other.scores, least, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(other.abpc, curves.abpc, atol=1e-12)


def test_no_order_is_better_than_that_of_a_linear_model(x: Tensor) -> None:
    best = perturbation(_linear, x, x * WEIGHT, 0, 5, fill=0.0).abpc
    for order in itertools.permutations(range(5)):
        other = torch.tensor(order, dtype=double).expand(6, 5)
        assert bool((perturbation(_linear, x, other, 0, 5, fill=0.0).abpc <= best + 1e-12).all())


def test_random_orders_gain_nothing_on_average() -> None:
    x = torch.randn(400, 5, dtype=double)
    curves = perturbation(_linear, x, x * WEIGHT, 0, 5, "random", 0.0)
    found = curves.interval("abpc", level=0.999)
    assert found.low < 0 < found.high
    again = perturbation(_linear, x, x * WEIGHT, 0, 5, "random", 0.0)
    assert torch.equal(curves.scores, again.scores)
    assert not torch.equal(
        curves.scores, perturbation(_linear, x, x, 0, 5, "random", 0.0, seed=1).scores
    )


def _summed(image: Tensor) -> Tensor:
    return (image * torch.arange(image[0].numel(), dtype=double).reshape(image.shape[1:])).sum(
        (1, 2, 3)
    )


def test_patches_are_erased_with_all_channels() -> None:
    image = torch.rand(2, 2, 5, 4, dtype=double)
    relevance = torch.randn(2, 2, 5, 4, dtype=double)
    curves = perturbation(_summed, image, relevance, None, 6, fill=0.5, patch=2)
    assert curves.scores.shape == (2, 7)
    padded = nn.functional.pad(relevance.sum(1), (0, 0, 0, 1))
    patches = padded.reshape(2, 3, 2, 2, 2).sum((2, 4)).flatten(1)
    for n in range(2):
        changed = image[n : n + 1].clone()
        for k, patch in enumerate(patches[n].argsort(descending=True).tolist()):
            row, column = 2 * (patch // 2), 2 * (patch % 2)
            changed[:, :, row : row + 2, column : column + 2] = 0.5
            torch.testing.assert_close(curves.scores[n, k + 1], _summed(changed)[0])


def test_images_are_filled_by_their_mean_or_blurred() -> None:
    image = torch.rand(2, 2, 6, 6, dtype=double)
    relevance = torch.randn_like(image)
    whole = image.mean((2, 3), keepdim=True).expand_as(image)
    mean = perturbation(_summed, image, relevance, fill="mean", steps=3)
    torch.testing.assert_close(mean.scores[:, -1], _summed(whole))
    blurred = perturbation(_summed, image, relevance, fill="blur", steps=3)
    sigma, at = 1.0, torch.arange(-3, 4, dtype=double)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = nn.functional.pad(image, (3, 3, 3, 3), mode="replicate")
    soft = nn.functional.conv2d(padded.reshape(4, 1, 12, 12), kernel[None, None])
    torch.testing.assert_close(blurred.scores[:, -1], _summed(soft.reshape(2, 2, 6, 6)))
    constant = torch.full_like(image, 0.3)
    same = perturbation(_summed, constant, relevance, fill="blur", steps=3)
    torch.testing.assert_close(same.scores[:, -1], _summed(constant))


class _Words(nn.Module):
    """The sum over tokens of what each is worth, times its position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 3).to(double)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.embed(ids).sum(-1)
        return (vectors * torch.arange(1, 1 + ids.shape[1])).sum(1, keepdim=True)


def test_tokens_are_masked_filled_or_dropped() -> None:
    model, ids = _Words(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 1]])
    relevance = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    vectors, place = model.embed(ids).detach(), torch.arange(1, 5)
    masked = perturbation(model, ids, relevance, 0, 4, fill=0)
    zeros = perturbation(model, ids, relevance, 0, 4, fill=0.0)
    mean = perturbation(model, ids, relevance, 0, 4, fill="mean")
    dropped = perturbation(model, ids, relevance, 0, 4, fill="drop")
    for n in range(2):
        order = relevance[n].argsort(descending=True)
        for k in range(5):
            gone = order[:k]
            other = ids[n].clone()
            other[gone] = 0
            torch.testing.assert_close(masked.scores[n, k], model(other[None])[0, 0])
            for curves, value in (
                (zeros, torch.zeros(3, dtype=double)),
                (mean, vectors[n].mean(0)),
            ):
                changed = vectors[n].clone()
                changed[gone] = value
                torch.testing.assert_close(curves.scores[n, k], (changed.sum(-1) * place).sum())
            if k < 4:
                kept = torch.tensor([t for t in range(4) if t not in gone.tolist()])
                torch.testing.assert_close(dropped.scores[n, k], model(ids[n, kept][None])[0, 0])
    assert dropped.scores.shape == (2, 4)


def test_parts_of_several_inputs_are_ranked_together() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return 3 * a.sum(1) + b.sum(1)

    a, b = torch.rand(2, 2), torch.rand(2, 3)
    curves = perturbation(model, (a, b), (3 * a, b), None, 5, fill=0.0)
    both = torch.cat([3 * a, b], 1).sort(1, descending=True).values
    torch.testing.assert_close(curves.scores[:, 1:], both.sum(1, keepdim=True) - both.cumsum(1))


def test_sequences_lose_steps_and_signals_times() -> None:
    x, weight = torch.randn(2, 4, 3, dtype=double), torch.randn(3, 2, dtype=double)

    def model(z: Tensor) -> Tensor:
        return (z @ weight).cumsum(1)[:, -1]

    relevance = torch.zeros(2, 4, 3)
    relevance[:, 2] = 1.0
    first = perturbation(model, x, relevance, 0, 4, fill=0.0, kind="sequence").scores[:, 1]
    changed = x.clone()
    changed[:, 2] = 0
    torch.testing.assert_close(first, model(changed)[:, 0])
    relevance = torch.zeros(2, 4, 3)
    relevance[..., 2] = 1.0
    first = perturbation(model, x, relevance, 0, 3, fill=0.0).scores[:, 1]
    changed = x.clone()
    changed[..., 2] = 0
    torch.testing.assert_close(first, model(changed)[:, 0])


def test_what_is_explained_is_what_is_evaluated(one_trace: None) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(double).eval()
    x = torch.randn(5, 4, dtype=double)
    explainer = lrpfx.Explainer(model, x)
    for target in (None, 2, [0, 1, 2, 0, 1], (1,), (slice(1, 3),), lambda out: out[:, 1] ** 2):
        explanation = explainer(x, target)
        with assert_untouched(model, x):
            told = perturbation(explainer, x, explanation, target, 4, fill=0.0)
        assert torch.equal(told.scores[:, -1], told.opposite[:, -1])
        if not callable(target):
            assert torch.equal(
                told.scores, perturbation(model, x, explanation, None, 4, fill=0.0).scores
            )
    assert told.scores.shape == (5, 5) and not told.scores.requires_grad
    with pytest.raises(lrpfx.errors.InputError, match="give target="):
        perturbation(model, x, explanation)


def test_equal_relevance_is_in_no_order_of_places() -> None:
    x = torch.rand(1, 40, dtype=double)
    curves = perturbation(lambda z: z.cumsum(1)[:, -1], x, torch.zeros(1, 40), None, 40, fill=0.0)
    falls = -curves.scores[0].diff()
    assert not torch.allclose(falls, x[0]) and not torch.allclose(falls, x[0].flip(0))
    torch.testing.assert_close(falls.sort().values, x[0].sort().values)


def test_curves_are_drawn(x: Tensor, tmp_path: Any) -> None:
    curves = perturbation(_linear, x, x * WEIGHT, 0, 5, fill=0.0)
    figure = curves.plot(tmp_path / "curves.png", title="linear")
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), curves.scores.mean(0))
    np.testing.assert_allclose(lines[1].get_ydata(), curves.opposite.mean(0))
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert "ABPC" in repr(curves)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(explanation=torch.ones(6, 4)), "not that of an input"),
        (dict(explanation=torch.full((6, 5), float("nan"))), "NaN"),
        (dict(explanation=(torch.ones(6, 5), None)), "relevance of 2 inputs"),
        (dict(order="best"), "order='best'"),
        (dict(steps=0), "steps=0"),
        (dict(patch=0), "patch=0"),
        (dict(fill="none"), "fill='none'"),
        (dict(fill="blur"), "no image and no signal"),
        (dict(fill="drop"), "token ids"),
        (dict(target="all"), "several classes"),
        (dict(target=lambda out: out.sum()), "6 samples"),
    ],
)
def test_what_has_no_answer_is_an_error(x: Tensor, options: Any, said: str) -> None:
    with pytest.raises(lrpfx.errors.LrpError, match=said):
        perturbation(Apply(lambda self, z: _linear(z)), x, **{"explanation": x, **options})
    with pytest.raises(lrpfx.errors.InputError, match="one\nrow|one row"):
        perturbation(_linear, x[:1], x[:1], 0)
