"""Conditional relevance: masks at places, and what enters no branch beside them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.concepts import Channel, Neuron
from tests.conftest import Apply, assert_untouched
from tests.test_errors import check_form

pytestmark = pytest.mark.usefixtures("each_front")

EXACT = lrpfx.composites.EpsilonAll(epsilon=1e-12)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    drawn = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=drawn, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.5)
    return model.double().eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return fill(
        nn.Sequential(*layers, nn.Conv2d(5, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    )


class Residual(nn.Module):
    """Two branches beside identities, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + self.b(y).relu()
        y = y + self.c(y).relu()
        return self.fc(y)


def test_relevance_goes_through_the_one_branch_only_by_hand() -> None:
    """Out = 2 (3 x) + 5 (7 x), of which the second branch carries 35 x."""
    parts = {"up": (2.0, 3.0), "down": (5.0, 7.0)}
    layers = {}
    for name, (outer, inner) in parts.items():
        layers[name] = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        layers[name][0].weight.data.fill_(inner)
        layers[name][1].weight.data.fill_(outer)
    model = Apply(lambda m, x: m.up(x) + m.down(x), **layers).double()
    x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, EXACT)
    conditions = [{"down.0": [0]}, {"up.0": [0]}, {"down.0": [0], "up.1": [0]}, {"up.0": []}]
    only = explainer(x, conditions=conditions).relevance
    every = explainer(x, conditions=conditions, through="all").relevance
    expected = torch.tensor([35.0, 6.0, 41.0, 0.0])[:, None, None] * x
    torch.testing.assert_close(only, expected.double())
    torch.testing.assert_close(every[3], 35.0 * x)  # the branch beside the blocked one flows on
    torch.testing.assert_close(every[0], 41.0 * x)  # all of the place's one channel is kept


def dense_lrp(
    weights: Sequence[np.ndarray], x: np.ndarray, target: int, keep: dict[int, list[int]]
) -> np.ndarray:
    """LRP-0 through linear layers and ReLUs in numpy, masked behind the layers in ``keep``."""
    inputs, a = [], x
    for k, w in enumerate(weights):
        inputs.append(a)
        a = w @ a
        a = np.maximum(a, 0) if k + 1 < len(weights) else a
    R = np.zeros_like(a)
    R[target] = a[target]
    for k in reversed(range(len(weights))):
        if k in keep:
            R = np.array([r if i in keep[k] else 0.0 for i, r in enumerate(R)])
        z = weights[k] @ inputs[k]
        R = np.array(
            [
                sum(
                    inputs[k][j] * weights[k][i, j] * R[i] / z[i]
                    for i in range(len(R))
                    if z[i] > 0 or k + 1 == len(weights)
                )
                for j in range(len(inputs[k]))
            ]
        )
    return R


@pytest.mark.parametrize("ledger", [True, False])
def test_masks_agree_with_sums_written_in_numpy(ledger: bool) -> None:
    sizes = (5, 7, 6, 3)
    linear = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = fill(nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2]))
    x = draw(4, 5)
    keeps = [{0: [1, 4]}, {1: [0, 2, 5], 0: [3, 6]}, {1: []}, {2: [1]}]
    conditions = [{str(2 * k): kept for k, kept in keep.items()} for keep in keeps]
    explainer = lrpfx.Explainer(model, x, EXACT)
    got = [explainer(x, 1, conditions=[c], ledger=ledger).relevance[0] for c in conditions]
    matrices = [layer.weight.detach().numpy() for layer in linear]
    for keep, relevance in zip(keeps, got, strict=True):
        wanted = np.stack([dense_lrp(matrices, sample, 1, keep) for sample in x.numpy()])
        np.testing.assert_allclose(relevance.numpy(), wanted, atol=1e-9)


@pytest.mark.parametrize("rules", ["epsilon_plus", "epsilon_alpha2_beta1", "attnlrp"])
def test_channels_sum_to_the_whole_where_every_path_passes_them(rules: str) -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, rules)
    whole = explainer(x, 1, layers=["2"])
    for ledger in (True, False):
        each = explainer(x, 1, conditions=[{"2": [c]} for c in range(5)], ledger=ledger)
        torch.testing.assert_close(each.relevance.sum(0), whole.relevance)
    of_layer = whole.layers["2"].relevance.flatten(1).sum(1)
    torch.testing.assert_close(whole.concepts("2").sum(1), of_layer)


def test_in_a_residual_network_channels_sum_to_the_branch() -> None:
    model, x = fill(Residual()), draw(2, 3)
    explainer = lrpfx.Explainer(model, x, EXACT)
    conditions = [{"b": [c]} for c in range(4)]
    branch = explainer(x, 1, conditions=[{"b": range(4)}]).relevance[0]
    only = explainer(x, 1, conditions=conditions).relevance.sum(0)
    torch.testing.assert_close(only, branch)
    # Under "all" every condition keeps what goes beside the branch, so it counts four times.
    beside = explainer(x, 1, conditions=[{"b": []}], through="all").relevance[0]
    every = explainer(x, 1, conditions=conditions, through="all").relevance.sum(0)
    torch.testing.assert_close(every, branch + 4 * beside)
    torch.testing.assert_close(branch + beside, explainer(x, 1).relevance)


def test_conditions_come_back_in_their_order_and_as_one_by_one() -> None:
    model, x = fill(Residual()), draw(3, 3)
    explainer = lrpfx.Explainer(model, x, "epsilon_alpha2_beta1")
    conditions: list[Any] = [{"b": [2]}, {"c": [1, 3]}, {"c": [0], "b": [1]}, {"a": [0]}]
    for ledger in (True, False):
        together = explainer(x, 1, conditions=conditions, ledger=ledger).relevance
        turned = explainer(x, 1, conditions=conditions[::-1], ledger=ledger).relevance
        torch.testing.assert_close(turned, together.flip(0))
        for k, one in enumerate(conditions):
            named = dict(reversed(one.items()))
            alone = explainer(x, 1, conditions=[named], ledger=ledger).relevance
            torch.testing.assert_close(alone[0], together[k])
        zipped = explainer(x, 1, conditions=conditions[:3], pairing="zip", ledger=ledger)
        own = together[torch.arange(3), torch.arange(3)]
        torch.testing.assert_close(zipped.relevance, own)


def test_one_forward_pass_serves_all_conditions() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus", capture="export")
    explainer(x, 1, conditions=[{"2": [c]} for c in range(5)])
    ran: list[str] = []
    conv = torch.ops.aten.convolution.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is conv and tuple(args[1].shape) == (4, 1, 3, 3):
                ran.append(str(op))
            return op(*args, **(kwargs or {}))

    for n in (1, 5):
        ran.clear()
        with Count():
            explainer(x, 1, conditions=[{"5": [c % 3]} for c in range(n)], ledger=False)
        counted = len(ran)
        assert counted <= 2, counted


def test_what_arrived_and_what_passed_are_told_apart() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    whole = explainer(x, 1, layers=["2"]).layers["2"]
    layer = explainer(x, 1, conditions=[{"2": [3]}]).layers["2"]
    torch.testing.assert_close(layer.relevance[0], whole.relevance)
    kept = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor([3]), 1.0)
    torch.testing.assert_close(layer.passed[0], whole.relevance * kept[:, None, None])
    torch.testing.assert_close(layer.activation, whole.activation)


def test_folding_is_the_same_with_and_without_conditions() -> None:
    """The batch norm's channels are the convolution's, whichever of them is named."""
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    a = explainer(x, 1, conditions=[{"2": [1]}]).relevance
    b = explainer(x, 1, conditions=[{"3": [1]}]).relevance
    torch.testing.assert_close(a, b)
    everything = explainer(x, 1, conditions=[{"3": range(5)}]).relevance[0]
    torch.testing.assert_close(everything, explainer(x, 1).relevance)


def test_the_ledger_closes_under_a_condition() -> None:
    model, x = fill(Residual()), draw(2, 3)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    e = explainer(x, 1, conditions=[{"b": [1, 2]}], ledger=True)
    assert abs(e.report.unaccounted) < 1e-12 * max(abs(e.report.started), 1)
    assert abs(e.report.absorbed["condition"]) > 1e-3
    cut = [note for note in e.report.notes if "no relevance enters" in note]
    assert len(cut) == 1 and "1 edge" in cut[0]


def test_any_node_of_the_report_can_be_conditioned() -> None:
    model, x = fill(Residual()), draw(2, 3)
    explainer = lrpfx.Explainer(model, x, EXACT)
    sums = [row.node for row in explainer.report.rows if row.op == "add"]
    each = [{sums[0]: [c]} for c in range(4)]
    torch.testing.assert_close(
        explainer(x, 1, conditions=each).relevance.sum(0), explainer(x, 1).relevance
    )


def test_calls_of_a_module_are_places_of_their_own() -> None:
    model = fill(
        Apply(
            lambda m, x: m.head(m.f(m.f(x).relu()).relu()), f=nn.Linear(3, 3), head=nn.Linear(3, 2)
        )
    )
    x = draw(2, 3)
    explainer = lrpfx.Explainer(model, x, EXACT)
    first = explainer(x, 1, conditions=[{"f@0": [c]} for c in range(3)]).relevance
    second = explainer(x, 1, conditions=[{"f@1": [c]} for c in range(3)]).relevance
    whole = explainer(x, 1).relevance
    torch.testing.assert_close(first.sum(0), whole)
    torch.testing.assert_close(second.sum(0), whole)
    assert not torch.allclose(first, second)
    with pytest.raises(lrpfx.errors.SelectorError, match="called 2 times"):
        explainer(x, 1, conditions=[{"f": [0]}])


def test_targets_can_be_one_per_condition() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    conditions = [{"2": [1]}, {"2": [3]}]
    both = explainer(x, [[0, 1], [0, 1]], conditions=conditions).relevance
    short = explainer(x[:1], [0, 1], conditions=conditions).relevance
    torch.testing.assert_close(short, both[:, :1])
    for k, one in enumerate(conditions):
        torch.testing.assert_close(explainer(x, k, conditions=[one]).relevance[0], both[k])
    with pytest.raises(lrpfx.errors.TargetError, match="2 targets"):
        explainer(x, [[0, 1], [0, 1]], conditions=[*conditions, {"2": [0]}])


@pytest.mark.parametrize("ledger", [True, False])
def test_relevance_can_begin_inside(ledger: bool) -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    whole = explainer(x, 1, layers=["5"])
    ((arrived, activation),) = whole.layers["5"]
    given = explainer(x, start="5", init=arrived, ledger=ledger)
    again = explainer(x, 1, start="5", init="relevance", ledger=ledger)
    for e in (given, again):
        torch.testing.assert_close(e.relevance, whole.relevance)
    inner = lrpfx.explain(model[:6], x, activation, rules="epsilon_plus")
    own = explainer(x, start="5", ledger=ledger)
    torch.testing.assert_close(own.relevance, inner.relevance)
    squared = explainer(x, start="5", init=lambda a: a * a, ledger=ledger)
    expected = lrpfx.explain(model[:6], x, activation.square(), rules="epsilon_plus")
    torch.testing.assert_close(squared.relevance, expected.relevance)
    one = explainer(x, start="5", conditions=[{"5": (Neuron(), [(2, 0, 1)])}], ledger=ledger)
    seed = torch.zeros_like(activation)
    seed[:, 2, 0, 1] = activation[:, 2, 0, 1]
    expected = lrpfx.explain(model[:6], x, seed, rules="epsilon_plus")
    torch.testing.assert_close(one.relevance[0], expected.relevance)


def test_derivatives_of_conditioned_relevance_are_exact() -> None:
    model, x = fill(Residual()), draw(1, 3)
    explainer = lrpfx.Explainer(model, x, lrpfx.composites.EpsilonAll(epsilon=0.1))
    conditions: list[Any] = [{"b": [1, 2]}, {"c": [0, 3]}]
    weight, along = draw(2, 1, 3, seed=5), draw(1, 3, seed=6)

    def value(at: Tensor, create_graph: bool = False) -> Tensor:
        e = explainer(at, 1, conditions=conditions, create_graph=create_graph)
        return (e.relevance * weight).sum()

    variable = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(variable, True), variable)
    step = 1e-6
    numeric = (value(x + step * along) - value(x - step * along)) / (2 * step)
    torch.testing.assert_close((grad * along).sum(), numeric, rtol=1e-5, atol=1e-8)


def test_frozen_and_compiled_explainers_serve_conditions_by_the_plain_graph() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    conditions: list[Any] = [{"2": [1]}, {"2": [3], "5": [0]}]
    wanted = lrpfx.Explainer(model, x, "epsilon_plus")(x, 1, conditions=conditions).relevance
    frozen = lrpfx.Explainer(model, x, "epsilon_plus", freeze=True)
    compiled = lrpfx.Explainer(model, x, "epsilon_plus").compile(backend="eager")
    compiled(x, 1, ledger=False)
    for explainer in (frozen, compiled):
        got = explainer(x, 1, conditions=conditions, ledger=False).relevance
        torch.testing.assert_close(got, wanted)


X = draw(2, 1, 7, 7)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "place": (dict(conditions=[{"9": [0]}]), "neither a module"),
    "several places": (dict(conditions=[{"9": [0], "nowhere": [1]}]), r"2 places[\s\S]*nowhere"),
    "range": (dict(conditions=[{"2": [5]}, {"5": [7]}]), r"2 concept[\s\S]*0 to 4[\s\S]*0 to 2"),
    "no list": (dict(conditions={"2": [1]}), "list of dicts"),
    "none": (dict(conditions=[]), "no condition"),
    "word": (dict(conditions=[{"2": "1"}]), "wrong form"),
    "zip": (dict(conditions=[{"2": [1]}], pairing="zip"), "one condition for each sample"),
    "pairing": (dict(conditions=[{"2": [1]}], pairing="both"), "pairing='both'"),
    "through": (dict(conditions=[{"2": [1]}], through="some"), "through='some'"),
    "heads": (dict(conditions=[{"2": (lrpfx.concepts.Head(2), [0])}]), "2 heads do not divide"),
    "start": (dict(start="9"), "neither a module"),
    "init": (dict(start="5", init=torch.ones(3)), r"init= at '5' is \(3,\)"),
    "above the start": (dict(start="2", conditions=[{"5": [0]}]), "on no path"),
    "directions": (
        dict(conditions=[{"2": (lrpfx.concepts.Direction(torch.eye(3)), [0])}]),
        "the vectors have 3 entries",
    ),
    "boolean": (dict(conditions=[{"2": [True]}]), "True is no number"),
}


@pytest.fixture(scope="module")
def explained() -> tuple[nn.Module, lrpfx.Explainer]:
    model = cnn()
    return model, lrpfx.Explainer(model, X, "epsilon_plus")


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, explained: tuple[nn.Module, lrpfx.Explainer]) -> None:
    model, explainer = explained
    options, said = WRONG[case]
    with assert_untouched(model, X), pytest.raises(lrpfx.errors.LrpError, match=said) as e:
        explainer(X, None if "start" in options else 1, **options)
    check_form(e.value)


def test_channels_are_followed_through_moves() -> None:
    layers = {"up": nn.Linear(3, 4), "fc": nn.Linear(5, 2)}
    model = Apply(lambda m, x: m.fc(m.up(x).transpose(1, 2)).sum(1), **layers)
    x = draw(2, 5, 3)
    explainer = lrpfx.Explainer(fill(model), x, EXACT)
    (turned,) = [row.node for row in explainer.report.rows if row.op == "transpose"]
    for c in range(4):
        got = explainer(x, 1, conditions=[{turned: [c]}]).relevance
        torch.testing.assert_close(got, explainer(x, 1, conditions=[{"up": [c]}]).relevance)


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_layers_that_move_their_channels_are_places(name: str) -> None:
    layer: nn.Module = nn.LSTM(4, 3, batch_first=True)
    if name == "attention":
        layer = nn.MultiheadAttention(4, 2, batch_first=True)
    size = 4 if name == "attention" else 3

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.layer(x, x, x, need_weights=False) if name == "attention" else m.layer(x)
        return m.fc(y[0]).sum(1)

    model, x = fill(Apply(forward, layer=layer, fc=nn.Linear(size, 2))), draw(2, 3, 4)
    explainer = lrpfx.Explainer(model, x, "attnlrp")
    whole = explainer(x, 1, layers=["layer"])
    each = explainer(x, 1, conditions=[{"layer": [c]} for c in range(size)])
    torch.testing.assert_close(each.relevance.sum(0), whole.relevance)
    assert whole.concepts("layer").shape == (2, size)


def test_a_channel_dimension_that_is_not_clear_is_asked_for() -> None:
    layers = {"up": nn.Linear(3, 4), "fc": nn.Linear(2, 2)}
    model = Apply(lambda m, x: m.fc(m.up(x).view(-1, 10, 2)).sum(1), **layers)
    x = draw(2, 5, 3)
    explainer = lrpfx.Explainer(fill(model), x, EXACT)
    (viewed,) = [row.node for row in explainer.report.rows if row.op in ("view", "reshape")]
    with pytest.raises(lrpfx.errors.SelectorError, match=r"not clear; give Channel\(dim\)"):
        explainer(x, 1, conditions=[{viewed: [0]}])
    got = explainer(x, 1, conditions=[{viewed: (Channel(1), [0, 2, 4, 6, 8])}]).relevance
    torch.testing.assert_close(got, explainer(x, 1, conditions=[{"up": [0, 1]}]).relevance)
