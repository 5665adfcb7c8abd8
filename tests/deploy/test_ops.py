"""The ops of the table in ONNX files: each gives what the Explainer gives, or is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lrpfx
from lrpfx.errors import ExportError
from tests.ops import test_table as table

onnxruntime = pytest.importorskip("onnxruntime", reason="of the extra export")
pytest.importorskip("onnxscript", reason="of the extra export")

TOLERANCE = 1e-5
CASES: dict[str, tuple[tuple[int, ...], table.Fn]] = {
    **table.LINEAR,
    **{name: ((8,), fn) for name, fn in table.ACTIVATIONS.items()},
    **{name: ((8,), fn) for name, (fn, _, _) in table.SHIFTS.items()},
}
#: By case, what ONNX or onnxruntime lacks.
REFUSED = {
    "conv_transpose2d dilated": "Computed output shape",
    "cumulative": "cummax",
    "ordered": "kthvalue",
    "in groups": "index_reduce",
    "put together": "masked_scatter_backward",
    "solved": "linalg_solve",
    "grid_sample": "grid_sampler_2d_backward",
    "special": "i0",
    "added to ones by index": "gives another output",  # torch.onnx forgets the ones
}
#: Writes by a number of the batch, which one sample does not have.
OF_TWO = {"index_put with accumulate"}


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cases in float32."""
    monkeypatch.setattr(table, "DTYPE", torch.float32)
    table.kernel.cache_clear()
    yield
    table.kernel.cache_clear()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:lrpfx. the file holds for the sizes")
@pytest.mark.parametrize("name", sorted(CASES.keys() - OF_TWO))
def test_an_op_in_a_file(name: str, single: None, tmp_path: Path) -> None:
    shape, fn = CASES[name]
    model, x, path = table.Between(fn, shape), table.samples(shape, 2), tmp_path / "model.onnx"
    explainer = lrpfx.Explainer(model, x)
    if name in REFUSED:
        with pytest.raises(ExportError, match=REFUSED[name]):
            lrpfx.export(explainer, path, x)
        assert not path.exists()
        return
    lrpfx.export(explainer, path, x)
    session = onnxruntime.InferenceSession(path)
    first, second = (given.name for given in session.get_inputs())
    target = torch.tensor([1, 2])
    output, relevance = map(
        torch.from_numpy, session.run(None, {first: x.numpy(), second: target.numpy()})
    )
    expected = explainer(x, target)
    pairs: list[tuple[Tensor, Tensor]] = [
        (output, expected.output),
        (relevance, expected.relevance),
    ]
    for got, right in pairs:
        assert (got - right).abs().max() <= TOLERANCE * right.abs().max()
