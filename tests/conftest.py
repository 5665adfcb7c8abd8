"""Hypothesis profiles, and what several test files need: `Apply` and `assert_untouched`."""

import gc
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils import _pytree as pytree

import lrpfx
from benchmarks.zoos import declare_missing_ops
from lrpfx.capture.captured import Trace
from lrpfx.capture.front import capture

# Derandomized, so that CI fails for changes of the code only; "nightly" looks for new examples:
# pytest --hypothesis-profile nightly
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=20)
settings.register_profile("nightly", derandomize=False, deadline=None, max_examples=500)
settings.load_profile("ci")

# Before torchvision is imported, by transformers and zennit as well.
declare_missing_ops()

# The models here are tiny, and pytest-xdist fills the cores already. OMP_NUM_THREADS=2 shows what
# hangs on the number of threads.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


#: Of the CPU alone where there is nothing else: for each device that may come, torch notes the
#: whole stack.
_seeded = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def seed() -> None:
    """Seed what models are drawn with: else torch begins every process somewhere else."""
    _seeded(0)
    random.seed(0)
    np.random.seed(0)


def leave_to_stay() -> None:
    """What is there now is looked through by no collection of garbage to come."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_to_stay()
    gc.set_threshold(50_000, 20, 20)  # graphs are many small objects, of which few are garbage


def pytest_collectstart() -> None:
    seed()


@pytest.hookimpl(tryfirst=True)  # before the fixtures, also those of a module
def pytest_runtest_setup(item: pytest.Item) -> None:
    seed()
    if item.path != _FILE.get("last"):  # what is cached grows with each file
        _FILE["last"] = item.path
        leave_to_stay()


_FILE: dict[str, Path] = {}


class Apply(nn.Module):
    """A model in evaluation mode whose forward is ``function(model, *args, **kwargs)``.

    Args:
        function: The forward pass; it finds the members as attributes of its first argument.
        **members: Submodules, buffers (tensors) and whatever else a model may hold.
    """

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in members.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


#: By the id of a model, which is held so that no other can have it, and the form of its inputs.
Traces = dict[tuple[Any, ...], tuple[nn.Module, Trace]]


@contextmanager
def traced_once(known: Traces | None = None) -> Iterator[None]:
    """One trace of a model, for inputs of one form, serves all its rule sets.

    Args:
        known: Where the traces are kept for the next time, if they are; the last hundred.
    """
    traces: Traces = {} if known is None else known

    def once(model: nn.Module, inputs: Any, dynamic: Any, by: Any) -> Trace:
        if by == "record":  # which is canonized in its place, and quickly recorded again
            return capture(model, inputs, dynamic, by)
        leaves, spec = pytree.tree_flatten(inputs)
        form = (
            (leaf.dtype, *leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
        )
        key = (id(model), model.training, by, str(dynamic), str(spec), *form)
        found = traces.pop(key, None) or (model, capture(model, inputs, dynamic, by))
        traces[key] = found
        while len(traces) > 100:
            del traces[next(iter(traces))]
        return found[1]

    with mock.patch("lrpfx.prepare.capture", once):
        yield


_OF_THE_SESSION: Traces = {}


@pytest.fixture
def one_trace() -> Iterator[None]:
    """A model is traced once in a session; one that changes between explanations must not be."""
    with traced_once(_OF_THE_SESSION):
        yield


@pytest.fixture(
    scope="module", params=["record", pytest.param("export", marks=pytest.mark.nightly)]
)
def each_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """What ``explain`` takes where the way of capture is not chosen; exports take long."""
    front = sys.modules["lrpfx.explain"]  # and not the function of that name
    with mock.patch.object(front._OfOneCall, "_once", request.param == "record"):
        yield


@pytest.fixture(
    scope="module", params=["record", pytest.param("export", marks=pytest.mark.nightly)]
)
def each_front(request: pytest.FixtureRequest) -> Iterator[None]:
    """What an ``Explainer`` takes, too; exports serve the whole session."""
    once = request.param == "record"
    front = sys.modules["lrpfx.explain"]
    with (
        traced_once(_OF_THE_SESSION),
        mock.patch.object(front._OfOneCall, "_once", once),
        mock.patch.object(lrpfx.Explainer, "_once", once),
    ):
        yield


# What a user may expect to find as it was ------------------------------------------------------


@contextmanager
def assert_untouched(model: Any, inputs: Any = None) -> Iterator[None]:
    """Fail unless the block leaves the model, the inputs and the process state as they were.

    Compared are, of every module, all that its ``__dict__`` reaches (parameters, buffers, hooks,
    training flag, caches, counters ...) by identity and by content, ``state_dict()``, each input
    tensor, the states of the three random number generators, and autograd's mode. Errors that leave
    the block are let through after the comparison.
    """
    keep: list[Any] = []  # what is alive cannot lend its id to something new
    before = _snapshot(model, inputs, keep)
    try:
        yield
    finally:
        after = _snapshot(model, inputs, keep)
        changes = [
            f"{place}: {before.get(place, 'absent')} -> {after.get(place, 'absent')}"
            for place in {**before, **after}
            if not _same(before.get(place, KeyError), after.get(place, KeyError))
        ]
        assert not changes, "\n".join(["the user's things have changed:", *changes])


def _snapshot(model: Any, inputs: Any, keep: list[Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            seen[f"type of {path or 'the model'}"] = type(module)
            for name, value in vars(module).items():
                _describe(f"{path}.{name}", value, seen, keep, depth=0)
        for name, tensor in model.state_dict(keep_vars=True).items():
            _describe(f"state_dict {name}", tensor, seen, keep, depth=0)
    for i, leaf in enumerate(pytree.tree_leaves(inputs)):
        _describe(f"inputs leaf {i}", leaf, seen, keep, depth=0)
    seen["torch's random state"] = torch.get_rng_state()
    seen["Python's random state"] = random.getstate()
    seen["numpy's random state"] = tuple(
        part.tobytes() if isinstance(part, np.ndarray) else part for part in np.random.get_state()
    )
    seen["grad mode"] = torch.is_grad_enabled()
    seen["inference mode"] = torch.is_inference_mode_enabled()
    seen["default dtype"] = torch.get_default_dtype()
    return seen


def _describe(place: str, value: Any, seen: dict[str, Any], keep: list[Any], depth: int) -> None:
    """Enter all that ``value`` reaches into ``seen``, one entry per place."""
    keep.append(value)
    seen[place] = (type(value).__name__, id(value))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        seen[place] = (type(value).__name__, value)
    elif isinstance(value, UninitializedTensorMixin):
        pass  # no content yet
    elif isinstance(value, Tensor):
        seen[f"{place} form"] = (value.dtype, value.device, value.shape, value.requires_grad)
        seen[f"{place} hooks"] = len(value._backward_hooks or ())
        if value.device.type != "meta" and type(value) in (Tensor, nn.Parameter):
            seen[f"{place} values"] = value.detach().clone()
        if value.is_leaf:
            _describe(f"{place}.grad", value.grad, seen, keep, depth + 1)
    elif isinstance(value, Mapping):
        seen[f"{place} keys"] = [*map(str, value)]
        for key, entry in value.items():
            _describe(f"{place}[{key!r}]", entry, seen, keep, depth + 1)
    elif isinstance(value, (list, tuple, deque)):
        seen[f"{place} length"] = len(value)
        for i, entry in enumerate(value):
            _describe(f"{place}[{i}]", entry, seen, keep, depth + 1)
    elif isinstance(value, set):
        seen[f"{place} members"] = set(value)
    elif isinstance(value, _OPAQUE):
        pass
    elif depth < 4 and hasattr(value, "__dict__"):
        _describe(f"vars({place})", vars(value), seen, keep, depth + 1)


# Compared by identity only: code, and modules, which have their own turn.
_OPAQUE = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes: unlike its values, NaN equals NaN and -0.0 is not 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def lived_in(model: Any) -> Any:
    """Give a model what models in use have: gradients, frozen parameters, hooks, caches, counters.

    At every forward pass a hook counts, logs, and caches activations, deeply and in several types.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return model
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5)
        parameter.requires_grad_(i % 2 == 1)
    model.calls, model.log = 0, ["made"]
    model.cache = {"first": torch.ones(2), "nested": {"inputs": []}}
    model.register_forward_pre_hook(_leave_traces)
    model.register_forward_hook(_count)
    return model


def _leave_traces(model: Any, args: Any) -> None:
    model.calls += 1
    model.log.append(model.calls)
    model.cache["last"] = len(args)
    model.last_call = model.calls


def _count(model: Any, args: Any, output: Any) -> None:
    model.cache["calls"] = model.cache.get("calls", 0) + 1
