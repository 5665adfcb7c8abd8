"""The randomisation test on methods that must fail it, and on one that must not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.attributors import gradient_x_input
from lrpfx.evaluate import randomization
from tests.conftest import Apply, assert_untouched

double = torch.float64


def _net() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).to(double).eval()


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    return _net()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 1, 6, 6, dtype=double)


def test_layers_become_random_from_the_output_down(net: nn.Module, x: Tensor) -> None:
    explainer = lrpfx.Explainer(net, x, "epsilon_all")
    with assert_untouched(net, x):
        found = randomization(explainer, x, 1)
    assert found.layers == ("6", "4", "1", "0")
    assert found.similarity.shape == found.signed.shape == (4, 4)
    assert float(found.signed[-1].mean()) < 0.7
    again = randomization(explainer, x, 1)
    assert torch.equal(found.similarity, again.similarity)
    assert not torch.equal(found.similarity, randomization(explainer, x, 1, seed=5).similarity)
    assert "6" in str(found) and found._repr_html_()


def test_a_map_that_does_not_see_the_model_stays_as_it_is(net: nn.Module, x: Tensor) -> None:
    def edges(model: nn.Module, x: Tensor, target: Any) -> lrpfx.Explanation:
        return gradient_x_input(lambda z: z.pow(2).flatten(1).sum(1), x)

    found = randomization(net, x, 1, method=edges)
    assert torch.allclose(found.similarity, torch.ones(4, 4, dtype=double))


def test_cascading_keeps_layers_random_and_independent_does_not(net: nn.Module, x: Tensor) -> None:
    cascading, independent = (
        randomization(net, x, 1, method=gradient_x_input, order=order)
        for order in ("cascading", "independent")
    )
    assert torch.equal(cascading.similarity[0], independent.similarity[0])
    assert not torch.equal(cascading.similarity[1], independent.similarity[1])
    last = nn.Sequential(*[nn.Identity()] * 3, _net())
    assert randomization(last, x, 1, method=gradient_x_input).layers[0] == "3.6"


def test_parameters_belong_to_the_module_that_uses_them() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Apply(lambda self, z: self.head(self.attention(z, z, z)[0].mean(1)))
    model.attention, model.head, model.scale = attention, nn.Linear(4, 2), nn.Linear(4, 4)
    model.eval()
    found = randomization(model, torch.randn(2, 3, 4), 0, method=gradient_x_input)
    assert found.layers == ("head", "attention", "")  # that which is never called is the model's


def test_the_class_is_that_of_the_trained_model(net: nn.Module, x: Tensor) -> None:
    best = net(x).argmax(1)
    by_none = randomization(net, x, None, method=gradient_x_input)
    assert torch.equal(by_none.signed, randomization(net, x, best, method=gradient_x_input).signed)


def test_what_has_no_answer_is_an_error(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(lrpfx.errors.InputError, match="takes an Explainer"):
        randomization(net, x)
    with pytest.raises(lrpfx.errors.InputError, match="no parameters"):
        randomization(nn.ReLU(), x, method=gradient_x_input, target=(0, 0, 0))
    with pytest.raises(lrpfx.errors.InputError, match="order="):
        randomization(net, x, method=gradient_x_input, order="up")  # type: ignore[arg-type]
