"""Denominators that are zero, of either sign: they are stabilised as positive ones."""

import pytest
import torch

import lrpfx
from lrpfx.rules.base import divide, share


@pytest.mark.parametrize("stabilizer", [0.25, lrpfx.Stabilizer(0.25)], ids=["number", "Stabilizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_counts_as_positive(stabilizer: lrpfx.Stabilizer | float, dtype: torch.dtype) -> None:
    z = torch.tensor([0.0, -0.0, 0.25, -0.25], dtype=dtype)
    expected = torch.tensor([4.0, 4.0, 2.0, -2.0], dtype=dtype)
    R = torch.ones_like(z)
    torch.testing.assert_close(divide(R, z, stabilizer)[0], expected)
    torch.testing.assert_close(share(R, z.clone(), stabilizer, taken=False), expected)


def test_a_sum_that_cancels_hands_on_what_its_summands_would_above_zero() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.ones(1, 2)
    x = torch.tensor([[1.0, -1.0]])
    for ledger in (True, False):
        got = lrpfx.explain(
            model, x, torch.ones(1, 1), rules=[("linear", lrpfx.Epsilon(0.5))], ledger=ledger
        )
        torch.testing.assert_close(got.relevance, 2 * x)
