"""The derivatives of relevance are exact: autograd agrees with central differences in float64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites


class Residual(nn.Module):
    """Conv, batch norm, residual sum by operator, activations, pooling, and a linear head."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        act = getattr(F, self.activation)
        x = act(self.norm(self.stem(x)))
        x = act(self.mix(x) + x)
        x = F.max_pool2d(x, 2)
        x = act(self.up(x))
        return self.head(F.avg_pool2d(x, 2).mean((2, 3)))


def model_of(activation: str) -> Residual:
    torch.manual_seed(3)
    model = Residual(activation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


RULES = {
    "epsilon": composites.EpsilonAll(epsilon=0.01),
    "epsilon_plus": composites.EpsilonPlus(epsilon=0.01, stabilizer=0.01),
    "epsilon_plus_flat": composites.EpsilonPlusFlat(epsilon=0.01, stabilizer=0.01),
    "alpha_beta": composites.EpsilonAlpha2Beta1(epsilon=0.01, stabilizer=0.01),
    "gamma_box": composites.EpsilonGammaBox(-3.0, 3.0, epsilon=0.01, stabilizer=0.01),
    "w_square": [("stem", lrpfx.WSquare(0.01)), ("*", lrpfx.Epsilon(0.01))],
    "norm_scaled": [("*", lrpfx.Epsilon(lrpfx.Stabilizer(0.01, norm_scale=True)))],
    "clipped": [("*", lrpfx.Epsilon(lrpfx.Stabilizer(0.05, clip=True)))],
    "excitation_backprop": composites.ExcitationBackprop(stabilizer=0.01),
    "beta_smooth": composites.BetaSmooth(),
    "gradient": [("*", lrpfx.Gradient())],
    "sign": [("stem", lrpfx.Sign(epsilon=0.25)), ("*", lrpfx.Epsilon(0.25))],
    "no_bias": composites.EpsilonPlus(epsilon=0.01, stabilizer=0.01, zero_params="bias"),
}


def loss_of(explainer: lrpfx.Explainer, x: Tensor, target: object, create_graph: bool) -> Tensor:
    """Some function of relevance, inner relevance and output that is smooth and not symmetric."""
    e = explainer(x, target, layers=["mix"], create_graph=create_graph)
    weight = torch.linspace(-1, 1, e.relevance.numel(), dtype=x.dtype).reshape(e.relevance.shape)
    inner = e.layers["mix"].relevance
    return (
        (e.relevance * weight).sum()
        + e.relevance.square().sum()
        + inner.tanh().sum()
        + (e.output.sin().sum())
    )


#: PyTorch's own hard sigmoid has no second derivative.
CASES = [*itertools.product(RULES, ["relu", "gelu", "softplus"]), ("gradient", "hardsigmoid")]
CASES = [(rules, act) for rules, act in CASES if rules != "sign" or act == "softplus"]


#: What is moved by a step is moved back.
shared_model = functools.cache(model_of)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("rules", "activation"), CASES)
def test_derivatives_of_relevance_agree_with_central_differences(
    rules: str, activation: str
) -> None:
    model = shared_model(activation)
    torch.manual_seed(5)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    explainer = lrpfx.Explainer(model, x, RULES[rules])
    variables = [x, *model.parameters()]
    loss = loss_of(explainer, x, 1, create_graph=True)
    gradients = torch.autograd.grad(loss, variables, materialize_grads=True)
    step = 1e-6
    for variable, gradient in zip(variables, gradients, strict=True):
        direction = torch.randn_like(variable)
        with torch.no_grad():
            variable.add_(direction, alpha=step)
            above = loss_of(explainer, x, 1, create_graph=False)
            variable.sub_(direction, alpha=2 * step)
            below = loss_of(explainer, x, 1, create_graph=False)
            variable.add_(direction, alpha=step)
        numeric = ((above - below) / (2 * step)).item()
        exact = (gradient * direction).sum().item()
        assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "target",
    [None, 2, [0, 2], (1,), lambda out: out[:, 0] * out[:, 1]],
    ids=["argmax", "class", "classes", "index", "callable"],
)
def test_the_seed_is_differentiated_with_the_rest(target: object) -> None:
    model = model_of("softplus")
    torch.manual_seed(5)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    explainer = lrpfx.Explainer(model, x, RULES["epsilon"])
    (gradient,) = torch.autograd.grad(loss_of(explainer, x, target, True), [x])
    direction = torch.randn_like(x)
    above = loss_of(explainer, (x + 1e-6 * direction).detach(), target, False)
    below = loss_of(explainer, (x - 1e-6 * direction).detach(), target, False)
    numeric = ((above - below) / 2e-6).item()
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_the_graph_module_is_twice_differentiable() -> None:
    """The user's own ``autograd.grad`` on the rewritten graph, differentiated again."""
    model = model_of("softplus")
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    module = lrpfx.Explainer(model, x, RULES["epsilon"]).graph_module
    seed = torch.randn(2, 3, dtype=torch.float64)

    def penalty(x: Tensor, create_graph: bool) -> Tensor:
        (relevance,) = torch.autograd.grad(module(x), x, seed, create_graph=create_graph)
        return relevance.square().sum()

    (gradient,) = torch.autograd.grad(penalty(x, True), [x])
    direction = torch.randn_like(x)
    above, below = (
        penalty((x + sign * 1e-6 * direction).detach().requires_grad_(), False) for sign in (1, -1)
    )
    numeric = ((above - below) / 2e-6).item()
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_central_differences_catch_a_detached_denominator() -> None:
    """The check can fail: a rule that detaches its denominator has other derivatives."""

    class Detached(lrpfx.Epsilon):
        def propagate(self, call, x, z, R):
            return super().propagate(call, x, z.detach(), R)

    model = model_of("softplus")
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    explainer = lrpfx.Explainer(model, x, [("*", Detached(0.01))])
    (gradient,) = torch.autograd.grad(loss_of(explainer, x, 1, True), [x])
    direction = torch.randn_like(x)
    above = loss_of(explainer, (x + 1e-6 * direction).detach(), 1, False)
    below = loss_of(explainer, (x - 1e-6 * direction).detach(), 1, False)
    numeric = ((above - below) / 2e-6).item()
    assert (gradient * direction).sum().item() != pytest.approx(numeric, rel=1e-2)


def test_training_on_an_explanation_moves_relevance() -> None:
    """What exact derivatives are for: descending on a relevance penalty lowers it."""
    model = model_of("relu")
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def outside() -> Tensor:
        relevance = explainer(x, 0, create_graph=True).relevance
        return relevance[..., :2].abs().sum() / relevance.abs().sum()

    before = outside().item()
    for _ in range(20):
        optimizer.zero_grad()
        outside().backward()
        optimizer.step()
    assert outside().item() < 0.9 * before
