"""Inputs -> the recorded graph that holds for them: one of before, or a new one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import fx

from lrpfx.capture import Captured, Inputs, agrees, as_captured, has_form

#: What explains by a graph.
Of = TypeVar("Of")
#: So many graphs are kept.
_KEPT = 8


class RecordedRun(NamedTuple, Generic[Of]):
    """What was made of one run.

    Args:
        captured: The model, and how it was captured.
        module: The canonical graph of the run.
        explains: What explains by it.
    """

    captured: Captured
    module: fx.GraphModule
    explains: Of


class Runs(Generic[Of]):
    """The recorded graphs of one model, one for each form of the inputs.

    A graph is used again for inputs of its form (structure, shapes, dtypes, what is no tensor) only
    if its run read no values, so that there was nothing in it that others could have decided
    otherwise; and only if it computes what the model computes now, which is seen by running both.

    Args:
        first: The run of the example inputs.
        anew: Records a run.
    """

    def __init__(self, first: RecordedRun[Of], anew: Callable[[Inputs], RecordedRun[Of]]) -> None:
        self._first, self._anew = first, anew
        self._kept = [] if first.captured.decisions else [first]

    def serving(self, inputs: Inputs) -> Of:
        """What explains these inputs, by the graph of a run that is the same as theirs."""
        for run in self._kept:
            if has_form(run.captured.signature, inputs):
                if agrees(run.captured, run.module, inputs):
                    return run.explains
                self._kept.remove(run)
                break
        with as_captured(self._first.captured):
            run = self._anew(inputs)
        if not run.captured.decisions:
            self._kept = [run, *self._kept][:_KEPT]
        return run.explains
