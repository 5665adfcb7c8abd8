"""`zero_params`: parameters that a rule takes as zero, also one that takes them as ones."""

import pytest
import torch
from torch import nn

import lrpfx
from tests.conftest import traced_once


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 2), nn.Linear(4, 3)], ids=["conv", "linear"])
def test_flat_over_no_weights_hands_on_nothing(layer: nn.Module) -> None:
    x = torch.randn(2, 2, 4).double()
    model = nn.Sequential(layer, nn.Tanh()).double().eval()
    with traced_once():
        for zero, handed_on in (("weight", 0.0), (("bias", "weight"), 0.0), ("bias", 1.0)):
            explainer = lrpfx.Explainer(model, x, [("0", lrpfx.Flat(zero_params=zero))])
            for ledger in (True, False):
                e = explainer(x, torch.ones_like(model(x)), ledger=ledger)
                assert e.relevance.sum().item() == pytest.approx(handed_on * e.seed.sum().item())
        row = e.report.rows[0]
        assert row.rule.startswith("Flat")
