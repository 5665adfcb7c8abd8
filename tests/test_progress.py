"""What takes long says so, where somebody watches."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lrpfx
from lrpfx import progress
from tests.conftest import Apply


class Watched(io.StringIO):
    def isatty(self) -> bool:
        return True


def slow(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)
    return m.head(m.steps(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "disabled"), [(Watched, ""), (Watched, "1"), (io.StringIO, "")])
def test_a_slow_set_up_is_told_on_a_terminal_and_nowhere_else(
    kind: type[io.StringIO], disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", kind())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    model = Apply(slow, steps=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 2)).eval()
    lrpfx.explain(model, torch.rand(1, 2, 2))
    said = sys.stderr.getvalue().splitlines()
    if kind is io.StringIO or disabled:
        assert said == []
    else:
        (line,) = said
        assert line.startswith("lrpfx: still making the graph of Apply: one part for each step")


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len)])
def test_any_error_stream_will_do(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window without a console has none; a test runner has one that can only be written."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.told("nothing"):
        pass


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Watched())
    lrpfx.explain(nn.Linear(3, 2), torch.rand(1, 3))
    assert sys.stderr.getvalue() == ""
