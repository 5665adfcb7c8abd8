"""target= -> seed: every form of a target, and every way to get it wrong."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from tests.conftest import Apply, assert_untouched, lived_in
from tests.test_errors import check_form


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """The model with parameters that are the same in every session."""
    for i, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=i)
    return model.eval()


@pytest.fixture(scope="module")
def classes() -> lrpfx.Explainer:
    """(3, 5) -> (3, 4), with negative outputs among the largest and the smallest."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    return lrpfx.Explainer(trained(model), draw(3, 5))


@pytest.fixture(scope="module")
def maps() -> lrpfx.Explainer:
    """(3, 1, 2, 2) -> (3, 4, 2, 2), a class map."""
    return lrpfx.Explainer(trained(nn.Conv2d(1, 4, 1)), draw(3, 1, 2, 2))


@pytest.fixture(scope="module")
def values() -> lrpfx.Explainer:
    """(3, 5) -> (3,), one value per sample."""
    model = trained(Apply(lambda m, x: m.fc(x).squeeze(1), fc=nn.Linear(5, 1)))
    return lrpfx.Explainer(model, draw(3, 5))


INPUTS = {"classes": draw(3, 5), "maps": draw(3, 1, 2, 2), "values": draw(3, 5)}


def first_class(out: Tensor) -> Tensor:
    return out[:, 0]


# -- the seed of every form -----------------------------------------------------------------------

Seed = Callable[[Tensor], Tensor]  # model output -> the seed that a target stands for


def at(*places: Any) -> Seed:
    """One-hot times output: the output at the given places, zero elsewhere."""

    def seed(out: Tensor) -> Tensor:
        hot = torch.zeros_like(out)
        for place in places:
            hot[place] = out[place]
        return hot

    return seed


def softmax_seed(out: Tensor) -> Tensor:
    """Gradient of the second softmax output times output, from the formula."""
    p = out.softmax(1)
    return out * p[:, 1:2] * (torch.eye(4)[1] - p)


PER_SAMPLE = at((0, 3), (1, 0), (2, 3))
ALL = slice(None)
FORMS: list[tuple[str, str, Any, Seed]] = [
    # name, model, target, seed
    ("int", "classes", 3, at((ALL, 3))),
    ("numpy int", "classes", np.int64(3), at((ALL, 3))),
    ("tensor without dimensions", "classes", torch.tensor(3), at((ALL, 3))),
    ("from the end", "classes", -1, at((ALL, 3))),
    ("numpy int from the end", "classes", np.int64(-2), at((ALL, 2))),
    ("classes from the end", "classes", [-1, 0, -1], PER_SAMPLE),
    ("index from the end", "classes", (-1,), at((ALL, 3))),
    ("pixel from the end", "maps", (-1, 0, np.int64(-1)), at((ALL, 3, 0, 1))),
    ("list", "classes", [3, 0, 3], PER_SAMPLE),
    ("range", "classes", range(1, 4), at((0, 1), (1, 2), (2, 3))),
    ("int64", "classes", torch.tensor([3, 0, 3]), PER_SAMPLE),
    ("int32", "classes", torch.tensor([3, 0, 3], dtype=torch.int32), PER_SAMPLE),
    # As an index, uint8 would be a mask.
    ("uint8", "classes", torch.tensor([3, 0, 3], dtype=torch.uint8), PER_SAMPLE),
    ("numpy array", "classes", np.array([3, 0, 3]), PER_SAMPLE),
    # A tuple is an index into each sample, so (3,) is class 3 and not a sequence of classes.
    ("tuple of one", "classes", (3,), at((ALL, 3))),
    ("tuple of a numpy int", "classes", (np.int64(3),), at((ALL, 3))),
    ("list of tensors", "classes", [torch.tensor(k) for k in (3, 0, 3)], PER_SAMPLE),
    ("tuple with a slice", "classes", (slice(1, 3),), at((ALL, slice(1, 3)))),
    ("tuple with a list", "classes", ([0, 3],), at((ALL, 0), (ALL, 3))),
    ("empty tuple", "classes", (), at(...)),
    ("callable", "classes", first_class, at((ALL, 0))),
    ("lambda", "classes", lambda out: out[:, 3], at((ALL, 3))),
    ("partial", "classes", functools.partial(torch.select, dim=1, index=3), at((ALL, 3))),
    ("sum over the batch", "classes", lambda out: out[:, 3].sum(), at((ALL, 3))),
    (
        "difference",
        "classes",
        lambda out: out[:, 3] - 2 * out[:, 0],
        lambda out: at((ALL, 3))(out) - 2 * at((ALL, 0))(out),
    ),
    ("nonlinear", "classes", lambda out: out.softmax(1)[:, 1], softmax_seed),
    ("channel of a map", "maps", 3, at((ALL, 3))),
    ("channel per sample", "maps", [3, 0, 3], PER_SAMPLE),
    ("pixel of a map", "maps", (3, 0, 1), at((ALL, 3, 0, 1))),
    ("last row of a map", "maps", (3, 1), at((ALL, 3, 1))),
    ("pixel of all channels", "maps", (ALL, 0, 1), at((ALL, ALL, 0, 1))),
    ("mean of a map", "maps", lambda out: out[:, 3].mean((1, 2)), lambda o: at((ALL, 3))(o) / 4),
    ("one value", "values", None, at(...)),
    ("callable of one value", "values", lambda out: out, at(...)),
]


@pytest.mark.parametrize(
    ("which", "target", "seed"), [pytest.param(*form, id=name) for name, *form in FORMS]
)
def test_seed(which: str, target: Any, seed: Seed, request: pytest.FixtureRequest) -> None:
    explainer = request.getfixturevalue(which)
    explanation = explainer(INPUTS[which], target)
    expected = seed(explanation.output)
    torch.testing.assert_close(explanation.seed, expected)
    # ... and relevance starts from just that seed.
    given_seed = explainer(INPUTS[which], expected)
    torch.testing.assert_close(explanation.relevance, given_seed.relevance)
    assert explanation.relevance.abs().sum() > 0
    started = explanation.report.started
    assert started == pytest.approx(expected.sum().item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("which", ["classes", "maps"])
def test_none_is_the_largest_output_of_each_sample(
    which: str, request: pytest.FixtureRequest
) -> None:
    explanation = request.getfixturevalue(which)(INPUTS[which])
    out = explanation.output
    largest = out == out.flatten(1).amax(1).reshape(-1, *[1] * (out.ndim - 1))
    assert largest.sum() == len(out)  # no ties in this example
    torch.testing.assert_close(explanation.seed, out * largest)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param(2, [2, 2, 2], id="int"),
        pytest.param([-1, 0, -4], [3, 0, 0], id="from the end"),
        pytest.param([3, 0, 3], [3, 0, 3], id="list"),
        pytest.param(torch.tensor([3, 0, 3]), [3, 0, 3], id="tensor"),
        pytest.param((2,), None, id="tuple"),
        pytest.param(first_class, None, id="callable"),
        pytest.param(torch.ones(3, 4), None, id="seed"),
    ],
)
def test_explained_class(classes: lrpfx.Explainer, target: Any, expected: list[int] | None) -> None:
    found = classes(INPUTS["classes"], target).target
    assert found is None if expected is None else found.tolist() == expected


def test_explained_class_of_none_is_the_argmax(classes: lrpfx.Explainer) -> None:
    explanation = classes(INPUTS["classes"])
    assert torch.equal(explanation.target, explanation.output.argmax(1))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        pytest.param(None, "argmax", id="none"),
        pytest.param(2, "class 2", id="int"),
        pytest.param([0, 1, 2], "class per sample", id="list"),
        pytest.param((2,), "output[:, 2]", id="tuple"),
        pytest.param(first_class, "first_class", id="callable"),
        # A partial has no name of its own.
        pytest.param(functools.partial(first_class), "partial", id="partial"),
        pytest.param(torch.ones(3, 4), "given", id="seed"),
    ],
)
def test_report_names_the_target(classes: lrpfx.Explainer, target: Any, said: str) -> None:
    explanation = classes(INPUTS["classes"], target)
    assert said in explanation.report.target
    assert said in repr(explanation) and said in repr(explanation.report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_given_seed_is_used_unchanged(classes: lrpfx.Explainer, dtype: torch.dtype) -> None:
    """Also where it is negative, zero, or has nothing to do with the output."""
    seed = torch.tensor([[1.0, -2, 0, 0.5], [0, 0, 0, 0], [-1, -1, -1, -1]], dtype=dtype)
    explanation = classes(INPUTS["classes"], seed)
    assert torch.equal(explanation.seed.to(dtype), seed)
    assert explanation.seed.dtype == explanation.output.dtype
    assert torch.equal(explanation.relevance[1], torch.zeros(5))  # no seed, no relevance
    assert seed.grad is None and not seed.requires_grad


@given(
    first=st.lists(st.integers(-8, 8), min_size=12, max_size=12),
    second=st.lists(st.integers(-8, 8), min_size=12, max_size=12),
    factor=st.integers(-3, 3),
)
def test_relevance_is_linear_in_the_seed(
    classes: lrpfx.Explainer, first: list[int], second: list[int], factor: int
) -> None:
    """Which no rule, and no target, may break: a rule shares relevance, whatever there is of it."""
    a, b = (torch.tensor(s, dtype=torch.float32).reshape(3, 4) for s in (first, second))

    def relevance(seed: Tensor) -> Tensor:
        return classes(INPUTS["classes"], seed).relevance

    together = relevance(a + factor * b)
    apart = relevance(a) + factor * relevance(b)
    scale = max(1.0, relevance(a).abs().max().item(), relevance(b).abs().max().item())
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4 * scale)


def test_samples_do_not_mix(classes: lrpfx.Explainer) -> None:
    targets = [3, 0, 2]
    together = classes(INPUTS["classes"], targets).relevance
    for i, target in enumerate(targets):
        alone = classes(INPUTS["classes"][i : i + 1], target).relevance
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_callable_may_write_into_the_output(classes: lrpfx.Explainer, create_graph: bool) -> None:
    """It is given a copy: what it does to it is part of the target and not of the model."""

    def doubled(out: Tensor) -> Tensor:
        return out.mul_(2.0)[:, 1]

    x = INPUTS["classes"]
    got = classes(x, doubled, create_graph=create_graph)
    expected = classes(x, lambda out: 2.0 * out[:, 1], create_graph=create_graph)
    torch.testing.assert_close(got.relevance, expected.relevance)
    assert torch.equal(got.output, expected.output)


# -- what is no target ----------------------------------------------------------------------------


def raises(out: Tensor) -> Tensor:
    raise KeyError("no such thing")


WRONG: list[tuple[str, str, Any, str]] = [
    # name, model, target, what the message must say
    ("class too large", "classes", 4, r"\[4\].* 4 classes, 0 to 3"),
    ("class before the first", "classes", -5, r"\[-5\].*0 to 3"),
    ("one class too large", "classes", [0, 7, 1], r"\[7\]"),
    ("a new dimension", "classes", (None,), "None is no index"),
    ("class beyond int64", "classes", 2**70, "."),
    ("too few classes", "classes", [0, 1], r"\(2,\).* 3 samples"),
    ("too many classes", "classes", torch.tensor([0, 1, 2, 3]), r"\(4,\).* 3 samples"),
    ("no classes", "classes", [], "."),
    ("ragged", "classes", [[0], [1, 2], []], r"\[1, 2, 0\]"),
    ("str", "classes", "cat", "'cat'"),
    ("list of str", "classes", ["cat", "dog", "cow"], "'cat'"),
    ("float", "classes", 1.5, "1.5"),
    ("list of floats", "classes", [0.0, 1.0, 2.0], "integers"),
    # True counts as 1 almost everywhere in Python, and is never meant to.
    ("bool", "classes", True, "True"),
    ("bool tensor", "classes", torch.tensor([True, False, True]), "mask"),
    ("dict", "classes", {"class": 1}, "'class'"),
    ("set", "classes", {1}, r"\{1\}"),
    ("complex", "classes", 1j, "1j"),
    ("classes on meta", "classes", torch.zeros(3, dtype=torch.long, device="meta"), "."),
    ("numpy of str", "classes", np.array(["cat", "dog", "cow"]), "cat"),
    ("numpy of objects", "classes", np.array([None, 1, 2]), "None"),
    ("numpy backwards", "classes", np.arange(3.0)[::-1], "."),
    ("index too large", "classes", (4,), r"\(4,\)"),
    ("index of None in a tuple", "classes", ((None, 0),), "None"),
    ("index before the first", "classes", (-5,), r"\(-5,\)"),
    ("numpy index before the first", "classes", (np.int64(-5),), "-5"),
    ("index too deep", "classes", (0, 0), r"\(0, 0\)"),
    ("index of bool", "classes", (True,), "True"),
    ("index of str", "classes", ("cat",), "'cat'"),
    ("index of float", "classes", (1.0,), "1.0"),
    # Nothing would be explained, and the map would be zero without a word.
    ("index of nothing", "classes", (slice(7, 9),), r"slice\(7, 9"),
    ("pixel outside", "maps", (0, 2, 0), r"\(0, 2, 0\)"),
    ("channel outside", "maps", 4, r"0 to 3"),
    ("seed of classes' shape", "classes", torch.zeros(3), r"\(3, 4\).*\(3,\)"),
    ("seed transposed", "classes", torch.zeros(4, 3), r"\(3, 4\).*\(4, 3\)"),
    ("seed for one sample", "classes", torch.zeros(1, 4), r"\(3, 4\).*\(1, 4\)"),
    ("seed with NaN", "classes", torch.full((3, 4), torch.nan), "NaN"),
    ("seed with infinity", "classes", torch.full((3, 4), torch.inf), "infinite"),
    ("complex seed", "classes", torch.zeros(3, 4, dtype=torch.complex64), "complex"),
    ("seed on meta", "classes", torch.zeros(3, 4, device="meta"), "meta"),
    ("class of one value", "values", 0, r"\(3,\)"),
    ("callable raises", "classes", raises, "raises.*KeyError.*no such thing"),
    ("callable takes no output", "classes", lambda: None, "lambda.*TypeError"),
    ("callable returns a number", "classes", lambda out: 1.0, r"\(3,\).*float"),
    ("callable returns None", "classes", lambda out: None, "NoneType"),
    ("callable returns all", "classes", lambda out: out, r"\(3,\).*\(3, 4\)"),
    ("callable keeps the dimension", "classes", lambda out: out[:, :1], r"\(3,\).*\(3, 1\)"),
    ("callable returns classes", "classes", lambda out: out.argmax(1), "does not depend"),
    ("callable detaches", "classes", lambda out: out[:, 0].detach(), "does not depend"),
    ("callable ignores", "classes", lambda out: torch.ones(3, requires_grad=True), "depend"),
    ("callable returns complex", "classes", lambda out: out[:, 1] * 1j, r"complex64.*\(3,\)"),
    ("sparse seed", "classes", torch.eye(3, 4).to_sparse(), "sparse.*to_dense"),
    ("callable divides by zero", "classes", lambda out: out[:, 0] / 0, "lambda.*(NaN|infinit)"),
]


@pytest.mark.parametrize(
    ("which", "target", "said"), [pytest.param(*case, id=name) for name, *case in WRONG]
)
def test_says_what_is_wrong(
    which: str, target: Any, said: str, request: pytest.FixtureRequest
) -> None:
    explainer = request.getfixturevalue(which)
    with pytest.raises(errors.LrpError, match=f"(?s){said}") as caught:
        explainer(INPUTS[which], target)
    assert type(caught.value) is errors.TargetError, repr(caught.value)
    check_form(caught.value)


def test_keeps_the_cause() -> None:
    """The traceback of the user's own callable is not lost."""
    with pytest.raises(errors.TargetError) as caught:
        lrpfx.explain(nn.Linear(5, 4), INPUTS["classes"], raises)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "target", [pytest.param(t, id=name) for name, which, t, _ in WRONG if which == "classes"][::5]
)
def test_failing_leaves_the_model_alone(target: Any) -> None:
    model, inputs = lived_in(nn.Linear(5, 4).eval()), INPUTS["classes"].clone()
    with assert_untouched(model, inputs), pytest.raises(Exception):  # noqa: B017  (see above)
        lrpfx.explain(model, inputs, target)


@pytest.mark.parametrize(
    ("forward", "target"),
    [
        # The first output is the model's weights, the second one is live.
        pytest.param(lambda m, x: (m.fc.weight + 0, m.fc(x)), None, id="first-output"),
        pytest.param(
            lambda m, x: (m.fc.weight + 0, m.fc(x)), lambda out: out[0].sum(), id="callable"
        ),
    ],
)
def test_output_without_the_input(forward: Any, target: Any) -> None:
    model = Apply(forward, fc=nn.Linear(5, 4))
    with pytest.raises(errors.TargetError, match="does not depend") as caught:
        lrpfx.explain(model, INPUTS["classes"], target)
    check_form(caught.value)


def test_infinite_output_of_another_class() -> None:
    """Models mask classes by -inf; the others can be explained all the same."""
    masked = torch.tensor([True, False, False, False])
    model = trained(Apply(lambda m, x: m.fc(x).masked_fill(masked, -torch.inf), fc=nn.Linear(5, 4)))
    plain = lrpfx.explain(model.fc, INPUTS["classes"], 2)
    torch.testing.assert_close(
        lrpfx.explain(model, INPUTS["classes"], 2).relevance, plain.relevance
    )


# Several targets of each sample ------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["epsilon_plus", "attnlrp"])
def test_several_targets_are_the_single_ones_stacked(rules: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, rules)
    wanted = [[3, 0, 1], [2, 2, 0]]
    several = explainer(x, wanted, layers=["0"])
    assert several.relevance.shape == (3, 2, 1, 6, 6) and several.absorbed.shape == (3, 2)
    for k in range(3):
        one = explainer(x, [row[k] for row in wanted], layers=["0"])
        torch.testing.assert_close(several.relevance[k], one.relevance)
        torch.testing.assert_close(several.seed[k], one.seed)
        torch.testing.assert_close(several.target[k], one.target)
        torch.testing.assert_close(several.layers["0"].relevance[k], one.layers["0"].relevance)
    every = explainer(x, "all")
    assert every.relevance.shape == (4, 2, 1, 6, 6)
    torch.testing.assert_close(every.relevance[1], explainer(x, 1).relevance)
    torch.testing.assert_close(explainer(x, torch.tensor(wanted)).relevance, several.relevance)
    assert "3 targets of each sample" in repr(several.report)


@pytest.mark.parametrize(
    "target", [[[None], [1]], [[1, 2]], [[1], [2, 3]], [[], []], [[1], [9]], [[1.5], [2.0]]]
)
def test_several_targets_that_do_not_fit_are_refused(target: list[list[int]]) -> None:
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    with pytest.raises(lrpfx.errors.TargetError):
        lrpfx.explain(model, x, target)
    with pytest.raises(lrpfx.errors.TargetError):
        lrpfx.explain(nn.Conv1d(3, 4, 1), torch.randn(2, 3, 5), "all")


def several(explainer: lrpfx.Explainer, x: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
    """Relevance for the targets at once, and for one after the other."""
    with torch.no_grad():
        together = explainer(x, [targets] * len(x), ledger=False).relevance
        return together, torch.stack([explainer(x, t, ledger=False).relevance for t in targets])


class Attending(nn.Module):
    """Convolution, norm, attention and an activation: an op of each kind that has its own form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.max_pool2d(self.bn(self.conv(x)).relu(), 2)
        tokens = self.norm(a.flatten(2).mT)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(nn.functional.gelu(tokens).mean(1))


attending = functools.cache(Attending)
COMPOSITES = ["epsilon_all", "epsilon_plus_flat", "epsilon_alpha2_beta1", "attnlrp", "cplrp"]
COMPOSITES += ["guided_backprop", lrpfx.composites.EpsilonGammaBox(-3, 3)]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("rules", "freeze", "bound"),
    [(rules, False, None) for rules in COMPOSITES]
    + [("epsilon_plus_flat", True, None), ("epsilon_alpha2_beta1", True, 3000)]
    + [("attnlrp", False, 1), ("cplrp", False, 3000)],
    ids=lambda value: str(value)[:20],
)
def test_targets_at_once_are_those_one_after_the_other(
    rules: Any, freeze: bool, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in parts that keep to a bound on memory."""
    if bound is not None:
        monkeypatch.setattr("lrpfx.run.backward.BOUND", bound)
    x = draw(2, 1, 8, 8).double()
    explainer = lrpfx.Explainer(attending(), x, rules, freeze=freeze)
    together, alone = several(explainer, x, [4, 0, 1, 2, 0])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-14)


def test_what_rules_compute_of_activations_is_computed_once() -> None:
    runs = []

    def stabilizer(z: Tensor) -> Tensor:
        runs.append(z.shape)
        return z + torch.where(z >= 0, 1e-6, -1e-6)

    x = draw(2, 5).double()
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6))).double()
    explainer = lrpfx.Explainer(model, x, lrpfx.composites.EpsilonAll(stabilizer))
    several(explainer, x, [0])
    runs.clear()
    explainer(x, "all")
    assert runs == [(2, 6), (2, 4)]


def test_a_rule_that_takes_no_batch_of_targets() -> None:
    """They are explained one after the other."""

    @dataclasses.dataclass(frozen=True)
    class Halved(lrpfx.Epsilon):
        def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Any:
            return super().propagate(call, x, z, R if R.sum() > 0 else R / 2)

        def carries(self, site: Any, taken: bool) -> bool:
            return False

    x = draw(2, 5).double()
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6))).double()
    together, alone = several(lrpfx.Explainer(model, x, [("linear", Halved())]), x, [0, 3, 5])
    torch.testing.assert_close(together, alone)


def test_one_hot_rows_are_not_taken_for_classes() -> None:
    explainer = lrpfx.Explainer(nn.Linear(4, 3), torch.randn(2, 4))
    rows = F.one_hot(torch.tensor([2, 0]), 3)
    with pytest.raises(lrpfx.errors.TargetError, match=r"one-hot(.|\n)*argmax"):
        explainer(torch.randn(2, 4), rows)
    assert explainer(torch.randn(2, 4), [[0, 1, 2], [2, 1, 0]]).relevance.shape == (3, 2, 4)


def test_of_a_map_the_report_says_which_dimension_a_class_is_of() -> None:
    target = lrpfx.explain(nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 3), 1).report.target
    assert target == "class 1 (dimension 1, all of [3, 3]), one-hot times output"


def test_a_single_output_is_no_class_and_a_mask_no_target() -> None:
    model, x = nn.Sequential(nn.Linear(3, 1)).eval(), torch.randn(2, 3)
    assert lrpfx.explain(model, x).report.target == "the output value"
    with pytest.raises(errors.TargetError, match="is a mask") as caught:
        lrpfx.explain(nn.Conv2d(1, 2, 1).eval(), torch.randn(1, 1, 2, 2), torch.ones(2, 2) > 0)
    assert "lambda out" in str(caught.value)


def test_another_length_is_told_what_lets_it_vary() -> None:
    explainer = lrpfx.Explainer(nn.Sequential(nn.Linear(3, 1)).eval(), torch.randn(2, 4, 3))
    with pytest.raises(errors.InputError, match=r"dynamic=\(1,\)"):
        explainer(torch.randn(2, 5, 3), (0, 0))


@dataclasses.dataclass
class Named:
    scores: Tensor
    kept: Tensor


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (lambda s, h: {"scores": s, "kept": h}, "'scores'"),
        (lambda s, h: {0: s, 1: h}, "0"),
        (Named, "'scores'"),
        (lambda s, h: (s, h), "0"),
    ],
)
def test_of_several_outputs_the_one_explained_is_named(form: Callable, named: str) -> None:
    model = Apply(lambda m, x: form(m.fc(x), x.sum(1)), fc=nn.Linear(3, 2)).eval()
    for explained in (
        lrpfx.explain(model, draw(2, 3), 1),
        lrpfx.Explainer(model, draw(2, 3))(draw(2, 3), 1),
        lrpfx.attributors.gradient(model, draw(2, 3), 1),
    ):
        assert explained.report.target.endswith(f"of output {named} (the first of 2 tensors)")
