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

pytestmark = pytest.mark.usefixtures("each_front")

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


def kept(explainer: lrpfx.Explainer, x: Tensor) -> list[torch.Size]:
    """Shapes of what the forward pass keeps for the backward pass, each storage once."""
    module, found = explainer._engine.graphs.for_calls((), fast=True)[0], dict[int, torch.Size]()
    parameters = {_address(p) for p in module.parameters()}

    def keep(t: Tensor) -> Tensor:
        if _address(t) not in parameters:
            found.setdefault(_address(t), t.shape)
        return t

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = module(x, None)
    del out  # until here nothing that is kept was freed, and no address given twice
    return list(found.values())


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardswish()], ids=str)
def test_of_an_activation_only_the_input_is_kept(activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 3)).double()
    explainer, x = lrpfx.Explainer(model, draw(2, 5), "attnlrp"), draw(2, 5)
    assert [tuple(shape) for shape in kept(explainer, x)].count((2, 7)) == 1
    plain, fast = (explainer(x, 0, ledger=ledger).relevance for ledger in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


class Masked(nn.Module):
    """Two attentions under one boolean mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.register_buffer("mask", torch.ones(11, 11, dtype=torch.bool).tril())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # of one head
            a = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
            x = x + a.squeeze(1)
        return self.head(x[:, -1])


@pytest.mark.parametrize("freeze", [False, True])
def test_attentions_share_what_the_kernel_makes_of_a_mask(freeze: bool) -> None:
    x = draw(2, 11, 4)
    explainer = lrpfx.Explainer(Masked(), x, "attnlrp", freeze=freeze)
    assert sum(list(shape).count(11) == 2 for shape in kept(explainer, x)) == 1
    plain, fast = (explainer(x, 0, ledger=ledger).relevance for ledger in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


class Residual(nn.Module):
    """A block whose convolution meets its input, or another branch, before a ReLU."""

    def __init__(self, meet: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.meet, self.stem = meet, nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x).relu()
        return self.head(self.meet(self.first(a), self.second(a), a).relu().mean((2, 3)))


#: How they meet, and how many tensors of that size are kept: a, y, and summands of the sum.
MEETINGS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "input": (lambda z, other, a: z + a, 2),
    "input first": (lambda z, other, a: a + z, 2),
    "branches": (lambda z, other, a: z + other, 3),
    "in place": (lambda z, other, a: z.add_(a), 2),
    "weighted": (lambda z, other, a: torch.add(z, a, alpha=2), 3),
    "broadcast": (lambda z, other, a: z + a.mean((2, 3), keepdim=True), 3),
    "broadcast up": (lambda z, other, a: a + z.mean((2, 3), keepdim=True), 3),
    "twice": (lambda z, other, a: z + z, 3),
    "read elsewhere": (lambda z, other, a: (z + a).relu() + z, 4),
    "in a row": (lambda z, other, a: (z + a).relu() + other, 3),
}


@pytest.mark.parametrize("rules", ["epsilon_plus", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("name", MEETINGS)
def test_a_residual_sum_keeps_one_summand(name: str, rules: str) -> None:
    meet, number = MEETINGS[name]
    explainer, x = lrpfx.Explainer(Residual(meet), draw(2, 2, 6, 6), rules), draw(2, 2, 6, 6)
    plain, fast = (explainer(x, 0, ledger=ledger).relevance for ledger in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    assert [tuple(shape) for shape in kept(explainer, x)].count((2, 4, 6, 6)) == number


def test_rules_that_divide_by_a_summand_recover_it_too() -> None:
    x = draw(2, 2, 6, 6)
    explainer = lrpfx.Explainer(Residual(lambda z, _, a: z + a), x, "epsilon_all")
    plain, fast = (explainer(x, 0, ledger=ledger).relevance for ledger in (True, False))
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    assert [tuple(shape) for shape in kept(explainer, x)].count((2, 4, 6, 6)) == 2


def test_halves_keep_both_summands() -> None:
    x = draw(2, 2, 6, 6)
    both = [
        len(kept(lrpfx.Explainer(Residual(lambda z, _, a: z + a).to(t), x.to(t)), x.to(t)))
        for t in (torch.float32, torch.bfloat16)
    ]
    assert both[1] == both[0] + 1


def test_graphs_are_made_when_they_are_asked_for() -> None:
    model, x = plain(), draw(1, 1, 8, 8)
    explainer = lrpfx.Explainer(model, x)
    assert explainer._engine.graphs.public is None and not explainer._engine.graphs.instrumented
    explainer(x, 0, ledger=False)
    assert (
        explainer._engine.graphs.public is None and len(explainer._engine.graphs.instrumented) == 1
    )
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())
    torch.testing.assert_close(explainer.graph_module(x), model(x))
