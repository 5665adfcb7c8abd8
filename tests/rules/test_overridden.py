"""A subclass of any rule is obeyed by whatever way relevance is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import rules
from tests.conftest import Apply, traced_once

CLASSES = [
    cls
    for cls in (getattr(rules, name) for name in rules.__all__)
    if isinstance(cls, type)
    and issubclass(cls, lrpfx.Rule)
    and cls not in (lrpfx.Rule, lrpfx.AffineRule, lrpfx.Stop, rules.ReLURule)
]
AFFINE = [cls for cls in CLASSES if issubclass(cls, lrpfx.AffineRule)]
OPTIONS = {lrpfx.ZBox: {"low": -9.0, "high": 9.0}, lrpfx.Epsilon: {"epsilon": 0.0}}


def forward(m: Apply, x: Tensor) -> Tensor:
    """Every family of ops, and every place that a shortcut is laid on."""
    y = torch.relu(m.stem(x))
    y = torch.relu(m.conv(y) + y)
    y = nn.functional.silu(m.conv(torch.relu(m.conv(y)))) * torch.sigmoid(m.conv(y))
    t = m.norm(nn.functional.avg_pool1d(y, 2).mT)
    t = t + nn.functional.scaled_dot_product_attention(m.q(t), m.k(t), t)
    return m.head(t.amax(1))


@pytest.fixture(scope="module")
def build() -> Callable[[Any], lrpfx.Explainer]:
    torch.manual_seed(0)
    linear = {name: nn.Linear(4, 4, bias=False) for name in ("q", "k")}
    conv = {"stem": nn.Conv1d(2, 4, 3), "conv": nn.Conv1d(4, 4, 3, padding=1)}
    m = Apply(forward, **conv, **linear, norm=nn.LayerNorm(4), head=nn.Linear(4, 3)).double()
    known: dict[int, Any] = {}

    def build(rule: lrpfx.Rule) -> lrpfx.Explainer:
        with traced_once(known):
            return lrpfx.Explainer(m, torch.ones(2, 2, 8).double(), [("*", rule), "attnlrp"])

    return build


def made(cls: type, **own: Any) -> lrpfx.Rule:
    return type("Own", (cls,), own)(**OPTIONS.get(cls, {}))


def assert_obeyed(build: Any, own: lrpfx.Rule, base: lrpfx.Rule) -> None:
    x = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    explainer = build(own)
    plain = explainer(x, 1).relevance
    assert not torch.allclose(plain, build(base)(x, 1).relevance)
    derived = explainer(x, 1, create_graph=True, ledger=False).relevance
    torch.testing.assert_close(derived.detach(), plain)
    fast = explainer(x, 1, ledger=False).relevance
    torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_propagate_is_obeyed(build: Any, cls: type) -> None:
    def propagate(self: Any, call: Any, x: Any, z: Any, R: Any) -> Any:
        flow = cls.propagate(self, call, x, z, R)  # type: ignore[attr-defined]
        pairs = zip(flow.relevance, x, strict=True)
        return lrpfx.Flow(tuple(r * (1.5 + torch.tanh(a)) for r, a in pairs))

    assert_obeyed(build, made(cls, propagate=propagate), made(cls))


@pytest.mark.parametrize("cls", AFFINE, ids=lambda cls: cls.__name__)
def test_terms_are_obeyed(build: Any, cls: type) -> None:
    def terms(self: Any, x: Any, f: Any, z: Any) -> Any:
        of_inputs = [(tuple(t.abs() for t in x.all), f)]
        return [*cls.terms(self, x, f, z), lrpfx.Term(of_inputs, gate=0.1)]  # type: ignore

    assert_obeyed(build, made(cls, terms=terms), made(cls))


def test_a_formula_of_a_base_beside_is_obeyed(build: Any) -> None:
    class Twice:
        def propagate(self, *args: Any) -> Any:
            flow = super().propagate(*args)  # type: ignore[misc]
            return lrpfx.Flow(tuple(2 * r for r in flow.relevance))

    own = type("Own", (Twice, lrpfx.Pass), {})()
    assert_obeyed(build, own, lrpfx.Pass())


@pytest.mark.parametrize("cls", [lrpfx.ZPlus, lrpfx.Pass], ids=lambda cls: cls.__name__)
def test_what_is_set_once_the_class_is_made_is_obeyed(build: Any, cls: type) -> None:
    own = made(cls)

    def propagate(self: Any, *args: Any) -> Any:
        flow = cls.propagate(self, *args)  # type: ignore[attr-defined]
        return lrpfx.Flow(tuple(2 * r for r in flow.relevance))

    type(own).propagate = propagate  # type: ignore[method-assign]
    assert_obeyed(build, own, made(cls))


@pytest.mark.parametrize("name", ["relevance", "multiply", "weigh"])
@pytest.mark.parametrize("cls", [lrpfx.ZPlus, lrpfx.Taylor], ids=lambda cls: cls.__name__)
def test_a_fast_form_by_itself_is_refused(cls: type, name: str) -> None:
    def own(self: Any, *args: Any) -> Any:
        return getattr(cls, name)(self, *args)

    with pytest.raises(lrpfx.errors.RuleError, match="override propagate instead"):
        type("Own", (cls,), {name: own})


def test_what_says_no_formula_keeps_its_fast_form(build: Any) -> None:
    class Named(lrpfx.ZPlus):
        """Another name, and no more."""

    explainer = build(Named())
    edges = [row.edge for row in explainer.report.rows if row.rule == "Named"]
    assert edges == [row.edge for row in build(lrpfx.ZPlus()).report.rows if row.rule == "ZPlus"]
