"""In-place ops: each is renamed to the op that computes the same, whatever that is called."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.canonize.writes.memory import functional
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_way")

aten = torch.ops.aten


def in_place() -> Iterator[Any]:
    """All in-place overloads of ATen that work on one tensor."""
    for schema in torch._C._jit_get_all_schemas():
        name, overload = schema.name.removeprefix("aten::"), schema.overload_name or "default"
        first = schema.arguments[0] if schema.arguments else None
        written = first and first.alias_info and first.alias_info.is_write
        if written and schema.name.startswith("aten::") and name.endswith("_"):
            packet = getattr(aten, name)
            if overload in packet.overloads() and str(first.type) == "Tensor":
                yield getattr(packet, overload)


MADE = {"number": 2, "int": 1, "float": 0.5, "bool": False, "str": "sum", "List[int]": [0, 1]}
FLOATS, NUMBERS, TRUTHS = torch.rand(3, 3).double() + 1, torch.tensor([[1, 2, 4]] * 3), torch.eye(3)
INDICES = [torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]]), torch.tensor([0, 2, 1])]


def arguments(schema: Any, x: Tensor, other: Tensor, index: Tensor) -> dict[str, Any]:
    """Something for each argument."""
    own = {"index": index, "mask": torch.eye(3) > 0, "min": other, "self": x, "input": x}
    own |= {"decimals": 1, "indices": [index], "reduce": "mean", "rounding_mode": "floor"}
    return {
        a.name: a.default_value
        if a.has_default_value() and a.name not in own
        else own.get(a.name, MADE.get(str(a.type), other))
        for a in schema.arguments
    }


def computes_the_same(op: Any) -> bool | None:
    """Whether op and functional form agree on the first arguments they take; None without any."""
    renamed = functional(op)
    assert renamed is not None
    for x, index in itertools.product((FLOATS, NUMBERS, TRUTHS > 0), INDICES):
        for other in (x.flip(0), x[0], x[0, 0]):
            given = arguments(op._schema, x.clone(), other, index)
            again = arguments(renamed._schema, x.clone(), other, index)
            try:
                torch.manual_seed(0)
                op(**given)
                torch.manual_seed(0)
                found = renamed(**again)
            except (RuntimeError, IndexError):
                continue
            written = given[op._schema.arguments[0].name]
            same = torch.isclose(found.to(x.dtype), written, equal_nan=True)
            return found.shape == written.shape and bool(same.all())
    return None


def test_every_in_place_op_computes_what_its_functional_form_does() -> None:
    found = {str(op): computes_the_same(op) for op in in_place() if functional(op) is not None}
    assert [name for name, same in found.items() if same is False] == []
    assert sum(same is True for same in found.values()) > 200


@pytest.mark.parametrize(
    ("op", "other"),
    [
        (aten.pow_.Scalar, aten.pow.Tensor_Scalar),
        (aten.pow_.Tensor, aten.pow.Tensor_Tensor),
        (aten.float_power_.Scalar, aten.float_power.Tensor_Scalar),
        (aten.polygamma_.default, aten.polygamma.default),
        (aten.floor_divide_.Tensor, aten.floor_divide.default),
        (aten.ldexp_.default, aten.ldexp.Tensor),
        (aten.dropout_.default, aten.dropout.default),
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.fill_diagonal_.default, None),
    ],
)
def test_the_overload_is_found_by_its_arguments(op: Any, other: Any) -> None:
    assert functional(op) is other


POWERS = {
    "pow with a number": (lambda d: d.pow_(-0.5), lambda d: d.pow(-0.5)),
    "pow with a tensor": (lambda d: d.pow_(d.detach() * 0.5), lambda d: d.pow(d.detach() * 0.5)),
    "float_power": (lambda d: d.float_power_(-0.5), lambda d: d.float_power(-0.5)),
    "floor division": (lambda d: d.floor_divide_(2), lambda d: torch.floor_divide(d, 2)),
    "polygamma": (lambda d: d.polygamma_(1), lambda d: torch.polygamma(1, d)),
    "ldexp": (lambda d: d.ldexp_(torch.tensor(2)), lambda d: torch.ldexp(d, torch.tensor(2))),
}


@pytest.mark.parametrize(("inside", "outside"), POWERS.values(), ids=POWERS)
def test_powers_in_place_are_explained_as_their_twins(inside: Any, outside: Any) -> None:
    torch.manual_seed(0)
    fc, adjacency = nn.Linear(4, 3, bias=False), torch.ones(5, 5).double().triu()
    x, found = torch.randn(5, 4).double(), []
    for power in (inside, outside):

        def forward(m: Any, x: Tensor, power: Any = power) -> Tensor:
            d = power(m.adjacency.sum(1))
            return (d[:, None] * m.adjacency * d[None]) @ m.fc(x)

        model = Apply(forward, fc=fc, adjacency=adjacency).double()
        found.append(lrpfx.explain(model, x, 1, rules=EpsilonAll(0.0)))
    torch.testing.assert_close(found[0].output, found[1].output)
    torch.testing.assert_close(found[0].relevance, found[1].relevance)


def test_a_live_tensor_is_raised_in_place() -> None:
    torch.manual_seed(0)
    x, fc = torch.randn(2, 4).double(), nn.Linear(4, 3)
    models = [
        Apply(lambda m, x: m.fc(x).abs_().add_(1).pow_(-0.5), fc=fc).double(),
        Apply(lambda m, x: (m.fc(x).abs() + 1) ** -0.5, fc=fc).double(),
    ]
    one, other = (lrpfx.explain(model, x, 1).relevance for model in models)
    torch.testing.assert_close(one, other)
