"""Ops that PyTorch writes in strides or into memory are the same as others, and written down."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.run import Spelled
from tests.conftest import Apply
from tests.oracle import zoo

aten = torch.ops.aten


def assert_compiled(model: nn.Module, x: Tensor, tolerance: float) -> None:
    explainer = lrpfx.Explainer(model, x)
    expected = explainer(x, 1, ledger=False).relevance
    with mock.patch("torch.compile", lambda graph, **_: graph):
        explainer.compile()
        found = explainer(x, 1, ledger=False).relevance
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("pad", [(2, 3, 0, 1, 1, 0), (6, 5), (-2, 1, 0, -3), (0, 0, 5, 0)])
def test_padding_in_a_circle_is_the_same_with_its_derivative(pad: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *(4, 5, 6)[-len(pad) // 2 :], dtype=torch.float64).requires_grad_()
    expected = F.pad(x, pad, mode="circular")
    with Spelled():
        got = aten.pad.default(x, pad, "circular")
    assert torch.equal(expected, got)
    start = torch.randn_like(got)
    right, found = (torch.autograd.grad(z, x, start)[0] for z in (expected, got))
    assert torch.allclose(right, found, rtol=1e-12)


@pytest.mark.nightly  # a dozen seconds
def test_a_swin_transformer_is_compiled() -> None:
    transformers = pytest.importorskip("transformers", reason="of the extra test")
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "window_size": 4}
    config = transformers.SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2])
    swin = transformers.SwinForImageClassification(config)
    model = Apply(lambda m, x: m.swin(x).logits, swin=swin).eval()
    assert_compiled(model, torch.randn(2, 3, 32, 32), 1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pool_to_one_of_inputs_in_any_layout_is_compiled(dims: int) -> None:

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.pool(m.norm(x).movedim(-1, 1)).flatten(1))

    parts = {"norm": nn.LayerNorm(4), "pool": getattr(nn, f"AdaptiveAvgPool{dims}d")(1)}
    model = zoo.randomize(Apply(forward, **parts, head=nn.Linear(4, 3))).double()
    x = torch.randn(2, *(4, 3, 5)[:dims], 4, dtype=torch.float64)
    assert_compiled(model, x, 1e-10)


def test_padding_in_a_circle_is_compiled() -> None:
    model = zoo.randomize(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten())
    ).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert_compiled(model, x, 1e-10)
