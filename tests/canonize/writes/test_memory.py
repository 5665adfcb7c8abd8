"""Writes into views, against PyTorch's own run of the same lines."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.canonize.writes import memory, unlifted
from lrpfx.capture import capture
from tests.conftest import Apply

VIEWS: list[Any] = [
    lambda t: t[0],
    lambda t: t[..., 1],
    lambda t: t[:, ::2],
    lambda t: t.narrow(-1, 1, 1),
    lambda t: t.transpose(0, -1),
    lambda t: t.movedim(0, -1),
    lambda t: t.permute(*reversed(range(t.ndim))),
    lambda t: t.unsqueeze(1),
    lambda t: t.squeeze(),
    lambda t: t.view(-1),
    lambda t: t.reshape(-1, 1),  # a copy of some, a view of others
    lambda t: t.flatten(),
    lambda t: t.unflatten(0, (1, -1)),
    lambda t: t.diagonal(),
    lambda t: t.unbind(-1)[-1],
    lambda t: t.split(2, 0)[0],
    lambda t: t.tensor_split(2, -1)[1],
    lambda t: t.topk(1, 0).values,  # no view, one of several results
    lambda t: t.chunk(2)[-1],
    lambda t: t.detach(),
]
WRITES: list[Any] = [
    lambda t, u: t.mul_(2),
    lambda t, u: t.add_(u.mean()),
    lambda t, u: t.tanh_(),
    lambda t, u: t.copy_(u.reshape(-1)[:1]),
    lambda t, u: t.masked_fill_(t > 0.5, 0.25),
    lambda t, u: t.zero_(),
    lambda t, u: t.clamp_(max=1).sub_(u.sum()),
]
OTHERS: list[Any] = [lambda t, u: t * 1.5, lambda t, u: t + u.mean(), lambda t, u: t.clone()]


def _program(seed: int) -> Any:
    """Lines drawn at random; of a line that PyTorch refuses there is nothing."""

    def run(x: Tensor) -> Tensor:
        draw, held = random.Random(seed), [x * 1, x.flip(1) + 1]
        for _ in range(14):
            t, u = draw.choice(held), draw.choice(held)
            kind = draw.choice("vvwwo")
            line = draw.choice({"v": VIEWS, "w": WRITES, "o": OTHERS}[kind])
            try:
                new = line(t) if kind == "v" else line(t, u)
            except (RuntimeError, IndexError):
                continue
            if new.numel() and new.ndim < 5:
                held.append(new)
        return torch.stack([t.square().sum() for t in held])

    return run


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(s, marks=pytest.mark.nightly) for s in range(12, 300))]
)
def test_programs_of_views_and_writes_compute_what_pytorch_computes(seed: int) -> None:
    run = _program(seed)
    model, x = Apply(lambda self, x: run(x)), torch.randn(4, 3, 2, dtype=torch.float64)
    module = unlifted(capture(model, x, by="record").program)
    known = memory.Memory(module.graph)
    assert known.known
    known.renew()
    assert not any(memory.writes(n) for n in module.graph.nodes)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(x), model(x))


def _written(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).clone()
    left, right = y[:, :2], y.narrow(1, 2, 2)
    left.mul_(2)
    right[:, 0] = left[:, 1]
    y.view(-1, 2, 2).transpose(1, 2)[0].add_(1)
    y[-1] = y[0].tanh()
    y.flatten()[3:5].mul_(2)
    y.permute(1, 0)[1:].sub_(0.5)
    return self.b(y)  # type: ignore[no-any-return]


def test_writes_have_the_gradient_of_pytorch_at_every_size_of_the_batch() -> None:
    torch.manual_seed(0)
    model = Apply(_written, a=nn.Linear(4, 4).double(), b=nn.Linear(4, 3).double())
    rules = [("*", lrpfx.Gradient())]
    explainer = lrpfx.Explainer(model, torch.randn(4, 4).double(), rules, capture="export")
    for n in (2, 5):
        x = torch.randn(n, 4).double().requires_grad_()
        seed = torch.randn(n, 3).double()
        explanation = explainer(x.detach(), seed)
        (model(x) * seed).sum().backward()
        torch.testing.assert_close(explanation.output, model(x).detach())
        torch.testing.assert_close(explanation.relevance, x.grad)
