"""An output near zero -> the summands that cancel in it: what its relevance is measured by."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.ops import explained_leaves, nodes_in, record, slot_nodes
from lrpfx.rules import finite, size_of
from lrpfx.run.targets import Seed


class Summands:
    """The first ops, from the outputs on, whose results are sums, and what is added up there.

    Such a sum may be next to nothing for what is added up, and relevance that begins with it is,
    too. What comes to the summands is then no explosion: it is as large as they are.

    Args:
        module: The canonical graph.
        live: The nodes that carry relevance.
    """

    def __init__(self, module: fx.GraphModule, live: Container[fx.Node]) -> None:
        self._module = module
        self._explained = explained_leaves(module.graph)
        self._behind, self._summands = _first_sums(nodes_in(self._explained), live)
        #: Names of the sums.
        self.names = {node.name for node in self._behind if _is_sum(node)}

    def size(self, leaves: Sequence[Any], seed: Seed) -> float:
        """Absolute gradient times value of the summands, of what is explained of the outputs.

        Gradients know of no rules: a wrong one does not hide itself. An output counts as itself,
        or as less where its seed is.

        Args:
            leaves: Flat inputs.
            seed: What relevance begins with.
        """
        run = _UpTo(self._module, self._behind, self._summands)
        values = run.values_of(leaves, nodes_in(self._explained))
        ends, slopes = [], []
        for node, s in zip(self._explained, seed.seeds, strict=True):
            if s is not None and isinstance(node, fx.Node) and values[node].requires_grad:
                z = values[node]
                part = torch.where(s == 0, 0.0, (s / z.detach()).nan_to_num(1.0).clamp(-1, 1))
                ends.append(z)
                slopes.append(part.to(z.dtype))
        at = list(run.leaves.values())
        if not ends or not at:
            return 0.0
        found = torch.autograd.grad(ends, at, slopes, allow_unused=True)
        pairs = zip(at, found, strict=True)
        return size_of([finite(a.detach()) * g for a, g in pairs if g is not None]).item()


def _first_sums(
    ends: Sequence[fx.Node], live: Container[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes from the outputs up to the first sums, these included, and the summands."""
    behind, summands, rest = set[fx.Node](), set[fx.Node](), [n for n in ends if n in live]
    while rest:
        node = rest.pop()
        if node in behind:
            continue
        known = record(node)
        if known is None:
            inputs = [n for n in node.all_input_nodes if n in live]  # of a getitem
        else:
            inputs = [slot_nodes(node)[i] for i in known.site.live]
        if not inputs:
            summands.add(node)
            continue
        behind.add(node)
        if known is None or known.site.op.keeps_shape or not _is_sum(node):
            rest += inputs
        else:
            summands.update(inputs)
    return behind, summands


def _is_sum(node: fx.Node) -> bool:
    """Whether values are added, be it a constant, so that a result may be less than its parts."""
    known = record(node)
    if known is None or known.kind == "scale":
        return False
    op = known.site.op
    return op.soft or op.family not in ("move", "activation", "product", "select")


class _UpTo(fx.Interpreter):
    """Runs a graph; autograd is on behind the summands only.

    Args:
        module: The graph.
        behind: The nodes that come after the summands.
        summands: These.
    """

    def __init__(
        self, module: fx.GraphModule, behind: set[fx.Node], summands: set[fx.Node]
    ) -> None:
        super().__init__(module)
        self._behind, self._summands = behind, summands
        self.leaves: dict[fx.Node, Tensor] = {}

    def values_of(self, leaves: Sequence[Any], ends: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """What the ends come to."""
        found: dict[fx.Node, Any] = {}
        self._wanted, self._found = set(ends), found
        self.run(*leaves, enable_io_processing=False)
        return found

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a summand's is a leaf."""
        with torch.set_grad_enabled(n in self._behind):
            value = super().run_node(n)
        if n in self._summands and isinstance(value, Tensor) and value.is_floating_point():
            value = self.leaves[n] = value.detach().requires_grad_()
        if n in self._wanted:
            self._found[n] = value
        return value
