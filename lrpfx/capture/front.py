"""Which of the two ways of capture is taken: torch.export, or a record of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lrpfx.capture.captured import Trace
from lrpfx.capture.exported import export
from lrpfx.capture.forms import Inputs
from lrpfx.capture.recorded import record

#: One graph for all inputs, or the graph of one run.
Way = Literal["export", "record"]
#: One of them, or the one that suits, and the other where that is refused.
By = Literal["auto", "export", "record"]


def capture(
    model: nn.Module, inputs: Inputs, dynamic: Sequence[int] = (), by: Way = "export"
) -> Trace:
    """Capture ``model`` as a graph that computes what ``model(inputs)`` computes.

    Args:
        model: Any module; it is not modified.
        inputs: Example inputs.
        dynamic: Of an exported graph, further dimensions that may vary beside the batch.
        by: "export" for a graph that holds for all inputs, "record" for that of one run.

    Returns:
        The trace; ``check_faithful`` compares the outputs of its graph with the expected ones.

    Raises:
        CaptureError: The model cannot be captured.
        InputError: No input can be explained, or the model itself fails on the inputs.
    """
    return record(model, inputs) if by == "record" else export(model, inputs, dynamic)
