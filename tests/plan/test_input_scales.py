"""What shifts and scales an input's channels belongs to it: relevance is the normalised input's."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply, traced_once

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
X = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOW, HIGH = ((bound - MEAN[:, None, None]) / STD[:, None, None] for bound in (0, 1))


def spread(t: Tensor) -> Tensor:
    return t[:, None, None]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "by mean and deviation": lambda x: (x - spread(MEAN)) / spread(STD),
    "in place": lambda x: x.clone().sub_(spread(MEAN)).div_(spread(STD)),
    "channels last": lambda x: ((x.permute(0, 2, 3, 1) - MEAN) / STD).permute(0, 3, 1, 2),
    "flat": lambda x: ((x.flatten(2) - MEAN[:, None]) / STD[:, None]).view_as(x),
    "by an einsum": lambda x: torch.einsum("nchw,c->nchw", x - spread(MEAN), 1 / STD),
    "by what was expanded": lambda x: (
        (x - spread(MEAN).expand_as(x)) / spread(STD).repeat(len(x), 1, 6, 6)
    ),
    "by ones times a number each": lambda x: x / (torch.ones_like(x) * spread(STD)),
    "on a line": lambda x: torch.lerp(spread(MEAN).expand_as(x), x, 0.5 / spread(STD)),
    "to -1 and 1": lambda x: x * 2 - 1,
    "by 255": lambda x: x / 255,
    "inverted": lambda x: 1 - x,
    "channel by channel": lambda x: torch.cat(
        [(c - m) / s for c, m, s in zip(x.split(1, 1), MEAN, STD.split(1), strict=True)], 1
    ),
    "of samples, by vmap": torch.vmap(lambda x: (x - spread(MEAN)) / spread(STD)),
    "clamped before": lambda x: (x.clamp(0, 1) - spread(MEAN)) / spread(STD),
}
RULES = {
    "flat": composites.EpsilonPlusFlat(1e-12, 1e-12),
    "w_square": composites.EpsilonPlus(1e-12, 1e-12)
    + [(composites.First(("conv",)), lrpfx.WSquare(1e-12))],
    "epsilon": composites.EpsilonAll(1e-12),
    "default": None,
}


@pytest.fixture(autouse=True, scope="module")
def one_trace() -> Iterator[None]:
    with traced_once():
        yield


def core() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).double().eval()


def relevance(model: nn.Module, x: Tensor, rules: lrpfx.composites.Composite | None) -> Tensor:
    return lrpfx.explain(model, x, 1, rules=rules).relevance


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_relevance_of_the_normalised_pixel_is_the_pixels(form: Callable) -> None:
    plain = core()
    model = Apply(lambda m, x: m.core(form(x)), core=plain)
    for rules in RULES.values():
        expected = relevance(plain, form(X), rules)
        torch.testing.assert_close(relevance(model, X, rules), expected)


def test_bounds_of_z_box_are_of_what_the_first_layer_reads() -> None:
    form = FORMS["by mean and deviation"]
    model = Apply(lambda m, x: m.core(form(x)), core=core())
    rules = composites.EpsilonGammaBox(LOW, HIGH)
    torch.testing.assert_close(relevance(model, X, rules), relevance(core(), form(X), rules))


def test_a_batch_norm_that_padding_keeps_from_being_folded_belongs_to_the_input() -> None:
    norm = nn.BatchNorm2d(3, affine=False, eps=0).double()
    norm.running_mean, norm.running_var = MEAN.clone(), STD.square()
    model = nn.Sequential(norm, core()).eval()
    for rules in RULES.values():
        torch.testing.assert_close(relevance(model, X, rules), relevance(model[1], norm(X), rules))


def test_an_image_that_is_resized_before_takes_all_that_the_first_layer_hands_on() -> None:
    """To which it gives what it gives the first layer's input, by what each pixel adds."""
    plain = core()
    form = FORMS["by mean and deviation"]

    def resized(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear")

    model = Apply(lambda m, x: m.core(form(resized(x))), core=plain)
    for rules in RULES.values():
        x = resized(X).requires_grad_()
        expected = relevance(plain, form(x.detach()), rules)
        small = X.clone().requires_grad_()
        (shares,) = torch.autograd.grad(resized(small), small, expected / x)
        torch.testing.assert_close(relevance(model, X, rules), X * shares, rtol=1e-4, atol=1e-5)


def test_the_report_says_what_was_laid_on_the_shift() -> None:
    model = Apply(lambda m, x: m.core(FORMS["to -1 and 1"](x)), core=core())
    rows = lrpfx.explain(model, X, 1, rules="epsilon_plus_flat").report.rows
    assert [(row.kind, row.rule, row.why.split(": ")[1]) for row in rows[:2]] == [
        (kind, "Pass", "predicate input_scales") for kind in ("scale", "shift")
    ]
    assert rows[2].rule == "Flat" and "first" in rows[2].why


def test_positions_that_are_added_and_inputs_without_a_layer_keep_their_share() -> None:
    table = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.rand(2, 5, 4, dtype=torch.float64)
    layer = nn.Linear(4, 3).double()
    for model in (Apply(lambda m, x: m.layer(x + table), layer=layer), Apply(lambda m, x: x + 2)):
        e = lrpfx.explain(model, x, torch.ones_like(model(x)), rules="epsilon_all")
        assert e.report.rows[0].rule.startswith("Norm") and "bias" in e.report.absorbed
