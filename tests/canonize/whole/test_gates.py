"""Gates in other words: the relevance of ``sigmoid(a) * b``, and of ``silu(a) * b``."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")

Gate = Callable[[Tensor, Tensor], Tensor]


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    return a.sigmoid() * b


def odds(a: Tensor, b: Tensor) -> Tensor:
    return b * (a.exp() / (1 + a.exp()))


def highway(a: Tensor, b: Tensor) -> Tensor:
    return a.sigmoid() * b + (-a).sigmoid() * b.flip(1)


def closed(a: Tensor, b: Tensor) -> Tensor:
    return (-a).sigmoid() * b


def hard(a: Tensor, b: Tensor) -> Tensor:
    return F.hardsigmoid(-a) * b


def channels(a: Tensor, b: Tensor) -> Tensor:
    return ((-a)[:, :3, None].sigmoid() * b.view(-1, 3, 2)).flatten(1)


def less_channels(a: Tensor, b: Tensor) -> Tensor:
    y = b.view(-1, 3, 2)
    return (y - y * a[:, :3].sigmoid()[..., None]).flatten(1)


def left_channels(a: Tensor, b: Tensor) -> Tensor:
    return (b.view(-1, 3, 2) * (1 - a[:, :3].sigmoid()[..., None])).flatten(1)


WEIGHTS = torch.linspace(0.5, 2, 6, dtype=torch.float64)

#: Each with its plain twin.
GATES: dict[str, tuple[Gate, Gate]] = {
    "of a tanh": (lambda a, b: b * (0.5 * (1 + (a / 2).tanh())), multiplied),
    "one less": (lambda a, b: b * (1 - (-a).sigmoid()), multiplied),
    "by odds": (odds, multiplied),
    "einsum": (lambda a, b: torch.einsum("ni,ni->ni", b, 1 - (-a).sigmoid()), multiplied),
    "highway": (lambda a, b: a.sigmoid() * b + (1 - a.sigmoid()) * b.flip(1), highway),
    "highway, lerp": (lambda a, b: torch.lerp(b.flip(1), b, a.sigmoid()), highway),
    "highway, stacked": (
        lambda a, b: (torch.stack([g := a.sigmoid(), 1 - g]) * torch.stack([b, b.flip(1)])).sum(0),
        highway,
    ),
    "less a part": (lambda a, b: b - b * a.sigmoid(), closed),
    "less a part of itself": (lambda a, b: b - b * b.sigmoid(), lambda a, b: b * (-b).sigmoid()),
    "less a part, hard": (lambda a, b: b - F.hardsigmoid(a) * b, hard),
    "what is left, hard": (lambda a, b: b * (1 - F.hardsigmoid(a)), hard),
    "less a part of channels": (less_channels, channels),
    "what is left of channels": (left_channels, channels),
    "less a part, by weights": (
        lambda a, b: b * WEIGHTS - a.sigmoid() * b * WEIGHTS,
        lambda a, b: closed(a, b) * WEIGHTS,
    ),
    "less a quotient": (lambda a, b: b - b / (1 + (-a).exp()), closed),
    "highway, the difference": (
        lambda a, b: (c := b.flip(1)) + a.sigmoid() * (b - c),
        highway,
    ),
    "highway, multiplied out": (
        lambda a, b: (z := a.sigmoid()) * b + (c := b.flip(1)) - z * c,
        highway,
    ),
    "highway, computed twice": (
        lambda a, b: b.flip(1) - a.sigmoid() * b.flip(1) + b * a.sigmoid(),
        highway,
    ),
    "highway, one quotient": (
        lambda a, b: (b * (e := a.exp()) + b.flip(1)) / (1 + e),
        highway,
    ),
    "highway, of means and a tanh": (
        lambda a, b: (b + (c := b.flip(1)) + (a / 2).tanh() * (b - c)) / 2,
        highway,
    ),
    "swish, the value first": (lambda a, b: b * a * a.sigmoid(), lambda a, b: F.silu(a) * b),
    "hard swish, the value first": (
        lambda a, b: b * F.hardsigmoid(a) * a,
        lambda a, b: F.hardswish(a) * b,
    ),
    "swish of three": (
        lambda a, b: torch.einsum("ni,ni,ni->ni", a, b, a.sigmoid()),
        lambda a, b: F.silu(a) * b,
    ),
    "gelu, the value first": (
        lambda a, b: b * a * 0.5 * (1 + (a / math.sqrt(2)).erf()),
        lambda a, b: F.gelu(a) * b,
    ),
}


@pytest.mark.parametrize(("spelled", "plain"), GATES.values(), ids=GATES)
def test_a_gate_in_other_words_is_that_gate(spelled: Gate, plain: Gate) -> None:
    torch.manual_seed(0)
    members = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    x = torch.randn(2, 4).double()
    found, expected = (
        lrpfx.explain(Apply(lambda m, x, f=f: m.head(f(m.a(x), m.b(x))), **members).double(), x, 1)
        for f in (spelled, plain)
    )
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-5)


#: Each with its plain twin; of a layer that is called again for the same.
CALLED_TWICE: dict[str, tuple[Callable[[Apply, Tensor], Tensor], ...]] = {
    "silu": (lambda m, x: m.a(x) * m.a(x).sigmoid() * m.b(x), lambda m, x: F.silu(m.a(x)) * m.b(x)),
    "silu, the value first": (
        lambda m, x: m.b(x) * m.a(x) * m.a(x).sigmoid(),
        lambda m, x: F.silu(m.a(x)) * m.b(x),
    ),
    "hard swish": (
        lambda m, x: m.a(x) * F.hardsigmoid(m.a(x)) * m.b(x),
        lambda m, x: F.hardswish(m.a(x)) * m.b(x),
    ),
    "gelu": (
        lambda m, x: 0.5 * m.a(x) * (1 + (m.a(x) / math.sqrt(2)).erf()),
        lambda m, x: F.gelu(m.a(x)),
    ),
    "a part less": (
        lambda m, x: m.b(x) - m.b(x) * m.a(x).sigmoid(),
        lambda m, x: closed(m.a(x), m.b(x)),
    ),
    "a mean of squares": (
        lambda m, x: m.a(x) * ((m.a(x) * m.a(x)).mean(1, True) + 1e-5).rsqrt(),
        lambda m, x: F.rms_norm(m.a(x), (6,), eps=1e-5),
    ),
}


@pytest.mark.parametrize(("spelled", "plain"), CALLED_TWICE.values(), ids=CALLED_TWICE)
def test_what_is_computed_twice_is_one_value(spelled: Callable, plain: Callable) -> None:
    torch.manual_seed(0)
    members = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    x = torch.randn(2, 4).double()
    found, expected = (
        lrpfx.explain(Apply(lambda m, x, f=f: m.head(f(m, x)), **members).double(), x, 1)
        for f in (spelled, plain)
    )
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-5)


def test_two_calls_of_a_module_that_are_no_part_of_a_formula_stay_two() -> None:
    model = Apply(lambda m, x: m.a(x).relu() + m.a(x), a=nn.Linear(3, 3)).double()
    e = lrpfx.explain(model, torch.randn(2, 3).double(), 1, layers=["a"])
    assert [row.kind for row in e.report.rows].count("linear") == 2
    assert len(e.layers["a"]) == 2


def test_an_open_gate_does_not_make_relevance_grow() -> None:
    """1 - sigmoid(a) hands on -sigmoid(a) / (1 - sigmoid(a)) of what it gets if 1 has a share."""
    x = torch.tensor([[12.0, 1.0]], dtype=torch.float64)
    model = Apply(lambda m, x: (1 - x[:, :1].sigmoid()) * x[:, 1:])
    torch.testing.assert_close(
        lrpfx.explain(model, x, 0).relevance, model(x).expand(1, 2) / 2, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "gate", [lambda a: 1 + a.sigmoid(), lambda a: 1 + a.tanh() / 2, lambda a: 2 - a.exp()]
)
def test_other_sums_keep_the_share_of_their_constant(gate: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[0.3, 2.0]], dtype=torch.float64)
    model = Apply(lambda m, x: gate(x[:, :1]) * x[:, 1:])
    half, whole = model(x) / 2, gate(x[:, :1])
    one = 2.0 if gate(torch.zeros(1))[0] == 1 and gate(torch.ones(1))[0] < 1 else 1.0
    expected = torch.cat([half * (whole - one) / whole, half], 1)
    torch.testing.assert_close(lrpfx.explain(model, x, 0).relevance, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["one less", "less a part", "highway, multiplied out"])
def test_gates_in_halves_are_gates_in_a_model_that_returns_more(name: str) -> None:
    """What other ops round to is added as a constant: the output is the model's to the last bit."""
    torch.manual_seed(0)
    members = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "head": nn.Linear(6, 3)}

    def forward(m: Apply, x: Tensor, gate: Gate) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.head(gate(m.a(x), m.b(x))).float()

    spelled, plain = GATES[name]
    x = torch.randn(2, 4)
    model = Apply(lambda m, x: forward(m, x, spelled), **members)
    found = lrpfx.explain(model, x, 1)
    expected = lrpfx.explain(Apply(lambda m, x: forward(m, x, plain), **members), x, 1)
    torch.testing.assert_close(found.output, model(x), rtol=0, atol=0)
    error = (found.relevance - expected.relevance).norm() / expected.relevance.norm()
    assert error < 0.05


def test_a_gate_of_which_a_module_returns_a_part_is_noted() -> None:
    torch.manual_seed(0)
    part = Apply(lambda m, a, b: a.sigmoid() * b)
    model = Apply(lambda m, x: x - m.part(m.a(x), x), part=part, a=nn.Linear(4, 4)).double()
    e = lrpfx.explain(model, torch.randn(2, 4).double(), 1, layers=["part"])
    assert "part" in e.layers
    assert sum("multiplied out" in note for note in e.report.notes) == 1
