"""Parity with zennit: the same relevance, for every composite that zennit has.

Zennit works by hooks on modules, lrpfx by the graph. Where hooks compute something else than the
rules say, zennit's copy of the network is rearranged (`peer_of`); lrpfx always gets torchvision's
model as it is. The first layer, which zennit takes to be the first one registered, is the first
one executed in all of these networks.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import zennit.composites
import zennit.core
import zennit.rules
import zennit.torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import lrpfx
from lrpfx.rules import Rule
from tests.conftest import traced_once
from tests.oracle import zoo

TOLERANCE = 1e-9

# Image size by model. Adaptive pooling gets 2x2 pixels in AlexNet, and returns more: its windows
# overlap.
MODELS = {
    "alexnet": 96,
    "vgg11_bn": 32,
    "residual": 48,
    "bottlenecks": 48,
    "resnet18": 48,
    "resnet50": 48,
    "squeezenet1_1": 64,
}
#: Of layers and blocks that others have, which are small.
LARGE = ("vgg11_bn", "resnet18", "resnet50", "squeezenet1_1")
SMALL = {"residual": zoo.residual, "bottlenecks": zoo.bottlenecks}

REQUIRED = {"epsilon_gamma_box": {"low": -3.0, "high": 3.0}}


class Pair(NamedTuple):
    """A model for lrpfx, the same function for zennit, and what both explain."""

    model: nn.Module
    peer: nn.Module
    x: Tensor
    seed: Tensor

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> "Pair":
        peer = peer_of(model)
        with torch.no_grad():
            expected = model(x)
            assert error(peer(x), expected) < 1e-12, "zennit's copy is another function"
        # Relevance of both signs at every output, so that no path goes without.
        return cls(model, peer, x, zoo.images(*expected.shape, seed=1))

    def by_lrpfx(self, rules: Any) -> Tensor:
        relevance = lrpfx.explain(self.model, self.x, self.seed, rules=rules, ledger=True).relevance
        assert isinstance(relevance, Tensor)
        return relevance

    def by_zennit(self, composite: zennit.core.Composite) -> Tensor:
        x = self.x.clone().requires_grad_()
        with composite.context(self.peer) as instrumented:
            (relevance,) = torch.autograd.grad(instrumented(x), x, self.seed)
        assert relevance.isfinite().all() and (relevance.flatten(1).norm(dim=1) > 0).all()
        return relevance


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a sample, in the Euclidean norm."""
    difference = (got - expected).flatten(1).norm(dim=1)
    return float((difference / expected.flatten(1).norm(dim=1)).max())


def named(name: str, **parameters: Any) -> zennit.core.Composite:
    return zennit.composites.COMPOSITES[name](**REQUIRED.get(name, {}) | parameters)


def named_here(name: str, **parameters: Any) -> lrpfx.composites.Composite:
    return lrpfx.composites.NAMED[name](**REQUIRED.get(name, {}) | parameters)


# Zennit's copy of a network ----------------------------------------------------------------------


class InTurn(nn.Module):
    """A ReLU that is called ``n`` times in a forward pass, as ``n`` modules."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(n))
        self.turns = itertools.cycle(range(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.relus[next(self.turns)](x)


def peer_of(model: nn.Module) -> nn.Module:
    """Copy ``model`` so that zennit's hooks compute what zennit's rules say."""
    peer = copy.deepcopy(model)
    # The batch norm that zennit's canonizers have merged stays, with variance 1, and still divides
    # by sqrt(1 + eps): 5e-5 in the output of ResNet-18. Folding by hand is exact.
    for parent in list(peer.modules()):
        for (_, conv), (key, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fold(conv, norm)
                setattr(parent, key, nn.Identity())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in peer.modules())
    # A residual sum needs to be a module to get a rule. These two only exchange the block's
    # forward; ResNetCanonizer would merge batch norms too.
    zennit.torchvision.ResNetBasicBlockCanonizer().apply(peer)
    zennit.torchvision.ResNetBottleneckCanonizer().apply(peer)
    for module in peer.modules():
        # A block calls one ReLU two or three times, and zennit keeps the input of the last call:
        # beta_smooth would smooth all of them at that one (error 1.1 on ResNet-18).
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.relu = InTurn(2 if isinstance(module, BasicBlock) else 3)
        # An in-place ReLU overwrites the input that zennit keeps: beta_smooth would take
        # sigmoid(beta * max(x, 0)) (error 0.96).
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return peer


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Make ``conv`` what ``norm(conv(x))`` is."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = 0.0 if conv.bias is None else conv.bias
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter((bias - norm.running_mean) * scale + norm.bias)


# Composites on torchvision's models --------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_trace() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.nightly] if n in LARGE else []) for n in MODELS],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    size = MODELS[request.param]
    make = SMALL.get(request.param, functools.partial(zoo.torchvision_model, request.param))
    return Pair.of(make(), zoo.images(2, 3, size, size))


@pytest.mark.parametrize("name", zennit.composites.COMPOSITES)
def test_composite(pair: Pair, name: str) -> None:
    assert error(pair.by_lrpfx(named_here(name)), pair.by_zennit(named(name))) < TOLERANCE


# A small network, signed everywhere --------------------------------------------------------------


@pytest.fixture(scope="module")
def signed() -> Pair:
    """All affine layers but the last get inputs of both signs, unlike those of most CNNs."""
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 6, 3, stride=2, padding=1))
    model.add_module("tanh", nn.Tanh())
    model.add_module("grouped", nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2))
    model.add_module("leaky", nn.LeakyReLU(0.3))
    model.add_module("pool", nn.AvgPool2d(3, stride=2, padding=1))
    model.add_module("inner", nn.Conv2d(8, 8, 3, padding=1, bias=False))
    model.add_module("relu", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(72, 4))
    return Pair.of(zoo.randomize(model.double().eval()), zoo.images(2, 3, 12, 12))


def laid(rule: zennit.core.Hook, layers: tuple[str, ...]) -> zennit.core.Composite:
    """``rule`` on the named layers, over epsilon_plus."""
    plus = zennit.composites.EpsilonPlus()
    return zennit.composites.NameLayerMapComposite([(layers, rule)], plus.layer_map)


WEIGHTED = ("stem", "grouped", "inner", "head")
LOW = torch.tensor([-3.0, -3.5, -4.0], dtype=torch.float64).view(1, 3, 1, 1)
HIGH = torch.linspace(3.0, 4.0, 12 * 12, dtype=torch.float64).view(1, 1, 12, 12).repeat(1, 3, 1, 1)
# Layers, lrpfx's rule, zennit's.
RULES: list[tuple[tuple[str, ...], Rule, zennit.core.Hook]] = [
    (WEIGHTED, lrpfx.Epsilon(0.1), zennit.rules.Epsilon(0.1)),
    (
        WEIGHTED,
        lrpfx.Epsilon(0.1, zero_params="bias"),
        zennit.rules.Epsilon(0.1, zero_params="bias"),
    ),
    (
        WEIGHTED,
        lrpfx.Epsilon(lrpfx.Stabilizer(0.1, clip=True)),
        zennit.rules.Epsilon(zennit.core.Stabilizer(0.1, clip=True)),
    ),
    (
        WEIGHTED,
        lrpfx.Epsilon(lrpfx.Stabilizer(0.1, norm_scale=True)),
        zennit.rules.Epsilon(zennit.core.Stabilizer(0.1, norm_scale=True)),
    ),
    (WEIGHTED, lrpfx.ZPlus(), zennit.rules.ZPlus()),
    (WEIGHTED, lrpfx.ZPlus(zero_params="bias"), zennit.rules.ZPlus(zero_params="bias")),
    (WEIGHTED, lrpfx.AlphaBeta(1, 0), zennit.rules.AlphaBeta(1, 0)),
    (WEIGHTED, lrpfx.AlphaBeta(2, 1), zennit.rules.AlphaBeta(2, 1)),
    (
        WEIGHTED,
        lrpfx.AlphaBeta(2, 1, zero_params="bias"),
        zennit.rules.AlphaBeta(2, 1, zero_params="bias"),
    ),
    (WEIGHTED, lrpfx.Gamma(0.5), zennit.rules.Gamma(0.5)),
    (WEIGHTED, lrpfx.Gamma(0.5, zero_params="bias"), zennit.rules.Gamma(0.5, zero_params="bias")),
    (WEIGHTED, lrpfx.WSquare(), zennit.rules.WSquare()),
    (WEIGHTED, lrpfx.WSquare(zero_params="bias"), zennit.rules.WSquare(zero_params="bias")),
    (WEIGHTED, lrpfx.Flat(), zennit.rules.Flat()),
    (("stem",), lrpfx.ZBox(LOW, HIGH), zennit.rules.ZBox(LOW, HIGH)),
    (
        ("stem",),
        lrpfx.ZBox(LOW, HIGH, zero_params="bias"),
        zennit.rules.ZBox(LOW, HIGH, zero_params="bias"),
    ),
    (("pool",), lrpfx.Norm(0.1), zennit.rules.Norm(0.1)),
    (("pool",), lrpfx.Flat(), zennit.rules.Flat()),
]


@pytest.mark.parametrize(
    ("layers", "rule", "peer"), RULES, ids=[f"{r} on {' '.join(at)}" for at, r, _ in RULES]
)
def test_rule_on_signed_inputs(
    signed: Pair, layers: tuple[str, ...], rule: Rule, peer: zennit.core.Hook
) -> None:
    relevance = signed.by_lrpfx([*((layer, rule) for layer in layers), "epsilon_plus"])
    assert error(relevance, signed.by_zennit(laid(peer, layers))) < TOLERANCE


@pytest.mark.parametrize("layer", WEIGHTED)
def test_alpha_beta_that_zennit_rejects(signed: Pair, layer: str) -> None:
    """1.4 - 0.4 is not 1.0 in floating point, but the rule is linear in (alpha, beta)."""
    with pytest.raises(ValueError, match="must equal 1"):
        zennit.rules.AlphaBeta(1.4, 0.4)
    one, two = (
        signed.by_zennit(laid(zennit.rules.AlphaBeta(*alpha_beta), (layer,)))
        for alpha_beta in ((1, 0), (2, 1))
    )
    relevance = signed.by_lrpfx([(layer, lrpfx.AlphaBeta(1.4, 0.4)), "epsilon_plus"])
    assert error(relevance, 0.6 * one + 0.4 * two) < TOLERANCE


# The comparison itself ---------------------------------------------------------------------------

# Composite, its parameter that is to be wrong, and the right value.
PLANTED = [
    ("epsilon_plus", "epsilon", 0.1),
    ("epsilon_plus", "stabilizer", 0.1),
    ("epsilon_plus_flat", "stabilizer", 0.1),
    ("epsilon_alpha2_beta1", "stabilizer", 0.1),
    ("epsilon_alpha2_beta1_flat", "stabilizer", 0.1),
    ("epsilon_gamma_box", "gamma", 0.25),
    ("epsilon_gamma_box", "low", -3.0),
    ("epsilon_gamma_box", "high", 3.0),
    ("excitation_backprop", "stabilizer", 0.1),
    ("beta_smooth", "beta", 10.0),
]
ZENNITS_NAME = {"beta": "beta_smooth"}


@pytest.mark.parametrize(("name", "parameter", "value"), PLANTED)
def test_comparison_sees_a_part_in_a_thousand(
    signed: Pair, name: str, parameter: str, value: float
) -> None:
    expected = signed.by_zennit(named(name, **{ZENNITS_NAME.get(parameter, parameter): value}))
    right, wrong = (
        error(signed.by_lrpfx(named_here(name, **{parameter: v})), expected)
        for v in (value, value * 1.001)
    )
    assert right < TOLERANCE
    assert wrong > 1000 * TOLERANCE
