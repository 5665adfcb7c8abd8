"""Occlusion against loops by hand and captum."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.attributors import occlusion
from tests.attributors.test_gradients import IDS, _net, _Tokens
from tests.conftest import Apply

double = torch.float64


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    return _net()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, dtype=double)


def _by_hand(model: Any, x: Tensor, k: int, window: Any, stride: Any, fill: float) -> Tensor:
    """Every window on its own, the last ones cut at the edge; the mean over windows."""
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    sides = zip(x.shape[1:], window, stride, strict=True)
    begins = [range(0, max(n - w, 0) + s, s) for n, w, s in sides]
    for begin in itertools.product(*begins):
        here = (slice(None), *(slice(b, b + w) for b, w in zip(begin, window, strict=True)))
        if total[here].numel() == 0:
            continue
        other = x.clone()
        other[here] = fill
        fall = (model(x) - model(other))[:, k]
        total[here] += fall.reshape(-1, *[1] * (x.ndim - 1))
        count[here] += 1
    return total / count


@pytest.mark.parametrize(
    ("window", "stride", "whole_window", "whole_stride"),
    [
        (2, 2, (2, 2, 2), (2, 2, 2)),
        (3, 2, (2, 3, 3), (2, 2, 2)),
        ((4, None), (1, None), (2, 4, 6), (2, 1, 6)),
        ((1, 5, 2), (1, 3, 2), (1, 5, 2), (1, 3, 2)),
        (8, 8, (2, 6, 6), (2, 6, 6)),
    ],
)
def test_windows_are_those_of_a_loop_by_hand(
    net: nn.Module, x: Tensor, window: Any, stride: Any, whole_window: Any, whole_stride: Any
) -> None:
    expected = _by_hand(net, x, 2, whole_window, whole_stride, 0.5).detach()
    for memory in (1, 2**28):
        found = occlusion(net, x, 2, window, stride, 0.5, memory=memory)
        torch.testing.assert_close(found.relevance, expected, rtol=1e-11, atol=1e-13)


def test_it_agrees_with_captum(net: nn.Module, x: Tensor) -> None:
    captum = pytest.importorskip("captum.attr", reason="captum: pip install 'lrpfx[faithfulness]'")
    for window, stride in ((2, 2), (3, 2), (5, 3)):
        theirs = captum.Occlusion(net).attribute(
            x, (2, window, window), (2, stride, stride), baselines=0.5, target=1
        )
        ours = occlusion(net, x, 1, window, stride, 0.5).relevance
        assert torch.equal(ours.float(), theirs.float())  # captum's is float32 in any case


def test_no_gradient_is_needed(net: nn.Module, x: Tensor) -> None:
    def numpy(z: Tensor) -> Tensor:
        return torch.from_numpy(net(z.detach()).detach().numpy().copy())

    expected = occlusion(net, x, 2, 2, 2).relevance
    assert torch.equal(occlusion(numpy, x, 2, 2, 2).relevance, expected)
    scripted = torch.jit.trace(net, x)
    torch.testing.assert_close(occlusion(scripted, x, 2, 2, 2).relevance, expected)


def test_tables_and_signals_have_columns_and_time() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=double)
    rows = torch.randn(5, 4, dtype=double)
    found = occlusion(lambda z: (z * weight).sum(1, keepdim=True), rows, 0, 1, 1).relevance
    torch.testing.assert_close(found, rows * weight)
    signal = torch.randn(2, 3, 4, dtype=double)
    found = occlusion(lambda z: (z * weight).sum((1, 2))[:, None], signal, 0, 1, 1).relevance
    expected = (signal * weight).sum(1, keepdim=True).expand_as(signal)
    torch.testing.assert_close(found, expected)
    means = signal.mean(2, keepdim=True)
    found = occlusion(lambda z: z.sum((1, 2))[:, None], signal, 0, 1, 1, "mean").relevance
    torch.testing.assert_close(found, (signal - means).sum(1, keepdim=True).expand_as(signal))


def test_tokens_are_replaced_by_another_or_at_their_embeddings() -> None:
    model = _Tokens()
    whole = model(IDS)[:, -1, 3]
    vectors = model.vectors(IDS).detach()
    by_id, by_zero, by_mean = (
        occlusion(model, IDS, (-1, 3), 1, 1, fill).relevance for fill in (7, 0.0, "mean")
    )
    for t in range(IDS.shape[1]):
        other = IDS.clone()
        other[:, t] = 7
        torch.testing.assert_close(by_id[:, t], whole - model(other)[:, -1, 3])
        for found, value in ((by_zero, 0.0), (by_mean, vectors.mean(1))):
            changed = vectors.clone()
            changed[:, t] = value
            torch.testing.assert_close(found[:, t], whole - model.of(changed)[:, -1, 3])


def test_several_inputs_are_occluded_one_at_a_time() -> None:
    a, b = torch.randn(3, 2), torch.randn(3, 4)
    found = occlusion(lambda a, b: a.sum(1) * b.sum(1), (a, b), None, 1, 1).relevance
    torch.testing.assert_close(found[0], a * b.sum(1, keepdim=True))
    torch.testing.assert_close(found[1], b * a.sum(1, keepdim=True))


def test_models_that_mix_the_batch_are_asked_window_by_window() -> None:
    model, x = Apply(lambda self, z: (z - z.mean(0)) ** 2), torch.randn(4, 3)
    assert torch.equal(
        occlusion(model, x, 1, 1, 1).relevance, occlusion(model, x, 1, 1, 1, memory=1).relevance
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(window=0), "window=0"),
        (dict(window=(1, 2, 3, 4)), "does not fit"),
        (dict(window=2, stride=3), "never occluded"),
        (dict(fill="none"), "fill='none'"),
        (dict(fill=torch.ones(7)), "broadcast"),
        (dict(target=lambda out: out.sum()), "3 samples"),
    ],
)
def test_what_has_no_answer_is_an_error(net: nn.Module, x: Tensor, options: Any, said: str) -> None:
    with pytest.raises(lrpfx.errors.LrpError, match=said):
        occlusion(net, x, **options)
