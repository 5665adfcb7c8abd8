"""The same composites by name in lrpfx and in zennit, and zennit's relevance as a call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks import works  # noqa: F401  (before zennit, which imports torchvision)
from benchmarks.measure import Call, Work, folded

REQUIRED = {"epsilon_gamma_box": {"low": -3.0, "high": 3.0}}


def composite(name: str) -> lrpfx.composites.Composite:
    """lrpfx's composite of that name, for inputs within [-3, 3]."""
    return lrpfx.composites.NAMED[name](**REQUIRED.get(name, {}))


def zennit_installed() -> bool:
    """Whether there is a zennit to compare with."""
    return importlib.util.find_spec("zennit") is not None


def zennit_composite(name: str) -> Any:
    """zennit's composite of that name; epsilon_all, which it lacks, from its own parts."""
    import zennit.composites as z
    from zennit.rules import Epsilon
    from zennit.types import Convolution, Linear

    if name == "epsilon_all":
        return z.LayerMapComposite([((Convolution, Linear), Epsilon()), *z.layer_map_base()])
    return z.COMPOSITES[name](**REQUIRED.get(name, {}))


@contextmanager
def zennit_call(work: Work, name: str, seed: Tensor) -> Iterator[Call]:
    """zennit's relevance; registering its hooks is outside of the call.

    Batch norm is folded by hand: zennit's canonizers leave 1 / sqrt(1 + eps) behind.
    """
    import zennit.torchvision

    peer = folded(work.model)
    zennit.torchvision.ResNetBasicBlockCanonizer().apply(peer)
    zennit.torchvision.ResNetBottleneckCanonizer().apply(peer)
    for module in peer.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with zennit_composite(name).context(peer) as instrumented:

        def call() -> Tensor:
            x = work.x.detach().requires_grad_()
            return torch.autograd.grad(instrumented(x), x, seed)[0]

        yield call
