"""A sample alone against the same sample in its batch: whether outputs depend on other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lrpfx.capture.captured import Captured
from lrpfx.capture.checks.faithful import as_captured, rounded, run_graph, worst_difference
from lrpfx.capture.forms import Inputs, TensorForm, copies, flatten_inputs, tensors_in
from lrpfx.capture.running import run_model
from lrpfx.errors import LrpError
from lrpfx.ops import source_line

#: How many times as far as rounding its inputs a sample's output may be moved by other samples.
_CHAOS = 10.0


def mixing_note(
    captured: Captured, module: fx.GraphModule, inputs: Inputs, expected: Sequence[Tensor]
) -> str:
    """What is noted of a model whose outputs depend on the other samples, "" of others.

    The middle sample is run alone, of two each, as the first may depend on none of those behind it;
    the only one of a graph for any number between two others that are made of it.

    Args:
        captured: The model.
        module: Its graph.
        inputs: Example inputs.
        expected: The tensors that the model returns for them.
    """
    leaves = flatten_inputs(inputs)[0]
    batched = [_is_batched(captured, i, leaf) for i, leaf in enumerate(leaves)]
    n = next((len(leaf) for leaf, is_it in zip(leaves, batched, strict=True) if is_it), 0)
    if not n or (n == 1 and captured.decisions is not None):
        return ""  # the graph of a run of one sample is used for no other number
    run = _runner(captured, module)
    place = None
    try:
        with as_captured(captured):
            for k in range(n) if n <= 2 else (n // 2,):
                other = [
                    _other(leaf, k, n) if is_it else leaf
                    for leaf, is_it in zip(leaves, batched, strict=True)
                ]
                pair = _Pair(slice(k, k + 1), slice(1, 2) if n == 1 else slice(0, 1), n)
                worst = _moved(expected, run(other), pair)
                if worst > 1 and worst > _CHAOS * worst_difference(
                    expected, run([rounded(leaf) for leaf in copies(leaves)])
                ):
                    place = _place(module, leaves, other, pair) if captured.batch_varies else ""
                    break
    except (LrpError, RuntimeError, IndexError, ValueError, TypeError):
        return ""  # other numbers of samples, or another sample, are nothing that it takes
    if place is None:
        return ""
    return (
        "the output of a sample depends on the others in its batch (dimension 0 of the inputs)"
        f"{place}: some of its relevance is theirs, and explained alone it is another"
    )


def _is_batched(captured: Captured, i: int, leaf: Any) -> bool:
    form = captured.signature.leaves[i]
    if not isinstance(leaf, Tensor) or not isinstance(form, TensorForm) or not leaf.ndim:
        return False
    return form.shape[0] == ("N" if captured.batch_varies else captured.signature.batch)


class _Pair(NamedTuple):
    """Where the same sample stands in two batches.

    Args:
        first: In the example inputs.
        second: In the others, of which there are three if that is one of one sample.
        n: How many samples there are among the example inputs.
    """

    first: slice
    second: slice
    n: int

    @property
    def others(self) -> int:
        """How many there are in the second batch."""
        return 3 if self.n == 1 else 1

    def are(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors have the samples of the two batches in dimension 0."""
        return bool(a.ndim and b.ndim) and (len(a), len(b)) == (self.n, self.others)

    def apart(self, a: Tensor, b: Tensor) -> float:
        """How far the sample is from itself, in units of the tolerance."""
        return worst_difference([a[self.first]], [b[self.second]])


def _other(leaf: Tensor, k: int, n: int) -> Tensor:
    """A sample alone, or between two of the same numbers in other places."""
    if n > 1:
        return leaf[k : k + 1]
    moved = leaf.roll(1, -1) if leaf.ndim > 1 else leaf
    moved = moved / 2 if leaf.is_floating_point() else moved
    return torch.cat([moved, leaf, moved])


def _runner(
    captured: Captured, module: fx.GraphModule
) -> Callable[[Sequence[Any]], Sequence[Tensor]]:
    """The graph, or, where that holds for one number of samples only, the model."""
    spec = captured.signature.spec
    if not captured.batch_varies:
        return lambda leaves: tensors_in(run_model(captured.model, copies(leaves), spec))
    return lambda leaves: run_graph(module, leaves)


def _moved(expected: Sequence[Tensor], got: Sequence[Tensor], pair: _Pair) -> float:
    """How far the outputs of the sample are apart, in units of the tolerance."""
    both = zip(expected, got, strict=True)
    return max((pair.apart(e, g) for e, g in both if pair.are(e, g)), default=0.0)


def _place(module: fx.GraphModule, leaves: Sequence[Any], other: Sequence[Any], pair: _Pair) -> str:
    """The first node at which the sample is another."""
    runs = []
    for given in (leaves, other):
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(*copies(given), enable_io_processing=False)
        runs.append(interpreter.env)
    for node in module.graph.nodes:
        a, b = runs[0].get(node), runs[1].get(node)
        if node.op != "call_function" or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if pair.are(a, b) and pair.apart(a, b) > 1:
            return f", first at {source_line(node) or node.name}"
    return ""
