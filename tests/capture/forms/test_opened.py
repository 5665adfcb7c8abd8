"""Objects that hold tensors: as trees of these, as inputs and outputs, and as relevance."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrpfx
from lrpfx.capture.forms.opened import leaves_in, opened
from lrpfx.errors import CaptureError, InputError
from tests.conftest import Apply


class Layer:
    def __init__(self, rows: list[Tensor], size: int = 2) -> None:
        self.rows, self.size, self.kind = rows, size, torch.float64


class Cache:
    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)
        self.table = {"first": layers[0] if layers else None, 3: (self, torch.Tensor)}

    def update(self, new: Tensor) -> Tensor:
        self.layers[0].rows.append(new)
        return torch.stack(self.layers[0].rows)


class Slotted:
    __slots__ = ("x",)


def _cache() -> Cache:
    return Cache(Layer([torch.ones(2), torch.zeros(3)]), Layer([torch.arange(2)]))


def test_an_object_is_put_together_from_other_leaves() -> None:
    cache = _cache()
    leaves, spec = pytree.tree_flatten(opened({"a": cache, "b": torch.ones(1)}))
    assert [tuple(leaf.shape) for leaf in leaves] == [(2,), (3,), (2,), (1,)]
    assert leaves_in(cache)[0] is cache.layers[0].rows[0]
    new = pytree.tree_unflatten([leaf + 1 for leaf in leaves], spec)["a"]
    assert type(new) is Cache and new.layers[1].size == 2
    assert new.table["first"] is new.layers[0] and new.table[3] == (new, torch.Tensor)
    torch.testing.assert_close(new.layers[0].rows[0], torch.full((2,), 2.0))
    new.layers[0].rows.append(torch.ones(2))
    assert len(cache.layers[0].rows) == 2  # the object itself is left as it was
    assert spec == pytree.tree_structure(opened({"a": _cache(), "b": 0}))
    cache.layers[1].size = 3
    assert spec != pytree.tree_structure(opened({"a": cache, "b": 0}))


def test_a_dict_of_a_class_of_its_own_keeps_items_and_attributes() -> None:
    class Named(OrderedDict[str, Tensor]):
        pass

    named = Named(b=torch.ones(1), a=torch.zeros(1))
    named.also = named["a"]  # type: ignore[attr-defined]
    leaves, spec = pytree.tree_flatten(opened(named))
    new = pytree.tree_unflatten(leaves, spec)
    assert type(new) is Named and list(new) == ["b", "a"] and new.also is new["a"]


@pytest.mark.parametrize(
    "value", [nn.Linear(1, 1), Slotted(), torch.Generator(), ValueError(), open, [Slotted()]]
)
def test_what_cannot_be_copied_by_its_attributes_stays_a_leaf(value: Any) -> None:
    class Holder:
        held = None

    holder = Holder()
    holder.held = value
    assert opened(value) == value
    assert leaves_in(holder) == ([] if value is open else [holder])


def _step(self: Any, x: Tensor, cache: Cache) -> Any:
    return self.head(cache.update(self.a(x)).mean(0)), cache


def _step_by_tensors(self: Any, x: Tensor, *past: Tensor) -> Tensor:
    return self.head(torch.stack([*past, self.a(x)]).mean(0))  # type: ignore[no-any-return]


def _model(forward: Any) -> nn.Module:
    torch.manual_seed(0)
    return Apply(forward, a=nn.Linear(4, 4).double(), head=nn.Linear(4, 3).double())


def test_the_tensors_of_an_object_are_explained_in_an_object() -> None:
    x, past = torch.randn(2, 4).double(), [torch.randn(2, 4).double() for _ in range(2)]
    cache = Cache(Layer([*past]))
    explainer = lrpfx.Explainer(_model(_step), (x, cache))
    for _ in range(2):
        explanation = explainer((x, cache), 1)
        expected = lrpfx.explain(_model(_step_by_tensors), (x, *past), 1, capture="export")
        found = explanation.relevance[1]
        assert isinstance(found, Cache) and found.table["first"] is found.layers[0]
        got = [explanation.relevance[0], *found.layers[0].rows]
        torch.testing.assert_close(got, list(expected.relevance), rtol=1e-10, atol=1e-12)
        assert len(cache.layers[0].rows) == 2  # the user's object is not written into
        assert len(explanation.output[1].layers[0].rows) == 3
    assert explanation.report.reached == pytest.approx(expected.report.reached)
    assert "[2, 4]" in repr(explanation) and len(repr(explanation).split("float64[2, 4]")) == 4
    several = explainer((x, cache), "all").relevance[1]
    assert several.layers[0].rows[0].shape == (3, 2, 4)
    chosen = lrpfx.explain(_model(_step), (x, cache), 1, wrt="args.1.layers.0.rows.1")
    first, second = chosen.relevance[1].layers[0].rows
    assert chosen.relevance[0] is None and first is None
    torch.testing.assert_close(second, expected.relevance[2], rtol=1e-10, atol=1e-12)


def test_another_state_of_an_object_is_another_form_of_the_inputs() -> None:
    x = torch.randn(2, 4).double()

    def forward(self: Any, x: Tensor, layer: Layer) -> Tensor:
        return self.head(self.a(x) * layer.size + layer.rows[0])  # type: ignore[no-any-return]

    explainer = lrpfx.Explainer(_model(forward), (x, Layer([x], 2)), capture="record")
    for size in (2, 5, 2):
        plain = _model(lambda self, x, row, size=size: self.head(self.a(x) * size + row))
        expected = lrpfx.explain(plain, (x, x), 1, capture="export").relevance
        found = explainer((x, Layer([x], size)), 1).relevance
        torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[1].rows[0], expected[1], rtol=1e-10, atol=1e-12)


def test_objects_that_cannot_be_opened_are_refused_by_name() -> None:
    x, slotted = torch.randn(2, 4).double(), Slotted()
    with pytest.raises(CaptureError, match="the inputs hold a Slotted"):
        lrpfx.explain(_model(lambda self, x, y: self.head(x)), (x, slotted), 1, capture="record")
    with pytest.raises(CaptureError, match="returns a Slotted"):
        lrpfx.explain(_model(lambda self, x: (self.head(x), Slotted())), x, 1, capture="record")
    with pytest.raises(InputError, match="no input is a tensor"):
        lrpfx.explain(_model(_step), (Cache(),), 1)
