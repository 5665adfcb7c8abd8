"""The rewritten graph as a module of PyTorch: its backward pass is relevance."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lrpfx
from tests.conftest import Apply, assert_untouched
from tests.oracle.networks import conv_net, draw, image


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
