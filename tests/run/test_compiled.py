"""Compiled explanations: the same relevance, from graphs that are made when they are needed.

That the explicit graphs give the relevance of the plain form is in test_fast.py; here most are
run by ``backend="eager"``, which takes seconds where a compiler takes minutes.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

import lrpfx
from lrpfx import composites
from lrpfx.errors import CaptureError, CompileError, InputError, NonFiniteError
from lrpfx.rewrite.freeze import freeze
from lrpfx.run import compiled
from tests.conftest import Apply, assert_untouched
from tests.oracle import laws, zoo

TOLERANCE = 1e-10


@pytest.fixture
def made() -> Iterator[list[fx.GraphModule]]:
    """The graphs that are compiled, in order; they are run as they are."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, **options: Any) -> fx.GraphModule:
        found.append(graph)
        return graph

    with mock.patch("torch.compile", keep):
        yield found


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return zoo.randomize(nn.Sequential(*layers)).double().eval()


X = zoo.images(2, 2, 6, 6)


def same(got: lrpfx.Explanation, expected: lrpfx.Explanation) -> bool:
    return laws.relative([got.relevance], [expected.relevance.detach()]) < TOLERANCE


def test_by_the_default_compiler() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("PyTorch's compiler needs a C++ compiler on the CPU, and there is none")
    # Compilation takes seconds for every few ops; the tests below have the larger network.
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    model = zoo.randomize(nn.Sequential(*layers)).double().eval()
    explainer = lrpfx.Explainer(model, X, "epsilon_plus")
    expected = explainer(X, [0, 1], ledger=True)
    assert explainer.compile() is explainer
    for _ in range(2):
        got = explainer(X, [0, 1], ledger=False)
        assert same(got, expected)
        torch.testing.assert_close(got.output, expected.output)


@pytest.mark.parametrize("frozen", [False, True])
def test_by_the_tracer_alone(frozen: bool) -> None:
    explainer = lrpfx.Explainer(network(), X, "epsilon_alpha2_beta1", freeze=frozen)
    explainer.compile(backend="eager")
    expected = explainer(X, [0, 1], ledger=True)
    for _ in range(2):
        assert same(explainer(X, [0, 1], ledger=False), expected)


def test_graphs_are_made_once_for_a_form_of_inputs(made: list[fx.GraphModule]) -> None:
    explainer = lrpfx.Explainer(network(), X, "epsilon_plus")
    expected = {n: explainer(X[:n], 1, ledger=True) for n in (1, 2)}
    explainer.compile()
    for n, graphs in [(2, 2), (2, 2), (1, 4), (2, 4), (1, 4)]:
        assert same(explainer(X[:n], 1, ledger=False), expected[n])
        assert len(made) == graphs
    strided = torch.stack([X, X], -1)[..., 0]
    assert same(explainer(strided, 1, ledger=False), expected[2])
    assert len(made) == 6
    assert not any("autograd" in graph.code or "lrp" in graph.code for graph in made)


def test_forms_beyond_the_limit_run_uncompiled(
    made: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "LIMIT", 1)
    explainer = lrpfx.Explainer(network(), X).compile()
    explainer(X, 1, ledger=False)
    with pytest.warns(UserWarning, match="padding the last batch"):
        got = explainer(X[:1], 1, ledger=False)
    assert same(got, explainer(X[:1], 1, ledger=True)) and len(made) == 2


def test_what_is_not_compiled(made: list[fx.GraphModule]) -> None:
    explainer = lrpfx.Explainer(network(), X).compile()
    assert explainer(X, 1, ledger=True).report.has_ledger
    x = X.clone().requires_grad_()
    assert explainer(x, 1, create_graph=True).relevance.requires_grad
    explainer(X, "all")
    assert not made


def test_seeds_on_one_output_and_on_another(made: list[fx.GraphModule]) -> None:
    def forward(model: Any, x: Tensor) -> dict[str, Tensor]:
        hidden = model.first(x).relu()
        return {"first": hidden, "second": model.second(hidden)}

    torch.manual_seed(0)
    model = Apply(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    targets: list[Callable[[Any], Tensor]] = [
        lambda output: output["first"][:, 0],
        lambda output: output["second"][:, 1],
        lambda output: output["first"][:, 1] + output["second"][:, 0],
    ]
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    expected = [explainer(x, target) for target in targets]
    explainer.compile()
    for _ in range(2):
        for target, right in zip(targets, expected, strict=True):
            got = explainer(x, target, ledger=False)
            assert same(got, right)
            torch.testing.assert_close(got.output, right.output)
    assert len(made) == 6


def test_layers(made: list[fx.GraphModule]) -> None:
    explainer = lrpfx.Explainer(network(), X, "epsilon_plus")
    expected = explainer(X, 1, layers=["*"], ledger=True)
    explainer.compile()
    for _ in range(2):
        got = explainer(X, 1, layers=["*"], ledger=False)
        for path, (layer,) in expected.layers.items():
            ((relevance, activation),) = got.layers[path]
            assert laws.relative([relevance], [layer.relevance]) < TOLERANCE
            torch.testing.assert_close(activation, layer.activation)
    assert len(made) == 2


def test_parameters_may_change() -> None:
    model = network()
    explainer = lrpfx.Explainer(model, X, "epsilon_plus").compile(backend="eager")
    before = explainer(X, 0, ledger=False)
    for change in ("in place", "replaced"):
        with torch.no_grad():
            if change == "in place":
                model[0].weight.mul_(-1.0)
                model[1].running_mean.add_(1.0)
            else:
                model[4].weight = nn.Parameter(model[4].weight.flip(0))
        got = explainer(X, 0, ledger=False)
        assert same(got, explainer(X, 0, ledger=True)) and not same(got, before)
        before = got


def test_what_depends_on_frozen_parameters_is_no_longer_in_the_graphs(
    made: list[fx.GraphModule],
) -> None:
    model = network()
    explainer = lrpfx.Explainer(model, X, "epsilon_plus", freeze=True).compile()
    explainer(X, 1, ledger=False)
    for node in (node for graph in made for node in graph.graph.nodes):
        inputs = node.all_input_nodes
        assert not inputs or any(n.op != "get_attr" for n in inputs), node.format_node()
    with torch.no_grad():
        model[4].bias.add_(1.0)
    with pytest.raises(CaptureError, match="promised to stay"):
        explainer(X, 1, ledger=False)


def test_tensors_that_rules_hold(made: list[fx.GraphModule]) -> None:
    low, high = X.amin((0, 2, 3), keepdim=True), X.amax((0, 2, 3), keepdim=True)
    rules = [("conv", lrpfx.ZBox(low, high)), ("linear", lrpfx.Epsilon(lambda z: z + 0.1))]
    explainer = lrpfx.Explainer(network(), X, rules)
    expected = explainer(X, 1, ledger=True)
    explainer.compile()
    for _ in range(2):
        assert same(explainer(X, 1, ledger=False), expected)


BOX = composites.EpsilonGammaBox(-3, 3)


@pytest.mark.parametrize(
    ("size", "rules"),
    [(1, "epsilon_plus"), (4, "epsilon_plus"), (2, BOX)]
    + [
        pytest.param(2, rules, marks=pytest.mark.nightly)
        for rules in ("epsilon_plus", "epsilon_all", "epsilon_alpha2_beta1")
    ],
    ids=str,
)
def test_images_in_channels_last(size: int, rules: Any) -> None:
    """The strides that kernels give are not always those that compilers expect of them."""
    torch.manual_seed(0)
    pooled = [nn.AdaptiveMaxPool2d(size), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    convolved = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    model = nn.Sequential(*convolved, *pooled, nn.Linear(128, 3)).double()
    model.to(memory_format=torch.channels_last)
    x = X[:1].contiguous(memory_format=torch.channels_last)
    explainer = lrpfx.Explainer(model, x, rules)
    expected = explainer(x, 1)
    explainer.compile(backend="eager")
    for _ in range(2):
        assert same(explainer(x, 1, ledger=False), expected)


def test_token_ids() -> None:
    def forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return model.head((model.embedding(ids) * mask[..., None]).mean(1))

    torch.manual_seed(0)
    model = Apply(forward, embedding=nn.Embedding(9, 4), head=nn.Linear(4, 2)).double()
    inputs = (torch.tensor([[1, 2, 3], [4, 1, 1]]), torch.ones(2, 3, dtype=torch.float64))
    explainer = lrpfx.Explainer(model, inputs)
    expected = explainer(inputs, 1)
    explainer.compile(backend="eager")
    for _ in range(2):
        got = explainer(inputs, 1, ledger=False)
        for a, b in zip(got.relevance, expected.relevance, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(InputError, match="index out of range"):
        explainer((inputs[0] + 7, inputs[1]), 1, ledger=False)


def test_autocast_is_part_of_the_form(made: list[fx.GraphModule]) -> None:
    model, x = network().float(), X.float()
    explainer = lrpfx.Explainer(model, x, "epsilon_plus").compile()
    single = explainer(x, 1, ledger=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            halved = explainer(x, 1, ledger=False)
            expected = explainer(x, 1)
        assert halved.output.dtype == torch.bfloat16
        assert laws.relative([halved.relevance], [expected.relevance.detach()]) < 0.02
    assert len(made) == 4
    assert explainer(x, 1, ledger=False).output.dtype == torch.float32
    assert laws.relative([explainer(x, 1, ledger=False).relevance], [single.relevance]) < 1e-5


def test_relevance_that_is_not_finite_is_traced_to_its_node(made: list[fx.GraphModule]) -> None:
    model = network()
    explainer = lrpfx.Explainer(model, X, [("conv", lrpfx.Epsilon(lambda z: 0 * z + scale))])
    explainer.compile()
    scale = 1.0
    with pytest.raises(NonFiniteError, match="first at"):
        scale = 1e-310
        explainer(X, 1, ledger=False)


# What goes wrong ---------------------------------------------------------------------------------


def failing(graph: fx.GraphModule, example: Any) -> Any:
    raise RuntimeError("no such instruction")


def wrong(graph: fx.GraphModule, example: Any) -> Any:
    def run(*args: Any) -> Any:
        return [1.01 * r if r.is_floating_point() else r for r in graph(*args)]

    return run


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (failing, "cannot be compiled[^$]*no such instruction"),
        (wrong, "output or relevance are others"),
        ("no such compiler", "cannot be compiled"),
    ],
)
def test_a_compiler_that_fails_or_is_wrong(backend: Any, said: str) -> None:
    model = network()
    explainer = lrpfx.Explainer(model, X).compile(backend=backend)
    for _ in range(2):  # nothing is kept of it
        with assert_untouched(model, X), pytest.raises(CompileError, match=said):
            explainer(X, 1, ledger=False)
    assert explainer(X, 1, ledger=True).report.has_ledger
    explainer.compile(backend="eager")
    assert same(explainer(X, 1), explainer(X, 1, ledger=True))


def test_rules_that_write_in_place() -> None:
    """Into a tensor of their own: as it is. Into a part of it: refused."""

    @dataclasses.dataclass(frozen=True)
    class Half(lrpfx.Gradient):
        part: bool

        def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Any:
            flow = super().propagate(call, x, z, R)
            (c,) = flow.relevance
            c = c.clone()
            if self.part:
                c[..., 0] = 0.0
            else:
                c.mul_(0.5)
            return dataclasses.replace(flow, relevance=(c,))

        def carries(self, site: Any, taken: bool) -> bool:
            return False

        def gradient_shares(self, site: Any) -> None:
            return None

    for frozen in (False, True):
        explainer = lrpfx.Explainer(network(), X, [("relu", Half(False))], freeze=frozen)
        expected = explainer(X, 1, ledger=True)
        explainer.compile(backend="eager")
        for _ in range(3):
            assert same(explainer(X, 1, ledger=False), expected)
    explainer = lrpfx.Explainer(network(), X, [("relu", Half(True))]).compile(backend="eager")
    with pytest.raises(CompileError, match="into part of a tensor"):
        explainer(X, 1, ledger=False)


def test_what_is_written_into_is_not_frozen() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    double = graph.call_function(torch.ops.aten.mul.Tensor, (w, 2.0))
    before = graph.call_function(torch.ops.aten.add.Tensor, (x, double))
    after = graph.call_function(torch.ops.aten.add_.Tensor, (double, 1.0))
    graph.output((before, after))
    root = nn.Module()
    root.register_buffer("w", torch.ones(2))
    module = freeze(fx.GraphModule(root, graph))
    for _ in range(2):
        before, after = module(torch.zeros(2))
        assert before.tolist() == [2, 2] and after.tolist() == [3, 3]


def test_a_model_whose_relevance_hangs_on_rounding_is_compiled_nevertheless() -> None:
    """Where rounded inputs give as different a relevance, the compiler is not to blame."""

    def forward(model: Any, x: Tensor) -> Tensor:
        return model.fc(x - x.mean(1, keepdim=True) + 1e-7 * x).square()

    torch.manual_seed(0)
    model = Apply(forward, fc=nn.Linear(6, 3))
    x = 1000 + torch.randn(2, 6)
    explainer = lrpfx.Explainer(model, x, "epsilon_all")
    explainer.compile(backend=rounding)
    explainer(x, 1, ledger=False)


def rounding(graph: fx.GraphModule, example: Any) -> Any:
    """Runs the graph with every input off by a rounding."""

    def run(*args: Any) -> Any:
        return graph(*(a * (1 + 1e-7) if a.is_floating_point() else a for a in args))

    return run
