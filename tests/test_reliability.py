"""What long runs and bad luck must not do: grow, leave things changed, or fail in unknown ways.

Errors of single wrong arguments are in test_errors.py and test_targets.py; here whatever can be
given is given in combination, and everything that can be interrupted is interrupted.
"""

import ctypes
import functools
import gc
import json
import logging
import pickle
import sys
import threading
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lrpfx
from lrpfx import Epsilon, Gamma, Rule, composites, errors
from lrpfx.capture.export import TRACING
from tests.conftest import Apply, assert_untouched

NIGHTLY = settings.get_current_profile_name() == "nightly"


# -- models ---------------------------------------------------------------------------------------


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class ConvNet(nn.Module):
    """A residual block with batch norm to fold and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))) + x
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    """Token ids, their embedding, one layer of attention, a gate: (N, 5) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
        return self.head((F.silu(x) * x).mean(1))


def two_inputs() -> nn.Module:
    return Apply(lambda m, a, b: {"sum": m.fc(a) + b, "b": b}, fc=nn.Linear(3, 3))


def image(n: int = 2) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(n))


def row(n: int = 2) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(n))


def tokens(n: int = 2) -> Tensor:
    return torch.randint(0, 7, (n, 5), generator=torch.Generator().manual_seed(n))


def row_pair(n: int = 2) -> dict[str, Tensor]:
    return {"a": row(n), "b": row(n).exp()}


# Each with its inputs for n samples.
MODELS: dict[str, tuple[nn.Module, Callable[[int], Any]]] = {
    "mlp": (seeded(mlp), row),
    "conv": (seeded(ConvNet), image),
    "attention": (seeded(Attention), tokens),
    "two inputs": (seeded(two_inputs), row_pair),
}
every_model = pytest.mark.parametrize("name", list(MODELS))


# -- memory ---------------------------------------------------------------------------------------


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


# -- exceptions at any stage ----------------------------------------------------------------------


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
    plan = explainer._plan.assignments
    return [
        (lambda record, name=name: record.name == name, Fused(assignment.rule, fuse))
        for name, assignment in plan.items()
    ]


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


def leaves_of(explanation: lrpfx.Explanation) -> list[Tensor]:
    found = [explanation.relevance, explanation.output, explanation.seed, explanation.absorbed]
    found += [[list(call) for call in calls] for calls in explanation.layers.values()]
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]


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
    for owner in [*modules, *(c for c in owners if c.__module__.startswith("lrpfx"))]:
        for name, found in list(vars(owner).items()):
            ours = isinstance(found, FunctionType) and found.__module__.startswith("lrpfx")
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


# -- the same twice -------------------------------------------------------------------------------


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


# -- arguments of every kind ----------------------------------------------------------------------

FLOATS = [0.0, -1.0, 1e30, 3e38, 1e-40, float("nan"), float("inf")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
DTYPES += [torch.uint8, torch.complex64]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (2, 3), (1, 3), (0, 3), (2, 0), (3, 2)]
SHAPES += [(2, 2), (2, 5), (2, 4), (2, 1, 4, 4), (1, 1, 1, 1), (2, 3, 4)]

tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.5, 1.0, *FLOATS]),
)
odd_tensors = st.sampled_from(
    [
        torch.zeros(2, 3, device="meta"),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, requires_grad=True) * 2,
        nn.Parameter(torch.ones(2, 3)),
        torch.ones(3, 2).T,
        torch.ones(1, 3).expand(2, 3),
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**63, -(2**70), 1.5, float("nan"), 1j, "", "conv", "épsilon", b"x"]),
    st.sampled_from([object(), object, len, ..., slice(None), slice(0, 99), np.int64(1)]),
    st.sampled_from([np.zeros(2), np.ones((2, 3), np.float32), np.array("a"), range(2), {1, 2}]),
)
junk = st.recursive(
    scalars | tensors | odd_tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "x", "0", 1, None]), inner, max_size=2)
    ),
    max_leaves=4,
)


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("planted")


def first_of(output: Any) -> Any:
    return output["sum"] if isinstance(output, dict) else output


right_targets = st.one_of(
    st.none(),
    st.integers(0, 1),
    st.just(lambda out: first_of(out)[:, 0]),
    st.just((0,)),
    st.just("all"),
)
odd_targets = st.one_of(
    st.lists(st.integers(-1, 3), max_size=3),
    st.lists(st.lists(st.integers(-1, 2), max_size=2), max_size=3),
    st.tuples(st.integers(-1, 3) | scalars, scalars),
    tensors,
    junk,
    st.sampled_from(
        [
            lambda out: first_of(out).sum(),
            lambda out: first_of(out),
            lambda out: first_of(out)[:, 0].detach(),
            lambda out: first_of(out)[:, 0] / 0,
            lambda out: first_of(out).argmax(1),
            lambda out: first_of(out).square_()[:, 0],
            lambda out: None,
            lambda out: 3,
            lambda: None,
            raises,
            torch.linalg.vector_norm,
        ]
    ),
)
SELECTORS: list[Any] = ["conv", "linear", "relu", "activation", "*", "0", "head", "mix.*", "[", ""]
SELECTORS += [nn.Linear, nn.Module, nn.ReLU, int, lambda r: True, lambda r: None, raises]
SELECTORS += [lambda r: torch.ones(2), lambda: True]
RULES: list[Any] = [Epsilon(), Epsilon(0), Gamma(), lrpfx.ZPlus(), lrpfx.AlphaBeta(2, 1)]
RULES += [lrpfx.Flat(), lrpfx.WSquare(), lrpfx.ZBox(-1.0, 1.0), lrpfx.ZBox(torch.zeros(3), 1.0)]
RULES += [lrpfx.Pass(), lrpfx.Norm(), lrpfx.Gradient(), lrpfx.Stop(), lrpfx.Uniform()]
RULES += [lrpfx.Bilinear(), lrpfx.Taylor(), lrpfx.ReLUGuidedBackprop(), Epsilon(raises)]
RULES += [Epsilon(lambda z: None), Epsilon(lambda z: z[:1]), Epsilon(lambda z: z * float("nan"))]
RULES += [lrpfx.ZPlus(zero_params="bias"), Epsilon, None, "epsilon"]
entries = st.lists(st.tuples(st.sampled_from(SELECTORS), st.sampled_from(RULES)), max_size=3)
right_rules = st.sampled_from([None, "epsilon_all", "attnlrp", composites.EpsilonPlus(1e-3), []])
odd_rules = st.one_of(
    st.sampled_from([*composites.NAMED, "", "epsilon", "EpsilonPlus"]),
    entries,
    entries,
    st.sampled_from([composites.EpsilonGammaBox(-3, 3), composites.CPLRP(), composites.AttnLRP]),
    st.sampled_from(RULES),
    junk,
)
right_layers = st.sampled_from([(), ["*"], "*"])
odd_layers = st.one_of(
    st.lists(st.sampled_from(["", "*", "0", "head", "mix", "no such", "conv", "fc", "["])),
    st.sampled_from(["0", "head", None, 3, [3], [None], b"head", [["0"]], True, object()]),
    junk,
)


@st.composite
def odd_inputs(draw: st.DrawFn, name: str) -> Any:
    """Inputs that are right but for one thing, or anything."""
    inputs = MODELS[name][1](2)
    kind = draw(st.sampled_from(["one value", "wrapped", "one of them", "junk"]))
    if kind == "one value":
        tensor = inputs["a"] if isinstance(inputs, dict) else inputs
        values = FLOATS if tensor.is_floating_point() else [99, -1]
        tensor.view(-1)[0] = draw(st.sampled_from(values))
        return inputs
    if kind == "wrapped":
        return draw(st.sampled_from([[inputs], (inputs,), {"a": inputs}, [[inputs]], list(inputs)]))
    if kind == "one of them" and isinstance(inputs, dict):
        return inputs | {draw(st.sampled_from("abc")): draw(junk)}
    return draw(junk)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    """A model's name, inputs, and keyword arguments; some are right and some are odd."""
    name = draw(st.sampled_from(list(MODELS)))
    right_inputs = st.sampled_from([1, 2, 3]).map(MODELS[name][1])
    odd = draw(st.sets(st.sampled_from(["inputs", "target", "rules", "layers"]), max_size=3))
    inputs = draw(odd_inputs(name) if "inputs" in odd else right_inputs)
    options = {
        "target": draw(odd_targets if "target" in odd else right_targets),
        "rules": draw(odd_rules if "rules" in odd else right_rules),
        "layers": draw(odd_layers if "layers" in odd else right_layers),
        "create_graph": draw(st.booleans()),
        "ledger": draw(st.booleans()),
    }
    return name, inputs, options


def end(call: Callable[[], Any]) -> Any:
    """The result of a call that may end in an LrpError and in no other exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except errors.LrpError as error:
            assert error.what.strip() and error.fix.strip(), repr(error)
            return None


def check(explanation: lrpfx.Explanation | None) -> None:
    if explanation is not None:
        assert all(
            t.isfinite().all()
            for t in torch.utils._pytree.tree_leaves(explanation.relevance)
            if isinstance(t, Tensor)
        )
        assert repr(explanation) and repr(explanation.report)


fuzzing = settings(
    max_examples=10_000 if NIGHTLY else 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@fuzzing
@given(arguments())
def test_explain_ends_in_a_result_or_its_own_error(
    drawn: tuple[str, Any, dict[str, Any]],
) -> None:
    name, inputs, options = drawn
    check(end(lambda: lrpfx.explain(MODELS[name][0], inputs, **options)))


@functools.cache
def explainer_of(name: str) -> lrpfx.Explainer:
    return lrpfx.Explainer(MODELS[name][0], MODELS[name][1](2))


@fuzzing
@given(arguments())
def test_an_explainer_ends_in_a_result_or_its_own_error(
    drawn: tuple[str, Any, dict[str, Any]],
) -> None:
    """Much faster than the above; and afterwards it explains as before."""
    name, inputs, options = drawn
    explainer = explainer_of(name)
    options.pop("rules")
    check(end(lambda: explainer(inputs, **options)))
    got = leaves_of(explainer(MODELS[name][1](2)))
    assert all(torch.equal(a, b) for a, b in zip(got, leaves_at_first(name), strict=True))


def test_sparse_inputs_are_refused() -> None:
    with pytest.raises(errors.InputError, match="sparse"):
        explainer_of("mlp")(row().to_sparse())


@functools.cache
def leaves_at_first(name: str) -> list[Tensor]:
    return leaves_of(lrpfx.explain(MODELS[name][0], MODELS[name][1](2)))


# -- files ----------------------------------------------------------------------------------------


RAN: list[str] = []


class Payload:
    """Unpickling it is noticed."""

    def __reduce__(self) -> Any:
        return note, ("code of a file",)


def note(what: str) -> None:
    RAN.append(what)


@functools.cache
def explained() -> lrpfx.Explanation:
    return lrpfx.explain(MODELS["two inputs"][0], row_pair(), 1, layers=["fc"])


def saved(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "explanation.npz"
    explained().save(path)
    with np.load(path) as stored:
        return path, dict(stored)


def assert_refused(path: Path) -> None:
    RAN.clear()
    with pytest.raises(errors.InputError, match="holds no explanation"):
        lrpfx.Explanation.load(path)
    assert not RAN, "code of the file was run"


def test_the_payload_would_run() -> None:
    RAN.clear()
    pickle.loads(pickle.dumps(Payload()))
    assert RAN


@pytest.mark.parametrize("member", ["relevance.a", "__tree__", "extra"])
def test_pickled_members_are_refused(tmp_path: Path, member: str) -> None:
    path, arrays = saved(tmp_path)
    assert member == "extra" or member in arrays
    arrays[member] = np.array([Payload()], dtype=object)
    np.savez(path, **arrays)
    assert_refused(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps(Payload()), id="pickle"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"PK\x03\x04" + bytes(50), id="broken zip"),
        pytest.param(lambda: b"\x93NUMPY\x01\x00" + bytes(50), id="broken npy"),
        pytest.param(lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.", id="pickle by hand"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Callable[[], bytes]) -> None:
    path = tmp_path / "explanation.npz"
    path.write_bytes(content())
    assert_refused(path)


def test_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "explanation.npz"
    torch.save({"relevance": Payload()}, path)
    assert_refused(path)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"tree": {}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "no such", "dtype": "float32"}}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "seed", "dtype": "load"}}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "seed", "dtype": "__builtins__"}}, "report": {}}',
        '{"tree": {"relevance": {"call": "os.system", "dtype": "float32"}}, "report": {}}',
        '{"tree": {"relevance": ' + '{"list": [' * 5000 + "]}" * 5000 + '}, "report": {}}',
    ],
    ids=lambda t: t[:30],
)
def test_trees_that_are_none_are_refused(tmp_path: Path, tree: str) -> None:
    path, arrays = saved(tmp_path)
    np.savez(path, **{**arrays, "__tree__": np.array(tree)})
    assert_refused(path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t["tree"].update(surprise={"value": 1}), id="unknown field"),
        pytest.param(lambda t: t["tree"].pop("relevance"), id="missing field"),
        pytest.param(lambda t: t["tree"].update(__class__={"value": 1}), id="class"),
        pytest.param(lambda t: t["report"].update(rows=[{"shape": 3}]), id="row"),
        pytest.param(lambda t: t["report"].update(rows=3), id="rows"),
        pytest.param(lambda t: t.update(report=None), id="no report"),
        pytest.param(lambda t: t["tree"].update(layers={"value": 3}), id="layers"),
        pytest.param(lambda t: t["tree"].update(layers={"dict": [["a"]]}), id="layer"),
    ],
)
def test_changed_trees_are_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path, arrays = saved(tmp_path)
    tree = json.loads(str(arrays["__tree__"]))
    change(tree)
    np.savez(path, **{**arrays, "__tree__": np.array(json.dumps(tree))})
    assert_refused(path)


def test_headers_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    """A member of some bytes whose header claims 80 terabytes."""
    path, _ = saved(tmp_path)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    header += b" " * (118 - 1 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.npy", b"\x93NUMPY\x01\x00v\x00" + header + bytes(64))
    assert_refused(path)


def test_names_are_names_and_not_paths(tmp_path: Path) -> None:
    """Nothing is written, wherever a member's name points."""
    path, arrays = saved(tmp_path)
    outside = tmp_path / "outside"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside", b"text")
        archive.writestr(str(outside), b"text")
    end(lambda: lrpfx.Explanation.load(path))
    assert not outside.exists() and [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(fuzzing, max_examples=10_000 if NIGHTLY else 100)
@given(st.data())
def test_damaged_files_end_in_a_result_or_its_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path, _ = saved(tmp_path_factory.getbasetemp())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    end(lambda: lrpfx.Explanation.load(path))
