"""Localisation, agreement, leave-one-out and statistics against numpy and known answers."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import lrpfx
from lrpfx.evaluate import agreement, interval, leave_one_out, localization, paired

double = torch.float64


def _localized(r: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """One map without ties, by the words of the papers."""
    inside, number = r[mask], int(mask.sum())
    top = np.sort(r.flatten())[-number:]
    positive = r.clip(min=0)
    return (
        float(mask.flatten()[r.argmax()]),
        float(positive[mask].sum() / positive.sum()),
        float(np.isin(inside, top).sum() / number),
    )


def test_localization_is_that_of_a_loop_in_numpy() -> None:
    r, mask = torch.randn(7, 3, 6, 5), torch.rand(7, 6, 5) > 0.6
    mask[:, 0, 0] = True
    for given in (mask, mask[:, None], mask.int().numpy()):
        found = localization(r, given)
        for n in range(7):
            expected = _localized(r[n].double().sum(0).numpy(), mask[n].numpy())
            got = (found.pointing[n], found.mass[n], found.rank[n])
            np.testing.assert_allclose(got, expected, rtol=1e-9)
    by_entry = localization(r, mask[:, None].expand_as(r))
    for n in range(7):
        m = mask[n].expand(3, 6, 5).numpy()
        expected = _localized(r[n].double().numpy(), m)
        np.testing.assert_allclose(
            (by_entry.pointing[n], by_entry.mass[n], by_entry.rank[n]), expected, rtol=1e-9
        )


def test_equal_relevance_is_localized_as_by_chance() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[0, 0, :3] = 1
    found = localization(torch.zeros(1, 1, 4, 4), mask)
    assert found.pointing.item() == pytest.approx(3 / 16)
    assert found.rank.item() == pytest.approx(3 / 16)
    assert found.mass.item() == 0
    one = torch.zeros(1, 1, 4, 4)
    one[0, 0, 1, 1] = 1.0
    assert localization(one, mask).pointing.item() == 0
    assert localization(one, mask, tolerance=1).pointing.item() == 1
    assert localization(one, mask).rank.item() == pytest.approx(2 * 3 / 15 / 3)


@pytest.mark.parametrize(
    ("relevance", "mask", "said"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 4), "do not fit"),
        (torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4), "empty"),
        ((torch.ones(2, 3), torch.ones(2, 3)), torch.ones(2, 3), "of one input"),
        ("map", torch.ones(2, 3), "holds no relevance"),
    ],
)
def test_masks_that_do_not_fit_are_refused(relevance: Any, mask: Tensor, said: str) -> None:
    with pytest.raises(lrpfx.errors.InputError, match=said):
        localization(relevance, mask)


def test_agreement_is_that_of_scipy() -> None:
    a = torch.randn(5, 2, 4, 4, dtype=double)
    b = (a + 0.5 * torch.randn_like(a)).round(decimals=1)
    found = agreement(a, b, top=0.25)
    for n in range(5):
        one, two = a[n].flatten().numpy(), b[n].flatten().numpy()
        assert found.pearson[n].item() == pytest.approx(stats.pearsonr(one, two).statistic)
        assert found.spearman[n].item() == pytest.approx(stats.spearmanr(one, two).statistic)
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert found.cosine[n].item() == pytest.approx(cosine)
    assert agreement(a, a).top.tolist() == [1.0] * 5
    assert agreement(a, -a).sign.tolist() == [0.0] * 5
    assert agreement(a, -a).spearman.tolist() == pytest.approx([-1.0] * 5)
    assert bool(agreement(a, torch.zeros_like(a)).spearman.isnan().all())
    with pytest.raises(lrpfx.errors.InputError, match="cannot be compared"):
        agreement(a, a[:, :1])


def test_leaving_tokens_out_agrees_with_what_tokens_are_worth() -> None:
    embed = nn.Embedding(9, 1, dtype=double)
    ids = torch.stack([torch.randperm(9)[:6] for _ in range(3)])

    def model(ids: Tensor) -> Tensor:
        return embed(ids)[..., 0].sum(1)

    worth = embed(ids)[..., 0].detach()
    found = leave_one_out(model, ids, worth, None, 0.0)
    torch.testing.assert_close(found.falls, worth)
    torch.testing.assert_close(found.correlation, torch.ones(3, dtype=double))
    half = worth.clone()
    half[:, 0] = 100.0
    skipped = leave_one_out(model, ids, half, None, 0.0, skip=[0])
    torch.testing.assert_close(skipped.correlation, torch.ones(3, dtype=double))
    assert bool((leave_one_out(model, ids, half, None, 0.0).correlation < 1).all())


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    draws = generator.exponential(size=(200, 40))
    hit = [low <= 1 <= high for _, low, high in (interval(d, 0.9, resamples=300) for d in draws)]
    assert 0.82 < np.mean(hit) < 0.96
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert interval(draws[0]) == interval(torch.from_numpy(draws[0]))
    with pytest.raises(lrpfx.errors.InputError, match="NaN"):
        interval([1.0, float("nan")])


def test_intervals_of_runs_are_wider_than_those_of_samples() -> None:
    generator = np.random.default_rng(0)
    runs = generator.normal(size=(5, 1)) + 0.1 * generator.normal(size=(5, 100))
    both, pooled = interval(runs), interval(runs.flatten())
    assert both.mean == pytest.approx(pooled.mean)
    assert both.high - both.low > 3 * (pooled.high - pooled.low)


def test_paired_tests_count_signs() -> None:
    a = np.arange(1.0, 7.0)
    # All six differences are positive: of 64 sign patterns this one and its opposite are as far.
    assert paired(a + 1, a).p == pytest.approx(2 / 64)
    assert paired(a, a + [1, -1, 1, -1, 1, -1]).p == pytest.approx(1.0)
    assert paired(a + 1, a).difference.mean == pytest.approx(1.0)
    with pytest.raises(lrpfx.errors.InputError, match="no pairs"):
        paired(a, a[:-1])
