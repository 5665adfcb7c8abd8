"""Writes ops into a graph in the place of another."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from lrpfx.canonize.insert import insert

aten = torch.ops.aten


class Writer:
    """Writes calls into the graph in the place of ``node``; a factor or summand of 1 or 0 falls.

    Args:
        node: What they stand for.
        module: The graph's.
        changing: The nodes that depend on the inputs; what is written and does so is added.
    """

    def __init__(
        self, node: fx.Node, module: fx.GraphModule, changing: set[fx.Node] | None = None
    ) -> None:
        self.node, self._module = node, module
        self._changing: set[fx.Node] = set() if changing is None else changing

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call."""
        new = insert(self.node, target, args, kwargs)
        if not self._changing.isdisjoint(new.all_input_nodes):
            self._changing.add(new)
        return new

    def changes(self, *nodes: Any) -> bool:
        """Whether the values of some of the nodes, not just their sizes, depend on the inputs."""
        return not self._changing.isdisjoint(n for n in nodes if isinstance(n, fx.Node))

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, unlike buffers such as tables of positions."""
        if node.op != "get_attr":
            return False
        return isinstance(operator.attrgetter(str(node.target))(self._module), nn.Parameter)

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size of a node's value: a number, or what computes it if it may vary."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self(aten.sym_size.int, node, dim)

    def times(self, a: fx.Node, number: Any) -> fx.Node:
        """``number * a``."""
        return a if isinstance(number, (int, float)) and number == 1 else self.mul(a, number)

    def mul(self, a: Any, b: Any) -> fx.Node:
        """``a * b``."""
        return self(aten.mul.Tensor, a, b)

    def div(self, a: Any, b: Any) -> fx.Node:
        """``a / b``."""
        return self(aten.div.Tensor, a, b)

    def sum(self, a: Any, b: Any) -> fx.Node:
        """``a + b``."""
        return self(aten.add.Tensor, a, b)

    def plus(self, a: Any, beta: Any, b: fx.Node) -> fx.Node:
        """``beta * a + b``, where a beta of 0 drops what a holds, were it NaN, as PyTorch does."""
        return b if beta == 0 else self.sum(self.times(a, beta), b)

    def replace_outputs(self, *outputs: Any) -> None:
        """Let what picks the k-th of several outputs use the k-th of these."""
        for user in list(self.node.users):
            user.replace_all_uses_with(outputs[int(user.args[1])])  # type: ignore[arg-type]
