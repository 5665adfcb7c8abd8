"""What comes out of a capture, by either way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lrpfx.capture.forms import Signature, TensorForm, from_dicts
from lrpfx.capture.reads import Read


@dataclass(frozen=True)
class Captured:
    """A model that was captured, and how.

    Args:
        model: The model.
        signature: What inputs it takes.
        output: What the model returns, if there are dataclasses in it that the graph has as
            dicts; else None.
        why_static: Why the batch size is fixed, "" if it is not.
        training: Whether each module was in training mode.
        read: Copies of the parameters and buffers that a branch has been taken by.
        decisions: Where values decided what a recorded run did; None if the model was exported.
        own_backwards: Functions with a backward of their own that it calls, with the lines.
    """

    model: nn.Module
    signature: Signature
    training: tuple[tuple[nn.Module, bool], ...]
    output: Any = None
    why_static: str = ""
    read: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: tuple[Read, ...] | None = None
    own_backwards: tuple[str, ...] = ()

    @property
    def batch_varies(self) -> bool:
        """Whether the graph holds for any number of samples."""
        forms = [form for form in self.signature.leaves if isinstance(form, TensorForm)]
        return any(form.shape[:1] == ("N",) for form in forms)

    @property
    def prefix(self) -> str:
        """What stands before every module path in the graph."""
        return "model." if self.output is not None else ""

    def rebuild(self, output: Any) -> Any:
        """The model's own output from the graph's."""
        return output if self.output is None else from_dicts(self.output, output)


class Program(Protocol):
    """What is used of an ``ExportedProgram``; a recorded run has it, too."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph as it was traced."""

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What it was traced with: positional arguments and keywords."""

    def module(self, check_guards: bool) -> fx.GraphModule | nn.Module:
        """The graph with the model's own parameters."""

    def run_decompositions(self, decomp_table: dict[Any, Any]) -> ExportedProgram:
        """The graph without in-place ops, and without the ops of the table."""


class Trace(NamedTuple):
    """What comes out of a capture.

    Args:
        captured: The model, and how it was captured.
        program: The graph, one node per ATen call.
        expected: The tensors that the model returned for the example inputs.
    """

    captured: Captured
    program: Program
    expected: list[Tensor]
