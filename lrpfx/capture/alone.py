"""A sample alone against the same sample in its batch: whether outputs depend on other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.capture.export import Captured
from lrpfx.capture.faithful import as_captured, rounded, run_graph, worst_difference
from lrpfx.capture.inputs import Inputs, TensorForm, copies, flatten_inputs
from lrpfx.capture.outputs import tensors_in
from lrpfx.capture.running import run_model
from lrpfx.errors import LrpError
from lrpfx.ops import source_line

#: How many times as far as rounding its inputs a sample's output may be moved by other samples.
_CHAOS = 10.0


def mixing_note(
    captured: Captured, module: fx.GraphModule, inputs: Inputs, expected: Sequence[Tensor]
) -> str:
    """What is noted of a model whose outputs depend on the other samples, "" of others.

    The first sample is run alone, or, if it is the only one of a graph for any number, beside
    another that is made of it.

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
    other = [
        _other(leaf, n) if is_it else leaf for leaf, is_it in zip(leaves, batched, strict=True)
    ]
    run = _runner(captured, module)
    try:
        with as_captured(captured):
            worst = _moved(expected, run(other), n)
            if not worst > 1 or not worst > _CHAOS * worst_difference(
                expected, run([rounded(leaf) for leaf in copies(leaves)])
            ):
                return ""
            place = _place(module, leaves, other) if captured.batch_varies else ""
    except (LrpError, RuntimeError, IndexError, ValueError, TypeError):
        return ""  # other numbers of samples, or another sample, are nothing that it takes
    return (
        "the output of a sample depends on the others in its batch (dimension 0 of the inputs)"
        f"{place}: some of its relevance is theirs, and explained alone it is another"
    )


def _is_batched(captured: Captured, i: int, leaf: Any) -> bool:
    form = captured.signature.leaves[i]
    if not isinstance(leaf, Tensor) or not isinstance(form, TensorForm) or not leaf.ndim:
        return False
    return form.shape[0] == ("N" if captured.batch_varies else captured.signature.batch)


def _other(leaf: Tensor, n: int) -> Tensor:
    """The first sample alone, or beside one of the same numbers in other places."""
    if n > 1:
        return leaf[:1]
    moved = leaf.roll(1, -1) if leaf.ndim > 1 else leaf
    return torch.cat([leaf, moved / 2 if leaf.is_floating_point() else moved])


def _runner(
    captured: Captured, module: fx.GraphModule
) -> Callable[[Sequence[Any]], Sequence[Tensor]]:
    """The graph, or, where that holds for one number of samples only, the model."""
    spec = captured.signature.spec
    if not captured.batch_varies:
        return lambda leaves: tensors_in(run_model(captured.model, copies(leaves), spec))
    return lambda leaves: run_graph(module, leaves)


def _moved(expected: Sequence[Tensor], got: Sequence[Tensor], n: int) -> float:
    """How far the outputs of the first sample are apart, in units of the tolerance."""
    pairs = [
        (e[:1], g[:1])
        for e, g in zip(expected, got, strict=True)
        if e.ndim and len(e) == n and len(g) == (1 if n > 1 else 2)
    ]
    return max((worst_difference([e], [g]) for e, g in pairs), default=0.0)


def _place(module: fx.GraphModule, leaves: Sequence[Any], other: Sequence[Any]) -> str:
    """The first node at which the first sample is another."""
    runs = []
    for given in (leaves, other):
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(*copies(given), enable_io_processing=False)
        runs.append(interpreter.env)
    sizes = [
        next(len(t) for t in given if isinstance(t, Tensor) and t.ndim) for given in (leaves, other)
    ]
    for node in module.graph.nodes:
        a, b = runs[0].get(node), runs[1].get(node)
        if node.op != "call_function" or not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if (
            a.ndim
            and b.ndim
            and [len(a), len(b)] == sizes
            and worst_difference([a[:1]], [b[:1]]) > 1
        ):
            return f", first at {source_line(node) or node.name}"
    return ""
