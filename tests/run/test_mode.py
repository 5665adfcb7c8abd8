"""An Explainer made in evaluation mode and called while the model trains."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from tests.test_errors import check_form

Made = tuple[nn.Module, lrpfx.Explainer, Tensor, Tensor]


@pytest.fixture
def made() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(48, 2),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 1, 0])
    return model, lrpfx.Explainer(model.eval(), x), x, y


def test_what_is_explained_while_it_trains_is_the_model_in_evaluation_mode(made: Made) -> None:
    model, explainer, x, y = made
    expected = explainer(x, y)
    assert not expected.report.notes
    model.train()
    e = explainer(x, y)
    assert torch.equal(e.relevance, expected.relevance) and torch.equal(e.output, expected.output)
    (note,) = e.report.notes
    assert "training mode now" in note and "running statistics" in note
    model.eval()
    assert not explainer(x, y).report.notes


def test_a_model_captured_in_training_mode_says_so_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2))  # nothing in it depends on the mode
    explainer = lrpfx.Explainer(model.train(), torch.ones(2, 3))
    assert not explainer(torch.ones(2, 3)).report.notes
    model.eval()
    (note,) = explainer(torch.ones(2, 3)).report.notes
    assert "captured in training mode" in note


def test_the_recipe_trains_by_the_derivative_in_evaluation_mode(made: Made) -> None:
    """Cross entropy in training mode plus a penalty on relevance: the sum of their gradients."""
    model, explainer, x, y = made

    def penalty(explainer: lrpfx.Explainer) -> Tensor:
        return explainer(x, y, create_graph=True).relevance[..., :2].square().sum()

    twin = copy.deepcopy(model).eval()
    penalty(lrpfx.Explainer(twin, x)).backward()
    model.train()
    penalty(explainer).backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)

    def trained(weight: float) -> float:
        torch.manual_seed(1)
        own = copy.deepcopy(twin).eval()
        explains = lrpfx.Explainer(own, x)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
        own.train()
        for _ in range(20):
            optimizer.zero_grad()
            (F.cross_entropy(own(x), y) + weight * penalty(explains)).backward()
            optimizer.step()
        return penalty(explains).item()

    assert trained(100.0) < 0.5 * trained(0.0)


@pytest.mark.parametrize("with_another_loss", [False, True])
def test_a_forgotten_graph_is_named(made: Made, with_another_loss: bool) -> None:
    model, explainer, x, y = made
    model.train()
    loss = explainer(x, y).relevance.abs().sum()
    if with_another_loss:  # which alone would have trained the model without the penalty
        loss = loss + F.cross_entropy(model(x), y)
    with pytest.raises(errors.InputError, match="create_graph=True") as caught:
        loss.backward()
    check_form(caught.value)


@pytest.mark.parametrize("of", ["layers", "embeddings"])
def test_so_it_is_of_relevance_inside(of: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Dropout(), nn.Flatten(), nn.Linear(6, 2)).eval()
    explainer = lrpfx.Explainer(model, torch.tensor([[0, 1], [2, 3]]))
    model.train()
    e = explainer(torch.tensor([[0, 1], [2, 3]]), 1, layers=["0"])
    inside = e.embeddings if of == "embeddings" else e.layers["0"].relevance
    with pytest.raises(errors.InputError, match="create_graph=True"):
        inside.square().sum().backward()


def test_a_model_without_modes_is_seen_to_train_by_its_parameters() -> None:
    """One that was never in evaluation mode: looked at it is as any other, until it has moved."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    explainer = lrpfx.Explainer(model, x)
    assert explainer(x, 1).relevance.numpy().shape == (2, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    with pytest.raises(errors.InputError, match="create_graph=True"):
        (model(x).square().sum() + explainer(x, 1).relevance.abs().sum()).backward()
    model.eval()
    assert explainer(x, 1).relevance.numpy().shape == (2, 4)


def test_relevance_that_is_only_looked_at_is_as_before(made: Made) -> None:
    model, explainer, x, y = made
    model.train()
    e = explainer(x, y)
    assert e.relevance.detach().numpy().shape == x.shape and e.plot() is not None
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        assert not explainer(x, y).relevance.requires_grad
    assert not explainer(x, "all", ledger=False).relevance.detach().requires_grad
