"""Inputs of every structure, and those that an Explainer is called with later."""

import contextlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrpfx
from lrpfx import errors
from tests.conftest import Apply, assert_untouched
from tests.oracle.networks import (
    IDS,
    LRP_0,
    MASK,
    TwoArms,
    X,
    Y,
    conv_net,
    draw,
    fc,
    image,
    mlp,
    trained,
)
from tests.test_errors import check_form

pytestmark = pytest.mark.usefixtures("each_way")


class Nested(nn.Module):
    """TwoArms of inputs in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.arms = TwoArms()

    def forward(self, pair: Any, extra: Any = None) -> Tensor:
        x, y = pair.values() if isinstance(pair, dict) else pair
        return self.arms(x, y)


Pair = namedtuple("Pair", "x y")


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
    assert explanation.seed.dtype == dtype
    assert explanation.relevance.dtype == (torch.float32 if dtype == torch.float16 else dtype)
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
    """(3,) is no batch of three: what the model takes is explained, if it is said what of it."""
    model, x = trained(nn.Linear(3, 2)), draw(3)
    with pytest.raises(errors.TargetError, match=r"no dimension of samples[\s\S]*x\[None\]"):
        lrpfx.explain(model, x)
    explanation = lrpfx.explain(model, x, lambda out: out[1])
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
