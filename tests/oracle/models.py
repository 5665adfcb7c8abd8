"""A few models of every make, each with what draws inputs for n samples."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from tests.conftest import Apply

NIGHTLY = settings.get_current_profile_name() == "nightly"


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class ConvNet(nn.Module):
    """A residual block with batch norm to fold and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))) + x
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Token ids, their embedding, one layer of attention, a gate: (N, 5) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
        return self.head((F.silu(x) * x).mean(1))


def two_inputs() -> nn.Module:
    return Apply(lambda m, a, b: {"sum": m.fc(a) + b, "b": b}, fc=nn.Linear(3, 3))


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(n))


def row(n: int = 2) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(n))


def tokens(n: int = 2) -> Tensor:
    return torch.randint(0, 7, (n, 5), generator=torch.Generator().manual_seed(n))


def row_pair(n: int = 2) -> dict[str, Tensor]:
    return {"a": row(n), "b": row(n).exp()}


# Each with its inputs for n samples.
MODELS: dict[str, tuple[nn.Module, Callable[[int], Any]]] = {
    "mlp": (seeded(mlp), row),
    "conv": (seeded(ConvNet), image),
    "attention": (seeded(Attention), tokens),
    "two inputs": (seeded(two_inputs), row_pair),
}


every_model = pytest.mark.parametrize("name", list(MODELS))


def leaves_of(explanation: lrpfx.Explanation) -> list[Tensor]:
    found = [explanation.relevance, explanation.output, explanation.seed, explanation.absorbed]
    found += [[list(call) for call in calls] for calls in explanation.layers.values()]
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]


def first_of(output: Any) -> Any:
    return output["sum"] if isinstance(output, dict) else output


def end(call: Callable[[], Any]) -> Any:
    """The result of a call that may end in an LrpError and in no other exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except errors.LrpError as error:
            assert error.what.strip() and error.fix.strip(), repr(error)
            return None


fuzzing = settings(
    max_examples=10_000 if NIGHTLY else 50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
