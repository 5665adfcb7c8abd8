"""Evaluation mode that mixes the batch: a note, by one sample alone against the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_way")


def attention_over_samples(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    weights = (q @ k.T).softmax(-1)  # of samples
    return m.head(x + weights @ v)


def batch_mean(m: Any, x: Tensor) -> Tensor:
    return m.head(x - x.mean(0))


def batch_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    hidden = m.qkv(x)[:, :4]
    return m.head((hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt())


def ranks(m: Any, x: Tensor) -> Tensor:
    return m.head(x * torch.softmax(x[:, :1], 0))


def sequence_first(m: Any, x: Tensor) -> Tensor:
    return m.head(x + m.qkv(x.roll(1, 0))[:, :4])


def those_before(m: Any, x: Tensor) -> Tensor:
    return m.head(x + x.cumsum(0))


def those_behind(m: Any, x: Tensor) -> Tensor:
    return m.head(x.flip(0).cumsum(0).flip(0))


def the_first(m: Any, x: Tensor) -> Tensor:
    return m.head(x - x[:1])


MIXING = [attention_over_samples, batch_mean, batch_norm_by_hand, ranks, sequence_first]
#: By an order of the samples, so that some depend on no others.
IN_ORDER = [those_before, those_behind, the_first]


def made(forward: Callable) -> nn.Module:
    torch.manual_seed(0)
    return Apply(forward, qkv=nn.Linear(4, 12), head=nn.Linear(4, 2))


@pytest.mark.parametrize("forward", MIXING)
def test_a_model_that_mixes_the_batch_is_noted_with_the_line(forward: Callable) -> None:
    torch.manual_seed(1)
    for n in (3, 1):
        notes = lrpfx.Explainer(made(forward), torch.randn(n, 4)).report.notes
        (note,) = [note for note in notes if "depends on the others in its batch" in note]
        assert ", first at " in note and ".py:" in note, (n, note)


@pytest.mark.parametrize("forward", IN_ORDER)
def test_a_model_that_mixes_them_in_order_is_noted_whichever_sample_depends(
    forward: Callable,
) -> None:
    for n in (1, 2, 3):
        e = lrpfx.explain(made(forward), torch.randn(n, 4), 1, capture="export")
        assert any("depends on the others in its batch" in note for note in e.report.notes), n


APART: list[Callable] = [
    lambda m, x: m.head(x - x.mean(1, keepdim=True)),
    lambda m, x: m.head(x.softmax(-1) * x.amax(1, keepdim=True)),
    lambda m, x: m.head(torch.stack([x, x]).mean(0)),
    lambda m, x: (m.head(x), m.qkv.weight.sum()),
    lambda m, x: m.head(x).sum(),  # one number for the batch
]


@pytest.mark.parametrize("forward", APART)
def test_samples_that_are_apart_are_not_noted(forward: Callable) -> None:
    for n in (3, 1):
        notes = lrpfx.Explainer(made(forward), torch.randn(n, 4)).report.notes
        assert not [note for note in notes if "depends on the others" in note]


def test_a_graph_for_one_number_of_samples_is_compared_by_the_model() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        shape = [x.shape[0], 4] if x.shape[0] == 1 else [3, 4]
        return m.head(x.reshape(shape) - x.mean(0))

    notes = lrpfx.Explainer(made(forward), torch.randn(3, 4)).report.notes
    assert [note for note in notes if "captured for a batch of 3" in note]
    assert [note for note in notes if "depends on the others" in note]


def test_what_is_noted_is_so() -> None:
    """The case itself: of the first sample's output some relevance is the others'."""
    x = torch.randn(3, 4, generator=torch.manual_seed(1))
    e = lrpfx.explain(made(batch_mean), x, lambda out: out[:1, 1].sum())
    assert e.relevance[1:].abs().sum() > 0 and "depends on the others" in " ".join(e.report.notes)
