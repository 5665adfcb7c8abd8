"""Explanations beside each other: in several threads, and between the passes of another."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import assert_untouched
from tests.oracle.networks import conv_net, draw, image, mlp
from tests.oracle.spellings import RULES, close, normal, plain_net


def test_two_forwards_before_one_backward() -> None:
    x, y = normal(2, 2, 5, 5), normal(3, 2, 5, 5, seed=9)
    explainer = lrpfx.Explainer(plain_net(), x, RULES["epsilon_plus"])
    expected = [explainer(t, 1).relevance for t in (x, y)]
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    outputs = [explainer.graph_module(leaf) for leaf in leaves]
    sum((o[:, 1] * o[:, 1].detach()).sum() for o in outputs).backward()
    for leaf, r in zip(leaves, expected, strict=True):
        assert close(leaf.grad, r)


def test_explanations_in_several_threads() -> None:
    inputs = [normal(2, 2, 5, 5, seed=s) for s in range(8)]
    explainer = lrpfx.Explainer(plain_net(), inputs[0], RULES["epsilon_plus"])
    expected = [explainer(x, 1).relevance for x in inputs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = explainer(inputs[i], 1).relevance

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[i], r) for i, r in enumerate(expected))


@pytest.fixture
def four_threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_two_explainers_in_four_threads(four_threads: ThreadPoolExecutor) -> None:
    model = conv_net()
    explainers = [lrpfx.Explainer(model, image()), lrpfx.Explainer(model, image(), "epsilon_all")]
    jobs = [(e, 1 + i % 3, ["act"] if i % 2 else []) for i in range(8) for e in explainers]

    def work(job: tuple[lrpfx.Explainer, int, list[str]]) -> list[Any]:
        explainer, n, layers = job
        found = explainer(image(n, seed=n), 1, layers=layers)
        seen = [call for calls in found.layers.values() for call in calls]
        return [found.relevance, found.output, seen, found.report.to_dict()]

    serial = [work(job) for job in jobs]
    with assert_untouched(model):
        parallel = list(four_threads.map(work, jobs))
    for found, expected in zip(parallel, serial, strict=True):
        torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=0)
        assert found[3] == expected[3]  # relevance of one call is not booked by another


@pytest.mark.parametrize("shared", [True, False], ids=["one-model", "own-models"])
def test_capturing_in_four_threads(four_threads: ThreadPoolExecutor, shared: bool) -> None:
    """A capture must not be seen by what explains, or captures, the same model meanwhile."""
    models = [mlp()] * 4 if shared else [mlp() for _ in range(4)]
    x = draw(2, 3)
    expected = lrpfx.explain(models[0], x).relevance

    def work(model: nn.Module) -> list[Tensor]:
        explainer = lrpfx.Explainer(model, x)
        return [lrpfx.explain(model, x).relevance, explainer(x).relevance, explainer(x).relevance]

    with assert_untouched(models[0]):
        for found in four_threads.map(work, models):
            assert all(torch.equal(relevance, expected) for relevance in found)
