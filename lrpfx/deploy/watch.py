"""Which node of the model an op is run for, in the forward pass and in the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from lrpfx.ops import Record, op_name, record, source_line


class Watch(TorchDispatchMode):
    """Notes for which nodes each op is called, and which node is run now."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = ""
        #: Places by op, each once.
        self.places: dict[Any, dict[str, None]] = {}
        self._by_number = dict[int, str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None:  # what a rule pulls back by itself has numbers of its own
            self.place = self._by_number.get(node._sequence_nr(), self.place)
        self.places.setdefault(func, {})[self.place] = None
        return func(*args, **(kwargs or {}))

    def begin(self, place: str) -> int:
        """What is called from now on is for the node at ``place``; a number for ``end``."""
        self.place = place
        return torch._C._autograd._get_sequence_nr()

    def end(self, begun: int) -> None:
        """What was recorded for the backward pass since is for the same node."""
        for number in range(begun, torch._C._autograd._get_sequence_nr()):
            self._by_number[number] = self.place


class Watched(fx.Interpreter):
    """Runs an instrumented graph with other parameters, under a ``Watch``.

    Args:
        module: The graph.
        records: Of the model's nodes, by name.
        watch: What is told.
    """

    def __init__(self, module: fx.GraphModule, records: Mapping[str, Record], watch: Watch) -> None:
        super().__init__(module)
        self._records, self._watch = records, watch
        self._state: Mapping[str, Tensor] = {}

    def run_with(self, state: Mapping[str, Tensor], leaves: Sequence[Any]) -> Any:
        """What the graph returns.

        Args:
            state: Parameters and buffers in the place of the graph's own.
            leaves: Flat inputs.
        """
        self._state = state
        return self.run(*leaves)

    def fetch_attr(self, target: str) -> Any:
        """A parameter, a buffer or a constant."""
        return self._state[target] if target in self._state else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        begun = self._watch.begin(self._place(n))
        value = super().run_node(n)
        self._watch.end(begun)
        return value

    def _place(self, node: fx.Node) -> str:
        name = getattr(node.target, "name", "")  # of a step of the phantom stream
        known = record(node) or self._records.get(str(name).removesuffix("_edge"))
        if known is not None:
            return f"{known}   {known.source}".rstrip()
        return f"{op_name(node.target)}   {source_line(node)}".rstrip()
