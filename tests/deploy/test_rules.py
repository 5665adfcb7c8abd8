"""Each rule and each composite in files: what they give is the Explainer's, at any batch size."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import NAMED
from lrpfx.rules import Rule
from tests.oracle import zoo

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[export]'")
pytest.importorskip("onnxscript", reason="pip install -e '.[export]'")

#: Relative to the largest value of the map, in float32 and in float64.
TOLERANCE, EXACT = 1e-6, 1e-10
X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Of each kind of op one: convolutions, pools, attention by hand, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.second, self.relu = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU()
        self.largest, self.mean = nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1, 1, ceil_mode=True)
        self.qkv, self.gate, self.up = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.largest(self.second(x).relu() + x)
        x = self.mean(x).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / 2, -1) @ v
        x = x + torch.sigmoid(self.gate(x)) * self.up(x)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Size(lrpfx.AffineRule):
    """A rule of one's own: shares by the size of each contribution."""

    stabilizer: float = 1e-6

    def terms(self, x: lrpfx.Input, f: lrpfx.AffineMap, z: Tensor) -> list[lrpfx.Term]:
        size, weights = tuple(t.abs() for t in x.all), f.with_weight(torch.abs, "size")
        return [lrpfx.Term([(size, weights)], f.bias_part(torch.abs, "size"))]


def far(z: Tensor) -> Tensor:
    """A stabilizer of one's own."""
    return z + torch.where(z < 0, -0.1, 0.1)


SCALED, CLIPPED = lrpfx.Stabilizer(1e-3, norm_scale=True), lrpfx.Stabilizer(0.1, clip=True)
LOW, HIGH = torch.full((2, 1, 1), -4.0), torch.rand(1, 2, 8, 8) + 4
#: Rules of several layers at once: an export costs more than all else. By kind of op or by name.
SETS: dict[str, dict[str, Rule]] = {
    "one": {
        "first": lrpfx.ZBox(-4.0, 4.0),
        "second": lrpfx.AlphaBeta(),
        "largest": lrpfx.SmoothPool(),
        "relu": lrpfx.Pass(),
        "avg_pool": lrpfx.Norm(),
        "linear": lrpfx.Epsilon(0.1),
        "softmax": lrpfx.Taylor(),
        "matmul": lrpfx.Bilinear(0.1),
        "product": lrpfx.Uniform(),
    },
    "two": {
        "first": lrpfx.ZBox(LOW, HIGH),
        "second": lrpfx.Gamma(zero_params="bias"),
        "largest": lrpfx.TakeMost(2.0),
        "relu": lrpfx.ReLUDeconvNet(),
        "avg_pool": lrpfx.Flat(),
        "linear": lrpfx.Epsilon(SCALED),
        "softmax": lrpfx.Stop(),
        "product": lrpfx.Uniform(pairwise=True),
    },
    "three": {
        "first": lrpfx.WSquare(),
        "second": lrpfx.ZPlus(zero_params="bias"),
        "relu": lrpfx.ReLUGuidedBackprop(),
        "linear": lrpfx.Gamma(10.0),
    },
    "four": {
        "first": lrpfx.Flat(),
        "second": lrpfx.AlphaBeta(1, 0),
        "largest": lrpfx.Gradient(),
        "relu": lrpfx.ReLUBetaSmooth(3.0),
        "linear": lrpfx.Epsilon(CLIPPED),
    },
    "five": {
        "first": lrpfx.Sign(),
        "second": lrpfx.AlphaBeta(1.4, 0.4),
        "up": Size(),
        "linear": lrpfx.Epsilon(far),
        "sigmoid": lrpfx.Stop(),
    },
}
CASES: dict[str, Any] = {
    **{name: list(rules.items()) for name, rules in SETS.items()},
    **{name: name for name in NAMED},
    "epsilon_gamma_box": NAMED["epsilon_gamma_box"](low=-4.0, high=4.0),
}


def concrete(cls: type[Rule] = Rule) -> Iterator[type[Rule]]:
    """The rules of the library that are the base of no other."""
    below = [each for each in cls.__subclasses__() if each.__module__.startswith("lrpfx")]
    yield from (rule for each in below for rule in concrete(each))
    if not below:
        yield cls


def apart(got: Any, expected: Tensor) -> float:
    return float(np.abs(np.asarray(got) - expected.numpy()).max() / expected.abs().max())


def test_every_rule_of_the_library_is_among_the_cases() -> None:
    assert {type(rule) for rules in SETS.values() for rule in rules.values()} >= set(concrete())


def made(case: str, dtype: torch.dtype) -> lrpfx.Explainer:
    model = zoo.randomize(Mixed()).to(dtype).eval()
    explainer = lrpfx.Explainer(model, X.to(dtype), CASES[case])
    given = {type(rule) for rule in SETS.get(case, {}).values()}
    laid = {type(a.rule) for a in explainer._engine.plan.assignments.values()}
    assert given <= laid | {lrpfx.Stop}  # nothing is left of what that stands on
    return explainer


def drawn() -> Iterator[tuple[Tensor, Tensor]]:
    """Fewer samples and more than the files were made with."""
    for samples in (1, 5):
        yield torch.randn(samples, *X.shape[1:]).double(), torch.arange(samples) % 3


@pytest.mark.parametrize(
    "case", [c if c == "two" else pytest.param(c, marks=pytest.mark.nightly) for c in CASES]
)
def test_a_program_of_each_rule_and_composite(case: str, tmp_path: Path) -> None:
    explainer = made(case, torch.float64)
    lrpfx.export(explainer, tmp_path / "model.pt2", X.double())
    program = torch.export.load(tmp_path / "model.pt2").module()
    for x, target in drawn():
        right = explainer(x, target, ledger=True)
        output, relevance = program(x, target)
        assert apart(output, right.output) <= EXACT
        assert apart(relevance, right.relevance) <= EXACT


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES)
def test_an_onnx_file_of_each_rule_and_composite(case: str, tmp_path: Path) -> None:
    explainer, exact = made(case, torch.float32), made(case, torch.float64)
    lrpfx.export(explainer, tmp_path / "model.onnx", X)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for x, target in drawn():
        right, own = exact(x, target, ledger=True), explainer(x.float(), target, ledger=True)
        feeds = {"x": x.float().numpy(), "target": target.numpy()}
        output, relevance = session.run(None, feeds)
        assert apart(output, right.output) <= TOLERANCE
        rounding = apart(own.relevance, right.relevance)
        assert apart(relevance, right.relevance) <= TOLERANCE + 2 * rounding
