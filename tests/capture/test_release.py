"""What a trace leaves behind: nothing that grows from call to call."""

import gc
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader

import lrpfx
from tests.conftest import Apply


def left() -> tuple[int, int]:
    """Fake tensors, and environments of traces, that are alive."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    return kinds.count(FakeTensor), kinds.count(ShapeEnv)


def written(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] = 2  # needs a second trace
    return m.fc(y)


@pytest.mark.parametrize("capture", ["export", "record"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(x),
        lambda m, x: m.fc(x * m.two),  # its batch is fixed by a first trace that fails
        written,
        lambda m, x: m.fc(x) if x.sum() > 0 else x,  # fails
    ],
)
def test_traces_are_let_go(forward: Callable[..., Any], capture: Any) -> None:
    torch.manual_seed(0)
    model = Apply(forward, fc=nn.Linear(3, 2), two=torch.ones(2, 3))
    counts = []
    for _ in range(4):
        try:
            lrpfx.explain(model, torch.ones(2, 3), 1, capture=capture)
        except lrpfx.errors.CaptureError:
            pass
        counts.append(left())
    assert max(counts[1:]) <= max(counts[:2]), counts


@pytest.mark.parametrize("capture", ["export", "record"])
def test_the_code_of_graphs_is_let_go(capture: Any) -> None:
    model, x, lines = nn.Linear(3, 2), torch.ones(2, 3), []
    for _ in range(3):
        explanation = lrpfx.explain(model, x, 1, capture=capture)
        lines.append(len(linecache.cache) + len(_loader.eval_cache))
    assert lines[2] == lines[1]
    assert explanation.report.reached is not None  # by a graph that runs without its lines


def test_a_hundred_explanations_leave_no_tensors() -> None:
    model, x, counts = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        torch.ones(2, 3),
        [],
    )
    for _ in range(3):
        for _ in range(34):
            lrpfx.explain(model.eval(), x, 1)
        gc.collect()
        counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    assert counts[2] <= counts[1] <= counts[0], counts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_over_many_calls() -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 4, 64), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.randn(1, 2, 1024, 1024)  # 8 MiB
    model(x)
    resident = []
    for _ in range(9):
        explainer = lrpfx.Explainer(model, x)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * 4096 / x.nbytes)
        explainer(x, 1)
    assert min(resident[-3:]) < min(resident[:3]) + 3, f"in units of the input: {resident}"
