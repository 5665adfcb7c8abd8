"""How a model holds its layers, is wrapped, called and answers: none of it changes relevance."""

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lrpfx
from tests.conftest import Apply
from tests.oracle.spellings import (
    FOR_IMAGES,
    RULES,
    assert_same,
    close,
    drawn,
    layers,
    net,
    normal,
    plain_net,
)

pytestmark = pytest.mark.usefixtures("each_front")


def _registered_backwards() -> nn.Module:
    return Apply(net, **dict(reversed(layers().items())))


def _in_a_shuffled_list() -> nn.Module:
    first, second, head = layers().values()

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.all[2](x))
        y = F.relu(m.all[1](y) + y)
        return m.all[0](y.mean((2, 3)))

    return Apply(forward, all=nn.ModuleList([head, second, first]))


def _in_a_dict() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = sorted(m.all)  # first, head, second
        y = m.all[order[0]](x).relu()
        y = F.relu(m.all[order[2]](y) + y)
        return m.all[order[1]](y.mean((2, 3)))

    return Apply(forward, all=nn.ModuleDict(reversed(layers().items())))


def _hidden_in_a_list() -> nn.Module:
    """Not registered: no hook finds these, and neither does ``parameters()``."""
    hidden = list(layers().values())

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(hidden[0](x))
        return hidden[2](F.relu(hidden[1](y) + y).mean((2, 3)))

    return Apply(forward)


def _hidden_in_an_attribute() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.table["first"](x))
        return m.table["head"](F.relu(m.table["second"](y) + y).mean((2, 3)))

    return Apply(forward, table=layers())


def _wrapped() -> nn.Module:
    return Apply(lambda m, x: m.module(x), module=plain_net())


def _with_idle_hooks() -> nn.Module:
    model = plain_net()
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: None)
        module.register_forward_pre_hook(lambda m, args: None)
        module.register_full_backward_hook(lambda m, before, after: None)
    return model


def _scaled_by_a_hook() -> nn.Module:
    model = plain_net()
    model.first.register_forward_pre_hook(lambda m, args: (args[0] * 2 - 1,))
    model.second.register_forward_hook(lambda m, args, output: output * 0.5)
    return model


def _scaled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x * 2 - 1))
        return m.head(F.relu(m.second(y) * 0.5 + y).mean((2, 3)))

    return Apply(forward, **layers())


def _compiled_inside() -> nn.Module:
    parts = layers()
    parts["first"] = torch.compile(parts["first"], backend="eager")
    return Apply(net, **parts)


def _odd_names() -> nn.Module:
    model = nn.Module()
    for name, layer in zip(("a-1", "1 x", "ü"), layers().values(), strict=True):
        model.add_module(name, layer)

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second, head = m.inner.children()
        y = F.relu(first(x))
        return head(F.relu(second(y) + y).mean((2, 3)))

    return Apply(forward, inner=model)


def _tied() -> nn.Module:
    parts = layers()
    parts["second"] = drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6)
    parts["other"] = nn.Conv2d(4, 4, 3, padding=1).double()
    parts["other"].weight, parts["other"].bias = parts["second"].weight, parts["second"].bias
    return Apply(lambda m, x: m.other(F.relu(m.second(F.relu(m.first(x))))), **parts)


def _untied() -> nn.Module:
    return Apply(lambda m, x: m.second(F.relu(m.second(F.relu(m.first(x))))), **layers())


def _normed(norm: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network with a parametrized convolution, and one with the weight that comes out."""
    torch.manual_seed(0)
    parts = layers()
    parts["second"] = norm(nn.Conv2d(4, 4, 3, padding=1).double()).eval()
    parts["second"](normal(1, 4, 3, 3))  # the old weight_norm computes the weight in a hook
    weight = parts["second"].weight.detach().clone()
    bias = parts["second"].bias.detach().clone()
    plain = nn.Conv2d(4, 4, 3, padding=1).double()
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return Apply(net, **parts), Apply(net, **{**layers(), "second": plain})


Two = namedtuple("Two", ["logits", "features"])


@dataclasses.dataclass
class Inner:
    logits: Tensor


@dataclasses.dataclass
class Outer:
    inner: Inner
    extra: list[Inner]


def _returning(wrap: Callable[[Tensor], Any]) -> tuple[nn.Module, nn.Module]:
    return Apply(lambda m, x: wrap(net(m, x)), **layers()), plain_net()


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "registered backwards": lambda: (_registered_backwards(), plain_net()),
    "shuffled ModuleList": lambda: (_in_a_shuffled_list(), plain_net()),
    "ModuleDict": lambda: (_in_a_dict(), plain_net()),
    "modules in a Python list": lambda: (_hidden_in_a_list(), plain_net()),
    "modules in a Python dict": lambda: (_hidden_in_an_attribute(), plain_net()),
    "wrapper": lambda: (_wrapped(), plain_net()),
    "hooks that change nothing": lambda: (_with_idle_hooks(), plain_net()),
    "hooks that change input and output": lambda: (_scaled_by_a_hook(), _scaled()),
    "compiled submodule": lambda: (_compiled_inside(), plain_net()),
    "names that are no identifiers": lambda: (_odd_names(), plain_net()),
    "tied weights": lambda: (_tied(), _untied()),
    "weight_norm": lambda: _normed(parametrizations.weight_norm),
    "weight_norm, old": lambda: _normed(torch.nn.utils.weight_norm),
    "spectral_norm": lambda: _normed(parametrizations.spectral_norm),
    "spectral_norm, old": lambda: _normed(torch.nn.utils.spectral_norm),
    "orthogonal": lambda: _normed(parametrizations.orthogonal),
    "dict output": lambda: _returning(lambda y: {"logits": y, "loss": None}),
    "tuple output": lambda: _returning(lambda y: (y, y.detach())),
    "list output": lambda: _returning(lambda y: [y]),
    "namedtuple output": lambda: _returning(lambda y: Two(y, [y.argmax(1)])),
    "nested dataclass output": lambda: _returning(lambda y: Outer(Inner(y), [Inner(y + 1)])),
    "dataclass in a dict": lambda: _returning(lambda y: {"out": Inner(y)}),
    "model in double": lambda: (plain_net().double().eval().requires_grad_(False), plain_net()),
}


@pytest.mark.filterwarnings("ignore")  # the old weight_norm, and hooks on what is traced
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    spelled, plain = make()
    x = normal(2, 2, 5, 5)

    def of(model: nn.Module, rules: str) -> tuple[Any, Tensor]:
        e = lrpfx.explain(model, x, lambda o: logits(o)[:, 1] * 2, rules=RULES[rules])
        return e.output, e.relevance

    for rules in FOR_IMAGES:
        (a, r), (b, expected) = of(spelled, rules), of(plain, rules)
        assert type(a) is type(spelled(x))
        assert close(logits(a), logits(b))
        assert expected.abs().max() > 1e-3
        assert close(r, expected), f"{rules}: {(r - expected).norm() / expected.norm():.1e}"


def logits(output: Any) -> Tensor:
    """The first tensor of an output that may be anything."""
    while not isinstance(output, Tensor):
        if isinstance(output, Outer):
            output = output.inner
        elif isinstance(output, Inner):
            output = output.logits
        else:
            output = output[next(iter(output))] if isinstance(output, dict) else output[0]
    return output.flatten(1)[:, :3]


def _siamese(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return m.head((m.body(a) - m.body(b)).flatten(1))


def _siamese_plain(m: Any, a: Tensor, b: Tensor) -> Tensor:
    one = F.relu(F.conv2d(a, m.body[0].weight, m.body[0].bias))
    two = F.relu(F.conv2d(b, m.body[0].weight, m.body[0].bias))
    return F.linear((one - two).flatten(1), m.head.weight, m.head.bias)


def _siamese_in_one_batch(m: Any, a: Tensor, b: Tensor) -> Tensor:
    one, two = m.body(torch.cat([a, b])).split(a.shape[0])
    return m.head((one - two).flatten(1))


INPUTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "siamese": (_siamese, _siamese_plain),
    "siamese in one batch": (_siamese_in_one_batch, _siamese_plain),
    "*args": (lambda m, *args: _siamese(m, *args), _siamese_plain),
    "two heads on one body": (
        lambda m, a, b: torch.stack([m.head(m.body(t).flatten(1)) for t in (a, b)]).sum(0),
        lambda m, a, b: m.head(m.body(a).flatten(1)) + m.head(m.body(b).flatten(1)),
    ),
}


@pytest.mark.parametrize(("spelled", "plain"), INPUTS.values(), ids=INPUTS)
def test_several_inputs(spelled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    members = dict(
        body=nn.Sequential(drawn(nn.Conv2d(2, 3, 3)), nn.ReLU(inplace=True)),
        head=drawn(nn.Linear(12, 3), seed=3),
    )
    inputs = (normal(2, 2, 4, 4), normal(2, 2, 4, 4, seed=8))
    assert_same(Apply(spelled, **members), Apply(plain, **members), inputs, FOR_IMAGES)


def test_embedding_bag_is_an_embedding_and_its_mean() -> None:
    ids = torch.tensor([[1, 2, 2], [0, 4, 3]])
    head = drawn(nn.Linear(4, 3))
    for mode, reduce_bag in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
        bag = drawn(nn.EmbeddingBag(6, 4, mode=mode))
        spelled = Apply(lambda m, ids: m.head(F.relu(m.bag(ids))), bag=bag, head=head)
        plain = Apply(
            lambda m, ids, f=reduce_bag: m.head(F.relu(f(F.embedding(ids, m.bag.weight), 1))),
            bag=bag,
            head=head,
        )
        r, expected = (lrpfx.explain(m, ids, 1, rules=RULES["gamma"]) for m in (spelled, plain))
        assert close(r.output, expected.output)
        assert close(r.relevance, expected.relevance) and expected.relevance.abs().max() > 1e-3
        assert close(r.embeddings, expected.embeddings)
