"""Normalisations and products of live tensors, against their formulas written out by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")

EPSILON_ALL = composites.EpsilonAll(epsilon=1e-9)


@pytest.mark.parametrize(
    "over",
    [
        lambda a, b: a / b.norm(dim=1, keepdim=True),
        lambda a, b: a / (b.std(1, keepdim=True) + 1e-3),
        lambda a, b: a * torch.rsqrt(b.square().mean(1, keepdim=True) + 1e-3),
    ],
)
def test_statistics_of_other_tensors_are_said_to_be_constants(over: Callable) -> None:
    class Model(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.own = own

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return over(a, a) + b if self.own else over(a, b)

    a, b = torch.randn(2, 4), torch.randn(2, 4)
    notes = ["1 divisors of live tensors count as constants"]
    for own, expected in ((False, notes), (True, [])):
        report = lrpfx.explain(Model(own), (a, b), (slice(None),)).report
        assert [note for note in report.notes if "divisors" in note] == expected


class Alone(nn.Module):
    """A module whose output is a batch of vectors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).flatten(1)


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.double().eval()


# The module, the shape of a sample, the axes that are normalised together after reshaping the
# sample to ``groups``, and whether the mean is subtracted.
NORMS = {
    "layer_norm": (nn.LayerNorm(6), (4, 6), (4, 6), (1,), True),
    "layer_norm 2 axes": (nn.LayerNorm((4, 6)), (4, 6), (4, 6), (0, 1), True),
    "layer_norm without affine": (
        nn.LayerNorm(6, elementwise_affine=False),
        (4, 6),
        (4, 6),
        (1,),
        True,
    ),
    "group_norm": (nn.GroupNorm(2, 4), (4, 3, 3), (2, 2, 3, 3), (1, 2, 3), True),
    "instance_norm": (
        nn.InstanceNorm2d(4, affine=True),
        (4, 3, 3),
        (4, 3, 3),
        (1, 2),
        True,
    ),
    "rms_norm": (nn.RMSNorm(6, eps=1e-5), (4, 6), (4, 6), (1,), False),
}


def dense(module: nn.Module, x: np.ndarray, groups: tuple, axes: tuple, mean: bool) -> tuple:
    """The affine map of one sample with its std held fixed: a matrix and a vector."""
    size = x.size

    def normalise(v: np.ndarray, std: np.ndarray) -> np.ndarray:
        v = v.reshape(groups)
        centred = v - v.mean(axes, keepdims=True) if mean else v
        return centred / std

    grouped = x.reshape(groups)
    centred = grouped - grouped.mean(axes, keepdims=True) if mean else grouped
    std = np.sqrt((centred**2).mean(axes, keepdims=True) + (module.eps or 0))
    weight = getattr(module, "weight", None)
    gain = np.ones(x.shape)
    bias = np.zeros(x.shape)
    for name, into in (("weight", gain), ("bias", bias)):
        value = getattr(module, name, None)
        if value is not None:
            value = value.detach().numpy()
            per_channel = isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d))
            into[...] = value.reshape(-1, 1, 1) if per_channel else value
    assert weight is None or gain.std() > 0
    columns = [normalise(unit, std).ravel() * gain.ravel() for unit in np.eye(size)]
    return np.stack(columns, axis=1), bias.ravel()


@pytest.mark.parametrize(("module", "shape", "groups", "axes", "mean"), NORMS.values(), ids=NORMS)
def test_a_norm_is_affine_with_its_std_as_a_constant(
    module: nn.Module, shape: tuple, groups: tuple, axes: tuple, mean: bool
) -> None:
    module = randomized(module)
    torch.manual_seed(1)
    x = torch.randn(3, *shape, dtype=torch.float64)
    seed = torch.randn(3, int(np.prod(shape)), dtype=torch.float64)
    e = lrpfx.explain(Alone(module), x, seed, rules=EPSILON_ALL)
    for k in range(3):
        J, b = dense(module, x[k].numpy(), groups, axes, mean)
        z = J @ x[k].numpy().ravel() + b
        np.testing.assert_allclose(z, Alone(module)(x)[k].detach(), rtol=1e-9, atol=1e-9)
        s = seed[k].numpy() / (z + np.where(z >= 0, 1e-9, -1e-9))
        expected = x[k].numpy().ravel() * (J.T @ s)
        got = e.relevance[k].detach().numpy().ravel()
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    assert e.report.unaccounted == pytest.approx(0, abs=1e-6)


class Gated(nn.Module):
    """Squeeze and excitation: a gate per channel, computed from the gated values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.squeeze = nn.Linear(4, 2)
        self.excite = nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))

    def gate(self, a: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(a.mean((2, 3))))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        a = self.features(x)
        return self.head((a * self.gate(a)).mean((2, 3)))


def test_a_product_gives_each_factor_half() -> None:
    """By hand: half of R goes straight to the features, the other half through the gate."""
    model = randomized(Gated())
    torch.manual_seed(1)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    e = lrpfx.explain(model, x, 1, rules=EPSILON_ALL, layers=["conv"])
    a = model.features(x).detach()
    g = model.gate(a).detach()
    z = a * g
    share = z.mean((2, 3)) * model.head.weight[1].detach()
    R = z * (share / z.mean((2, 3)))[:, :, None, None] / z[0, 0].numel()
    through = R.sum((2, 3)) / 2  # the gate's half, then sigmoid passes it on
    hidden = F.relu(model.squeeze(a.mean((2, 3)))).detach()
    s = through / model.excite(hidden).detach()
    hidden_R = hidden * (s @ model.excite.weight.detach())
    pooled = a.mean((2, 3))
    s = hidden_R / model.squeeze(pooled).detach()
    pooled_R = pooled * (s @ model.squeeze.weight.detach())
    back = a * (pooled_R / pooled / a[0, 0].numel())[:, :, None, None]
    expected = R / 2 + back
    got = e.layers["conv"].relevance.detach()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7 * expected.abs().max())


def test_relevance_of_a_broadcast_factor_is_summed() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 1)
    seed = torch.randn(2, 3, 4)
    ra, rb = lrpfx.explain(Product(), (a, b), seed).relevance
    torch.testing.assert_close(ra, seed / 2)
    torch.testing.assert_close(rb, seed.sum(2, keepdim=True) / 2)


def test_a_divisor_normalises_and_gets_no_relevance() -> None:
    """Linear attention divides by the sum of its weights; R goes to the numerator whole."""

    class Quotient(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a / b.square().sum(-1, keepdim=True)).flatten(1)

    a, b = torch.randn(2, 1, 3).double(), torch.randn(2, 4, 3).double()
    seed = torch.randn(2, 12).double()
    ra, rb = lrpfx.explain(Quotient(), (a, b), seed, rules=EPSILON_ALL).relevance
    torch.testing.assert_close(ra, seed.reshape(2, 4, 3).sum(1, keepdim=True), rtol=1e-6, atol=1e-6)
    assert not rb.any()


@pytest.mark.parametrize("rule", [lrpfx.Flat(), lrpfx.ZPlus()], ids=str)
def test_rules_that_make_no_sense_on_a_norm_are_refused(rule: lrpfx.Rule) -> None:
    model = randomized(Alone(nn.LayerNorm(6)))
    with pytest.raises(lrpfx.errors.RuleError, match="layer_norm"):
        lrpfx.explain(model, torch.randn(2, 6).double(), rules=[("layer_norm", rule)])


# What is held, and what is not -------------------------------------------------------------------


class Beside(nn.Module):
    """A linear layer of the input, and what a function of input and parameters adds to it."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn, self.linear, self.inner = fn, nn.Linear(4, 3), nn.Linear(4, 3)
        self.gain, self.gain_and_one = nn.Parameter(torch.randn(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.fn(self, x)


def energy(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


FEATURES = {
    "energy": (lambda m, x: energy(x) * (1 + m.gain), lambda m, x: energy(x) * m.gain_and_one),
    "divided": (
        lambda m, x: energy(x) / torch.exp(-m.gain_and_one.log()),
        lambda m, x: energy(x) * m.gain_and_one,
    ),
    "two energies": (
        lambda m, x: energy(x[:, :2]) * energy(x[:, 2:]) * m.gain_and_one,
        lambda m, x: (  # as large, and no statistic that is looked for
            x[:, :2].abs().pow(2.0000000001).mean(-1, keepdim=True)
            * x[:, 2:].abs().pow(2.0000000001).mean(-1, keepdim=True)
            * m.gain_and_one
        ),
    ),
    "a constant over a divisor": (
        lambda m, x: torch.ones_like(m.inner(x)) / (1 + m.inner(x).exp()),
        lambda m, x: 1 / (1 + m.inner(x).exp()),
    ),
    "what is detached over a divisor": (
        lambda m, x: m.inner(x).detach().sign().abs() / (1 + m.inner(x).exp()),
        lambda m, x: 1 / (1 + m.inner(x).exp()),
    ),
}


@pytest.mark.parametrize(("one", "other"), FEATURES.values(), ids=FEATURES)
def test_what_normalises_nothing_is_no_constant(one: Callable, other: Callable) -> None:
    x, found = torch.randn(2, 4, dtype=torch.float64), []
    for fn in (one, other):
        model = randomized(Beside(fn))
        with torch.no_grad():
            model.gain_and_one.copy_(1 + model.gain.abs())
            model.gain.abs_()
        found.append(lrpfx.explain(model, x, 1, rules=EPSILON_ALL))
    torch.testing.assert_close(found[0].output, found[1].output)
    torch.testing.assert_close(found[0].relevance, found[1].relevance)
    assert not any("divisors" in note for note in found[0].report.notes)


@pytest.mark.parametrize("end", [torch.add, torch.mul])
def test_a_second_use_of_a_product_changes_no_share(end: Callable) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            p = self.a(x) * self.b(x) * self.c(x)
            return torch.cat([p, end(p, self.d(x))], 1)

    x = torch.randn(2, 4, dtype=torch.float64)
    seed = torch.cat([torch.randn(2, 3), torch.zeros(2, 3)], 1).double()
    e = lrpfx.explain(randomized(Three()), x, seed, rules="attnlrp", layers=["a", "b", "c"])
    got = [(e.layers[k][0].relevance.sum() / seed.sum()).item() for k in "abc"]
    assert got == pytest.approx([1 / 3] * 3)


class ChannelGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.way, self.share = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.share(x)) * (self.way(x) - x)


@pytest.mark.parametrize(
    ("inner", "around"),
    [
        (ChannelGate(), lambda y, x, m: y * torch.sigmoid(m.gate(x))),  # a product of products
        (Step(), lambda y, x, m: x + y),  # an interpolation
    ],
)
def test_what_a_module_returns_is_a_node_of_its_own(inner: nn.Module, around: Callable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate, self.head = inner, nn.Conv2d(4, 1, 1), nn.Linear(4, 2)
            self.stop = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y = y.detach() if self.stop else y
            return self.head(around(y, x, self).mean((2, 3)))

    model = randomized(Model())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    (layer,) = lrpfx.explain(model, x, 0, rules="attnlrp", layers=["inner"]).layers["inner"]
    torch.testing.assert_close(layer.activation, inner(x).detach())
    stopped = lrpfx.explain(model, x, 0, rules=[("inner", lrpfx.Stop())])
    model.stop = True
    expected = lrpfx.explain(model, x, 0)
    torch.testing.assert_close(stopped.relevance, expected.relevance)


@pytest.mark.parametrize("as_matrices", [True, False])
def test_a_normalised_energy_is_live(as_matrices: bool) -> None:
    """By hand: half of the relevance for each of two branches, of which one is such."""

    class Model(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            f = F.normalize(image.pow(2).mean(1).sqrt(), dim=-1)
            if as_matrices:
                return (f[:, None] @ text[..., None])[..., 0]
            return (f * text).sum(-1, keepdim=True)

    inputs = torch.randn(2, 4, 6).double(), torch.randn(2, 6).double()
    e = lrpfx.explain(Model(), inputs, 0, rules="attnlrp")
    for r in e.relevance:
        torch.testing.assert_close(r.flatten(1).sum(1), e.output[:, 0] / 2)


def _routed(weights: Tensor) -> Tensor:
    most, which = weights.topk(2, 1)
    return torch.zeros_like(weights).scatter(1, which, most / most.sum(1, keepdim=True))


GATED = {
    "softmax beside a relu": (
        lambda a, b: a.relu() * b.softmax(1),
        lambda a, b: a.relu() * b.softmax(1).detach(),
    ),
    "clamped": (
        lambda a, b: (a.clamp(-9, 9) + 1) * F.silu(b.clamp(max=9)),
        lambda a, b: (a.clamp(-9, 9) + 1) * F.silu(b).detach(),
    ),
    "clamp": (lambda a, b: a * b.clamp(0, 1), lambda a, b: a * b.clamp(0, 1).detach()),
    "clamp beside an activation": (
        lambda a, b: a.relu() * b.clamp(0, 1),
        lambda a, b: a.relu() * b.clamp(0, 1).detach(),
    ),
    "two of one chunk": (
        lambda a, b: (
            (rz := torch.cat([a, b], 1).sigmoid().chunk(2, 1))[0] * a.tanh() + rz[1] * (rz[0] * b)
        ),
        lambda a, b: (
            a.sigmoid().detach() * a.tanh() + b.sigmoid().detach() * (a.sigmoid().detach() * b)
        ),
    ),
    "two side by side": (
        lambda a, b: torch.cat([a[:, :2].sigmoid(), b[:, :2].sigmoid()], 1) * b.tanh(),
        lambda a, b: torch.cat([a[:, :2].sigmoid(), b[:, :2].sigmoid()], 1).detach() * b.tanh(),
    ),
    "the larger of two": (
        lambda a, b: a.tanh() * torch.minimum(a.sigmoid(), b.sigmoid()),
        lambda a, b: a.tanh() * torch.minimum(a.sigmoid(), b.sigmoid()).detach(),
    ),
    "pooled": (
        lambda a, b: a.relu() * (1 - b.sigmoid().mean(1, True)) * (b.sigmoid() + 1).amax(1, True),
        lambda a, b: (
            a.relu() * ((1 - b.sigmoid().mean(1, True)) * (b.sigmoid() + 1).amax(1, True)).detach()
        ),
    ),
    "an expert's weight by a sigmoid": (
        lambda a, b: b + b.sigmoid().topk(1, 1)[0] * a.tanh(),
        lambda a, b: b + b.sigmoid().topk(1, 1)[0].detach() * a.tanh(),
    ),
    "an expert's weight": (
        lambda a, b: b + b.softmax(1).topk(1, 1)[0] * F.relu(a),
        lambda a, b: b + b.softmax(1).topk(1, 1)[0].detach() * F.relu(a),
    ),
    "an expert's weight, scattered": (
        lambda a, b: b + F.relu(a) * _routed(b.softmax(1)).unbind(1)[0][:, None],
        lambda a, b: b + F.relu(a) * _routed(b.softmax(1)).detach()[:, :1],
    ),
    "of what the signal is": (
        lambda a, b: (y := (a + b).relu()) * ((y @ y.new_ones(4, 4)).tanh() + 1),
        lambda a, b: (y := (a + b).relu()) * ((y @ y.new_ones(4, 4)).tanh() + 1).detach(),
    ),
    "none: the signal's own activation": (
        lambda a, b: (y := F.gelu(a + b)) * (y @ y.new_ones(4, 4)),
        lambda a, b: (y := F.gelu(a + b)) * (y @ (2 * y.new_ones(4, 4))) / 2,
    ),
    "sigmoid and tanh in a product of three": (
        lambda a, b: a.tanh() * a * b.sigmoid(),
        lambda a, b: a.tanh() * a * b.sigmoid().detach(),
    ),
}


@pytest.mark.parametrize(("gated", "detached"), GATED.values(), ids=GATED)
def test_cplrp_stops_the_gate_alone(gated: Callable, detached: Callable) -> None:
    class Model(nn.Module):
        def __init__(self, fn: Callable) -> None:
            super().__init__()
            self.fn, self.a, self.b, self.head = fn, *(nn.Linear(4, 4) for _ in "abh")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fn(self.a(x), self.b(x)))

    x = torch.randn(2, 4, dtype=torch.float64)
    pair = [lrpfx.Explainer(randomized(Model(fn)), x, "cplrp") for fn in (gated, detached)]
    for ledger in (True, False):
        got, expected = (explainer(x, 1, ledger=ledger) for explainer in pair)
        torch.testing.assert_close(got.relevance, expected.relevance)


def test_what_is_a_gate_only_once_another_is_constant_is_none() -> None:
    class Model(nn.Module):
        def __init__(self, gate: Callable) -> None:
            super().__init__()
            self.gate, self.a, self.b, self.c = gate, *(nn.Linear(4, 4) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.gate(self.b(x)) * torch.tanh(self.c(x))

    x = torch.randn(2, 4, dtype=torch.float64)
    got = lrpfx.explain(randomized(Model(torch.sigmoid)), x, 1, rules="cplrp")
    constant = randomized(Model(lambda b: torch.sigmoid(b).detach()))
    expected = lrpfx.explain(constant, x, 1, rules=composites.CPLRP(gate="uniform"))
    torch.testing.assert_close(got.relevance, expected.relevance)


def test_what_is_first_once_the_first_is_stopped_is_not() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + self.a(x))

    rules = [(composites.First(("linear",)), lrpfx.Stop())]
    report = lrpfx.explain(Model().eval(), torch.randn(2, 4), 1, rules=rules).report
    assert [row.rule for row in report.rows if row.kind == "linear"] == ["Epsilon"]


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.relu() * (ctx.saved_tensors[0] > 0)


NORMALISED = {
    "rms by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
    "std": lambda x: (x - x.mean(1, True)) / (x.std(1, keepdim=True) + 0.1),
    "normalize": F.normalize,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "divisor": lambda x: x / (1 + x.exp().sum(1, keepdim=True)),
    "inverse": lambda x: x * (1 / (1 + x * x).sum(1, keepdim=True)),
    "cosine": lambda x: x * F.cosine_similarity(x, x.flip(1), dim=1)[:, None],
    "softmax by hand": lambda x: x * ((e := x.exp()) / e.sum(1, keepdim=True)),
}


@pytest.mark.parametrize("norm", NORMALISED.values(), ids=NORMALISED)
@pytest.mark.parametrize("ledger", [True, False])
def test_rules_that_follow_the_gradient_follow_it_through_divisors(
    norm: Callable, ledger: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, relu: Callable = F.relu) -> Tensor:
            return self.head(norm(self.b(relu(self.a(x)))))

    model, x = randomized(Model()), torch.randn(2, 4, dtype=torch.float64)
    for rules, relu in (("guided_backprop", Guided.apply), ([("*", lrpfx.Gradient())], F.relu)):
        at = x.clone().requires_grad_()
        score = model(at, relu)[:, 1]
        (expected,) = torch.autograd.grad(score, at, score.detach())
        e = lrpfx.explain(model, x, 1, rules=rules, ledger=ledger)
        torch.testing.assert_close(e.relevance, expected)
        assert not any("constants" in note for note in e.report.notes)


INVERSES = {
    "expanded": lambda x, y: x * (1 / (y * y + 1).sum(1, keepdim=True)).expand_as(x),
    "squared": lambda x, y: x * (1 / (y + 9)) ** 2,
    "root": lambda x, y: x * torch.rsqrt(y.abs() + 1).sqrt(),
    "matmul": lambda x, y: (x[:, None] @ (1 / (y + 9))[..., None])[..., 0],
    "einsum": lambda x, y: torch.einsum("ni,ni->n", x, 1 / (y + 9))[:, None],
    "joined": lambda x, y: torch.cat([x, x], 1) * torch.cat([1 / (y + 9), 2 / (y + 8)], 1),
    "of two": lambda x, y: x * ((1 / (y + 9)) * (1 / y.flip(1).exp())),
}


@pytest.mark.parametrize("fn", INVERSES.values(), ids=INVERSES)
def test_an_inverse_that_is_a_factor_gets_nothing(fn: Callable) -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    seed = fn(x, y)
    e = lrpfx.explain(Apply(lambda _, x, y: fn(x, y)), (x, y), seed, rules="attnlrp")
    torch.testing.assert_close(e.relevance[0].sum(1), seed.sum(1))
    assert not e.relevance[1].any()
    assert "divisors of live tensors" in e.report.notes[0]


SHARED = {
    "for its shape": lambda a, b, c: (p := a * b) * c.expand_as(p),
    "for a comparison": lambda a, b, c: (p := a * b) * c * (p > -100).to(p.dtype),
    "for a choice": lambda a, b, c: torch.where((p := a * b) > -1e9, p, 0.0) * c,
    "for ones": lambda a, b, c: ((p := a * b) * torch.ones_like(p)) * c,
    "detached": lambda a, b, c: (p := a * b) * c * (p.detach().abs().max() + 1),
}


@pytest.mark.parametrize("ledger", [True, False])
def test_a_factor_that_is_joined_of_products_counts_once(ledger: bool) -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return torch.cat([a * b, a], 1) * torch.cat([c, b], 1)

    abc = tuple(torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    seed = Model()(*abc).clone()
    a, b, c = lrpfx.explain(Model(), abc, seed, rules="attnlrp", ledger=ledger).relevance
    left, right = seed.split(4, 1)
    torch.testing.assert_close((a, b, c), (left / 4 + right / 2, left / 4 + right / 2, left / 2))


@pytest.mark.parametrize("fn", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("ledger", [True, False])
def test_what_reads_a_product_without_relevance_changes_no_share(
    fn: Callable, ledger: bool
) -> None:
    abc = tuple(torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    seed, model = fn(*abc), Apply(lambda _, a, b, c: fn(a, b, c))
    for r in lrpfx.explain(model, abc, seed, rules="attnlrp", ledger=ledger).relevance:
        torch.testing.assert_close(r, seed / 3)


def test_norm_scaled_stabilizers_mix_no_samples_of_one_number() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    x = torch.randn(3, 4, dtype=torch.float64) * torch.tensor([1.0, 10, 100]).double()[:, None]
    rules = [("linear", lrpfx.Epsilon(lrpfx.Stabilizer(0.1, norm_scale=True)))]
    model, one = Model(), torch.ones(3, dtype=torch.float64)
    together = lrpfx.explain(model, x, one, rules=rules).relevance
    for k in range(3):
        alone = lrpfx.explain(model, x[k : k + 1], one[:1], rules=rules).relevance
        torch.testing.assert_close(together[k : k + 1], alone)
