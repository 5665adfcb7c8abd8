"""What relevance without a ledger takes, counted in bytes of tensors and not in resident memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lrpfx

SIZE = 64
#: Bytes of an activation of ``plain``.
UNIT = 4 * SIZE * SIZE * 8


class Peak(TorchDispatchMode):
    """The most bytes that tensors made here take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_address(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(made):
            if isinstance(t, Tensor) and _address(t) not in self._known | given:
                storage, key = t.untyped_storage(), _address(t)
                self._known.add(key)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.bytes = max(self.bytes, self._now)
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that the second of two calls takes at once."""
    call()
    with Peak() as found:
        call()
    return found.bytes


def plain(depth: int = 3) -> nn.Sequential:
    """Convolutions of one size."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Conv2d(4 if k else 1, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("rules", "units"),
    [("epsilon_all", 3), ("epsilon_plus", 4), ("epsilon_alpha2_beta1", 5)],
    ids=str,
)
def test_a_convolution_takes_few_tensors_at_once(rules: str, units: int) -> None:
    """On top of those that are kept, one for each of the three."""
    x = draw(1, 1, SIZE, SIZE)
    explainer = lrpfx.Explainer(plain(), x, rules)
    taken = peak(lambda: explainer(x, 0, ledger=False)) / UNIT
    assert taken < 3 + units + 0.1
