"""A model in training mode -> the same without what it draws at random, for as long as it takes.

Modules that draw random numbers themselves, such as dropout, are put into evaluation mode; what
they are is seen by running the model, not by their names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lrpfx.capture.examples import check_examples
from lrpfx.capture.forms import Inputs, copies
from lrpfx.capture.preserve import preserved
from lrpfx.capture.running import run_model
from lrpfx.errors import TrainingModeError, some

#: A module that draws may keep others from being run, which are seen the next time.
_RUNS = 4


@contextmanager
def quiet(model: nn.Module, inputs: Inputs) -> Iterator[list[str]]:
    """Meanwhile modules that draw random numbers are in evaluation mode; yields what they are.

    Cumulative averages of batch norm (``momentum=None``) read a counter, which no graph can; they
    are given a number meanwhile, on which no output depends.

    Raises:
        TrainingModeError: A module draws, and has buffers that follow the batch.
    """
    leaves, spec = check_examples(model, inputs)
    names = {module: path for path, module in model.named_modules()}
    averages = [m for m in names if getattr(m, "momentum", 0.0) is None]
    off: list[nn.Module] = []
    try:
        for module in averages:
            module.momentum = 0.0
        for _ in range(_RUNS):
            with preserved(model):
                drawn = _drawing(model, lambda: run_model(model, copies(leaves), spec))
            drawn = [module for module in drawn if module.training]
            for module in drawn:
                module.training = False
            off += drawn
            if not drawn:
                break
        yield [f"{names[m] or '(the model)'} ({type(m).__name__})" for m in names if m in off]
    finally:
        for module in off:
            module.training = True
        for module in averages:
            module.momentum = None


def _drawing(model: nn.Module, run: Callable[[], Any]) -> list[nn.Module]:
    """The modules whose own code, not that of modules in them, moves a random state."""
    stack: list[nn.Module | None] = [None]
    found: dict[nn.Module, None] = {}
    last = [_states()]
    written = {module: _writes(module) for module in model.modules()}

    def crossed() -> None:
        now = _states()
        if not _same(now, last[0]) and (inside := stack[-1]) is not None:
            found[inside] = None
        last[0] = now

    def entered(module: nn.Module, args: Any) -> None:
        crossed()
        stack.append(module)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        crossed()
        stack.pop()

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
            hooks.callback(module.register_forward_hook(left, always_call=True).remove)
        run()
    if both := [m for m in found if m.training and _writes(m) != written[m]]:
        names = {module: path for path, module in model.named_modules()}
        raise TrainingModeError(
            "modules draw random numbers and follow the batch in buffers of their own: one cannot "
            "be left out without the other.",
            where=some([f"{names[m] or '(the model)'} ({type(m).__name__})" for m in both]),
            fix="draw, or drop out, in a module by itself, such as nn.Dropout.",
        )
    return list(found)


def _writes(module: nn.Module) -> list[int]:
    """How often each buffer has been written into."""
    return [b._version for b in module._buffers.values() if b is not None and not b.is_inference()]


def _states() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda, random.getstate(), _numpys()]


def _numpys() -> Any:
    state: Any = np.random.get_state()
    return state[1].tobytes(), state[2]


def _same(a: list[Any], b: list[Any]) -> bool:
    tensors = [torch.equal(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)]
    return all(tensors) and a[-2:] == b[-2:]
