"""Every error says what happened, where, and what to do; and leaves the user's things alone.

A case is a call that must fail: by the right error, and a model in use is left as it was. Errors
about ``target=`` are in test_targets.py.
"""

import copy
import random
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Norm,
    Pass,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    Stabilizer,
    ZBox,
    ZPlus,
    composites,
    errors,
)
from tests.conftest import Apply, assert_untouched, lived_in
from tests.oracle.networks import ConvNet


def x(*shape: int) -> Tensor:
    """Two samples of three features, or of another shape; the same at every call."""
    return torch.randn(shape or (2, 3), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """A call that must fail.

    Args:
        name: What is wrong.
        error: The class of the error, exactly; LrpError stands for any.
        model: Makes the model.
        inputs: Makes the inputs.
        says: What the message must match: the places and values in question.
        unsaid: What it must not match.
        options: Keyword arguments of ``explain``.
    """

    name: str
    error: type[errors.LrpError]
    model: Callable[[], Any]
    inputs: Callable[[], Any] = x
    says: tuple[str, ...] = ()
    unsaid: str = "(?!)"
    options: dict[str, Any] = field(default_factory=dict)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def image() -> Tensor:
    return x(2, 1, 4, 4)


def fc(forward: Callable[..., Any], **members: Any) -> Callable[[], nn.Module]:
    """Makes a model with a linear layer ``fc`` and the given forward(model, x)."""
    return lambda: Apply(forward, fc=nn.Linear(3, 3), **members)


# -- inputs ---------------------------------------------------------------------------------------


class Array:
    """As a table of pandas."""

    def __array__(self) -> np.ndarray:
        return np.zeros((2, 3))


class Picture(Array):
    def getbands(self) -> tuple[str, ...]:
        return ("R", "G", "B")


def raises_key_error(m: Any, x: Tensor) -> Tensor:
    layers = {"fc": m.fc}
    return layers["no such layer"](x)


def with_one(value: float) -> Tensor:
    inputs = x()
    inputs[1, 2] = value
    return inputs


INPUTS = [
    Case("features", errors.InputError, mlp, lambda: x(2, 5), (r"\[2, 5\]",)),
    Case("dimensions", errors.InputError, ConvNet, lambda: x(2, 3), (r"\[2, 3\]",)),
    Case("dtype", errors.InputError, mlp, lambda: x().double(), ("float64",)),
    Case("input's device", errors.InputError, mlp, lambda: x().to("meta"), ("meta",)),
    Case("model's device", errors.InputError, lambda: mlp().to("meta"), x, ("meta",)),
    Case(  # model and input agree, but there are no values
        "no values on meta",
        errors.InputError,
        lambda: mlp().to("meta"),
        lambda: x().to("meta"),
        ("meta",),
    ),
    Case("too many inputs", errors.InputError, mlp, lambda: (x(), x()), ("positional",)),
    Case("unknown keyword", errors.InputError, mlp, lambda: {"image": x()}, ("'image'",)),
    Case(
        "the model raises",
        errors.InputError,
        fc(raises_key_error),
        says=("KeyError", r'test_errors\.py:\d+ .*layers\["no such layer"\]'),
    ),
    Case("no inputs", errors.InputError, mlp, lambda: ()),
    Case("no samples", errors.InputError, mlp, lambda: x()[:0]),
    Case("None", errors.InputError, mlp, lambda: None, ("NoneType",)),
    Case("numpy", errors.InputError, mlp, lambda: x().numpy(), ("ndarray",)),
    Case(
        "lists of numbers",
        errors.InputError,
        mlp,
        lambda: x(20).tolist(),
        ("and 15 more", r"torch\.tensor\(x\)"),
    ),
    Case("what holds an array", errors.InputError, mlp, lambda: Array(), (r"numpy\.asarray\(x\)",)),
    Case("image of Pillow", errors.InputError, mlp, lambda: Picture(), ("to_tensor",)),
    Case("text as output", errors.CaptureError, fc(lambda m, x: "text"), x, ("no tensor",)),
    Case("integers", errors.InputError, mlp, lambda: x().long(), ("int64",)),
    Case("complex", errors.InputError, mlp, lambda: x().to(torch.complex64), ("complex64",)),
    Case("function as model", errors.InputError, lambda: F.relu, x, ("function",)),
    Case("class as model", errors.InputError, lambda: nn.ReLU, x, ("type",)),
    Case("NaN", errors.NonFiniteError, mlp, lambda: with_one(torch.nan), ("the input: 1 of 6",)),
    Case("infinity", errors.NonFiniteError, mlp, lambda: with_one(-torch.inf), ("1 of 6",)),
    Case(
        "NaN in one of two",
        errors.NonFiniteError,
        fc(lambda m, x, y: m.fc(x) + m.fc(y)),
        lambda: (x(), with_one(torch.nan)),
        (r"inputs\[1\]: 1 of 6",),
        r"inputs\[0\]",
    ),
    Case(
        "NaN in a keyword",
        errors.NonFiniteError,
        fc(lambda m, a, b: m.fc(a) + m.fc(b)),
        lambda: {"a": x(), "b": with_one(torch.nan)},
        (r"inputs\['b'\]: 1 of 6",),
        r"inputs\['a'\]",
    ),
]

# -- values that stop being finite on the way -----------------------------------------------------


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).abs().add(1).mul(1000).exp()
        return self.fc(x)


def cancelling() -> nn.Module:
    """Three layers a, b, c; for the input [1, -1 + 2^-24] b cancels to 6e-8 of its summands."""
    model = nn.Sequential()
    for name, weight in {"a": [[1, 0], [0, 1]], "b": [[1e4, 1e4], [1, 0]], "c": [[1e3, 1]]}.items():
        model.add_module(name, nn.Linear(2, len(weight), bias=False))
        model[-1].weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    return model.eval()


NOT_FINITE = [
    Case(
        "forward overflows",
        errors.NonFiniteError,
        Overflows,
        says=(r"\bexp\b", r"test_errors\.py:\d+ .*mul\(1000\)\.exp\(\)"),
    ),
    Case(
        "LRP-0 overflows",
        errors.NonFiniteError,
        cancelling,
        lambda: torch.tensor([[1.0, -1.0 + 2**-24]]),
        (r"\bb: linear", "Epsilon"),
        options={"rules": composites.EpsilonAll(0.0), "target": torch.full((1, 1), 1e35)},
    ),
    Case(  # alpha times a seed near the largest float32, at the layer next to the output
        "alpha-beta overflows",
        errors.NonFiniteError,
        cancelling,
        lambda: torch.tensor([[1.0, 2.0]]),
        (r"\bc: linear", "AlphaBeta"),
        options={"rules": [("c", AlphaBeta(2, 1))], "target": torch.full((1, 1), 3e38)},
    ),
    Case(  # the model's own layer stands in no module of the model, and has no line of the user's
        "overflow in a bare layer",
        errors.NonFiniteError,
        lambda: nn.Linear(3, 2, bias=False),
        says=("linear", "AlphaBeta"),
        options={"rules": [("linear", AlphaBeta(2, 1))], "target": torch.full((2, 2), 3e38)},
    ),
]

# -- capture --------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return -self.fc(x)


def branches_inside() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Branches()).eval()


def counts(m: Any, x: Tensor) -> Tensor:
    m.n += 1
    return m.fc(x) * m.n


def alternates(m: Any, x: Tensor) -> Tensor:
    m.n = 1 - m.n
    return m.fc(x) if m.n else -m.fc(x)


def through_numpy(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.from_numpy(np.tanh(x.detach().numpy())))


class Chaotic(nn.Module):
    """Doubles a rounding error at every step; its graph begins with one, whichever kernels run."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.abs() / 4
        if torch.compiler.is_exporting():
            y = y * (1 + 2 * torch.finfo(y.dtype).eps)
        for _ in range(40):
            y = 3.99 * y * (1 - y)
        return y


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module.eval())


LINE = r"test_errors\.py:\d+ +"
CAPTURE = [
    Case("branch on data", errors.CaptureError, Branches, x, (LINE + r"if x\.sum\(\) > 0:",)),
    Case("branch inside", errors.CaptureError, branches_inside, x, (LINE + r"if x\.sum\(\) > 0:",)),
    Case(
        "scripted", errors.CaptureError, lambda: scripted(nn.Linear(3, 2)), x, ("script", "model")
    ),
    Case(
        "scripted inside",
        errors.CaptureError,
        lambda: nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), head=scripted(nn.Linear(3, 2)))),
        says=("script", r"\bhead\b"),
        unsaid=r"\bstem\b",
    ),
    Case(
        "traced", errors.CaptureError, lambda: torch.jit.trace(mlp(), x()), x, ("script", "model")
    ),
    Case(
        "through numpy", errors.CaptureError, fc(through_numpy), x, (LINE + r"return m\.fc\(torch",)
    ),
    Case(
        "names that break code",
        errors.CaptureError,
        lambda: nn.Sequential(OrderedDict({"stem": nn.Linear(3, 3), "in": nn.Linear(3, 2)})).eval(),
        says=(r"in\.weight", "keywords"),
        unsaid="stem",
    ),
    # The graph of these computes something else than the model.
    Case(
        "torch.rand",
        errors.CaptureError,
        fc(lambda m, x: m.fc(x) * torch.rand(3)),
        says=("random",),
    ),
    *(
        Case(
            f"torch.rand per sample, by {name}", errors.CaptureError, fc(forward), says=("random",)
        )
        for name, forward in {
            "shape": lambda m, x: m.fc(x) * torch.rand(x.shape[0], 3),
            # A graph for any batch size is no longer possible; one for this size is.
            "len": lambda m, x: m.fc(x) * torch.rand(len(x), 3),
        }.items()
    ),
    Case(
        "chaotic",
        errors.CaptureError,
        lambda: Chaotic().eval(),
        x,
        ("rounding", "Chaotic, in float32", r"model\.double\(\)"),
        unsaid="random",
    ),
    Case(
        "random", errors.CaptureError, fc(lambda m, x: m.fc(x) * random.random()), says=("random",)
    ),
    Case(
        "np.random",
        errors.CaptureError,
        fc(lambda m, x: m.fc(x) * np.random.rand()),
        says=("random",),
    ),
    Case("counter", errors.CaptureError, fc(counts, n=0), says=("counter",)),
    Case("every other call", errors.CaptureError, fc(alternates, n=0), says=("state",)),
    # Nothing to explain.
    Case(
        "constant output", errors.CaptureError, fc(lambda m, x: m.fc.weight + 0), says=("depends",)
    ),
    Case(
        "detached output", errors.CaptureError, fc(lambda m, x: m.fc(x).detach()), says=("depends",)
    ),
    Case(
        "inputs without a scale",
        errors.CaptureError,
        fc(lambda m, x: m.fc(x.float())),
        lambda: torch.tensor([[True, False, True]]),
        says=("nothing to explain", "embedding"),
    ),
    Case(
        "argmax output", errors.CaptureError, fc(lambda m, x: m.fc(x).argmax(1)), says=("depends",)
    ),
]

# -- training mode --------------------------------------------------------------------------------


class AlwaysDrops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


def in_training(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*modules).train()


IN_TRAINING = [
    Case(
        "lists all",
        errors.TrainingModeError,
        in_training(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.2)
        ),
        says=(r"\b1: .*batch_norm", r"\b3, 4: .*dropout", r"eval\(\)"),
        unsaid=r"\b[02]: ",
    ),
    Case(  # where PyTorch itself refuses to run: users forget eval() with a single sample
        "single sample",
        errors.TrainingModeError,
        in_training(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        lambda: x(1, 3),
        (r"\b1: .*batch_norm", r"eval\(\)"),
    ),
    Case(  # the model is in eval mode already, so it is the line that helps
        "functional dropout",
        errors.TrainingModeError,
        lambda: AlwaysDrops().eval(),
        says=("dropout", r"F\.dropout\(x, 0\.5\)"),
    ),
    Case(
        "statistics of the batch in eval mode",
        errors.TrainingModeError,
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        says=(r"\b1: .*batch_norm", "running statistics"),
    ),
    *(
        Case(
            type(module).__name__,
            errors.TrainingModeError,
            in_training(nn.Conv2d(1, 2, 3), module),
            image,
            (r"\b1: ", r"eval\(\)"),
        )
        for module in (
            nn.BatchNorm2d(2),
            nn.Dropout2d(),
            nn.AlphaDropout(),
            nn.FeatureAlphaDropout(),
            nn.RReLU(),
        )
    ),
]

# -- unsupported ops ------------------------------------------------------------------------------


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.atan2(x, x + 1)


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=4).angle()


class Odds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.pinv(x).mT


class Unsupported(nn.Module):
    """Three modules that have no rules, with supported ops between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.total, self.spectrum, self.odds = Total(), Spectrum(), Odds()

    def forward(self, x: Tensor) -> Tensor:
        return self.odds(self.fc(self.total(x))) + self.spectrum(self.fc(x))


UNSUPPORTED = [
    Case(
        "lists all",
        errors.UnsupportedOpError,
        Unsupported,
        says=(
            r"atan2\S* with live self and other at total\b",
            r"linalg_pinv\S* at odds\b",
            r"angle\S* of complex numbers at spectrum\b",
            LINE + r".*torch\.atan2\(x, x \+ 1\)",
            LINE + r".*torch\.linalg\.pinv\(x\)",
            r"why: an angle does not",
            r"why: a function of whole matrices",
            LINE + r".*torch\.fft\.rfft\(x, n=4\)\.angle\(\)",
            "register_op",
        ),
        unsaid=r"linear\.default",
    ),
    Case(
        "complex values",
        errors.UnsupportedOpError,
        fc(lambda m, x: torch.fft.rfft(m.fc(x)).angle()),
        says=("angle", "why: an angle", "real and imaginary"),
        unsaid="register_op",
    ),
    Case(  # relevance must not leave through the other branch without a word
        "complex values beside a live path",
        errors.UnsupportedOpError,
        fc(lambda m, x: m.fc(x) + torch.fft.rfft(x, n=4).angle()),
        says=("angle",),
    ),
    Case(
        "complex values in ops of the table",
        errors.UnsupportedOpError,
        fc(lambda m, x: (m.fc(x) * (1 + 2j)).exp().abs()),
        says=(r"exp\.default of complex numbers", "real and imaginary"),
        unsaid="register_op",
    ),
    Case(
        "an embedding that rescales its table",
        errors.UnsupportedOpError,
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2)),
        lambda: torch.tensor([[0, 4], [1, 1]]),
        says=("max_norm",),
    ),
    Case(
        "product of two live tensors",
        errors.UnsupportedOpError,
        fc(lambda m, x: x.atan2(m.fc(x))),
        says=("atan2", "self and other"),
    ),
]

# -- rules and selectors --------------------------------------------------------------------------


def rules(*entries: Any, **options: Any) -> dict[str, Any]:
    return {"rules": list(entries), **options}


def is_relu(record: Any) -> bool:
    return record.kind == "relu"


MISFITS = [
    Case(
        name,
        errors.RuleError,
        ConvNet,
        image,
        (re.escape(str(entry[1])), said),
        options=rules(entry),
    )
    for name, entry, said in [
        ("Gamma on relu", ("relu", Gamma()), r"act: relu"),
        ("guided backprop on conv", ("conv", ReLUGuidedBackprop()), r"conv: conv2d"),
        ("Gamma on a ReLU class", (nn.ReLU, Gamma()), r"act: relu"),
        ("Gamma on a ReLU's path", ("act", Gamma()), r"act: relu"),
        ("Gamma on a predicate", (is_relu, Gamma()), r"is_relu"),
        ("Pass on linear", ("linear", Pass()), r"classifier: linear"),
        ("Norm on conv", ("conv", Norm()), r"use Epsilon"),
        ("DeconvNet on the flatten", ("reshape", ReLUDeconvNet()), r"flatten"),
    ]
]

RULES = [
    *MISFITS,
    Case("a number", errors.RuleError, mlp, x, ("no composite",), options={"rules": 3}),
    Case("no pair", errors.RuleError, mlp, x, ("pair",), options=rules("linear")),
    Case("no rule", errors.RuleError, mlp, x, ("'gamma'",), options=rules(("linear", "gamma"))),
    Case("a class", errors.RuleError, mlp, x, ("instance",), options=rules(("linear", Gamma))),
    Case("no selector", errors.RuleError, mlp, x, (r"\b3\b",), options=rules((3, Gamma()))),
    Case("a rule's class", errors.RuleError, mlp, x, (r"Gamma\(",), options={"rules": Gamma}),
    Case(
        "a box that is no box for the input",
        errors.RuleError,
        ConvNet,
        image,
        ("ZBox", r"\(5,\)", r"\(2, 1, 4, 4\)"),
        options=rules(("conv", ZBox(torch.zeros(5), torch.ones(5)))),
    ),
    *(
        Case(
            f"an input outside of its box, {'with' if ledger else 'without'} a ledger",
            errors.RuleError,
            ConvNet,
            image,
            ("of 32 inputs lie outside", r"between -\d", "conv: conv2d", "normalisation"),
            options=rules(("conv", ZBox(0.0, 1.0, strict=True)), ledger=ledger),
        )
        for ledger in (True, False)
    ),
    Case(
        "a norm-scaled stabilizer on what is no batch",
        errors.RuleError,
        fc(lambda m, x: torch.einsum("ni,oi->on", x, m.fc.weight).T),
        says=("einsum", "norm_scale=True", "first dimension"),
        options=rules(("linear", Epsilon(Stabilizer(0.1, norm_scale=True)))),
    ),
    Case(
        "a stabilizer that writes into its argument",
        errors.RuleError,
        mlp,
        x,
        ("writes into its argument", "linear"),
        options=rules(("linear", Epsilon(lambda z: z.add_(0.1)))),
    ),
    Case(
        "a stabilizer of another dtype",
        errors.RuleError,
        mlp,
        x,
        (r"float64 of torch\.float32",),
        options=rules(("linear", Epsilon(lambda z: z.double() + 0.1))),
    ),
    Case(
        "everything is stopped",
        errors.CaptureError,
        mlp,
        x,
        ("rule Stop", "2: linear"),
        options=rules(("linear", lrpfx.Stop())),
    ),
    Case(
        "a predicate that raises",
        errors.LrpError,
        mlp,
        x,
        ("no_such_field",),
        options=rules((lambda record: record.no_such_field, Gamma())),
    ),
]

SELECTORS = [
    Case(name, errors.SelectorError, ConvNet, image, tuple(says), options=options)
    for name, options, says in [
        ("composite misspelt", {"rules": "epsilon_pluss"}, ["'epsilon_pluss'", "'epsilon_plus'"]),
        ("composite unlike any", {"rules": "zzz"}, ["epsilon_plus, ", "guided_backprop"]),
        (
            "composite needs values",
            {"rules": "epsilon_gamma_box"},
            ["low", "high", "EpsilonGammaBox"],
        ),
        ("kind misspelt", rules(("lineer", Gamma())), ["'lineer'", "'linear'"]),
        ("path misspelt", rules(("clasifier", Gamma())), ["'clasifier'", "'classifier'"]),
        ("kind not here", rules(("leaky_relu", Pass())), ["'leaky_relu'", "'relu'"]),
        ("kind unlike any here", rules(("prelu", Pass())), ["relu"]),
        ("glob of nothing", rules(("layer4.*", Gamma())), [r"'layer4\.\*'", "conv", "classifier"]),
        ("class not here", rules((nn.Conv1d, Gamma())), ["Conv1d", "conv"]),
        ("predicate of nothing", rules((lambda r: False, Gamma())), ["lambda", "conv"]),
        ("folded batch norm", rules(("norm", Gamma())), ["'norm'", "folded", "'conv'"]),
        ("one of two entries", rules(("conv", Gamma()), ("cov", Flat())), ["'cov'", "'conv'"]),
        ("layer misspelt", {"layers": ["clasifier"]}, ["'clasifier'", "'classifier'"]),
        ("layer glob of nothing", {"layers": ["layer4.*"]}, [r"'layer4\.\*'", "classifier"]),
        ("one of two layers", {"layers": ["conv", "cov"]}, ["'cov'", "'conv'"]),
        ("layer is no path", {"layers": [3]}, [r"\b3\b"]),
    ]
]

ALL = [
    pytest.param(case, id=f"{group}-{case.name}".replace(" ", "_"))
    for group, cases in {
        "input": INPUTS,
        "finite": NOT_FINITE,
        "capture": CAPTURE,
        "training": IN_TRAINING,
        "op": UNSUPPORTED,
        "rule": RULES,
        "selector": SELECTORS,
    }.items()
    for case in cases
]


@pytest.mark.parametrize("case", ALL)
def test_says_what_where_and_what_to_do_and_leaves_the_model_alone(
    case: Case, capfd: pytest.CaptureFixture[str]
) -> None:
    model, inputs = lived_in(case.model()), case.inputs()
    capfd.readouterr()
    with assert_untouched(model, inputs), pytest.raises(errors.LrpError) as caught:
        lrpfx.explain(model, inputs, **case.options, capture="export")
    assert capfd.readouterr() == ("", ""), "what the tracer has to say comes in the error"
    error = caught.value
    assert type(error) is case.error or case.error is errors.LrpError, repr(error)
    for pattern in case.says:
        assert re.search(pattern, str(error)), f"no {pattern} in: {error}"
    assert not re.search(case.unsaid, str(error)), str(error)
    check_form(error)


def check_form(error: errors.LrpError) -> None:
    """What happened, the places, the repair: in this order, none of them empty."""
    assert error.what.strip() and error.fix.strip(), repr(error)
    assert all(place.strip() for place in error.where), f"an empty place in: {error}"
    parts = [error.what, *error.where, error.fix]
    positions = [str(error).find(part) for part in parts]
    assert -1 not in positions and positions == sorted(positions), str(error)


def test_value_errors_are_value_errors() -> None:
    """What a wrong value causes can be caught as the ValueError that Python users expect."""
    wrong_values = (
        errors.InputError,
        errors.TargetError,
        errors.RuleError,
        errors.SelectorError,
        errors.NonFiniteError,
    )
    assert all(issubclass(error, ValueError) for error in wrong_values)
    exported = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(error, (errors.LrpError, errors.LrpWarning)) for error in exported)


# -- parameters of rules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda: AlphaBeta(2, 0.5), "alpha=2, beta=0.5", id="alpha-beta=1.5"),
        pytest.param(lambda: AlphaBeta(-1, -2), "alpha=-1, beta=-2", id="alpha<0"),
        pytest.param(lambda: AlphaBeta(torch.nan, 0), "nan", id="alpha=nan"),
        pytest.param(lambda: AlphaBeta("2", 1), "'2'|2", id="alpha=str"),  # type: ignore[arg-type]
        pytest.param(lambda: Epsilon(-1e-6), "-1e-06", id="epsilon<0"),
        pytest.param(lambda: Epsilon(torch.nan), "nan", id="epsilon=nan"),
        pytest.param(lambda: Epsilon("small"), "'small'", id="epsilon=str"),  # type: ignore[arg-type]
        pytest.param(lambda: Epsilon(True), "True", id="epsilon=bool"),
        pytest.param(lambda: ZPlus(stabilizer=-1), "-1", id="stabilizer<0"),
        pytest.param(lambda: Stabilizer(-1), "-1", id="Stabilizer<0"),
        pytest.param(lambda: ZPlus(zero_params="weights"), "'weights'", id="zero_params"),
        pytest.param(lambda: Gamma(-0.5), "-0.5", id="gamma<0"),
        pytest.param(lambda: Gamma(torch.nan), "nan", id="gamma=nan"),
        pytest.param(lambda: Gamma("a"), "a", id="gamma=str"),  # type: ignore[arg-type]
        pytest.param(lambda: ZBox(1.0, 0.0), "low", id="box-upside-down"),
        pytest.param(
            lambda: ZBox(torch.zeros(2), torch.ones(3)), r"\(2,\).*\(3,\)", id="box-shapes"
        ),
        pytest.param(lambda: ReLUBetaSmooth(0), "0", id="beta=0"),
    ],
)
def test_illegal_parameters(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(errors.RuleError, match=says) as caught:
        make()
    check_form(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        # 1.4 - 0.4 is 0.9999999999999999
        pytest.param(lambda: AlphaBeta(1.4, 0.4), id="1.4-0.4"),
        pytest.param(lambda: AlphaBeta(1, 0), id="1-0"),
        pytest.param(lambda: AlphaBeta(3.3, 2.3), id="3.3-2.3"),
        pytest.param(lambda: Epsilon(0), id="LRP-0"),
        pytest.param(lambda: Epsilon(Stabilizer(1e-3, clip=True)), id="stabilizer-object"),
        pytest.param(lambda: Gamma(0), id="gamma=0"),
        pytest.param(lambda: ZBox(0.0, 0.0), id="flat-box"),
    ],
)
def test_legal_parameters(make: Callable[[], Any]) -> None:
    assert make() is not None


# -- the checks themselves ------------------------------------------------------------------------


def _renamed(m: Any) -> None:
    m.other = m._modules.pop("fc")


def _same_values(m: Any) -> None:
    m.fc.weight = nn.Parameter(m.fc.weight.detach().clone())


def _negative_zero(m: Any) -> None:
    m.mean.neg_()


MEDDLING = {
    "weight in place": lambda m: m.fc.weight.data.add_(1e-6),
    "weight replaced by its equal": _same_values,
    "requires_grad": lambda m: m.fc.weight.requires_grad_(False),
    "grad set": lambda m: setattr(m.fc.bias, "grad", torch.zeros(3)),
    "grad changed": lambda m: m.fc.weight.grad.mul_(2),
    "buffer": lambda m: m.mean.add_(1),
    "sign of zero": _negative_zero,
    "training flag": lambda m: m.fc.train(),
    "hook": lambda m: m.fc.register_forward_hook(print),
    "tensor hook": lambda m: m.fc.weight.register_hook(print),
    "module renamed": _renamed,
    "new attribute": lambda m: setattr(m, "new", 1),
    "attribute gone": lambda m: delattr(m, "n"),
    "counter": lambda m: setattr(m, "n", 1),
    "True for 1": lambda m: setattr(m, "one", True),
    "dict": lambda m: m.cache.update(new=1),
    "dict in a dict": lambda m: m.cache["inner"].update(new=1),
    "list": lambda m: m.log.append(1),
    "deque": lambda m: m.queue.append(1),
    "set": lambda m: m.names.add("b"),
    "object": lambda m: setattr(m.state, "n", 1),
    "tensor attribute": lambda m: m.state.seen.add_(1),
    "parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.fc),
    "dtype": lambda m: m.double(),
    "torch's random state": lambda m: torch.rand(1),
    "Python's random state": lambda m: random.random(),
    "numpy's random state": lambda m: np.random.rand(),
    "grad mode": lambda m: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("name", [*MEDDLING, "input", "input's requires_grad", "input's grad"])
def test_assert_untouched_sees(name: str) -> None:
    """The helper of the tests above fails for every way of meddling it is there for."""
    model = Apply(
        lambda m, x: m.fc(x),
        fc=nn.Linear(3, 3),
        mean=torch.zeros(3),
        n=0,
        one=1,
        cache={"inner": {}},
        log=[],
        queue=deque(),
        names={"a"},
        state=SimpleNamespace(n=0, seen=torch.zeros(1)),
    )
    model.fc.weight.grad = torch.ones(3, 3)
    inputs = {"x": x()}
    meddle = MEDDLING | {
        "input": lambda m: inputs["x"].add_(1),
        "input's requires_grad": lambda m: inputs["x"].requires_grad_(),
        "input's grad": lambda m: setattr(inputs["x"], "grad", x()),
    }
    with torch.set_grad_enabled(True):
        with pytest.raises(AssertionError, match="have changed"), assert_untouched(model, inputs):
            meddle[name](model)


def test_assert_untouched_lets_pass() -> None:
    """What is put back where it was is as it was; and errors are let through."""
    model, inputs = lived_in(mlp()), with_one(torch.nan)
    with assert_untouched(model, inputs), pytest.raises(ZeroDivisionError):
        weight = model[0].weight
        model[0].weight = nn.Parameter(torch.zeros(4, 3))
        model[0].weight = weight
        raise ZeroDivisionError


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = mlp()
        inside = pytest.raises(
            errors.CaptureError, match=r"(?s)inference mode.*0\.weight.*deepcopy"
        )
        with inside:
            lrpfx.explain(model, x())
    with pytest.raises(errors.CaptureError, match=r"(?s)inference mode.*\b0\.weight\b.*deepcopy"):
        lrpfx.explain(model, x())
    lrpfx.explain(copy.deepcopy(model), x())


class Cache:
    """What torch.export does not know."""


def returns_a_cache(m: Any, x: Tensor) -> Any:
    return m.fc(x), Cache()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda m: lrpfx.explain(fc(returns_a_cache)(), x(), capture="export"),
            "Cache(.|\n)*use_cache=False",
        ),
        (lambda m: lrpfx.Explainer(m, x(), dynamic=1), "dynamic=1 is no sequence"),
        (lambda m: lrpfx.Explainer(m, x(), dynamic=(-1,)), r"dynamic=\(-1,\) is no sequence"),
        (lambda m: lrpfx.Explainer(m, x(), dynamic=(5,)), "no input has a dimension 5"),
        (lambda m: lrpfx.explain(m, x(), rules=[(m, lrpfx.Gamma())]), "is no selector"),
        (lambda m: lrpfx.explain(m, x()).report.compare(m), "takes a Report, not Sequential"),
        (lambda m: lrpfx.explain(m, x(), "all").report.leaks(), "and one target"),
    ],
)
def test_is_refused_by_name(call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(errors.LrpError, match=says) as caught:
        call(mlp())
    assert len(str(caught.value)) < 600


def test_many_places_are_cut_and_counted() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(8))).eval()
    with pytest.raises(errors.RuleError, match="and 3 more"):
        lrpfx.explain(model, x(), rules=[("relu", lrpfx.Gamma())])
    explainer = lrpfx.Explainer(model, x())
    model.double()
    with pytest.raises(errors.CaptureError, match=r"float32\[3, 3\] on cpu -> float64(.|\n)*more"):
        explainer(x())
