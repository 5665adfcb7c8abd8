"""Values of inserted nodes: remembered ones are those that PyTorch's meta kernels give."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lrpfx.canonize.insert import by_trying, run_on_meta, value_of

aten = torch.ops.aten


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, INTEGERS = on_meta(2, 3), on_meta(2, 3, dtype=torch.int64)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "sum": (aten.add.Tensor, (X, on_meta(3)), {"alpha": 2}),
    "True": (aten.add.Tensor, (INTEGERS, True), {}),
    "1": (aten.add.Tensor, (INTEGERS, 1), {}),
    "1.0": (aten.add.Tensor, (INTEGERS, 1.0), {}),
    "quotient": (aten.div.Tensor, (INTEGERS, INTEGERS), {}),
    "transposed": (aten.relu.default, (X.t(),), {}),
    "several": (aten.split.Tensor, (X, 2, 1), {}),
    "two results": (aten.sort.default, (X, 1), {}),
    "list": (aten.cat.default, ([X, X], 1), {}),
    "none": (aten.clamp.default, (X, None, 1.0), {}),
    "dtype": (aten.to.dtype, (X, torch.float64), {}),
    "logarithms": (aten.log_softmax.int, (X.t(), 0), {}),
    "deviation": (aten.std.correction, (X, [1]), {"keepdim": True}),
    "norm": (aten.linalg_vector_norm.default, (X, 2, [0]), {}),
    "permuted": (aten.permute.default, (X, [1, 0]), {}),
    "expanded": (aten.expand.default, (X, [4, 2, 3]), {}),
    "product": (aten.matmul.default, (X, X.t()), {}),
    "distances": (aten.cdist.default, (X, X), {}),
    "rows": (aten.embedding.default, (X, INTEGERS), {}),
}


def form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.storage_offset()
    return type(value), [form(v) for v in value]


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_remembered_values_are_those_of_a_run(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for target, args, kwargs in CALLS.values():
            expected = form(run_on_meta(target, (args, kwargs)))
            first, again = (value_of(target, (args, kwargs)) for _ in range(2))
            assert form(first) == form(again) == expected
            one = first if isinstance(first, Tensor) else first[0]
            other = again if isinstance(again, Tensor) else again[0]
            assert one is not other
    finally:
        torch.set_default_dtype(before)


def _layouts() -> list[tuple[Tensor, Tensor]]:
    image = on_meta(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    return [
        (image, on_meta(3, 1, 1)),
        (last, last),
        (last, on_meta()),
        (image.transpose(1, 3), on_meta(1)),
        (on_meta(3).expand(2, 3), on_meta(2, 1)),
        (on_meta(0, 3), on_meta(3)),
        (on_meta(2, 3, dtype=torch.float16), on_meta(dtype=torch.float64)),
        (INTEGERS, X),
    ]


POINTWISE = [aten.relu.default, aten.rsqrt.default, aten.neg.default, aten.sigmoid.default]
POINTWISE += [aten.gelu.default, aten.reciprocal.default, aten.exp.default, aten.silu.default]
PAIRS = [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default]


def test_values_by_trying_ops_are_those_of_pytorchs_meta_kernels() -> None:
    for a, b in _layouts():
        calls = [(op, (a, b)) for op in PAIRS]
        calls += [(op, (a,)) for op in POINTWISE if a.is_floating_point()]
        for op, args in calls:
            found = by_trying(op, (args, {}))
            assert form(found) == form(run_on_meta(op, (args, {}))), (op, a, b)


def test_a_first_call_imports_no_compiler() -> None:
    code = """
import sys, torch, lrpfx
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
                      nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2)).eval()
lrpfx.explain(model, torch.randn(1, 3, 4, 4), 0)
class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(5, 4), nn.LSTM(4, 3), nn.Linear(3, 2)
    def forward(self, ids):
        states, _ = self.layer(self.table(ids))
        states = nn.functional.normalize(states, dim=-1) / states.std(-1, keepdim=True)
        return nn.functional.log_softmax(self.head(states.sum(1)), -1)
lrpfx.explain(Words().eval(), torch.tensor([[0, 1, 2]]), 0)
assert not {"torch._dynamo", "torch._inductor"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@torch.library.custom_op("lrpfx_tests::above_one", mutates_args=(), tags=[torch.Tag.pointwise])
def above_one(x: Tensor) -> Tensor:
    """An op of single entries that refuses what is not above one."""
    if not bool((x > 1).all()):
        raise ValueError("not above one")
    return x.log()


above_one.register_fake(torch.empty_like)


def test_an_op_that_takes_no_ones_is_run_on_meta() -> None:
    op = torch.ops.lrpfx_tests.above_one.default
    assert torch.Tag.pointwise in op.tags
    assert by_trying(op, ((X,), {})) is None
    assert value_of(op, ((X,), {})).shape == (2, 3)
