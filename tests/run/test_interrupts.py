"""Whatever is interrupted, wherever: all is as it was, and goes on as it did."""

import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lrpfx
from lrpfx import Epsilon, Gamma, Rule, errors
from lrpfx.capture.tracing import TRACING
from tests.conftest import Apply, assert_untouched
from tests.oracle.models import MODELS, NIGHTLY, every_model, image, leaves_of, row, seeded


@contextmanager
def assert_process_untouched(model: Any, inputs: Any) -> Iterator[None]:
    """As ``assert_untouched``, and also threads, locks, streams, warnings and torch's modes."""
    before = _process()
    try:
        with assert_untouched(model, inputs):
            yield
    finally:
        after = _process()
        changes = [f"{k}: {v} -> {after[k]}" for k, v in before.items() if after[k] != v]
        assert not changes, "\n".join(changes)


def _process() -> dict[str, Any]:
    return {
        "threads": sorted(t.ident or 0 for t in threading.enumerate()),
        "torch's threads": torch.get_num_threads(),
        "the lock of traces": _is_free(TRACING),
        "streams": (id(sys.stdout), id(sys.stderr)),
        "warning filters": [*warnings.filters],
        "torch's log": logging.getLogger("torch").level,
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
        "exporting": torch.compiler.is_exporting() or torch.compiler.is_compiling(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
    }


def _is_free(lock: Any) -> bool:
    """Whether another thread could take the lock."""
    found = []

    def take() -> None:
        if taken := lock.acquire(blocking=False):
            lock.release()
        found.append(taken)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


PLANTED = [RuntimeError("planted"), torch.OutOfMemoryError("planted"), KeyboardInterrupt("planted")]


planted = pytest.mark.parametrize("error", PLANTED, ids=lambda e: type(e).__name__)


@dataclass(eq=False)
class Fuse:
    """Raises ``error`` when it is touched for the k-th time, k counted from 0."""

    error: BaseException
    k: int = 0
    touched: int = 0

    def touch(self) -> None:
        self.touched += 1
        if self.touched == self.k + 1:
            raise self.error


@dataclass(frozen=True)
class Fused(Rule):
    """A rule that touches a fuse before it is itself."""

    inner: Rule = field(default_factory=Epsilon)
    fuse: Any = None
    reads_output = True

    def fits(self, op: Any) -> str:
        return self.inner.fits(op)

    def propagate(self, call: Any, x: Any, z: Any, R: Any) -> Any:
        self.fuse.touch()
        return self.inner.propagate(call, x, z, R)


def fused(explainer: lrpfx.Explainer, fuse: Fuse) -> list[Any]:
    """The rules of an explainer, each with the fuse."""
    plan = explainer._engine.plan.assignments
    return [
        (lambda record, name=name: record.name == name, Fused(assignment.rule, fuse))
        for name, assignment in plan.items()
    ]


@pytest.mark.usefixtures("one_trace")
@planted
@every_model
def test_an_exception_in_any_nodes_backward(name: str, error: BaseException) -> None:
    model, inputs = MODELS[name][0], MODELS[name][1](2)
    plain = lrpfx.Explainer(model, inputs)
    fuse = Fuse(error, k=-1)
    explainer = lrpfx.Explainer(model, inputs, fused(plain, fuse))
    expected = leaves_of(explainer(inputs, layers=["*"]))
    nodes = fuse.touched
    assert nodes >= 2
    for k in range(nodes):
        fuse.k, fuse.touched = k, 0
        with assert_process_untouched(model, inputs), pytest.raises(type(error), match="planted"):
            explainer(inputs, create_graph=k % 2 == 1)
    fuse.k = -1
    got = leaves_of(explainer(inputs, layers=["*"]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@planted
@pytest.mark.parametrize("place", ["hook", "pre-hook", "forward", "child"])
def test_an_exception_while_the_model_runs_or_is_traced(place: str, error: BaseException) -> None:
    """Also in the k-th call of the model: lrpfx runs, traces and compares it."""
    fuse, x = Fuse(error, k=-1), row()

    def touch(*_: Any) -> None:
        fuse.touch()

    def forward(m: Any, x: Tensor) -> Tensor:
        if place == "forward":
            fuse.touch()
        return m.fc(x).relu()

    model = seeded(lambda: Apply(forward, fc=nn.Linear(3, 3)))
    if place == "hook":
        model.register_forward_hook(touch)
    if place == "pre-hook":
        model.register_forward_pre_hook(touch)
    if place == "child":
        model.fc.register_forward_hook(touch)
    lrpfx.explain(model, x)
    calls = fuse.touched
    assert calls >= 3
    for k in range(calls):
        fuse.k, fuse.touched = k, 0
        ends: Any = (errors.LrpError, type(error))
        with assert_process_untouched(model, x):
            try:
                lrpfx.explain(model, x)
            except ends as caught:
                assert "planted" in str(caught)
            else:  # a trace for any batch size that fails is followed by one for this size
                assert not isinstance(error, KeyboardInterrupt)
    fuse.k = -1
    assert lrpfx.explain(model, x).relevance.isfinite().all()


@planted
@pytest.mark.parametrize("place", ["target", "predicate", "stabilizer"])
def test_an_exception_in_what_the_user_passes(place: str, error: BaseException) -> None:
    model, inputs = MODELS["conv"][0], image()

    def fail(*_: Any) -> Any:
        raise error

    options: dict[str, dict[str, Any]] = {
        "target": {"target": fail},
        "predicate": {"rules": [(fail, Gamma())]},
        "stabilizer": {"rules": [("conv", Epsilon(fail))]},
    }
    ends = type(error) if isinstance(error, KeyboardInterrupt) else (errors.LrpError, type(error))
    with assert_process_untouched(model, inputs), pytest.raises(ends, match="planted"):
        lrpfx.explain(model, inputs, **options[place])
    assert lrpfx.explain(model, inputs).relevance.isfinite().all()


#: What puts things back must itself be let finish.
UNINTERRUPTED = {"preserved", "tracing"}


def plant_everywhere(patch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    """Let every function and method of lrpfx touch the fuse first."""
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "lrpfx"]
    owners: set[Any] = {v for m in modules for v in vars(m).values() if isinstance(v, type)}
    planted: dict[Any, Any] = {}
    for owner in [*modules, *(c for c in owners if str(c.__module__).startswith("lrpfx"))]:
        for name, found in list(vars(owner).items()):
            ours = isinstance(found, FunctionType) and str(found.__module__).startswith("lrpfx")
            special = name.startswith("__") and name != "__call__"
            if ours and not special and name not in UNINTERRUPTED:
                patch.setattr(owner, name, planted.setdefault(found, touching(fuse, found)))


def touching(fuse: Fuse, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def touched(*args: Any, **kwargs: Any) -> Any:
        fuse.touch()
        return function(*args, **kwargs)

    return touched


@every_model
def test_an_interrupt_at_any_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the k-th call of a function of lrpfx, for k all over an explanation."""
    model, inputs = MODELS[name][0], MODELS[name][1](2)
    fuse = Fuse(KeyboardInterrupt("planted"), k=-1)
    with monkeypatch.context() as patch:
        plant_everywhere(patch, fuse)
        lrpfx.explain(model, inputs)  # the first of a process does some things that none repeats
        fuse.touched = 0
        lrpfx.explain(model, inputs)
        calls = fuse.touched
        assert calls > 300
        points = 400 if NIGHTLY else 5
        # Many calls are early and short; the later half of the points is the last few.
        for k in {*range(0, calls, 1 + calls // points), *range(calls - points, calls)}:
            fuse.k, fuse.touched = k, 0
            with assert_process_untouched(model, inputs):
                try:
                    lrpfx.explain(model, inputs)
                except KeyboardInterrupt as error:
                    assert "planted" in str(error)
                else:  # sets of nodes are walked in any order, and may need a few calls less
                    assert k > calls - 10
    assert lrpfx.explain(model, inputs).output is not None


@pytest.mark.parametrize(
    "meddle",
    [
        lambda: warnings.simplefilter("ignore"),
        lambda: logging.getLogger("torch").setLevel(logging.CRITICAL),
        lambda: TRACING.acquire(),
        lambda: torch.use_deterministic_algorithms(True),
    ],
)
def test_what_is_left_changed_is_seen(meddle: Callable[[], Any]) -> None:
    level = logging.getLogger("torch").level
    try:
        with warnings.catch_warnings(), pytest.raises(AssertionError, match="->"):
            with assert_process_untouched(None, None):
                meddle()
    finally:
        logging.getLogger("torch").setLevel(level)
        torch.use_deterministic_algorithms(False)
        if not _is_free(TRACING):
            TRACING.release()


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("deterministic", [True, False])
@every_model
def test_the_same_call_gives_the_same_bits(name: str, deterministic: bool) -> None:
    model, inputs = MODELS[name][0], MODELS[name][1](3)
    torch.use_deterministic_algorithms(deterministic)
    try:
        explainer = lrpfx.Explainer(model, inputs)
        first = leaves_of(explainer(inputs, layers=["*"]))
        for again in (explainer, lrpfx.Explainer(model, inputs)):
            second = leaves_of(again(inputs, layers=["*"]))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
