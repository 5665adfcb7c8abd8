"""torch.func and torch.compile over a rewritten graph: as autograd by itself has it."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

import lrpfx
from lrpfx import composites


class Net(nn.Module):
    """Convolutions, batch norm, a sum, pooling with indices, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.mix, self.layer_norm = nn.Conv2d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.max_pool2d(nn.functional.gelu(self.mix(x)) + x, 2)
        t = x.flatten(2).transpose(1, 2)
        return self.head(self.layer_norm(t + self.attend(t, t, t, need_weights=False)[0]).mean(1))


@functools.cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


RULES: dict[str, Any] = {
    "auto": None,
    "epsilon_all": composites.EpsilonAll(0.01),
    "alpha_beta": composites.EpsilonAlpha2Beta1Flat(0.01, 0.01),
}


def images(*sizes: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*sizes, 1, 4, 4, dtype=torch.float64)


def one_hot(k: int, n: int = 2) -> Tensor:
    return torch.eye(3, dtype=torch.float64)[[k] * n]


def relevance(module: Any, x: Tensor, k: int, create_graph: bool = False) -> Tensor:
    """By autograd alone."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(module(x), x, one_hot(k, len(x)), create_graph=create_graph)[0]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("rules", RULES)
def test_jacobians_and_batches_of_batches_hold_relevance(rules: str) -> None:
    module = lrpfx.Explainer(model(), images(2), RULES[rules]).graph_module
    x, many = images(2), images(3, 2)
    jacobian = jacrev(module)(x)
    for k in range(3):
        own = torch.stack([jacobian[n, k, n] for n in range(2)])
        torch.testing.assert_close(own, relevance(module, x, k))
    plain = torch.stack([relevance(module, each, 1) for each in many])
    torch.testing.assert_close(vmap(grad(lambda x: module(x)[:, 1].sum()))(many), plain)
    leaf = many.clone().requires_grad_()
    (found,) = torch.autograd.grad(vmap(module)(leaf)[..., 1].sum(), leaf)
    torch.testing.assert_close(found, plain)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("rules", RULES)
def test_relevance_is_differentiated_by_transforms_as_by_autograd(rules: str) -> None:
    module = lrpfx.Explainer(model(), images(2), RULES[rules]).graph_module
    x = images(2)
    found = grad(lambda x: grad(lambda x: module(x)[:, 1].sum())(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    loss = relevance(module, leaf, 1, create_graph=True).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, leaf)[0])


def test_samples_of_their_own_norms_are_stabilized_by_their_own() -> None:
    """Under vmap a stabilizer sees one sample at a time, as it does alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double().eval()
    rule = lrpfx.Epsilon(lrpfx.Stabilizer(0.3, norm_scale=True))
    x = torch.randn(5, 1, 4, dtype=torch.float64)
    module = lrpfx.Explainer(net, x[0], [("linear", rule)]).graph_module
    found = vmap(grad(lambda x: module(x)[:, 1].sum()))(x)
    torch.testing.assert_close(found, torch.stack([relevance(module, each, 1) for each in x]))


@pytest.mark.nightly
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("through", ["compile", "compiled transform"])
def test_compiled_graphs_hold_relevance(through: str) -> None:
    x = images(2)
    module = lrpfx.Explainer(model(), x, RULES["epsilon_all"]).graph_module
    torch.compiler.reset()
    if through == "compile":
        compiled = torch.compile(module, backend="aot_eager")
        found = relevance(compiled, x, 1)
    else:
        f = torch.compile(lambda x: grad(lambda x: module(x)[:, 1].sum())(x), backend="aot_eager")
        found = f(x)
    torch.testing.assert_close(found, relevance(module, x, 1))


def test_a_compiled_graph_holds_relevance_and_its_derivatives_are_right_or_an_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)).double().eval()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    module = lrpfx.Explainer(net, x, RULES["epsilon_all"]).graph_module
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(relevance(compiled, x, 1), relevance(module, x, 1))
    variables = [x, *net.parameters()]
    plain = torch.autograd.grad(relevance(module, x, 1, True).square().sum(), variables)
    try:
        loss = relevance(compiled, x, 1, True).square().sum()
        found = torch.autograd.grad(loss, variables)
    except RuntimeError as error:
        assert "double backward" in str(error) or "create_graph" in str(error)
    else:
        torch.testing.assert_close(found, plain)
