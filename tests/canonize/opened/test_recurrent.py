"""Recurrent layers and what steers them: steps opened, gates, quotients, picked values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from lrpfx.canonize.opened import recurrent
from lrpfx.capture import By

pytestmark = pytest.mark.usefixtures("each_way")

aten = torch.ops.aten
EXACT = composites.EpsilonAll(epsilon=1e-9)
WIDTHS = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


class Steps(nn.Module):
    """An LSTM as its equations, one time step after the other."""

    def __init__(self, lstm: nn.LSTM, head: nn.Linear) -> None:
        super().__init__()
        self.lstm, self.head = lstm, head

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.lstm.hidden_size, dtype=x.dtype)
        for t in range(x.shape[1]):
            above = F.linear(x[:, t], self.lstm.weight_ih_l0, self.lstm.bias_ih_l0)
            state = F.linear(h, self.lstm.weight_hh_l0, self.lstm.bias_hh_l0)
            i, f, g, o = (above + state).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class Layer(nn.Module):
    def __init__(self, lstm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.lstm, self.head = lstm, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("rules", [EXACT, composites.CPLRP(epsilon=1e-9)], ids=["uniform", "stop"])
def test_an_lstm_is_its_steps(rules: composites.Composite) -> None:
    torch.manual_seed(0)
    lstm, head = nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    whole, steps = (lrpfx.explain(m(lstm, head), x, 1, rules=rules) for m in (Layer, Steps))
    torch.testing.assert_close(whole.relevance, steps.relevance, rtol=1e-5, atol=1e-6)


def test_gates_as_constants_give_the_signal_everything() -> None:
    """LRP-all of Arras et al. 2019, by hand: only c and g carry relevance through the cell."""
    torch.manual_seed(0)
    lstm, head = nn.LSTM(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    x = torch.randn(1, 1, 3, dtype=torch.float64)
    e = lrpfx.explain(Layer(lstm, head), x, 1, rules=composites.CPLRP(epsilon=0.0))
    z = (F.linear(x[0, 0], lstm.weight_ih_l0, lstm.bias_ih_l0) + lstm.bias_hh_l0).detach()
    i, _, g, o = z.chunk(4)
    h = torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g))
    R_h = h * head.weight[1].detach()
    expected = x[0, 0] * (lstm.weight_ih_l0.detach()[8:12].T @ (R_h / g))
    torch.testing.assert_close(e.relevance[0, 0], expected)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "GRUCell", "LSTMCell", "RNNCell"])
def test_recurrent_layers_are_opened(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.cell(x if kind.endswith("Cell") else x[None])[0]
            return out if kind.endswith("Cell") else out[0]

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(5, 3, dtype=torch.float64)
    if kind in ("GRUCell", "RNNCell"):  # these return a tensor, and [0] would pick a sample
        model.forward = lambda x: model.cell(x)  # type: ignore[method-assign]
    e = lrpfx.explain(model, x, 1, rules="epsilon_all")
    torch.testing.assert_close(e.output, model(x))
    assert e.relevance.abs().max() > 0
    assert abs(e.report.unaccounted) < 1e-9


class Whole(nn.Module):
    """All that a recurrent layer returns, of states that are computed of the input."""

    def __init__(self, layer: nn.RNNBase, states: tuple[Tensor, ...] = ()) -> None:
        super().__init__()
        self.layer, self.states = layer, states

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean()
        states = tuple(state * scale for state in self.states)
        given = () if not states else (states if len(states) > 1 else states[0],)
        out, ends = self.layer(x, *given)
        last = ends if isinstance(ends, tuple) else (ends,)
        return sum(t.sin().flatten(1).sum(1).sum() for t in (out, *last))[None]


BOTH = dict(num_layers=2, bidirectional=True)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM both ways": lambda: Whole(nn.LSTM(3, 4, batch_first=True, **BOTH)),
    "LSTM, projected": lambda: Whole(
        nn.LSTM(3, 4, 2, proj_size=2), (torch.randn(2, 3, 2), torch.randn(2, 3, 4))
    ),
    "LSTM without biases": lambda: Whole(nn.LSTM(3, 4, bias=False)),
    "GRU both ways": lambda: Whole(nn.GRU(3, 4, **BOTH), (torch.randn(4, 3, 4),)),
    "RNN of ReLUs": lambda: Whole(nn.RNN(3, 4, nonlinearity="relu", bidirectional=True)),
}


@pytest.mark.parametrize(
    ("name", "by"),
    [(name, "record") for name in LAYERS]
    + [
        pytest.param(name, "export", marks=[pytest.mark.nightly] * (name != "LSTM, projected"))
        for name in LAYERS
    ],
)
def test_opened_layers_have_the_derivative_of_the_whole(name: str, by: str) -> None:
    torch.manual_seed(0)
    model, x = LAYERS[name]().double(), torch.randn(2, 3, 3, dtype=torch.float64)
    if isinstance(model, Whole):
        model.states = tuple(state.double() for state in model.states)
    seed = torch.ones(1, dtype=torch.float64)
    e = lrpfx.explain(model, x, seed, rules=[("*", lrpfx.Gradient())], capture=by)
    variable = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(variable).sum(), variable)
    torch.testing.assert_close(e.relevance, gradient)


def test_one_step_of_a_layer_is_traced_and_the_rest_are_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []

    def counted(*args: object) -> tuple[object, ...]:
        steps.append(len(steps))
        return plain(*args)

    plain = recurrent._STEPS[torch.ops.aten.lstm.input]
    monkeypatch.setitem(recurrent._STEPS, torch.ops.aten.lstm.input, counted)
    rows = []
    for number in (4, 9):
        model = Layer(nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2))
        rows.append(len(lrpfx.Explainer(model, torch.randn(2, number, 3)).report.rows))
    assert len(steps) == 2
    each = (rows[1] - rows[0]) // 5
    assert rows[0] - 4 * each == rows[1] - 9 * each < each


def test_recurrent_layers_beside_writes_into_memory_are_opened_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)[0].clone()
            y[:, 0] *= 2  # a write into what is read again
            return y.sum(1)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 3, 3)
    e = lrpfx.explain(model, x, 1, rules="epsilon_all")
    torch.testing.assert_close(e.output, model(x))
    assert "lstm" not in {row.kind for row in e.report.rows}


class Function(nn.Module):
    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *x: Tensor) -> Tensor:
        return self.fn(*x)


def test_a_divisor_is_a_constant_and_the_report_says_so() -> None:
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64) + 1
    seed = torch.randn(2, 3, dtype=torch.float64)
    e = lrpfx.explain(Function(lambda a, b: a / b), (a, b), seed, rules=EXACT)
    torch.testing.assert_close(e.relevance[0], seed, rtol=1e-6, atol=1e-6)
    assert e.relevance[1].abs().max() == 0
    assert "1 divisors of live tensors count as constants" in str(e.report)


def test_a_constant_over_a_live_tensor_is_an_activation() -> None:
    b = torch.rand(2, 3, dtype=torch.float64) + 1
    e = lrpfx.explain(Function(lambda b: 3 / b), b, 1, rules=EXACT)
    assert [row.kind for row in e.report.rows] == ["reciprocal", "scale"]
    torch.testing.assert_close(e.relevance[:, 1], 3 / b[:, 1], rtol=1e-6, atol=1e-6)


def test_weights_over_their_own_sum_stay_live() -> None:
    """The router of a mixture of experts: the k largest, brought to sum one."""

    def routed(x: Tensor) -> Tensor:
        best = x.softmax(1).topk(2).values
        return best / best.sum(1, keepdim=True)

    x = torch.randn(3, 4, dtype=torch.float64)
    e = lrpfx.explain(Function(routed), x, 1, rules=EXACT)
    assert [row.kind for row in e.report.rows] == ["softmax", "topk", "scale"]
    y = x.softmax(1)
    R = torch.zeros_like(x)
    R[torch.arange(3), x.topk(2).indices[:, 1]] = e.output[:, 1]
    torch.testing.assert_close(e.relevance, x * (R - y * R.sum(1, keepdim=True)))


def test_sorted_values_take_their_relevance_back() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    seed = torch.randn(3, 4, dtype=torch.float64)
    e = lrpfx.explain(Function(lambda x: x.sort(1).values), x, seed, rules=EXACT)
    torch.testing.assert_close(e.relevance, seed.gather(1, x.argsort(1).argsort(1)))


@pytest.mark.parametrize(
    ("fn", "shares"),
    [
        (lambda a, b, c: a * b * c, (1 / 4, 1 / 4, 1 / 2)),
        (lambda a, b, c: a * (b * c), (1 / 2, 1 / 4, 1 / 4)),
    ],
)
def test_pairwise_shares_follow_the_association(fn: Callable, shares: tuple[float, ...]) -> None:
    abc = tuple(torch.randn(2, 3) for _ in range(3))
    seed = torch.randn(2, 3)
    rules = [("product", lrpfx.Uniform(pairwise=True))]
    relevance = lrpfx.explain(Function(fn), abc, seed, rules=rules).relevance
    for r, share in zip(relevance, shares, strict=True):
        torch.testing.assert_close(r, seed * share)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: a * b / 2 * c,
        lambda a, b, c: (-(a * b)) * c,
        lambda a, b, c: c * (3.0 * (a * b)),
        lambda a, b, c: a * b * WIDTHS * c,
        lambda a, b, c: c * (-(a * b / WIDTHS) * 2.0),
        lambda a, b, c: (a * 2 * b) * c,
    ],
)
@pytest.mark.parametrize("ledger", [True, False])
def test_constants_between_factors_take_no_share(fn: Callable, ledger: bool) -> None:
    abc = tuple(torch.rand(2, 3, dtype=torch.float64) + 1 for _ in range(3))
    seed = torch.randn(2, 3, dtype=torch.float64)
    e = lrpfx.explain(Function(fn), abc, seed, rules=EXACT, ledger=ledger)
    torch.testing.assert_close(e.output, fn(*abc))
    for r in e.relevance:
        torch.testing.assert_close(r, seed / 3)


def test_divisors_from_integer_inputs_take_no_share() -> None:
    abc = tuple(torch.rand(2, 3, dtype=torch.float64) + 1 for _ in range(3))
    model = Function(lambda a, b, c, n: a * b / n[:, None] * c)
    seed = torch.randn(2, 3, dtype=torch.float64)
    *shares, of_n = lrpfx.explain(model, (*abc, torch.tensor([2, 3])), seed, rules=EXACT).relevance
    assert of_n is None
    for r in shares:
        torch.testing.assert_close(r, seed / 3)


@pytest.mark.parametrize(
    "gate",
    [
        lambda g: 2 * torch.sigmoid(g),
        lambda g: 1 - torch.sigmoid(g),
        lambda g: (torch.tanh(g) + 1)[:, :, None].squeeze(2) / 2,
    ],
)
def test_gates_with_constant_factors_and_summands_are_stopped(gate: Callable) -> None:
    torch.manual_seed(0)
    g, u, head = (nn.Linear(4, n).double() for n in (4, 4, 3))
    x = torch.randn(2, 4, dtype=torch.float64)
    model = Function(lambda x: head(gate(g(x)) * u(x)))
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(gate(g(x)).detach() * u(at))[:, 1].sum(), at)
    got = lrpfx.explain(model, x, 1, rules=composites.CPLRP(epsilon=0.0)).relevance
    torch.testing.assert_close(got, x * gradient)


@pytest.mark.parametrize("constant", [2.0, -2.0])
def test_the_sign_of_a_product_is_that_of_all_its_factors(constant: float) -> None:
    abc = tuple(torch.rand(2, 3, dtype=torch.float64) for _ in range(3))
    matrix = torch.randn(3, 4, dtype=torch.float64)
    rules, exact = [("linear", lrpfx.ZPlus())], [("scale", lrpfx.Norm(1e-12))]
    whole = Function(lambda a, b, c: ((a.relu() * b.relu()) * constant * c.relu()) @ matrix)
    head = Function(lambda z: z @ matrix)
    (z,) = lrpfx.explain(head, (abc[0] * abc[1] * constant * abc[2],), 0, rules=rules).relevance
    for r in lrpfx.explain(whole, abc, 0, rules=[*rules, *exact]).relevance:
        torch.testing.assert_close(r, z / 3)


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(-1)], ids=["softmax", "log"])
def test_a_softmax_at_the_output_is_left_out(last: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    model, x = nn.Sequential(net, last), torch.randn(3, 4, dtype=torch.float64)
    for target in (None, 1, [0, 1, 2]):
        of_logits, of_all = (lrpfx.explain(m, x, target) for m in (net, model))
        torch.testing.assert_close(of_all.relevance, of_logits.relevance)
        torch.testing.assert_close(of_all.output, model(x))
    assert "explained are its logits" in str(of_all.report)
    # To a callable the softmax is a part of what it computes.
    e = lrpfx.explain(model, x, lambda out: out[:, 1])
    logits = net(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(last(logits)[:, 1].sum(), logits)
    seed = gradient * logits.detach()
    torch.testing.assert_close(e.relevance, lrpfx.explain(net, x, seed).relevance)


# autocast ------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A GRU, an LSTM and a recurrent network one behind the other, maybe in autocast."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.gru = nn.GRU(4, 6, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(12, 5, batch_first=True)
        self.rnn, self.head = nn.RNN(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, self.dtype is not None):
            for layer in self.gru, self.lstm, self.rnn:
                x = layer(x)[0]
            return self.head(x[:, -1]).float()


@pytest.fixture(scope="module")
def in_autocast() -> tuple[nn.Module, Tensor, lrpfx.Explanation]:
    """Layers in autocast, an input, and what is right by the same layers in float64."""
    model, x = Layers(torch.bfloat16).eval(), torch.randn(2, 3, 4)
    twin = Layers(None).eval().double()
    twin.load_state_dict(model.state_dict())
    return model, x, lrpfx.explain(twin, x.double(), 1)


@pytest.mark.parametrize("capture", ["export", "record"])
def test_layers_under_autocast_are_those_of_float32_but_for_rounding(
    capture: By, in_autocast: tuple[nn.Module, Tensor, lrpfx.Explanation]
) -> None:
    """The kernels round elsewhere than their steps do; both are about as far from the truth."""
    model, x, right = in_autocast
    explainer = lrpfx.Explainer(model, x, capture=capture)
    linear = [n for n in explainer._engine.module.graph.nodes if n.target is aten.linear.default]
    assert {n.meta["val"].dtype for n in linear} == {torch.bfloat16}  # as the model computes it
    for ledger in (True, False):
        e = explainer(x, 1, ledger=ledger)
        assert (e.output.double() - right.output).abs().max() < 0.02 * right.output.abs().max()
        assert (e.relevance - right.relevance).norm() < 0.05 * right.relevance.norm()
