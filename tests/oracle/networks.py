"""Small networks that are the same at every call, and what they are given."""

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx import composites
from tests.conftest import Apply

#: LRP-0: in a network that is linear, relevance is the contribution to the output.
LRP_0 = composites.EpsilonAll(0.0)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module) -> nn.Module:
    """The model with parameters and statistics that are the same in every session."""
    for i, tensor in enumerate([*model.parameters(), *model.buffers()]):
        if tensor.is_floating_point():
            tensor.data = draw(*tensor.shape, seed=i).abs_() if i % 3 else draw(*tensor.shape)
    return model.eval()


class ConvNet(nn.Module):
    """A conv with a batch norm to fold, ReLU as module and as function, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU()
        self.classifier = nn.Linear(32, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.classifier(F.relu(x).flatten(1))


def conv_net() -> nn.Module:
    return trained(ConvNet())


def mlp() -> nn.Module:
    return trained(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def image(n: int = 2, seed: int = 3) -> Tensor:
    return draw(n, 1, 4, 4, seed=seed)


class TwoArms(nn.Module):
    """The linear map scale * (A x + B y) * mask + ids * row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4, bias=False)
        self.b = nn.Linear(5, 4, bias=False)
        self.row = nn.Parameter(torch.ones(4))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: float = 1.0,
        ids: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        mode: str = "sum",
    ) -> Tensor:
        out = scale * (self.a(x) + self.b(y))
        out = out if mask is None else out * mask
        out = out if ids is None else out + ids[:, None] * self.row
        return out if mode == "sum" else -out


X, Y = draw(2, 3).double(), draw(2, 5, seed=4).double()
IDS, MASK = torch.tensor([1, 6]), torch.tensor([[True, False, True, True]] * 2)


@dataclass
class Plain:
    logits: Any
    extra: Any = None


def returning(pack: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    body = mlp()
    return Apply(lambda m, x: pack(m.body(x), m.body(x * 2) * 3), body=body)


def leaves(output: Any) -> list[Any]:
    """What an output holds, in order; None and texts, too."""
    return pytree.tree_leaves(vars(output) if is_dataclass(output) else output)


def assert_same(found: Any, expected: Any) -> None:
    """Equal leaves, whatever container they are in."""
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


def fc(forward: Callable[..., Any], **members: Any) -> nn.Module:
    return trained(Apply(forward, fc=nn.Linear(3, 3), **members))


def tied() -> nn.Module:
    model = trained(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    return model
