"""Explaining leaves the user's model, inputs and process as they were."""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lrpfx
from lrpfx import errors
from lrpfx.capture.preserve import _LARGE
from tests.conftest import Apply, assert_untouched, lived_in
from tests.oracle.networks import (
    IDS,
    Plain,
    TwoArms,
    assert_same,
    draw,
    fc,
    mlp,
    returning,
    tied,
    trained,
)

pytestmark = pytest.mark.usefixtures("each_way")


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
    "tied": lambda: tied(),
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
            lrpfx.explain(model, x, capture="export")
    explanation = lrpfx.explain(model, x)
    expected = copy.deepcopy(model)(x.clone())
    assert_same(explanation.output, expected)


@pytest.mark.parametrize("name", MODELS)
def test_recording_leaves_the_model_alone(name: str) -> None:
    model, x = MODELS[name](), draw(2, 3)
    with assert_untouched(model, x), contextlib.suppress(errors.LrpError):
        lrpfx.explain(model, x, capture="record")


WRITES: dict[str, Callable[[Any], Any]] = {
    "under no_grad": lambda w: w.detach().mul_(0.5),
    "through .data": lambda w: w.data.add_(1),
    "into a view": lambda w: w.data[0].zero_(),
    "as out=": lambda w: torch.mul(w.data, 2, out=w.data),
    "one of several": lambda w: torch._foreach_add_([w.data], 1.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_large_parameters_that_forward_writes_into_are_brought_back(write: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        write(m.table.weight)
        return m.fc(x) + m.table.weight[0, :2].detach()

    model = Apply(forward, fc=nn.Linear(3, 2), table=nn.Linear(512, 300))
    assert model.table.weight.nbytes > _LARGE
    x = draw(2, 3)
    expected = copy.deepcopy(model)(x)
    with assert_untouched(model, x):
        explanation = lrpfx.explain(model, x, 1, capture="record")
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
