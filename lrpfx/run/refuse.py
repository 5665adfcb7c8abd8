"""What went wrong, and whose fault it is: the errors of an explanation that cannot be given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrpfx.capture import TRACING, Captured, preserved, run_given
from lrpfx.errors import NonFiniteError, TargetError, some
from lrpfx.ops import record
from lrpfx.plan import Plan
from lrpfx.rewrite import Booking
from lrpfx.run.targets import Seed


def refuse_if_the_model_does(captured: Captured, leaves: Sequence[Any]) -> None:
    """Raise InputError if the model itself fails on these inputs."""
    with TRACING, preserved(captured.model):
        run_given(captured.model, leaves, captured.signature.spec)


def refuse_seed(
    model: nn.Module,
    module: fx.GraphModule,
    seed: Seed,
    clean: Sequence[Any],
    leaves: Sequence[Any],
) -> None:
    """Raise the error of a seed that is not finite, by the fault of weights, model or target."""
    _refuse_weights(model)
    finder = _FirstNonFinite(module)
    with torch.no_grad():
        finder.run(*leaves, enable_io_processing=False)
    if finder.found is None:
        raise TargetError(
            f"{seed.description}: the seed has NaN or infinite entries.",
            where=[f"outputs of shape {[tuple(t.shape) for t in clean if _floating(t)]}"],
            fix="look at the target's own arithmetic; the model's output is finite.",
        )
    else:
        r = record(finder.found)
        raise NonFiniteError(
            "the model's own forward pass makes NaN or infinity.",
            where=[str(r), *filter(None, [r.source])] if r else [str(finder.found)],
            fix="look at the activations that enter this op; the inputs are finite.",
        )


def _refuse_weights(model: nn.Module) -> None:
    """Raise NonFiniteError by the names of parameters with NaN or infinity, if there are any.

    Infinity in a buffer may be meant, as in masks of attention.
    """
    state = [*model.named_parameters(), *model.named_buffers()]
    own = {name for name, _ in model.named_parameters()}
    bad = []
    for name, t in state:
        if _floating(t) and (n := int((~t.isfinite() if name in own else t.isnan()).sum())):
            bad.append(f"{name}: {n} of {t.numel()} entries")
    if bad:
        raise NonFiniteError(
            "the model's own weights are NaN or infinite.",
            where=some(bad),
            fix="load the weights again, or train again from before they became so.",
        )


def refuse_relevance(plan: Plan, bookings: dict[str, Booking]) -> None:
    """Raise the error of relevance that is not finite, with the place if it is known."""
    bad = [n for n, b in bookings.items() if not math.isfinite(b.passed)] or list(bookings)
    where = []
    if bad:
        assignment = plan.assignments[bad[0]]
        where = [f"first at {assignment.record} under {assignment.rule}"]
        where += filter(None, [assignment.record.source])
    raise NonFiniteError(
        "the relevance has NaN or infinite entries.",
        where=where,
        fix="give the rule a larger stabilizer; epsilon = 0 divides by what may be near zero.",
    )


class _FirstNonFinite(fx.Interpreter):
    """Runs a graph and remembers the first node with NaN or infinity in its value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and n.op == "call_function" and _floating(value):
            if not bool(value.isfinite().all()):
                self.found = n
        return value


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
