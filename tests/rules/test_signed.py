"""SIGN, against its formula on a convolution, with padding, thresholds and the ledger."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import First, Sign, errors
from lrpfx.composites import EpsilonPlus


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    return nn.Sequential(*layers).double().eval()


def by_formula(model: nn.Sequential, x: Tensor, R: Tensor, mu: float | Tensor) -> Tensor:
    z = model[0](x)
    s = R / torch.where(z >= 0, z + 1e-6, z - 1e-6)
    sign = (x >= mu).double() * 2 - 1
    return sign * F.conv_transpose2d(s, model[0].weight, padding=1)


@pytest.mark.parametrize("mu", [0.0, 0.5, torch.tensor([-0.5, 0.5]).view(1, 2, 1, 1)], ids=str)
def test_the_input_counts_by_the_side_of_mu_it_is_on(mu: float | Tensor) -> None:
    model, x = net(), torch.randn(2, 2, 4, 4).double()
    explainer = lrpfx.Explainer(model, x, EpsilonPlus() + [(First(), Sign(mu))])
    for ledger in (True, False):
        got = explainer(x, 1, layers=["0"], ledger=ledger)
        want = by_formula(model, x, got.layers["0"].relevance, mu)
        torch.testing.assert_close(got.relevance, want)


def test_the_ledger_says_what_the_signs_change() -> None:
    x = torch.randn(2, 2, 4, 4).double()
    got = lrpfx.explain(net(), x, 1, rules=[(First(), Sign())], ledger=True).report
    assert got.unaccounted == pytest.approx(0, abs=1e-12)
    assert "sign" in got.absorbed


def test_a_mu_of_another_shape_is_refused_with_its_place() -> None:
    with pytest.raises(errors.RuleError, match="mu of shape"):
        lrpfx.explain(net(), torch.ones(1, 2, 4, 4).double(), 1, rules=Sign(torch.ones(3)))
