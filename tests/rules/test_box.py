"""The z-box: its formula inside and outside of the box, what is said of it, and its bounds."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import ZBox, errors
from lrpfx.composites import EpsilonGammaBox

STABILIZER = 1e-6


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, **options), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    model = nn.Sequential(*layers).double().eval()
    model(images())
    return model


def images(n: int = 2, scale: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return scale * torch.randn(n, 2, 5, 5, generator=g).double()


def by_formula(model: Any, x: Tensor, R: Tensor, low: Any, high: Any) -> Tensor:
    """Written out for a convolution, the box padded as the image is."""
    w, how = model[0].weight, dict(padding=model[0].padding)
    ones = torch.ones_like(x)
    low, high = ones * low, ones * high
    d = F.conv2d(x, w, **how) - F.conv2d(low, w.relu(), **how) - F.conv2d(high, -(-w).relu(), **how)
    s = R / torch.where(d >= 0, d + STABILIZER, d - STABILIZER)
    back = F.conv_transpose2d
    return (
        x * back(s, w, **how) - low * back(s, w.relu(), **how) + high * back(s, (-w).relu(), **how)
    )


BOUNDS = {
    "numbers": (-1.0, 1.5),
    "per channel": (torch.tensor([-1.0, 0.0]).view(1, 2, 1, 1), 1.5),
    "per sample": (-torch.rand(2, 1, 1, 1), torch.rand(2, 2, 5, 5)),
}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("low", "high"), BOUNDS.values(), ids=BOUNDS)
def test_outside_of_the_box_the_formula_is_computed(low: Any, high: Any, padding: int) -> None:
    model, x = net(padding=padding), images()
    explainer = lrpfx.Explainer(model, x, EpsilonGammaBox(low, high))
    for ledger in (True, False):
        with pytest.warns(UserWarning) if ledger else warnings.catch_warnings():
            got = explainer(x, 1, layers=["0"], ledger=ledger)
        want = by_formula(model, x, got.layers["0"].relevance, low, high)
        torch.testing.assert_close(got.relevance, want)


def test_outside_is_warned_of_once_at_the_callers_line_and_noted_each_time() -> None:
    model, x, rule = net(), images(), ZBox(-3, 3)
    outside = int((x.abs() > 3).sum())
    says = f"{outside} of 100 inputs lie outside of the box; they are between -.*and .*0: conv2d"
    with pytest.warns(UserWarning, match=says) as caught:
        explainer = lrpfx.Explainer(model, x, [("0", rule)])
        found = [explainer(x, 1), explainer(x, 0, ledger=False), explainer(x, [[0, 1], [1, 0]])]
        found += [lrpfx.explain(model, x, 1, rules=[("0", rule)])]
    assert [w.filename for w in caught] == [__file__]
    for explanation in found:
        (note,) = explanation.report.notes
        assert f"{outside} of 100 inputs lie outside" in note
    assert not explainer.report.notes and not explainer(x.clamp(-3, 3), 1).report.notes


def test_another_layer_is_looked_at_where_its_input_is_computed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    x = torch.randn(2, 3).double()
    most = model[:2](x).max().item()
    explainer = lrpfx.Explainer(model, x, [("2", ZBox(0, most / 2))])
    with pytest.warns(UserWarning, match=f"between 0 and {most:g}.*2: linear"):
        explainer(x, 1)
    with torch.no_grad():
        model[0].weight.mul_(0)
        model[0].bias.fill_(most / 4)
    # By the parameters of now; they are zero, and nothing comes to the inputs.
    assert not [note for note in explainer(x, 1).report.notes if "outside" in note]


def test_a_strict_box_refuses_what_is_outside() -> None:
    x = images()
    for rules in ([("0", ZBox(-1, 1, strict=True))], EpsilonGammaBox(-1, 1, strict=True)):
        with pytest.raises(errors.RuleError, match="of 100 inputs lie outside(.|\n)*0: conv2d"):
            lrpfx.explain(net(), x, 1, rules=rules)
        assert lrpfx.explain(net(), x.clamp(-1, 1), 1, rules=rules).relevance.any()


@pytest.mark.filterwarnings("error")
def test_rounding_is_not_outside() -> None:
    x = images().clamp(-1, 1) * (1 + 1e-6)
    lrpfx.explain(net(), x, 1, rules=EpsilonGammaBox(-1, 1))


def test_bounds_of_a_larger_batch_are_cut() -> None:
    model, x = net(padding=1), images(5)
    low, high = x - torch.rand(x.shape), x + torch.rand(x.shape)
    explainer = lrpfx.Explainer(model, x, EpsilonGammaBox(low, high))
    whole = explainer(x, 1).relevance
    for n, ledger in ((1, True), (3, False)):
        torch.testing.assert_close(explainer(x[:n], 1, ledger=ledger).relevance, whole[:n])
    with pytest.raises(errors.RuleError, match=r"\(2, 2, 5, 5\) does not broadcast"):
        lrpfx.explain(model, x, 1, rules=EpsilonGammaBox(low[:2], 9.0))


def test_boxes_are_not_equal_for_what_other_rules_have_in_common() -> None:
    assert ZBox(0, 1) != ZBox(-1, 1) and len({ZBox(0, 1), ZBox(torch.zeros(2), 1)}) == 2
