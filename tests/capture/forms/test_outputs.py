"""Outputs of every structure, and callables that pick what is explained of them."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply
from tests.oracle.networks import Plain, assert_same, draw, leaves, mlp, returning, trained

pytestmark = pytest.mark.usefixtures("each_way")


@dataclass(frozen=True)
class Frozen:
    logits: Any
    extra: Any = None


@dataclass
class Derived:
    """A field that the constructor does not take, and one that it computes."""

    logits: Any
    extra: Any = None
    n: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        self.extra = self.logits.softmax(1)


Named = namedtuple("Named", "logits extra")


OUTPUTS: list[tuple[str, Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], int]] = [
    # name, (logits, others) -> output, output -> logits, position of the first floating tensor
    ("tuple", lambda z, o: (z, o), lambda out: out[0], 0),
    ("list", lambda z, o: [o, z], lambda out: out[1], 0),
    ("tuple with integers first", lambda z, o: (z.argmax(1), z, o), lambda out: out[1], 1),
    ("tuple with None first", lambda z, o: (None, z), lambda out: out[1], 1),
    ("tuple with a scalar first", lambda z, o: (o.sum(), z), lambda out: out[1], 0),
    ("tuple with no batch first", lambda z, o: (o.sum(0).repeat(3), z), lambda out: out[1], 0),
    ("dict", lambda z, o: {"other": o, "logits": z}, lambda out: out["logits"], 0),
    ("OrderedDict", lambda z, o: OrderedDict(logits=z), lambda out: out["logits"], 0),
    ("named tuple", lambda z, o: Named(z, o), lambda out: out.logits, 0),
    ("nested", lambda z, o: {"a": [o, (z, o)]}, lambda out: out["a"][1][0], 0),
    ("dataclass", lambda z, o: Plain(z, o), lambda out: out.logits, 0),
    ("frozen dataclass", lambda z, o: Frozen(z, o), lambda out: out.logits, 0),
    ("dataclass without a value", lambda z, o: Plain(z), lambda out: out.logits, 0),
    ("dataclass with a text", lambda z, o: Plain(z, "text"), lambda out: out.logits, 0),
    ("dataclass with a dict", lambda z, o: Plain(z, {"o": [o]}), lambda out: out.logits, 0),
    ("dataclass, logits last", lambda z, o: Plain(o, z), lambda out: out.extra, 0),
    ("dataclass with a derived field", lambda z, o: Derived(z), lambda out: out.logits, 0),
    ("subclass", lambda z, o: type("Sub", (Plain,), {})(z, o), lambda out: out.logits, 0),
]


def first_fraction(output: Any) -> Tensor:
    tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
    return next(t for t in tensors if t.is_floating_point())


@pytest.mark.parametrize(
    ("pack", "pick", "first"), [pytest.param(*row, id=name) for name, *row in OUTPUTS]
)
def test_model_that_returns(
    pack: Callable[[Tensor, Tensor], Any], pick: Callable[[Any], Tensor], first: int
) -> None:
    model, x = returning(pack), draw(2, 3)
    expected = model(x)
    received: list[Any] = []

    def target(out: Any) -> Tensor:
        received.append(out)
        return pick(out)[:, 1]

    explainer = lrpfx.Explainer(model, x)
    explanation = explainer(x, target)
    kind = type(expected)
    for output in (received[-1], explanation.output):
        # The class "subclass" is made at each call, but its name is the same.
        assert type(output) is kind or kind.__name__ == type(output).__name__ == "Sub"
        assert_same(output, expected)
    torch.testing.assert_close(explanation.relevance, lrpfx.explain(mlp(), x, 1).relevance)

    # Without a callable it is the first tensor with a fraction, and the report says which.
    one = first_fraction(expected)
    if one.ndim and len(one) != len(x):
        with pytest.raises(lrpfx.errors.TargetError, match="no dimension of samples"):
            explainer(x)
        return
    explanation = explainer(x)
    tensors = [leaf for leaf in leaves(expected) if isinstance(leaf, Tensor)]
    chosen = next(t for t in tensors if t.is_floating_point())
    started = explanation.seed != 0
    torch.testing.assert_close(explanation.seed[started], chosen[started])
    if len(tensors) > 1:
        fields = expected if isinstance(expected, dict) else getattr(expected, "__dict__", {})
        keys = [repr(key) for key, value in fields.items() if value is chosen]
        assert f"output {(keys or [first])[0]}" in explanation.report.target
        assert f"first of {len(tensors)}" in explanation.report.target
    else:
        assert "first of" not in explanation.report.target


def test_callable_of_several_outputs() -> None:
    """Relevance of a sum of outputs is the sum of their relevances."""
    x = draw(2, 3)
    model = returning(lambda z, o: Plain(z, o))
    explainer = lrpfx.Explainer(model, x)
    both = explainer(x, lambda out: out.logits[:, 1] + out.extra[:, 0]).relevance
    one = explainer(x, lambda out: out.logits[:, 1]).relevance
    other = explainer(x, lambda out: out.extra[:, 0]).relevance
    torch.testing.assert_close(both, one + other)


@pytest.mark.parametrize("create_graph", [False, True])
def test_callable_of_an_output_that_others_are_computed_from(create_graph: bool) -> None:
    """As a model returns its encoder's last state: the seed of that is by its own use alone."""
    model = trained(
        Apply(
            lambda m, x: (m.head(h := m.body(x).tanh()), h),
            body=nn.Linear(3, 4),
            head=nn.Linear(4, 2),
        )
    ).double()
    x = draw(2, 3).double().requires_grad_(create_graph)
    explainer = lrpfx.Explainer(model, x)

    def both(out: Any) -> Tensor:
        return out[0][:, 1] + 3 * out[1][:, 0]

    explanation = explainer(x, both, create_graph=create_graph)
    one = explainer(x, lambda out: out[0][:, 1])
    other = explainer(x, lambda out: 3 * out[1][:, 0])
    torch.testing.assert_close(explanation.relevance.detach(), one.relevance + other.relevance)
    report = explanation.report
    assert report.started == pytest.approx(one.report.started + other.report.started)
    assert report.unaccounted == pytest.approx(0.0, abs=1e-12)
    assert [s.shape for s in explanation.seed] == [(2, 2), (2, 4)]
    if create_graph:
        derivative = torch.autograd.gradcheck
        assert derivative(lambda t: explainer(t, both, create_graph=True).relevance, (x,))
