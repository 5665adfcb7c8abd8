"""Gates of recurrent layers are constants by default, however the layer is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lrpfx
from lrpfx import composites
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")

#: LRP-0 where there is nothing to be stabilised, so that relevance is gradient times input.
EXACT = composites.Auto(epsilon=1e-12, stabilizer=1e-12)


class GatesHeld(TorchFunctionMode):
    """Autograd as LRP-0 with constant gates has it: R = x * gradient.

    Sigmoids and clamps are constants, the slope of a tanh is that through the origin, and what a
    layer norm divides by is a constant.
    """

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = fn(*args, **(kwargs or {}))
        if fn in (torch.sigmoid, torch.clamp):
            return out.detach()
        if fn is torch.tanh:
            return args[0] * (out / args[0]).detach()
        if fn is F.layer_norm:
            centred = args[0] - args[0].mean(-1, keepdim=True)
            return centred * (out / centred).detach()
        return out


def held(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    at = x.clone().requires_grad_()
    with GatesHeld():
        out = model(at)
    (gradient,) = torch.autograd.grad(out[:, 1].sum(), at)
    return x * gradient * 1.0


def inputs(steps: int = 4) -> Tensor:
    return torch.randn(2, steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model(forward: Callable[..., Tensor], **members: Any) -> nn.Module:
    torch.manual_seed(0)
    drawn = {
        name: value if isinstance(value, nn.Module) else nn.Parameter(torch.randn(value) / 2)
        for name, value in members.items()
    }
    return Apply(forward, **drawn, head=nn.Linear(4, 2)).double()


# -- PyTorch's own, and their equations


def lstm_step(m: nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    both = F.linear(x, m.weight_ih_l0, m.bias_ih_l0) + F.linear(h, m.weight_hh_l0, m.bias_hh_l0)
    i, f, g, o = both.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(m: nn.Module, x: Tensor, h: Tensor) -> tuple[Tensor]:
    r, z, n = F.linear(x, m.weight_ih_l0, m.bias_ih_l0).chunk(3, 1)
    hr, hz, hn = F.linear(h, m.weight_hh_l0, m.bias_hh_l0).chunk(3, 1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return ((1 - z) * n + z * h,)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("layer", "step"), [(nn.LSTM, lstm_step), (nn.GRU, gru_step)], ids=["lstm", "gru"]
)
def test_pytorchs_layers_have_constant_gates(layer: Any, step: Any, steps: int) -> None:
    def equations(x: Tensor) -> Tensor:
        states = [torch.zeros(len(x), 4, dtype=x.dtype)] * (1 + (layer is nn.LSTM))
        for t in range(steps):
            states = step(m.layer, x[:, t], *states)
        return m.head(states[0])

    m = model(lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=layer(3, 4, batch_first=True))
    x = inputs(steps)
    torch.testing.assert_close(equations(x), m(x))
    explainer = lrpfx.Explainer(m, x, EXACT)
    for ledger in (True, False):
        got = explainer(x, 1, ledger=ledger).relevance
        torch.testing.assert_close(got, held(equations, x), rtol=1e-8, atol=1e-10)


# -- written by hand


def loop(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(m: Apply, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = step(m, x[:, t], h)
        return m.head(h)

    return forward


def gru_of_three_matrices(m: Apply, x: Tensor, h: Tensor) -> Tensor:
    both = torch.cat([x, h], 1)
    z, r = torch.sigmoid(both @ m.z), torch.sigmoid(both @ m.r)
    return z * h + (1 - z) * torch.tanh(torch.cat([x, r * h], 1) @ m.n)


def one_gate_by_a_clamp(m: Apply, x: Tensor, h: Tensor) -> Tensor:
    f = torch.clamp(0.2 * (torch.cat([x, h], 1) @ m.z) + 0.5, 0, 1)
    return h + f * (torch.tanh(torch.cat([x, f * h], 1) @ m.n) - h)


def with_layer_norm(m: Apply, x: Tensor, h: Tensor) -> Tensor:
    f, i, o, g = F.layer_norm(torch.cat([x, h], 1) @ m.w, (16,)).chunk(4, 1)
    c = torch.sigmoid(f) * h + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c)


def gates_of_all_steps_at_once(m: Apply, x: Tensor) -> Tensor:
    z, f, r = (x @ m.w).chunk(3, 2)
    f, r = torch.sigmoid(f).unbind(1), torch.sigmoid(r).unbind(1)
    c = torch.zeros_like(z[:, 0])
    for t in range(x.shape[1]):
        c = f[t] * c + (1 - f[t]) * z[:, t]
    return m.head(r[-1] * torch.tanh(c))


def convolutional(m: Apply, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 2, 2, dtype=x.dtype)
    for t in range(x.shape[1]):
        image = x[:, t, None, :2]
        z, r = torch.sigmoid(F.conv1d(torch.cat([image, h], 1), m.gates, padding=1)).chunk(2, 1)
        n = torch.tanh(F.conv1d(torch.cat([image, r * h], 1), m.n, padding=1))
        h = (1 - z) * h + z * n
    return m.head(h.flatten(1))


BY_HAND = [
    (loop(gru_of_three_matrices), {"z": (7, 4), "r": (7, 4), "n": (7, 4)}),
    (loop(one_gate_by_a_clamp), {"z": (7, 4), "n": (7, 4)}),
    (loop(with_layer_norm), {"w": (7, 16)}),
    (gates_of_all_steps_at_once, {"w": (3, 12)}),
    (convolutional, {"gates": (4, 3, 3), "n": (2, 3, 3)}),
]


@pytest.mark.parametrize(
    ("forward", "shapes"), BY_HAND, ids=["gru", "clamp", "layer norm", "sru", "convgru"]
)
def test_layers_by_hand_have_constant_gates(forward: Any, shapes: Any) -> None:
    m, x = model(forward, **shapes), inputs()
    rules = EXACT + [("conv", lrpfx.Epsilon(1e-12))] if forward is convolutional else EXACT
    got = lrpfx.explain(m, x, 1, rules=rules).relevance
    torch.testing.assert_close(got, held(m, x), rtol=1e-7, atol=1e-9)


def test_relevance_does_not_grow_with_the_steps() -> None:
    m = model(lambda m, x: m.layer(x)[0][:, -1], layer=nn.GRU(3, 4, batch_first=True))
    e = lrpfx.explain(m, inputs(10), 1, ledger=False)
    assert "recurrent gates as constants" in e.report.rules
    assert e.relevance.abs().sum() < 3 * e.seed.abs().sum()


# -- what is none


def squeeze_and_excitation(m: Apply, x: Tensor) -> Tensor:
    for w in (m.a, m.b):
        x = x * torch.sigmoid(x.mean(1, keepdim=True) @ w)
    return m.head(F.pad(x.sum(1), (0, 1)))


def gated_mlps(m: Apply, x: Tensor) -> Tensor:
    for w in (m.a, m.b):
        x = x + F.silu(x @ w) * (x @ w.T) + F.glu(x @ torch.cat([w, w.T], 1), -1)
    return m.head(F.pad(x.sum(1), (0, 1)))


@pytest.mark.parametrize("forward", [squeeze_and_excitation, gated_mlps])
def test_other_products_are_shared_as_before(forward: Any) -> None:
    m, x = model(forward, a=(3, 3), b=(3, 3)), inputs()
    of = [lrpfx.explain(m, x, 1, rules=rules) for rules in (None, "epsilon_all")]
    assert torch.equal(of[0].relevance, of[1].relevance)
    assert not any("Stop" in note for note in of[0].report.notes)


def test_what_comes_through_gates_only_keeps_its_way() -> None:
    """The input opens and closes constants; as a constant it would explain nothing."""

    def only_gates(m: Apply, x: Tensor) -> Tensor:
        c = m.start[None, :]
        for t in range(x.shape[1]):
            c = torch.sigmoid(x[:, t] @ m.w) * c
        return m.head(c)

    e = lrpfx.explain(model(only_gates, w=(3, 4), start=(4,)), inputs(), 1)
    assert e.relevance.abs().sum() > 0


def test_own_entries_come_before_the_stop() -> None:
    m = model(loop(gru_of_three_matrices), z=(7, 4), r=(7, 4), n=(7, 4))
    rules = [(composites.recurrent_gates, lrpfx.Pass()), "auto"]
    shared = lrpfx.explain(m, inputs(), 1, rules=rules)
    assert torch.equal(
        shared.relevance, lrpfx.explain(m, inputs(), 1, rules="epsilon_all").relevance
    )
