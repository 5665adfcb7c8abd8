"""What has no relevance, or cannot be traced, is refused with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from tests.conftest import Apply
from tests.oracle.spellings import RULES, normal


def _named(name: str) -> nn.Module:
    model = Apply(lambda m, x: next(m.children())(x))
    model.add_module(name, nn.Linear(6, 3).double())
    return model


def _loop_by_value(m: Any, x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "LSTM with dropout, in training": (
        lambda: Apply(
            lambda m, x: m.f(x[:, None])[0], f=nn.LSTM(6, 4, 2, dropout=0.5).double()
        ).train(),
        errors.TrainingModeError,
        r"training mode[\s\S]*f: lstm is random",
    ),
    "complex output": (
        lambda: Apply(lambda m, x: torch.fft.rfft(x)),
        errors.UnsupportedOpError,
        r"no relevance rule[\s\S]*fft_rfft\S* of complex numbers",
    ),
    "phases": (
        lambda: Apply(lambda m, x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=0).angle()),
        errors.UnsupportedOpError,
        r"no relevance rule[\s\S]*angle\S* of complex numbers[\s\S]*why: an angle",
    ),
    "grid_sample at places that depend on the input": (
        lambda: Apply(lambda m, x: F.grid_sample(x.view(-1, 1, 2, 3), x.view(-1, 3, 1, 2))),
        errors.UnsupportedOpError,
        "grid_sampler.default with live input and grid",
    ),
    "bags with offsets": (
        lambda: Apply(
            lambda m, x: m.bag((x[:, 0] > 0).long(), torch.tensor([0, 1])),
            bag=nn.EmbeddingBag(2, 3).double(),
        ),
        errors.UnsupportedOpError,
        "bags differ in size or have offsets",
    ),
    "a chunk written in place, which PyTorch refuses": (
        lambda: Apply(lambda m, x: m.f(x).chunk(2, 1)[0].relu_(), f=nn.Linear(6, 4).double()),
        errors.CaptureError,
        "is a view and is being modified inplace",
    ),
    "a name with quotes": (
        lambda: _named('the "first"'),
        errors.CaptureError,
        r'cannot stand in code[\s\S]*the "first"\.weight',
    ),
    "a name with a line break": (
        lambda: _named("two\nlines"),
        errors.CaptureError,
        r"cannot stand in code[\s\S]*two\\nlines\.weight",
    ),
    "a name that is a keyword": (
        lambda: _named("in"),
        errors.CaptureError,
        r"cannot stand in code[\s\S]*in\.weight",
    ),
    "a branch on values": (
        lambda: Apply(lambda m, x: x * 2 if x.sum() > 0 else x),
        errors.CaptureError,
        "branches on values",
    ),
    "a loop until a value": (
        lambda: Apply(_loop_by_value),
        errors.CaptureError,
        "branches on values",
    ),
    "everything detached": (
        lambda: Apply(lambda m, x: x.detach() * 2),
        errors.CaptureError,
        "no output of the model depends on the explained inputs",
    ),
    "numpy in between": (
        lambda: Apply(lambda m, x: torch.from_numpy(x.detach().numpy() * 2)),
        errors.CaptureError,
        "cannot trace",
    ),
    "scripted module": (
        lambda: Apply(lambda m, x: m.f(x), f=torch.jit.script(nn.Linear(6, 3).double())),
        errors.CaptureError,
        "scripted",
    ),
    "random numbers": (
        lambda: Apply(lambda m, x: x + torch.randn_like(x)),
        errors.CaptureError,
        "random numbers",
    ),
    "dropout in training": (
        lambda: Apply(lambda m, x: F.dropout(x)),
        errors.TrainingModeError,
        "dropout is random",
    ),
    "a matrix function": (
        lambda: Apply(lambda m, x: x.pinverse()),
        errors.UnsupportedOpError,
        "aten.pinverse.default",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lrpfx.explain(make(), normal(2, 6), rules=RULES["epsilon_all"], capture="export")
