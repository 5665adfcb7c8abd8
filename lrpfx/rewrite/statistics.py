"""Statistics of a batch -> the running ones, as PyTorch's batch norm updates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrpfx.canonize import batch_statistics
from lrpfx.capture import (
    Captured,
    Inputs,
    as_captured,
    copies,
    flatten_inputs,
    run_model,
    state_of,
    worst_difference,
)
from lrpfx.errors import CaptureError, some

#: In units of the tolerance of outputs: statistics of deep layers are of what others have rounded.
_ROUND_OFF = 10.0


@dataclass(frozen=True)
class Running:
    """The buffers that follow one call of a batch norm.

    Args:
        buffers: Names of the running mean and variance, "" where there are none.
        batches: Name of the number of batches, "" if it is not counted.
        momentum: Of the running statistics; None for their average over all batches.
        owner: The module whose ``momentum`` it is, so that a change is seen; None for a constant.
    """

    buffers: tuple[str, str]
    batches: str
    momentum: float | None
    owner: nn.Module | None

    def follow(self, found: Sequence[Any], state: dict[str, Tensor]) -> None:
        """Update the buffers of ``state`` by mean, biased variance and number of elements."""
        mean, var, count = found
        momentum = self.momentum if self.owner is None else getattr(self.owner, "momentum", None)
        batches = state.get(self.batches)
        with torch.no_grad():
            if batches is not None:
                batches.add_(1)
                momentum = 1.0 / float(batches) if momentum is None else momentum
            n = count // len(mean)
            values = mean, var * (n / max(n - 1, 1))
            for name, value in zip(self.buffers, values, strict=True):
                if name in state:
                    state[name].lerp_(value.to(state[name].dtype), momentum or 0.0)

    def differing(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
        """The buffers that differ by more than round-off, means in units of deviations."""
        wrong = [self.batches] if self.batches and a[self.batches] != b[self.batches] else []
        if all(self.buffers):
            mean, var = self.buffers
            both = (torch.cat([state[mean], state[var].sqrt()]) for state in (a, b))
            if not worst_difference([next(both)], [next(both)]) <= _ROUND_OFF:
                wrong.append(mean)
        return wrong


def running_of(model: nn.Module, graph: fx.Graph, prefix: str) -> list[Running]:
    """What follows each batch norm of training mode, in the order of their calls.

    Args:
        model: The model.
        graph: Its canonical graph.
        prefix: What to strip from names in the graph.
    """
    found = []
    for statistics in batch_statistics(graph):
        mean, var = (name.removeprefix(prefix) for name in statistics.buffers)
        path = mean.rpartition(".")[0]
        owner = model.get_submodule(path) if mean else None
        batches = f"{path}.num_batches_tracked".lstrip(".")
        counted = owner is not None and getattr(owner, "num_batches_tracked", None) is not None
        own = getattr(owner, "momentum", statistics.momentum)
        live = owner is not None and own in (None, statistics.momentum)
        found.append(
            Running(
                (mean, var),
                batches if counted else "",
                None if own is None else statistics.momentum,
                owner if live else None,
            )
        )
    return found


def unfollowed(captured: Captured, module: fx.GraphModule, inputs: Inputs) -> list[str]:
    """The buffers that the model's own forward writes into, and an explanation does not.

    Args:
        captured: The model.
        module: Its canonical graph.
        inputs: Example inputs.

    Raises:
        CaptureError: Running statistics would become others than by the model's own forward.
    """
    leaves, spec = flatten_inputs(inputs)
    model = captured.model
    with as_captured(captured):
        ours = {name: t.detach().clone() for name, t in state_of(model).items()}
        theirs = dict(ours)
        run_model(model, copies(leaves), spec)
        for name, tensor in state_of(model).items():
            if not torch.equal(tensor, ours[name]):
                theirs[name] = tensor.detach().clone()
    found = batch_statistics(module.graph)
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    graph.graph_copy(module.graph, copied)
    graph.output([[copied[n] for n in (s.mean, s.var, s.mean.all_input_nodes[0])] for s in found])
    graph.eliminate_dead_code()
    with torch.no_grad():
        values = fx.Interpreter(module, graph=graph).run(
            *copies(leaves), enable_io_processing=False
        )
    followed = running_of(model, module.graph, captured.prefix)
    for running, (mean, var, measured) in zip(followed, values, strict=True):
        running.follow((mean, var, measured.numel()), ours)
    names = {name for one in followed for name in (*one.buffers, one.batches) if name}
    wrong = [name for one in followed for name in one.differing(theirs, ours)]
    if wrong:
        raise CaptureError(
            "forward() updates running statistics in another way than PyTorch's batch norm.",
            where=some(wrong),
            fix='explain it by running statistics: model.eval(), and bn="running".',
        )
    return [n for n in ours if n not in names and not torch.equal(theirs[n], ours[n])]


class Follows(nn.Module):
    """A step of a rewritten graph that updates running statistics whenever the graph is run.

    Args:
        running: What it updates.
    """

    #: For fx, which would drop it: nothing reads what it returns.
    _is_impure = True

    def __init__(self, running: Running) -> None:
        super().__init__()
        self._running = (running,)  # in a tuple: the module that owns momentum is no part of this

    def forward(self, found: Sequence[Any], buffers: Sequence[Tensor]) -> None:
        """Update the buffers, in the order of their names, by what a batch norm found."""
        (running,) = self._running
        names = [name for name in (*running.buffers, running.batches) if name]
        running.follow(found, dict(zip(names, buffers, strict=True)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Follows:
        return Follows(*self._running)
