"""Which nodes of a graph compute the same: they call the same op of the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx


class Same:
    """The nodes of a graph by what they compute, as they are when this is made.

    The graph has no writes and no random ops. What is the same is merged where a formula is
    recognised only: else two calls of a module stay two, each with a row of its own.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        known: dict[Any, fx.Node] = {}
        self._first: dict[fx.Node, fx.Node] = {}
        self._groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            called = fx.node.map_arg((node.args, node.kwargs), self._first.__getitem__)
            of = (
                called if node.op == "call_function" else node.name if node.op != "get_attr" else ""
            )
            first = known.setdefault((node.op, node.target, str(of)), node)
            self._first[node] = first
            self._groups.setdefault(first, []).append(node)

    def first(self, node: fx.Node) -> fx.Node:
        """The first node that computes the same."""
        return self._first.get(node, node)

    def group(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that compute the same, this one too."""
        return self._groups.get(self.first(node), [node])

    def merge(self, nodes: Collection[fx.Node]) -> bool:
        """Let nodes read, of what computes the same, the first; return whether any has changed."""
        changed = False
        for node in nodes:
            for read in [n for n in node.all_input_nodes if self.first(n) is not n]:
                node.replace_input_with(read, self.first(read))
                changed = True
        return changed
