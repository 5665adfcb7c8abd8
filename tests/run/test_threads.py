"""Explanations beside each other: in several threads, and between the passes of another."""

import threading

import pytest
from torch import Tensor

import lrpfx
from tests.oracle.spellings import RULES, close, normal, plain_net

pytestmark = pytest.mark.usefixtures("one_trace")


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
