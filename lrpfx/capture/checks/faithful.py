"""Whether the graph computes what the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrpfx.capture.captured import Captured
from lrpfx.capture.forms import Inputs, copies, flatten_inputs, tensors_in
from lrpfx.capture.preserve import preserved
from lrpfx.capture.running import run_model, run_twice
from lrpfx.errors import CaptureError


def check_faithful(
    captured: Captured,
    module: fx.GraphModule,
    inputs: Inputs,
    expected: Sequence[Tensor] | None = None,
    got: Sequence[Tensor] | None = None,
) -> None:
    """Raise CaptureError unless ``module`` computes what the model computes on ``inputs``.

    Python state and random numbers are baked in at capture; this is where they come to light.

    Args:
        captured: The model.
        module: Its graph.
        inputs: What both are run on.
        expected: The tensors that the model returns for them, if they are known.
        got: Those that the graph does, if it has been run.
    """
    leaves, spec = flatten_inputs(inputs)
    model = captured.model
    if expected is None:
        with as_captured(captured):
            expected = copies(tensors_in(run_twice(model, leaves, spec)))
    if got is None:
        # It writes nothing that is the model's, but may draw random numbers that nobody uses.
        with preserved(nn.Identity()), torch.no_grad():
            got = run_graph(module, leaves)
    dtype = _coarsest(module.graph)
    worst = worst_difference(expected, got, dtype)
    if not worst <= 1.0:
        changed = [rounded(leaf) for leaf in copies(leaves)]
        with as_captured(captured):
            again, near = (
                worst_difference(expected, tensors_in(run_model(model, given, spec)))
                for given in (copies(leaves), changed)
            )
        if again <= 1.0 and not near <= 1.0:
            raise CaptureError(
                "the model makes so much of rounding errors that its output cannot be told from "
                f"another's (inputs changed by one rounding: {near:.1e} times the tolerance).",
                where=[f"{type(model).__name__}, in {_dtypes(expected)}"],
                fix="explain it in float64: model.double() and inputs.double().",
            )
        raise CaptureError(
            "the captured graph does not compute what the model computes "
            f"(difference {worst:.1e} times the tolerance).",
            where=[f"{type(model).__name__}, outputs of the same inputs"],
            fix="look for random numbers, counters or other Python state in forward(); "
            "they were baked in when the model was traced.",
        )


def agrees(captured: Captured, module: fx.GraphModule, inputs: Inputs) -> bool:
    """Whether ``module`` computes what the model computes on ``inputs`` as it is now."""
    leaves, spec = flatten_inputs(inputs)
    with as_captured(captured):
        expected = copies(tensors_in(run_model(captured.model, copies(leaves), spec)))
    with as_captured(captured):
        try:
            got = run_graph(module, leaves)
        except (RuntimeError, IndexError, ValueError):  # it is the graph of another run
            return False
    return worst_difference(expected, got, _coarsest(module.graph)) <= 1.0


def run_graph(module: fx.GraphModule, leaves: Sequence[Any]) -> list[Tensor]:
    """The tensors that the graph returns."""
    return run_on(module, copies(leaves))


def run_on(module: fx.GraphModule, leaves: Sequence[Any]) -> list[Tensor]:
    """The same, of these very inputs, which the graph may write into."""
    graph = fx.Graph()  # without the layers that are kept for their names, such as folded ones
    graph.output(graph.graph_copy(module.graph, {}))
    graph.eliminate_dead_code()
    # Not by its hooks, which hold sizes to the branches that were taken: the values tell. Nor by
    # its code, of which Python would keep the lines.
    found = fx.Interpreter(module, graph=graph).run(*leaves, enable_io_processing=False)
    return [t for t in found if isinstance(t, Tensor)]


@contextmanager
def as_captured(captured: Captured) -> Iterator[None]:
    """The model in the mode that it was captured in, and left as it was."""
    with preserved(captured.model, plainly=True), torch.no_grad():
        for module, training in captured.training:
            module.training = training
        yield


def worst_difference(
    expected: Sequence[Tensor], got: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> float:
    """The largest difference of two lists of tensors, in units of their dtypes' tolerance.

    Args:
        expected: Some.
        got: Others.
        dtype: The coarsest that they were computed in, if that is coarser than their own.
    """
    if len(expected) != len(got):
        return float("inf")
    pairs = zip(expected, got, strict=True)
    return max((_difference(e, g, _tolerance(dtype)) for e, g in pairs), default=0.0)


def rounded(leaf: Any) -> Any:
    """A floating tensor with every element changed by about one rounding, up or down.

    All up would be a scale, which networks of ReLUs hand on without any loss.
    """
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    signs = torch.randint(2, leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    return leaf * (1 + 2 * torch.finfo(leaf.dtype).eps * (2 * signs - 1))


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))


def _coarsest(graph: fx.Graph) -> torch.dtype:
    """The coarsest dtype that the graph computes in, as autocast and casts by hand have it."""
    values = (node.meta.get("val") for node in graph.nodes)
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    return max(dtypes, key=_tolerance, default=torch.float64)


def _tolerance(dtype: torch.dtype) -> float:
    # Folding batch norm reorders sums, which costs a few digits; a wrong graph costs all of them.
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)


def _difference(expected: Tensor, got: Tensor, least: float) -> float:
    """Largest difference in units of the dtype's tolerance; NaN and infinity must coincide."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, got) else float("inf")
    tolerance = max(least, _tolerance(expected.dtype))
    expected, got = expected.double(), got.double()
    if not torch.equal(expected.isfinite(), got.isfinite()):
        return float("inf")
    expected, got = expected.nan_to_num(), got.nan_to_num()
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-12)
    return (expected - got).abs().max().item() / scale / tolerance if expected.numel() else 0.0
