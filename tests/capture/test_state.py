"""An Explainer reads the parameters that the model has today."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lrpfx
from lrpfx import errors
from tests.conftest import assert_untouched
from tests.oracle.networks import conv_net, draw, fc, image, tied, trained
from tests.test_errors import check_form

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.fixture
def fresh() -> tuple[nn.Module, lrpfx.Explainer]:
    """A model, and an Explainer that has explained and rewritten it once."""
    model = conv_net()
    explainer = lrpfx.Explainer(model, image())
    explainer(image(), layers=["act"])
    explainer.graph_module(image())
    return model, explainer


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def other_state() -> dict[str, Tensor]:
    return {k: v + 0.25 if v.is_floating_point() else v for k, v in conv_net().state_dict().items()}


def scaled(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach() * 1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": step,
    "load_state_dict": lambda m: m.load_state_dict(other_state()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(other_state(), assign=True),
    ".data in place": lambda m: m.conv.weight.data.mul_(1.5),
    ".data replaced": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 1.5),
    "weight replaced": lambda m: setattr(m.conv, "weight", scaled(m.conv.weight)),
    "bias replaced": lambda m: setattr(m.classifier, "bias", scaled(m.classifier.bias)),
    "layer replaced": lambda m: setattr(
        m, "classifier", trained(nn.Linear(32, 3)).requires_grad_()
    ),
    "statistics in place": lambda m: m.norm.running_var.add_(0.5),
    "statistics replaced": lambda m: setattr(m.norm, "running_mean", torch.ones(2)),
    "statistics by training": lambda m: (m.train(), m(image(4)), m.eval()),
    "frozen": lambda m: m.requires_grad_(False).conv.weight.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_reads_the_parameters_of_today(
    fresh: tuple[nn.Module, lrpfx.Explainer], change: Callable[[Any], Any]
) -> None:
    model, explainer = fresh
    before = explainer(image(), 1, layers=["act"])
    change(model)
    after = explainer(image(), 1, layers=["act"])
    expected = lrpfx.explain(model, image(), 1, layers=["act"])
    assert not torch.allclose(after.output, before.output)  # the change is one
    for found, wanted in [
        (after.output, model(image())),
        (after.relevance, expected.relevance),
        (after.layers["act"].relevance, expected.layers["act"].relevance),
        (explainer.graph_module(image()), model(image())),
    ]:
        torch.testing.assert_close(found, wanted)


def test_reads_parameters_behind_a_cache() -> None:
    """Some vision transformers cache what they compute from parameters (LeViT, TinyViT)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if "bias" not in m.cache:
            m.cache["bias"] = m.fc.weight.sum(0)
        return m.fc(x + m.cache["bias"])

    model = fc(forward, cache={})
    explainer = lrpfx.Explainer(model, draw(2, 3))
    model.fc.weight.data.mul_(2)
    torch.testing.assert_close(explainer(draw(2, 3)).output, model(draw(2, 3)))


def test_reads_tied_parameters() -> None:
    model, x = tied(), draw(2, 3)
    explainer = lrpfx.Explainer(model, x)
    model[0].weight = model[2].weight = scaled(model[0].weight)
    torch.testing.assert_close(explainer(x).relevance, lrpfx.explain(model, x).relevance)
    model[2].weight = scaled(model[0].weight)  # no longer tied: the graph may say so, but not lie
    with contextlib.suppress(errors.CaptureError):
        torch.testing.assert_close(explainer(x).output, model(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda m: m.to(torch.float64), ["float32", "float64"], id="dtype"),
        pytest.param(lambda m: m.to("meta"), ["cpu", "meta"], id="device"),
        pytest.param(
            lambda m: setattr(m, "classifier", nn.Linear(32, 5)), ["classifier", "5"], id="shape"
        ),
        pytest.param(lambda m: setattr(m, "conv", nn.Identity()), ["conv.weight"], id="layer-gone"),
        pytest.param(
            lambda m: parametrizations.weight_norm(m.classifier), ["classifier"], id="parametrized"
        ),
        pytest.param(
            lambda m: m.register_parameter("new", nn.Parameter(torch.ones(1))), ["new"], id="added"
        ),
    ],
)
def test_change_of_form_is_an_error(
    fresh: tuple[nn.Module, lrpfx.Explainer], change: Callable[[Any], Any], said: list[str]
) -> None:
    model, explainer = fresh
    change(model)
    for use in (lambda: explainer(image()), lambda: explainer.graph_module(image())):
        with assert_untouched(model), pytest.raises(errors.CaptureError) as caught:
            use()
        check_form(caught.value)
        assert all(word in str(caught.value) for word in said), str(caught.value)


def test_there_and_back_again(fresh: tuple[nn.Module, lrpfx.Explainer]) -> None:
    model, explainer = fresh
    expected = explainer(image()).relevance
    model.double()
    with pytest.raises(errors.CaptureError):
        explainer(image())
    model.float()
    torch.testing.assert_close(explainer(image()).relevance, expected)
