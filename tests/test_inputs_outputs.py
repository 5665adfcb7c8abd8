"""What goes in and what comes out: inputs, outputs, rules, layers, the Explainer, graph_module.

And that explaining leaves the user's model, inputs and process as they were.
"""

import contextlib
import copy
import io
import pickle
import random
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import lrpfx
from lrpfx import Flat, Gamma, composites, errors
from tests.conftest import Apply, assert_untouched, lived_in
from tests.test_errors import ConvNet, check_form

#: LRP-0: in a network that is linear, relevance is the contribution to the output.
LRP_0 = composites.EpsilonAll(0.0)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """The model with parameters and statistics that are the same in every session."""
    for i, tensor in enumerate([*model.parameters(), *model.buffers()]):
        if tensor.is_floating_point():
            tensor.data = draw(*tensor.shape, seed=i).abs_() if i % 3 else draw(*tensor.shape)
    return model.eval()


def conv_net() -> nn.Module:
    return trained(ConvNet())


def mlp() -> nn.Module:
    return trained(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def image(n: int = 2, seed: int = 3) -> Tensor:
    return draw(n, 1, 4, 4, seed=seed)


# -- inputs ---------------------------------------------------------------------------------------


class TwoArms(nn.Module):
    """The linear map scale * (A x + B y) * mask + ids * row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4, bias=False)
        self.b = nn.Linear(5, 4, bias=False)
        self.row = nn.Parameter(torch.ones(4))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: float = 1.0,
        ids: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        mode: str = "sum",
    ) -> Tensor:
        out = scale * (self.a(x) + self.b(y))
        out = out if mask is None else out * mask
        out = out if ids is None else out + ids[:, None] * self.row
        return out if mode == "sum" else -out


class Nested(nn.Module):
    """TwoArms of inputs in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.arms = TwoArms()

    def forward(self, pair: Any, extra: Any = None) -> Tensor:
        x, y = pair.values() if isinstance(pair, dict) else pair
        return self.arms(x, y)


Pair = namedtuple("Pair", "x y")
X, Y = draw(2, 3).double(), draw(2, 5, seed=4).double()
IDS, MASK = torch.tensor([1, 6]), torch.tensor([[True, False, True, True]] * 2)
STRUCTURES: list[tuple[str, Callable[[], nn.Module], Any, float]] = [
    # name, model, inputs, what a sample's contributions are multiplied by
    ("tuple", TwoArms, (X, Y), 1.0),
    ("tuple with a number", TwoArms, (X, Y, 3.0), 3.0),
    ("tuple with integers", TwoArms, (X, Y, 2.0, IDS), 2.0),
    ("tuple with None", TwoArms, (X, Y, 2.0, None), 2.0),
    ("dict", TwoArms, {"x": X, "y": Y}, 1.0),
    ("dict in another order", TwoArms, {"y": Y, "x": X}, 1.0),
    ("dict with constants", TwoArms, {"mode": "diff", "x": X, "scale": 0.5, "y": Y}, -0.5),
    ("dict with integers first", TwoArms, {"ids": IDS, "y": Y, "x": X}, 1.0),
    ("dict with a mask", TwoArms, {"x": X, "mask": MASK, "y": Y, "ids": IDS}, 1.0),
    ("dict with None", TwoArms, {"x": X, "y": Y, "ids": None}, 1.0),
    ("tuple of a dict", Nested, ({"x": X, "y": Y},), 1.0),
    ("tuple of a list", Nested, ([X, Y],), 1.0),
    ("tuple of a tuple and more", Nested, ((X, Y), {"unused": [1, None]}), 1.0),
    ("tuple of a named tuple", Nested, (Pair(X, Y),), 1.0),
    ("dict of a tuple", Nested, {"pair": (X, Y)}, 1.0),
    ("dict of a dict", Nested, {"pair": {"x": X, "y": Y}, "extra": "text"}, 1.0),
]


@pytest.mark.parametrize(
    ("make", "inputs", "factor"), [pytest.param(*row, id=name) for name, *row in STRUCTURES]
)
def test_relevance_is_structured_like_the_inputs(
    make: Callable[[], nn.Module], inputs: Any, factor: float
) -> None:
    """Each tensor gets its own relevance, and what is not explained gets None."""
    model = trained(make()).double()
    arms = model.arms if isinstance(model, Nested) else model
    weights = {id(X): arms.a.weight, id(Y): arms.b.weight}

    def contribution(leaf: Any) -> Any:
        return factor * leaf * weights[id(leaf)][2] if id(leaf) in weights else None

    explanation = lrpfx.explain(model, inputs, 2, rules=LRP_0)
    expected = pytree.tree_map(contribution, inputs)
    # of a dict, the order of the keys counts too
    assert pytree.tree_structure(explanation.relevance) == pytree.tree_structure(expected)
    assert type(explanation.relevance) is type(inputs)
    pairs = zip(
        pytree.tree_leaves(explanation.relevance), pytree.tree_leaves(expected), strict=True
    )
    for found, wanted in pairs:
        if wanted is None:
            assert found is None
        else:
            torch.testing.assert_close(found, wanted.detach())


def test_input_that_is_not_used() -> None:
    model = trained(Apply(lambda m, x, y: m.fc(x), fc=nn.Linear(3, 2)))
    of_x, of_y = lrpfx.explain(model, (draw(2, 3), draw(2, 5)), 1).relevance
    assert torch.equal(of_y, torch.zeros(2, 5)) and of_x.abs().sum() > 0


def test_input_given_twice() -> None:
    """Two places are two inputs, also where they hold one tensor."""
    model = trained(Apply(lambda m, x, y: m.fc(x) + 2 * m.fc(y), fc=nn.Linear(3, 2)))
    of_x, of_y = lrpfx.explain(model, (draw(2, 3), draw(2, 3)), 1).relevance
    x = draw(2, 3)
    torch.testing.assert_close(lrpfx.explain(model, (x, x), 1).relevance, (of_x, of_y))
    torch.testing.assert_close(of_y, 2 * of_x)


def test_input_that_is_returned() -> None:
    """Relevance of an output that is the input stays where it is."""
    model = trained(Apply(lambda m, x: (m.fc(x), x), fc=nn.Linear(3, 2)))
    x = draw(2, 3)
    relevance = lrpfx.explain(model, x, lambda out: out[1][:, 1]).relevance
    torch.testing.assert_close(relevance, x * torch.eye(3)[1])


class OddNames(nn.Module):
    """Arguments that are called like things inside of lrpfx and torch.fx."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor, ledger: Tensor, phantom_x: Tensor, root: Tensor) -> Tensor:
        return self.fc(x) + 2 * self.fc(ledger) + 3 * self.fc(phantom_x) + 4 * self.fc(root)


def test_arguments_of_any_name() -> None:
    model = trained(OddNames()).double()
    names = ["x", "ledger", "phantom_x", "root"]
    inputs = {name: draw(2, 3, seed=i).double() for i, name in enumerate(names)}
    relevance = lrpfx.explain(model, inputs, 1, rules=LRP_0).relevance
    for i, name in enumerate(names):
        expected = (i + 1) * inputs[name] * model.fc.weight[1].detach()
        torch.testing.assert_close(relevance[name], expected)


def test_relevance_of_a_tensor_is_a_tensor() -> None:
    for inputs in (draw(2, 3), draw(2, 3)[:, :].t().contiguous().t(), nn.Parameter(draw(2, 3))):
        relevance = lrpfx.explain(mlp(), inputs).relevance
        assert type(relevance) is Tensor
        assert relevance.shape == inputs.shape and not relevance.requires_grad


@pytest.mark.parametrize("inputs", [[X, Y], OrderedDict(x=X, y=Y)], ids=["list", "OrderedDict"])
def test_other_containers(inputs: Any) -> None:
    """A list is taken as a tuple, any mapping as a dict."""
    found = lrpfx.explain(trained(TwoArms()).double(), inputs, 2, rules=LRP_0).relevance
    plain = lrpfx.explain(trained(TwoArms()).double(), (X, Y), 2, rules=LRP_0).relevance
    for a, b in zip(pytree.tree_leaves(found), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_types(dtype: torch.dtype) -> None:
    explanation = lrpfx.explain(mlp().to(dtype), draw(2, 3).to(dtype), 1)
    wanted = lrpfx.explain(mlp().double(), draw(2, 3).double(), 1)
    assert explanation.relevance.dtype == explanation.seed.dtype == dtype
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(dtype, 1e-4)
    torch.testing.assert_close(
        explanation.relevance.double(), wanted.relevance, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("shift", "seen"),
    [
        pytest.param(draw(3), lambda r: r.sum(0), id="vector"),
        pytest.param(draw(1, 3), lambda r: r.sum(0, keepdim=True), id="row"),
        pytest.param(torch.tensor(0.7), lambda r: r.sum(), id="number"),
    ],
)
def test_input_without_a_batch(shift: Tensor, seen: Callable[[Tensor], Tensor]) -> None:
    """Floating tensors are explained, also those that all samples share."""
    shift, x = shift.double(), draw(4, 3).double()
    model = Apply(lambda m, x, y: m.fc(x + y), fc=nn.Linear(3, 2, bias=False)).double()
    explanation = lrpfx.explain(model, (x, shift), 1, rules=LRP_0)
    of_x, of_shift = explanation.relevance
    weight = model.fc.weight[1].detach()
    torch.testing.assert_close(of_x, x * weight)
    torch.testing.assert_close(of_shift, seen(shift.expand(4, 3) * weight))
    reached = of_x.sum() + of_shift.sum()
    torch.testing.assert_close(explanation.absorbed.sum(), explanation.seed.sum() - reached)


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda m, x: m.fc(x).sum(), id="scalar"),
        pytest.param(lambda m, x: m.fc(x), id="vectors"),
        pytest.param(lambda m, x: m.fc(x).unsqueeze(2) * torch.ones(3), id="maps"),
    ],
)
def test_absorbed_is_what_did_not_arrive(forward: Any) -> None:
    model = trained(Apply(forward, fc=nn.Linear(3, 2))).double()
    explanation = lrpfx.explain(model, X)
    difference = explanation.seed.sum() - explanation.relevance.sum()
    torch.testing.assert_close(explanation.absorbed.sum(), difference)
    report = explanation.report
    assert sum(report.absorbed.values()) == pytest.approx(difference.item())


# -- outputs --------------------------------------------------------------------------------------


@dataclass
class Plain:
    logits: Any
    extra: Any = None


@dataclass(frozen=True)
class Frozen:
    logits: Any
    extra: Any = None


@dataclass
class Derived:
    """A field that the constructor does not take, and one that it computes."""

    logits: Any
    extra: Any = None
    n: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        self.extra = self.logits.softmax(1)


Named = namedtuple("Named", "logits extra")
OUTPUTS: list[tuple[str, Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], int]] = [
    # name, (logits, others) -> output, output -> logits, position of the first floating tensor
    ("tuple", lambda z, o: (z, o), lambda out: out[0], 0),
    ("list", lambda z, o: [o, z], lambda out: out[1], 0),
    ("tuple with integers first", lambda z, o: (z.argmax(1), z, o), lambda out: out[1], 1),
    ("tuple with None first", lambda z, o: (None, z), lambda out: out[1], 1),
    ("tuple with a scalar first", lambda z, o: (o.sum(), z), lambda out: out[1], 0),
    ("tuple with no batch first", lambda z, o: (o.sum(0).repeat(3), z), lambda out: out[1], 0),
    ("dict", lambda z, o: {"other": o, "logits": z}, lambda out: out["logits"], 0),
    ("OrderedDict", lambda z, o: OrderedDict(logits=z), lambda out: out["logits"], 0),
    ("named tuple", lambda z, o: Named(z, o), lambda out: out.logits, 0),
    ("nested", lambda z, o: {"a": [o, (z, o)]}, lambda out: out["a"][1][0], 0),
    ("dataclass", lambda z, o: Plain(z, o), lambda out: out.logits, 0),
    ("frozen dataclass", lambda z, o: Frozen(z, o), lambda out: out.logits, 0),
    ("dataclass without a value", lambda z, o: Plain(z), lambda out: out.logits, 0),
    ("dataclass with a text", lambda z, o: Plain(z, "text"), lambda out: out.logits, 0),
    ("dataclass with a dict", lambda z, o: Plain(z, {"o": [o]}), lambda out: out.logits, 0),
    ("dataclass, logits last", lambda z, o: Plain(o, z), lambda out: out.extra, 0),
    ("dataclass with a derived field", lambda z, o: Derived(z), lambda out: out.logits, 0),
    ("subclass", lambda z, o: type("Sub", (Plain,), {})(z, o), lambda out: out.logits, 0),
]


def returning(pack: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    body = mlp()
    return Apply(lambda m, x: pack(m.body(x), m.body(x * 2) * 3), body=body)


@pytest.mark.parametrize(
    ("pack", "pick", "first"), [pytest.param(*row, id=name) for name, *row in OUTPUTS]
)
def test_model_that_returns(
    pack: Callable[[Tensor, Tensor], Any], pick: Callable[[Any], Tensor], first: int
) -> None:
    model, x = returning(pack), draw(2, 3)
    expected = model(x)
    received: list[Any] = []

    def target(out: Any) -> Tensor:
        received.append(out)
        return pick(out)[:, 1]

    explainer = lrpfx.Explainer(model, x)
    explanation = explainer(x, target)
    kind = type(expected)
    for output in (received[-1], explanation.output):
        # The class "subclass" is made at each call, but its name is the same.
        assert type(output) is kind or kind.__name__ == type(output).__name__ == "Sub"
        assert_same(output, expected)
    torch.testing.assert_close(explanation.relevance, lrpfx.explain(mlp(), x, 1).relevance)

    # Without a callable it is the first tensor with a fraction, and the report says which.
    explanation = explainer(x)
    tensors = [leaf for leaf in leaves(expected) if isinstance(leaf, Tensor)]
    chosen = next(t for t in tensors if t.is_floating_point())
    started = explanation.seed != 0
    torch.testing.assert_close(explanation.seed[started], chosen[started])
    if len(tensors) > 1:
        assert f"output {first}" in explanation.report.target
        assert f"first of {len(tensors)}" in explanation.report.target
    else:
        assert "first of" not in explanation.report.target


def leaves(output: Any) -> list[Any]:
    """What an output holds, in order; None and texts, too."""
    return pytree.tree_leaves(vars(output) if is_dataclass(output) else output)


def assert_same(found: Any, expected: Any) -> None:
    """Equal leaves, whatever container they are in."""
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


def test_callable_of_several_outputs() -> None:
    """Relevance of a sum of outputs is the sum of their relevances."""
    x = draw(2, 3)
    model = returning(lambda z, o: Plain(z, o))
    explainer = lrpfx.Explainer(model, x)
    both = explainer(x, lambda out: out.logits[:, 1] + out.extra[:, 0]).relevance
    one = explainer(x, lambda out: out.logits[:, 1]).relevance
    other = explainer(x, lambda out: out.extra[:, 0]).relevance
    torch.testing.assert_close(both, one + other)


@pytest.mark.parametrize("create_graph", [False, True])
def test_callable_of_an_output_that_others_are_computed_from(create_graph: bool) -> None:
    """As a model returns its encoder's last state: the seed of that is by its own use alone."""
    model = trained(
        Apply(
            lambda m, x: (m.head(h := m.body(x).tanh()), h),
            body=nn.Linear(3, 4),
            head=nn.Linear(4, 2),
        )
    ).double()
    x = draw(2, 3).double().requires_grad_(create_graph)
    explainer = lrpfx.Explainer(model, x)

    def both(out: Any) -> Tensor:
        return out[0][:, 1] + 3 * out[1][:, 0]

    explanation = explainer(x, both, create_graph=create_graph)
    one = explainer(x, lambda out: out[0][:, 1])
    other = explainer(x, lambda out: 3 * out[1][:, 0])
    torch.testing.assert_close(explanation.relevance.detach(), one.relevance + other.relevance)
    report = explanation.report
    assert report.started == pytest.approx(one.report.started + other.report.started)
    assert report.unaccounted == pytest.approx(0.0, abs=1e-12)
    assert [s.shape for s in explanation.seed] == [(2, 2), (2, 4)]
    if create_graph:
        derivative = torch.autograd.gradcheck
        assert derivative(lambda t: explainer(t, both, create_graph=True).relevance, (x,))


# -- rules ----------------------------------------------------------------------------------------


def is_linear(record: Any) -> bool:
    return record.kind == "linear"


class Blocks(nn.Module):
    """Two containers of a conv and a ReLU, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


DEFAULT = {
    "stem.0": "ZPlus",
    "stem.1": "Pass",
    "body.0": "ZPlus",
    "body.1": "Pass",
    "": "Gradient",
    "head": "Epsilon",
}
BLOCKS = trained(Blocks())
RULES: list[tuple[str, Any, dict[str, str]]] = [
    # name, rules=, what is other than in the default
    ("none", None, {}),
    ("no entries", [], {}),
    ("composite's name", "epsilon_all", {"stem.0": "Epsilon", "body.0": "Epsilon"}),
    ("composite", composites.EpsilonAll(), {"stem.0": "Epsilon", "body.0": "Epsilon"}),
    ("composite of one's own", composites.Composite([("conv", Flat())]), {
        "stem.0": "Flat", "body.0": "Flat",
    }),
    ("kind", [("conv", Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    ("class", [(nn.Conv2d, Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    ("predicate", [(is_linear, Flat())], {"head": "Flat"}),
    ("path", [("body.0", Flat())], {"body.0": "Flat"}),
    ("glob", [("*.0", Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    # Broad selectors reach what the rule fits, and only that.
    ("container", [("body", Flat())], {"body.0": "Flat"}),
    ("container's glob", [("body*", Gamma())], {"body.0": "Gamma"}),
    ("class of containers", [(nn.Sequential, Gamma())], {"stem.0": "Gamma", "body.0": "Gamma"}),
    ("all", [("*", Gamma())], {"stem.0": "Gamma", "body.0": "Gamma", "head": "Gamma"}),
    ("all ReLUs", [("*", lrpfx.ReLUGuidedBackprop())], {
        "stem.1": "ReLUGuidedBackprop", "body.1": "ReLUGuidedBackprop",
    }),
    ("family", [("affine", Gamma())], {"stem.0": "Gamma", "body.0": "Gamma", "head": "Gamma"}),
    # The first entry wins.
    ("order", [("body", Flat()), ("conv", Gamma())], {"stem.0": "Gamma", "body.0": "Flat"}),
    ("other order", [("conv", Gamma()), ("body", Flat())], {"stem.0": "Gamma", "body.0": "Gamma"}),
    ("tuple", (("conv", Flat()),), {"stem.0": "Flat", "body.0": "Flat"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "changed"), [pytest.param(*row, id=name) for name, *row in RULES]
)
def test_rules_reach(rules: Any, changed: dict[str, str]) -> None:
    report = lrpfx.Explainer(BLOCKS, image(), rules).report
    assert {row.module: row.rule for row in report.rows} == DEFAULT | changed


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        pytest.param(conv_net(), image(), ["epsilon_plus", "convolution"], id="conv"),
        pytest.param(mlp(), draw(2, 3), ["epsilon_all", "no convolution"], id="mlp"),
    ],
)
def test_report_says_what_none_picked(model: nn.Module, inputs: Tensor, said: list[str]) -> None:
    explanation = lrpfx.explain(model, inputs)
    named = lrpfx.explain(model, inputs, rules=said[0])
    assert torch.equal(explanation.relevance, named.relevance)
    for word in said:
        assert word in explanation.report.rules
        assert word in repr(explanation.report)


def test_an_entry_that_decides_nothing_is_noted() -> None:
    rules = [("conv", Gamma()), ("linear", Gamma()), (nn.Conv2d, lrpfx.Epsilon())]
    notes = lrpfx.Explainer(BLOCKS, image(), rules).report.notes
    assert [n for n in notes if "decides nothing" in n] == [
        "(Conv2d, Epsilon) decides nothing: entries before it match first"
    ]


def test_selecting_the_model_itself() -> None:
    """A model that is one layer is an instance of its class like any other layer."""
    report = lrpfx.Explainer(nn.Linear(3, 2), draw(2, 3), [(nn.Linear, Gamma())]).report
    assert [row.rule for row in report.rows] == ["Gamma"]


# -- layers ---------------------------------------------------------------------------------------


class Layered(nn.Module):
    """Batch norm to fold, a shared ReLU, an in-place one, containers, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(inplace=True))
        self.head = nn.Linear(32, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = self.act(self.block(x) - 0.1 * x)
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def layered() -> Layered:
    model = trained(Layered())
    # With these, batch norm has no shift that would absorb relevance.
    model.norm.running_mean.zero_()
    model.norm.bias.data.zero_()
    return model.double()


@pytest.fixture(scope="module")
def layered_explainer(layered: Layered) -> lrpfx.Explainer:
    return lrpfx.Explainer(layered, image().double(), LRP_0)


def hooked(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Per module path, what a forward hook sees at each call."""
    seen: dict[str, list[Tensor]] = {path: [] for path, _ in model.named_modules() if path}
    handles = [
        # cloned, as an in-place op may follow
        module.register_forward_hook(lambda m, i, out, path=path: seen[path].append(out.clone()))
        for path, module in model.named_modules()
        if path
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        pytest.param(["conv"], ["conv"], id="folded-conv"),
        pytest.param(["norm"], ["norm"], id="folded-norm"),
        pytest.param(["conv", "norm"], ["conv", "norm"], id="both"),
        pytest.param(["act"], ["act"], id="called-twice"),
        pytest.param(["block"], ["block"], id="container"),
        pytest.param(["block.1"], ["block.1"], id="in-place"),
        pytest.param(["block.*"], ["block.0", "block.1"], id="glob"),
        pytest.param(["head"], ["head"], id="output"),
        pytest.param("head", ["head"], id="str"),
        pytest.param(("head", "block.*", "head"), ["head", "block.0", "block.1"], id="overlap"),
        pytest.param(
            ["*"], ["conv", "norm", "act", "block", "block.0", "block.1", "head"], id="all"
        ),
    ],
)
def test_layers_see_what_a_hook_sees(
    layered: Layered, layered_explainer: lrpfx.Explainer, layers: Any, paths: list[str]
) -> None:
    x = image(3, seed=5).double()
    explanation = layered_explainer(x, 1, layers=layers)
    seen = hooked(layered, x)
    assert set(explanation.layers) == set(paths)
    for path in paths:
        calls = explanation.layers[path]
        assert len(calls) == len(seen[path]) == (2 if path == "act" else 1)
        for call, activation in zip(calls, seen[path], strict=True):
            torch.testing.assert_close(call.activation, activation)
            assert call.relevance.shape == call.activation.shape
    without = layered_explainer(x, 1)
    assert without.layers == {}
    torch.testing.assert_close(without.relevance, explanation.relevance)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s[:, None, None] + self.t[:, None, None]


class Folds(nn.Module):
    """Much behind convolutions, one of which is also read ahead of."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.nested = nn.Sequential(nn.Sequential(block, Scale()), Scale())
        self.ahead, self.one = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nested(x) + self.bias[:, None, None])
        return (self.one(self.ahead(x)) * self.bias[:, None, None]).mean((2, 3))


def test_layers_see_every_step_of_what_is_folded() -> None:
    torch.manual_seed(0)
    model, x = Folds().double().eval(), image(3, seed=5).double()
    explanation = lrpfx.explain(model, x, 1, layers=["nested*", "one"])
    seen = hooked(model, x)
    assert len(explanation.layers) == 8
    for path, calls in explanation.layers.items():
        torch.testing.assert_close(calls.activation, seen[path][0])
    with pytest.raises(errors.SelectorError, match="'ahead' was folded into the layer after it"):
        lrpfx.explain(model, x, 1, layers=["ahead"])
    labels = [row.label for row in explanation.report.rows if row.kind == "conv"]
    assert labels == ["nested.0.0.0+1+1+1", "one+ahead"]


@pytest.mark.parametrize("path", ["conv", "norm", "head"])
def test_layers_of_a_chain_conserve(layered_explainer: lrpfx.Explainer, path: str) -> None:
    """Each of these is all that relevance passes through; nothing is absorbed under LRP-0."""
    explanation = layered_explainer(image().double(), 1, layers=[path])
    sums = explanation.layers[path].relevance.flatten(1).sum(1)
    torch.testing.assert_close(sums, explanation.seed.sum(1))


def test_layers_of_parallel_branches_add_up(layered_explainer: lrpfx.Explainer) -> None:
    explanation = layered_explainer(image().double(), 1, layers=["block", "act"])
    first, second = explanation.layers["act"]
    started = explanation.seed.sum(1)
    torch.testing.assert_close(first.relevance.flatten(1).sum(1), started)
    torch.testing.assert_close(second.relevance.flatten(1).sum(1), started)
    # the block is one of two summands, so that it carries a part
    part = explanation.layers["block"].relevance.flatten(1).sum(1)
    assert not torch.allclose(part, started)


def test_layer_of_the_last_module_is_the_seed(layered_explainer: lrpfx.Explainer) -> None:
    explanation = layered_explainer(image().double(), 1, layers=["head"])
    torch.testing.assert_close(explanation.layers["head"].relevance, explanation.seed)
    torch.testing.assert_close(explanation.layers["head"].activation, explanation.output)


def test_layer_called_twice_has_no_single_relevance(layered_explainer: lrpfx.Explainer) -> None:
    calls = layered_explainer(image().double(), layers=["act"]).layers["act"]
    for read in (lambda: calls.relevance, lambda: calls.activation):
        with pytest.raises(errors.LrpError, match="2 times"):
            read()
    assert calls[0].relevance is not calls[1].relevance


def test_layers_beside_a_dataclass() -> None:
    """The paths are the user's, whatever the output is wrapped in."""
    model = returning(lambda z, o: Plain(z))
    explanation = lrpfx.explain(model, draw(2, 3), lambda out: out.logits[:, 0], layers=["body.*"])
    assert set(explanation.layers) == {"body.0", "body.1", "body.2"}
    assert {row.module.partition("@")[0] for row in explanation.report.rows} <= {
        "body.0", "body.1", "body.2", "",
    }  # fmt: skip
    report = lrpfx.Explainer(model, draw(2, 3), [("body.0", Gamma())]).report
    assert "Gamma" in {row.rule for row in report.rows if row.module == "body.0"}


# -- what explaining leaves as it was -------------------------------------------------------------


def fc(forward: Callable[..., Any], **members: Any) -> nn.Module:
    return trained(Apply(forward, fc=nn.Linear(3, 3), **members))


class Remembers(nn.Module):
    """A model that writes into ``memory`` whatever ``write`` does."""

    def __init__(self, memory: Any, write: Callable[[Any, Tensor, nn.Module], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.memory = memory
        self.write = write
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.memory, x, self)
        return self.fc(x)


def renormed(m: Any, x: Tensor) -> Tensor:
    m.fc.weight.data = torch.renorm(m.fc.weight.data, 2, 0, 0.1)
    return m.fc(x)


def decayed(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.fc.weight.mul_(0.5)
    return m.fc(x)


def counted(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return m.fc(x)


def unused_random_numbers(m: Any, x: Tensor) -> Tensor:
    torch.rand(1), random.random(), np.random.rand()
    return m.fc(x)


def written(m: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return m.fc(x)


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    x.view(-1).mul_(2)
    return m.fc(x)


def frozen_batch_norm() -> nn.Module:
    """In training mode as a whole, with the batch norm in evaluation mode: legal, and common."""
    model = Apply(lambda m, x: Plain(m.norm(m.fc(x))), fc=nn.Linear(3, 3), norm=nn.BatchNorm1d(3))
    model.train()
    model.norm.eval()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
    "in use": lambda: lived_in(mlp()),
    "in training mode": lambda: mlp().train(),
    "partly in training mode": frozen_batch_norm,
    "weight norm": lambda: trained(parametrizations.weight_norm(nn.Linear(3, 2))),
    "spectral norm": lambda: trained(parametrizations.spectral_norm(nn.Linear(3, 2))),
    "dataclass": lambda: returning(Plain),
    "tied": lambda: _tied(),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)).eval(),
    "in-place ReLU on the input": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)),
    "in-place add to the input": lambda: fc(lambda m, x: m.fc(x.add_(1))),
    "+= on the input": lambda: fc(written_by_operator),
    "assignment into the input": lambda: fc(written),
    "write through a view of the input": lambda: fc(written_through_a_view),
    "unused random numbers": lambda: fc(unused_random_numbers),
    "counting buffer": lambda: fc(counted, seen=torch.zeros(1)),
    "weights rescaled in forward": lambda: fc(renormed),
    "weights decayed in forward": lambda: fc(decayed),
    **{
        f"memory: {name}": lambda memory=memory, write=write: Remembers(memory(), write)
        for name, memory, write in [
            ("dict", dict, lambda d, x, m: d.update({x.dtype: x})),
            ("dict of weights", dict, lambda d, x, m: d.update(w=m.fc.weight * 2)),
            ("defaultdict", lambda: defaultdict(list), lambda d, x, m: d["x"].append(x)),
            ("OrderedDict", OrderedDict, lambda d, x, m: d.update(x=x)),
            ("list", list, lambda d, x, m: d.append(x)),
            ("deque", lambda: deque(maxlen=3), lambda d, x, m: d.append(x)),
            ("set", set, lambda d, x, m: d.add(x.dtype)),
            ("list in a dict", lambda: {"x": []}, lambda d, x, m: d["x"].append(x)),
            ("dict in a list", lambda: [{}], lambda d, x, m: d[0].update(x=x)),
            ("object", lambda: SimpleNamespace(n=0), lambda d, x, m: setattr(d, "n", d.n + 1)),
            ("attribute", lambda: None, lambda d, x, m: setattr(m, "last", x)),
            ("counter", lambda: 0, lambda d, x, m: setattr(m, "memory", d + 1)),
            ("tensor", lambda: torch.zeros(3), lambda d, x, m: d.add_(1)),
            ("module", lambda: None, lambda d, x, m: m.add_module("made", nn.Identity())),
            ("hook", lambda: None, lambda d, x, m: m.fc.register_forward_hook(_ignore)),
        ]
    },
}  # fmt: skip


def written_by_operator(m: Any, x: Tensor) -> Tensor:
    x += 1
    return m.fc(x)


def _ignore(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that does nothing."""


def _tied() -> nn.Module:
    model = trained(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    return model


# torch.export warns of tensors that a trace leaves in Python attributes.
@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("name", MODELS)
def test_explaining_leaves_the_model_alone(name: str) -> None:
    """And what the model cannot be explained for is told, and leaves it alone, too."""
    model, x = MODELS[name](), draw(2, 3)
    with assert_untouched(model, x), contextlib.suppress(errors.LrpError):
        explainer = lrpfx.Explainer(model, x)
        explainer(x)
        explainer(x, create_graph=True, layers=["*"])
        if name != "unused random numbers":  # calling this is calling the model
            explainer.graph_module(x)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize(
    "name",
    [n for n in MODELS if n not in ("lazy", "weights rescaled in forward")],
)
def test_such_models_are_explained(name: str) -> None:
    """What the test above lets pass as an error is none for these."""
    model, x = MODELS[name](), draw(2, 3)
    if name == "weights decayed in forward":  # the graph holds the weights of one call
        with pytest.raises(errors.CaptureError):
            lrpfx.explain(model, x)
        return
    explanation = lrpfx.explain(model, x)
    expected = copy.deepcopy(model)(x.clone())
    assert_same(explanation.output, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_input_is_left_alone(requires_grad: bool, create_graph: bool) -> None:
    x = draw(2, 3).requires_grad_(requires_grad)
    inputs = {"x": x, "y": draw(2, 5, seed=4), "ids": IDS.clone()}
    model = trained(TwoArms())
    with assert_untouched(model, inputs):
        explanation = lrpfx.explain(model, inputs, create_graph=create_graph)
    assert explanation.relevance["x"].requires_grad is create_graph
    assert x.is_leaf and x.grad is None


def test_a_part_of_a_larger_tensor_is_left_alone() -> None:
    """In-place ops of the model must not write through to the user's data set."""
    data = draw(5, 3)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    with assert_untouched(model, data):
        lrpfx.explain(model, data[1:3])


def test_unfinished_training_step_goes_on() -> None:
    """A backward pass begun before the explanation ends as it would have without."""
    x = draw(4, 3)

    def gradients(explain: bool) -> list[Tensor]:
        model = nn.Sequential(mlp(), nn.BatchNorm1d(2)).train()
        loss = model(x).square().sum()
        if explain:
            model.eval()
            lrpfx.explain(model, x, create_graph=True)
            model.train()
        loss.backward()
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("capturing", MODES)
@pytest.mark.parametrize("calling", MODES)
def test_grad_mode_makes_no_difference(capturing: str, calling: str) -> None:
    model, x = mlp(), draw(2, 3)
    expected = lrpfx.explain(model, x)
    with MODES[capturing]():
        explainer = lrpfx.Explainer(model, x)
    with MODES[calling](), assert_untouched(model, x):
        explanation = explainer(x)
    assert torch.equal(explanation.relevance, expected.relevance)
    assert not explanation.output.requires_grad


def test_inference_tensor_as_input() -> None:
    model, x = mlp(), draw(2, 3)
    with torch.inference_mode():
        same = x.clone()
    assert torch.equal(lrpfx.explain(model, same).relevance, lrpfx.explain(model, x).relevance)


# -- Explainer: live parameters -------------------------------------------------------------------


@pytest.fixture
def fresh() -> tuple[nn.Module, lrpfx.Explainer]:
    """A model, and an Explainer that has explained and rewritten it once."""
    model = conv_net()
    explainer = lrpfx.Explainer(model, image())
    explainer(image(), layers=["act"])
    explainer.graph_module(image())
    return model, explainer


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def other_state() -> dict[str, Tensor]:
    return {k: v + 0.25 if v.is_floating_point() else v for k, v in conv_net().state_dict().items()}


def scaled(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach() * 1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": step,
    "load_state_dict": lambda m: m.load_state_dict(other_state()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(other_state(), assign=True),
    ".data in place": lambda m: m.conv.weight.data.mul_(1.5),
    ".data replaced": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 1.5),
    "weight replaced": lambda m: setattr(m.conv, "weight", scaled(m.conv.weight)),
    "bias replaced": lambda m: setattr(m.classifier, "bias", scaled(m.classifier.bias)),
    "layer replaced": lambda m: setattr(
        m, "classifier", trained(nn.Linear(32, 3)).requires_grad_()
    ),
    "statistics in place": lambda m: m.norm.running_var.add_(0.5),
    "statistics replaced": lambda m: setattr(m.norm, "running_mean", torch.ones(2)),
    "statistics by training": lambda m: (m.train(), m(image(4)), m.eval()),
    "frozen": lambda m: m.requires_grad_(False).conv.weight.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_reads_the_parameters_of_today(
    fresh: tuple[nn.Module, lrpfx.Explainer], change: Callable[[Any], Any]
) -> None:
    model, explainer = fresh
    before = explainer(image(), 1, layers=["act"])
    change(model)
    after = explainer(image(), 1, layers=["act"])
    expected = lrpfx.explain(model, image(), 1, layers=["act"])
    assert not torch.allclose(after.output, before.output)  # the change is one
    for found, wanted in [
        (after.output, model(image())),
        (after.relevance, expected.relevance),
        (after.layers["act"].relevance, expected.layers["act"].relevance),
        (explainer.graph_module(image()), model(image())),
    ]:
        torch.testing.assert_close(found, wanted)


def test_reads_parameters_behind_a_cache() -> None:
    """Some vision transformers cache what they compute from parameters (LeViT, TinyViT)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if "bias" not in m.cache:
            m.cache["bias"] = m.fc.weight.sum(0)
        return m.fc(x + m.cache["bias"])

    model = fc(forward, cache={})
    explainer = lrpfx.Explainer(model, draw(2, 3))
    model.fc.weight.data.mul_(2)
    torch.testing.assert_close(explainer(draw(2, 3)).output, model(draw(2, 3)))


def test_reads_tied_parameters() -> None:
    model, x = _tied(), draw(2, 3)
    explainer = lrpfx.Explainer(model, x)
    model[0].weight = model[2].weight = scaled(model[0].weight)
    torch.testing.assert_close(explainer(x).relevance, lrpfx.explain(model, x).relevance)
    model[2].weight = scaled(model[0].weight)  # no longer tied: the graph may say so, but not lie
    with contextlib.suppress(errors.CaptureError):
        torch.testing.assert_close(explainer(x).output, model(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda m: m.to(torch.float64), ["float32", "float64"], id="dtype"),
        pytest.param(lambda m: m.to("meta"), ["cpu", "meta"], id="device"),
        pytest.param(
            lambda m: setattr(m, "classifier", nn.Linear(32, 5)), ["classifier", "5"], id="shape"
        ),
        pytest.param(lambda m: setattr(m, "conv", nn.Identity()), ["conv.weight"], id="layer-gone"),
        pytest.param(
            lambda m: parametrizations.weight_norm(m.classifier), ["classifier"], id="parametrized"
        ),
        pytest.param(
            lambda m: m.register_parameter("new", nn.Parameter(torch.ones(1))), ["new"], id="added"
        ),
    ],
)
def test_change_of_form_is_an_error(
    fresh: tuple[nn.Module, lrpfx.Explainer], change: Callable[[Any], Any], said: list[str]
) -> None:
    model, explainer = fresh
    change(model)
    for use in (lambda: explainer(image()), lambda: explainer.graph_module(image())):
        with assert_untouched(model), pytest.raises(errors.CaptureError) as caught:
            use()
        check_form(caught.value)
        assert all(word in str(caught.value) for word in said), str(caught.value)


def test_there_and_back_again(fresh: tuple[nn.Module, lrpfx.Explainer]) -> None:
    model, explainer = fresh
    expected = explainer(image()).relevance
    model.double()
    with pytest.raises(errors.CaptureError):
        explainer(image())
    model.float()
    torch.testing.assert_close(explainer(image()).relevance, expected)


# -- Explainer: inputs to come --------------------------------------------------------------------


@pytest.mark.parametrize("example", [1, 2, 3])
def test_any_batch_size(example: int) -> None:
    model = conv_net()
    explainer = lrpfx.Explainer(model, image(example))
    assert explainer.report.notes == ()
    for n in (1, 2, 5):
        x = image(n, seed=7)
        explanation = explainer(x, layers=["act"])
        singles = [explainer(x[i : i + 1], layers=["act"]) for i in range(n)]
        torch.testing.assert_close(explanation.output, model(x))
        torch.testing.assert_close(explanation.relevance, torch.cat([s.relevance for s in singles]))
        torch.testing.assert_close(explanation.absorbed, torch.cat([s.absorbed for s in singles]))
        torch.testing.assert_close(
            explanation.layers["act"].relevance,
            torch.cat([s.layers["act"].relevance for s in singles]),
        )


STATIC: dict[str, Callable[[], nn.Module]] = {
    "reshape": lambda: fc(lambda m, x: m.fc(x.reshape(2, 3))),
    "buffer": lambda: fc(lambda m, x: m.fc(x + m.offset), offset=torch.ones(2, 3)),
    "len": lambda: fc(lambda m, x: m.fc(x) * len(x)),
    "loop": lambda: fc(lambda m, x: torch.stack([m.fc(row) for row in x])),
}


@pytest.mark.parametrize("make", STATIC.values(), ids=STATIC)
def test_model_for_one_batch_size(make: Callable[[], nn.Module]) -> None:
    """It is explained for that size, the report says so, and another size is an error."""
    model, x = make(), draw(2, 3)
    explainer = lrpfx.Explainer(model, x)
    torch.testing.assert_close(explainer(x).output, model(x))
    assert any("batch of 2 only" in note for note in explainer.report.notes)
    assert "batch of 2 only" in repr(explainer(x).report)
    with pytest.raises(errors.InputError, match=r"\[4, 3\].*\[2, 3\]") as caught:
        explainer(draw(4, 3))
    check_form(caught.value)


def test_model_for_one_sample() -> None:
    """As a batch of one is traced as two, this is another way to become static."""
    model, x = fc(lambda m, x: m.fc(x.reshape(1, 3))), draw(1, 3)
    explainer = lrpfx.Explainer(model, x)
    torch.testing.assert_close(explainer(x).output, model(x))
    with pytest.raises(errors.InputError):
        explainer(draw(2, 3))


def test_unbatched_input() -> None:
    """(3,) is no batch of three: what the model takes is explained."""
    model, x = trained(nn.Linear(3, 2)), draw(3)
    explanation = lrpfx.explain(model, x)
    assert explanation.relevance.shape == (3,)
    torch.testing.assert_close(explanation.output, model(x))


@pytest.fixture(scope="module")
def arms() -> lrpfx.Explainer:
    inputs = {"x": X, "y": Y, "scale": 2.0, "ids": IDS, "mode": "sum"}
    return lrpfx.Explainer(trained(TwoArms()).double(), inputs)


GIVEN = {"x": X, "y": Y, "scale": 2.0, "ids": IDS, "mode": "sum"}
WRONG: list[tuple[str, Any, list[str]]] = [
    # name, inputs, what the message must say
    ("number changed", GIVEN | {"scale": 3.0}, ["inputs['scale']", "3.0", "2.0"]),
    ("text changed", GIVEN | {"mode": "diff"}, ["inputs['mode']", "'diff'", "'sum'"]),
    ("number for a tensor", GIVEN | {"y": 1.0}, ["inputs['y']", "1.0"]),
    ("tensor for a number", GIVEN | {"scale": torch.tensor(2.0)}, ["inputs['scale']", "2.0"]),
    ("None for a tensor", GIVEN | {"ids": None}, ["inputs['ids']", "None"]),
    ("wrong shape", GIVEN | {"y": draw(2, 6).double()}, ["inputs['y']", "[2, 6]", "[N, 5]"]),
    ("dimension more", GIVEN | {"x": X[:, None]}, ["inputs['x']", "[2, 1, 3]"]),
    ("wrong dtype", GIVEN | {"x": X.float()}, ["inputs['x']", "float32", "float64"]),
    ("wrong integers", GIVEN | {"ids": IDS.int()}, ["inputs['ids']", "int32", "int64"]),
    ("wrong device", GIVEN | {"x": X.to("meta")}, ["inputs['x']", "meta", "cpu"]),
    ("two things wrong", GIVEN | {"x": X.float(), "mode": "a"}, ["inputs['x']", "inputs['mode']"]),
    ("batch of one input", GIVEN | {"y": draw(3, 5).double()}, ["[2, 3]"]),
    ("batch of the integers", GIVEN | {"ids": IDS[:1]}, ["[1, 2]"]),
    ("no samples", GIVEN | {"x": X[:0], "y": Y[:0], "ids": IDS[:0]}, ["0"]),
    ("NaN", GIVEN | {"y": Y / 0 * 0}, ["inputs['y']", "10 of 10"]),
    ("key missing", {"x": X, "y": Y}, ["inputs['scale']"]),
    ("key too many", GIVEN | {"mask": MASK}, ["inputs['mask']"]),
    ("tuple for a dict", (X, Y, 2.0, IDS), ["inputs[0]", "inputs['x']"]),
    ("tensor for a dict", X, ["inputs['x']"]),
]


@pytest.mark.parametrize(("inputs", "said"), [pytest.param(*row, id=name) for name, *row in WRONG])
def test_other_inputs_than_captured(arms: lrpfx.Explainer, inputs: Any, said: list[str]) -> None:
    kind = errors.NonFiniteError if "10 of 10" in said else errors.InputError
    with assert_untouched(None, inputs), pytest.raises(errors.LrpError) as caught:
        arms(inputs)
    assert type(caught.value) is kind, repr(caught.value)
    check_form(caught.value)
    assert all(text in str(caught.value) for text in said), str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(GIVEN, id="same"),
        # The order of keyword arguments means nothing.
        pytest.param(dict(reversed(GIVEN.items())), id="reversed"),
        pytest.param(OrderedDict(GIVEN), id="OrderedDict"),
        pytest.param(GIVEN | {"ids": torch.tensor([0, 0])}, id="other-integers"),
        pytest.param(
            GIVEN | {"x": X[[0, 1, 0]], "y": Y[[0, 1, 0]], "ids": IDS[[0, 1, 0]]}, id="batch-of-3"
        ),
    ],
)
def test_inputs_like_those_captured(arms: lrpfx.Explainer, inputs: Any) -> None:
    explanation = arms(inputs, 2)
    model = trained(TwoArms()).double()
    torch.testing.assert_close(explanation.output, model(**inputs))
    expected = lrpfx.explain(model, inputs, 2).relevance
    assert set(explanation.relevance) == set(inputs)
    for name in "xy":
        torch.testing.assert_close(explanation.relevance[name], expected[name])


def test_failed_call_does_no_harm(arms: lrpfx.Explainer) -> None:
    before = arms(GIVEN).relevance["x"]
    for _, inputs, _ in WRONG:
        with contextlib.suppress(errors.LrpError):
            arms(inputs)
    assert torch.equal(arms(GIVEN).relevance["x"], before)


def test_repr_of_an_explainer(arms: lrpfx.Explainer) -> None:
    text = repr(arms)
    assert "TwoArms" in text and "epsilon_all" in text
    assert "\n" not in text and len(text) <= 120


# -- Explainer: threads ---------------------------------------------------------------------------


@pytest.fixture
def four_threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_two_explainers_in_four_threads(four_threads: ThreadPoolExecutor) -> None:
    model = conv_net()
    explainers = [lrpfx.Explainer(model, image()), lrpfx.Explainer(model, image(), "epsilon_all")]
    jobs = [(e, 1 + i % 3, ["act"] if i % 2 else []) for i in range(8) for e in explainers]

    def work(job: tuple[lrpfx.Explainer, int, list[str]]) -> list[Any]:
        explainer, n, layers = job
        found = explainer(image(n, seed=n), 1, layers=layers)
        seen = [call for calls in found.layers.values() for call in calls]
        return [found.relevance, found.output, seen, found.report.to_dict()]

    serial = [work(job) for job in jobs]
    with assert_untouched(model):
        parallel = list(four_threads.map(work, jobs))
    for found, expected in zip(parallel, serial, strict=True):
        torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=0)
        assert found[3] == expected[3]  # relevance of one call is not booked by another


@pytest.mark.parametrize("shared", [True, False], ids=["one-model", "own-models"])
def test_capturing_in_four_threads(four_threads: ThreadPoolExecutor, shared: bool) -> None:
    """A capture must not be seen by what explains, or captures, the same model meanwhile."""
    models = [mlp()] * 4 if shared else [mlp() for _ in range(4)]
    x = draw(2, 3)
    expected = lrpfx.explain(models[0], x).relevance

    def work(model: nn.Module) -> list[Tensor]:
        explainer = lrpfx.Explainer(model, x)
        return [lrpfx.explain(model, x).relevance, explainer(x).relevance, explainer(x).relevance]

    with assert_untouched(models[0]):
        for found in four_threads.map(work, models):
            assert all(torch.equal(relevance, expected) for relevance in found)


# -- graph_module ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewritten() -> tuple[nn.Module, lrpfx.Explainer]:
    model = conv_net()
    return model, lrpfx.Explainer(model, image())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_graph_module_returns_the_output_and_pulls_relevance(
    rewritten: tuple[nn.Module, lrpfx.Explainer], n: int
) -> None:
    model, explainer = rewritten
    explanation = explainer(image(n), 1)
    x = image(n).requires_grad_()
    with assert_untouched(model):  # no parameter gets a gradient
        out = explainer.graph_module(x)
        out.backward(explanation.seed)
    torch.testing.assert_close(out, model(image(n)))
    torch.testing.assert_close(x.grad, explanation.relevance)


def test_graph_module_leaves_parameters_without_gradients(
    rewritten: tuple[nn.Module, lrpfx.Explainer],
) -> None:
    model, explainer = rewritten
    x = image().requires_grad_()
    graph = explainer.graph_module
    graph(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in [*model.parameters(), *graph.parameters()])
    # They are the model's own, not copies.
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in graph.parameters()} <= own


def test_graph_module_of_several_inputs_and_outputs() -> None:
    model = Apply(lambda m, x, y: {"a": m.fc(x), "b": m.fc(x) + y}, fc=nn.Linear(3, 3))
    x, y = draw(2, 3), draw(2, 3, seed=4)
    explainer = lrpfx.Explainer(model, (x, y))
    explanation = explainer((x, y), lambda out: out["b"][:, 1])
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    out = explainer.graph_module(*leaves)
    torch.testing.assert_close(out, model(x, y))
    out["b"].backward(explanation.seed)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(explanation.relevance))


def test_graph_module_without_grad(rewritten: tuple[nn.Module, lrpfx.Explainer]) -> None:
    model, explainer = rewritten
    with torch.no_grad():
        out = explainer.graph_module(image())
    torch.testing.assert_close(out, model(image()))
    assert not out.requires_grad


# torch's own tree specs warn about themselves when they are copied.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_graph_module_is_copied_with_its_rules(
    rewritten: tuple[nn.Module, lrpfx.Explainer],
) -> None:
    model, explainer = rewritten
    copied = copy.deepcopy(explainer.graph_module)
    explanation = explainer(image(), 1)
    x = image().requires_grad_()
    with assert_untouched(model):
        for parameter in copied.parameters():
            parameter.data.mul_(1)  # its own
        out = copied(x)
        out.backward(explanation.seed)
    torch.testing.assert_close(out, model(image()))
    torch.testing.assert_close(x.grad, explanation.relevance)


@pytest.mark.parametrize(
    "dump",
    [
        pytest.param(pickle.dumps, id="pickle"),
        pytest.param(lambda graph: torch.save(graph, io.BytesIO()), id="torch.save"),
        pytest.param(lambda graph: pickle.dumps({"graph": [graph]}), id="inside"),
    ],
)
def test_graph_module_refuses_to_be_pickled(
    rewritten: tuple[nn.Module, lrpfx.Explainer], dump: Callable[[Any], Any]
) -> None:
    """It would come back without its rules, and then give gradients for relevance."""
    with pytest.raises(TypeError, match="rules would be lost"):
        dump(rewritten[1].graph_module)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_copied_graph_module_cannot_be_pickled_either(
    rewritten: tuple[nn.Module, lrpfx.Explainer],
) -> None:
    copied = copy.deepcopy(rewritten[1].graph_module)
    with pytest.raises(Exception):  # noqa: B017  (torch's own pickler may see it first)
        pickle.dumps(copied)


@pytest.mark.parametrize(
    ("forward", "size"),
    [
        (lambda m, x: m.fc(x) * (2.0 if x.shape[0] > 4 else 1.0), 6),
        (lambda m, x: m.fc(x) * (2.0 if x.shape[0] % 2 == 0 else 1.0), 3),
        (lambda m, x: m.fc(x) * (2.0 if x.shape[0] > 1 else 1.0), 1),
    ],
    ids=["more than four", "even", "more than one"],
)
def test_branches_on_the_batch_size_are_seen(forward: Any, size: int) -> None:
    model = fc(forward)
    explainer = lrpfx.Explainer(model, torch.randn(2, 3))
    model.train()  # what the graph holds for is the mode of its capture
    assert explainer(torch.randn(2, 3), 1).output.shape == (2, 3)
    with pytest.raises(lrpfx.errors.InputError, match=f"does not hold for N={size}"):
        explainer(torch.randn(size, 3), 1)
    assert model.training


def test_inputs_without_entries_have_relevance_without_entries() -> None:
    model = fc(lambda m, x: m.fc(x).sum(1))
    for ledger in (True, False):
        explanation = lrpfx.explain(model, torch.randn(2, 0, 3), 1, ledger=ledger)
        assert explanation.relevance.shape == (2, 0, 3)


def test_a_floating_tensor_that_holds_ids_among_others() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rest, self.head = nn.Embedding(5, 4), nn.Linear(2, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x[:, 0].long()) + self.rest(x[:, 1:]))

    torch.manual_seed(0)
    model = Table().double().eval()
    x = torch.tensor([[1.0, 0.5, 2.0], [3.0, -1.0, 0.2]], dtype=torch.float64)
    vectors = model.embed(x[:, 0].long()).detach().requires_grad_()
    rest = x[:, 1:].clone().requires_grad_()
    model.head(vectors + model.rest(rest))[:, 0].sum().backward()
    expected = torch.cat([(vectors * vectors.grad).sum(-1, keepdim=True), rest * rest.grad], 1)
    for ledger in (True, False):
        got = lrpfx.explain(model, x, 0, rules="attnlrp", ledger=ledger).relevance
        torch.testing.assert_close(got, expected.detach())
