"""Relevance of the layers in between: what a hook on the user's module sees."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import Gamma, errors
from tests.oracle.networks import LRP_0, Plain, draw, image, returning, trained


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
