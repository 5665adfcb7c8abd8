"""Long runs leave nothing behind: neither tensors nor other objects nor memory."""

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import lrpfx
from lrpfx import errors
from tests.oracle.models import seeded


def alive() -> dict[str, int]:
    """How many tensors and how many objects at all there are, after a collection.

    Fake tensors hold no memory, and torch.export keeps one or two of each trace for good.
    """
    gc.collect()
    things = gc.get_objects()
    kinds = [type(thing) for thing in things]
    tensors = sum(issubclass(kind, Tensor) and kind is not FakeTensor for kind in kinds)
    return {"tensors": tensors, "objects": len(things)}


class Allocated(ctypes.Structure):
    """What glibc tells of its memory."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks mapped usmblks fsmblks used free top".split()
    ]


def allocated() -> int | None:
    """Bytes that malloc has given away and not got back; None where there is no glibc to ask.

    The size of the process would tell less: freed memory stays in it and hides what leaks later.
    """
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if ask is None:
        return None
    ask.restype = Allocated
    gc.collect()
    info = ask()
    return int(info.used + info.mapped)


def grown_since(before: int | None) -> float:
    """Megabytes more than before."""
    return 0.0 if before is None else ((allocated() or 0) - before) / 1e6


def assert_no_growth(once: Callable[[], Any], times: int, warm_up: int = 30) -> None:
    """Fail if ``times`` calls of ``once`` leave tensors or memory behind.

    A leak of one object a call is seen by its number, and one of a kilobyte a call by the memory.
    """
    for _ in range(warm_up):
        once()
    before, held = alive(), allocated()
    for _ in range(times):
        once()
    grown, after = grown_since(held), alive()
    left = {kind: after[kind] - before[kind] for kind in before}
    assert left["tensors"] <= 0 and left["objects"] < times / 4, f"left after {times}: {left}"
    assert grown < 0.1, f"{grown:.1f} MB more after {times} calls"


WIDE = seeded(lambda: nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_thousand_explanations_leave_nothing_behind(create_graph: bool) -> None:
    x = torch.randn(32, 128)  # 16 kB: a thousand would be 16 MB
    explainer = lrpfx.Explainer(WIDE, x)
    assert_no_growth(lambda: explainer(x, 1, layers=["1"], create_graph=create_graph), 1000)


def test_a_thousand_errors_leave_nothing_behind() -> None:
    x = torch.randn(32, 128)
    explainer = lrpfx.Explainer(WIDE, x)

    def fail() -> None:
        with pytest.raises(errors.TargetError):
            explainer(x, lambda output: output[:, 99])

    assert_no_growth(fail, 1000)


def test_explainers_can_be_made_and_dropped() -> None:
    x = torch.randn(4, 128)
    references: list[weakref.ref[Any]] = []

    def once() -> None:
        model = nn.Sequential(nn.Linear(128, 2048), nn.ReLU(), nn.Linear(2048, 4)).eval()  # 1 MB
        explainer = lrpfx.Explainer(model, x)
        explainer(x)
        references.extend([weakref.ref(model), weakref.ref(explainer.graph_module)])

    for _ in range(3):
        once()
    before, held = alive(), allocated()
    for _ in range(30):
        once()
    left, grown = alive()["tensors"] - before["tensors"], grown_since(held)
    assert left <= 0, f"{left} tensors left of 30 explainers"
    # torch.export by itself keeps a tenth of a megabyte of each trace.
    assert grown < 3.0, f"{grown:.1f} MB more after 30 explainers"
    assert not [r() for r in references if r() is not None]


@pytest.mark.parametrize("what", [lambda: torch.zeros(1), lambda: [0], lambda: bytes(20_000)])
def test_growth_is_seen(what: Callable[[], Any]) -> None:
    if type(what()) is bytes and allocated() is None:
        pytest.skip("malloc cannot be asked")
    kept: list[Any] = []
    with pytest.raises(AssertionError, match=r"left after|MB more"):
        assert_no_growth(lambda: kept.append(what()), 1000)
