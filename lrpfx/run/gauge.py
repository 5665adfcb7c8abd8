"""A rewritten graph -> the same, run once with the absolute relevance measured at its edges.

A ledger needs the plain form. This measures what any form carries, for the price of one product
and one sum an edge; it holds on to all activations meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lrpfx.ops import explained_leaves, nodes_in, widened
from lrpfx.rewrite import ARRIVES
from lrpfx.rules import size_of
from lrpfx.run.backward import Run
from lrpfx.run.halves import pull_scaled
from lrpfx.run.targets import Seed

#: Less than this part of what relevance began with is round-off.
_LEAST = 1e-6


class Gauge(fx.Interpreter):
    """Runs a rewritten graph, and keeps the sizes of what its backward pass carries.

    Args:
        module: As ``rewrite.instrument`` makes it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors are as if the module had been called
        self._sizes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, with a hook if relevance arrives at it."""
        value = super().run_node(n)
        if ARRIVES in n.meta and isinstance(value, Tensor) and value.requires_grad:
            name, multiplier = n.meta[ARRIVES]
            a = value.detach() if multiplier else None
            # Of the sizes alone: a hook that held the values would be in a circle that no
            # collector sees.
            value.register_hook(functools.partial(_measure, self._sizes, name, a))
        return value

    def measure(self, leaves: Sequence[Any], seed: Seed, scaled: bool) -> None:
        """Run the graph, and pull one seed back.

        Args:
            leaves: Flat inputs.
            seed: The seed.
            scaled: Whether it is scaled on its way.
        """
        with torch.no_grad():
            run = Run(*self.run(*leaves, None))
            list(pull_scaled(run, [seed]) if scaled else run.pull([seed]))

    @property
    def measured(self) -> bool:
        """Whether a backward pass has been measured; compiled graphs are none of this one's."""
        return bool(self._sizes)

    def steepest(self, graph: fx.Graph, live: Container[fx.Node]) -> float:
        """How many times what arrived at a node's users arrived at the node, at most.

        Args:
            graph: The canonical graph.
            live: The nodes that carry relevance. One of no edge, or of values that are infinite,
                counts as having what its users got.
        """
        found = torch.stack(list(self._sizes.values())).tolist()
        sizes = {n: size for n, size in zip(self._sizes, found, strict=True) if size == size}
        ends = set(nodes_in(explained_leaves(graph)))
        came: dict[fx.Node, float] = {}
        worst, least = 0.0, _LEAST * max((sizes.get(n.name, 0.0) for n in ends), default=0.0)
        for node in reversed(graph.nodes):
            if node in live:
                got = sum(came.get(user, 0.0) for user in node.users)
                came[node] = sizes.get(node.name, got)
                if node not in ends and came[node] > least and got:
                    worst = max(worst, came[node] / got)
        return worst


def _measure(sizes: dict[str, Tensor], name: str, a: Tensor | None, m: Tensor) -> None:
    m = m.detach()
    sizes[name] = size_of([m if a is None else widened(a) * m])
