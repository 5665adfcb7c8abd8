"""Ops of a program -> where in the model they come from, found by running the explanation once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lrpfx.deploy.equivalents import Spelled
from lrpfx.deploy.seeds import seed_in_graph
from lrpfx.explain import Explainer
from lrpfx.ops import Record, op_name, record, source_line
from lrpfx.run import Run


def locate(
    explainer: Explainer, leaves: Sequence[Any], ops: Collection[Any]
) -> Mapping[Any, list[str]]:
    """For each of the ops the nodes of the model that it is run for, forward or backward.

    Args:
        explainer: What explains.
        leaves: Flat inputs.
        ops: ATen ops.
    """
    module = explainer._for_export()
    records = {r.name: r for n in explainer._module.graph.nodes if (r := record(n)) is not None}
    watch = _Watch(set(ops))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Spelled(), watch:
        run = Run(*_Placed(module, records, watch).run(*leaves, None))
        list(run.pull([seed_in_graph(run.explained, None)]))
    return {op: list(places) for op, places in watch.found.items()}


class _Watch(TorchDispatchMode):
    """Notes for which node an op is called."""

    def __init__(self, ops: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[Any, dict[str, None]] = {op: {} for op in ops}
        #: The node that is run, and by number of its autograd nodes those that have been.
        self.place, self.by_number = "", dict[int, str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None:  # what a rule pulls back by itself has numbers of its own
            self.place = self.by_number.get(node._sequence_nr(), self.place)
        if func in self.found:
            self.found[func][self.place] = None
        return func(*args, **(kwargs or {}))


class _Placed(fx.Interpreter):
    """Runs a graph, and tells ``watch`` which node it is at."""

    def __init__(
        self, module: fx.GraphModule, records: Mapping[str, Record], watch: _Watch
    ) -> None:
        super().__init__(module)
        self._records, self._watch = records, watch

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        begun = torch._C._autograd._get_sequence_nr()
        self._watch.place = self._place(n)
        value = super().run_node(n)
        for number in range(begun, torch._C._autograd._get_sequence_nr()):
            self._watch.by_number[number] = self._watch.place
        return value

    def _place(self, node: fx.Node) -> str:
        name = getattr(node.target, "name", "")  # of a step of the phantom stream
        known = record(node) or self._records.get(str(name).removesuffix("_edge"))
        if known is not None:
            return f"{known}   {known.source}".rstrip()
        return f"{op_name(node.target)}   {source_line(node)}".rstrip()
