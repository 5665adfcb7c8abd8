"""What nodes of a graph compute for the example inputs, and what that does not depend on.

A property that is measured holds for every spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.canonize.insert import ROUND_OFF
from lrpfx.canonize.same import Same
from lrpfx.ops import HELD, precision, reachable

aten = torch.ops.aten

#: In ``GraphModule.meta`` while the passes run: the flat inputs that the graph was captured with.
INPUTS = "lrpfx_inputs"
#: Relative error that is round-off, by bytes of a number.
ROUNDED = {8: 1e-9, 4: 1e-4, 2: 2e-2}


class Measured:
    """Runs parts of a graph on the inputs that it was captured with.

    Args:
        module: With these inputs in its ``meta``; without them nothing can be measured.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self._graph = module.graph
        #: What has been found of regions, by their form; see ``forms``.
        self.known: dict[Any, Any] = {}
        arguments = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._values: dict[fx.Node, Any] = dict(
            zip(arguments, module.meta.get(INPUTS, ()), strict=False)
        )

    def ignores(self, end: fx.Node, shift: fx.Node) -> bool:
        """Whether ``end`` keeps its value where all of ``shift`` is moved by numbers of its own."""
        return self._same(end, lambda: self.value_with(end, {shift: self._drawn(shift)}))

    def moves(self, end: fx.Node, shift: fx.Node) -> bool:
        """Whether every entry of ``end`` is another where all of ``shift`` is moved so."""
        try:
            with torch.no_grad():
                value, other = self.value(end), self.value_with(end, {shift: self._drawn(shift)})
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return False
        return bool((value != other).all())

    def ignores_number(self, end: fx.Node, total: fx.Node) -> bool:
        """Whether ``end`` keeps its value where one number is added to all of ``total``."""
        return self._same(end, lambda: self.value_with(end, {total: self.value(total) + 0.7}))

    def ignores_scale(self, end: fx.Node, x: fx.Node, total: fx.Node, groups: fx.Node) -> bool:
        """Whether ``end`` keeps its value where x and its sums are scaled, each group by a number.

        Args:
            end: The node in question.
            x: What is summed up over groups.
            total: The sums.
            groups: What is computed from them, and hands each sum back to its group.
        """

        def scaled() -> Any:
            scale = self._drawn(total).abs()
            of_x = self.value_with(groups, {total: scale})
            return self.value_with(end, {x: self.value(x) * of_x, total: self.value(total) * scale})

        return self._same(end, scaled)

    def adds_again(
        self, end: fx.Node, logarithm: fx.Node, exponential: fx.Node, total: fx.Node, place: int
    ) -> bool:
        """Whether ``end`` adds what was subtracted in the exponentials of log(sum(exp(a - c))).

        Args:
            end: A sum of the logarithm, which was scaled and moved maybe, and something else.
            logarithm: The operand of the sum that comes from the logarithm.
            exponential: Of which the logarithm takes the sum.
            total: The sum in which c is subtracted.
            place: Of c in there.
        """

        def without() -> Any:
            shift: Any = total.args[place]
            rest = self.value(total.all_input_nodes[0])
            if isinstance(shift, fx.Node):
                zero = torch.zeros_like(self.value(shift))
                rest = self.value_with(total, {shift: zero})
            (t,) = exponential.all_input_nodes
            moved = self.value(t) - self.value_with(t, {total: rest})
            e, moved = self.value(exponential), -moved.nan_to_num(0, 0, 0)
            (log,) = (n for n in between(exponential, logarithm) if n.target is aten.log.default)
            (sums,) = log.all_input_nodes
            of_all, once, twice = (
                self.value_with(sums, {exponential: e * c}) for c in (1, moved, moved.square())
            )
            mean = once / of_all
            if not close(twice / of_all, mean.square()) or not bool(mean.any()):
                return mean.new_full((), torch.nan)  # not the same for all of a sum
            return self.value_with(logarithm, {log: self.value(log) + mean})

        return self._same(end, without)

    def commutes(self, end: fx.Node, x: fx.Node, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether a node of x is the same before and behind a function of positive numbers."""
        try:
            with torch.no_grad():
                drawn = self.drawn(x).abs() + 0.1
                before, behind = (self.value_with(end, {x: t}) for t in (function(drawn), drawn))
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return False
        return close(before, function(behind))

    def excess(self, more: fx.Node, less: fx.Node) -> float | None:
        """By what number a node is more than another, whatever the inputs; None if by none."""
        inputs = [n for n in self._values if n.op == "placeholder"]
        floating = [n for n in inputs if precision(n)]
        found: float | None = None
        try:
            with torch.no_grad():
                for changed in ({}, {n: self.drawn(n, i) for i, n in enumerate(floating)}):
                    a, b = (self.value_with(n, changed) for n in (more, less))
                    number = float((a - b).double().mean())
                    if found is not None and abs(number - found) > ROUNDED[a.itemsize]:
                        return None
                    size = float(b.abs().max())
                    if not close(a - b, torch.full_like(a, number), size):
                        return None
                    found = 0.0 if abs(number) < ROUNDED[a.itemsize] * max(size, 1) else number
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return None
        return found

    def drawn(self, node: fx.Node, seed: int = 0) -> Tensor:
        """Numbers in the form of a node's value."""
        like: Tensor = node.meta["val"]
        sizes = [size if isinstance(size, int) else size.node.hint for size in like.shape]
        given = next(t for t in self._values.values() if isinstance(t, Tensor))
        device = given.device if like.is_meta else like.device
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(*sizes, generator=generator, dtype=like.dtype, device=device)

    def equals(self, end: fx.Node, compute: Callable[[Tensor], Tensor], of: fx.Node) -> bool:
        """Whether a node has the value that ``compute`` makes of another's."""
        return self._same(end, lambda: compute(self.value(of)))

    def _drawn(self, node: fx.Node) -> Tensor:
        """The value of a node with something added to each number."""
        value: Tensor = self.value(node)
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
        return value + 0.5 + noise.to(value)

    def value_with(self, end: fx.Node, changed: Mapping[fx.Node, Any]) -> Any:
        """The value of ``end`` if some nodes, and what computes the same, have others."""
        if not changed:
            return self.value(end)
        others = {n: value for start, value in changed.items() for n in self.same.group(start)}
        others.update(changed)
        for node in sorted({n for start in others for n in between(start, end)} - {*others}):
            if node.meta.get(HELD) == ROUND_OFF:
                others[node] = self.value(node)
                continue
            own = {n: others[n] if n in others else self.value(n) for n in node.all_input_nodes}
            others[node] = self._call(node, own)
        return others[end]

    @cached_property
    def same(self) -> Same:
        """What computes the same, when this is first asked for."""
        return Same(self._graph)

    def _same(self, end: fx.Node, other: Callable[[], Any]) -> bool:
        try:
            with torch.no_grad():
                value, expected = self.value(end), other()
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return False
        return bool(value.shape == expected.shape) and close(value, expected)

    def value(self, end: fx.Node) -> Any:
        """The value of a node for the example inputs."""
        needed = reachable([end], lambda n: [] if n in self._values else n.all_input_nodes)
        with torch.no_grad():
            for node in sorted(needed):
                if node not in self._values:
                    self._values[node] = self._call(node, self._values)
        return self._values[end]

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def close(value: Tensor, other: Tensor, size: float = 0.0) -> bool:
    """Whether two tensors are equal but for round-off of the largest number, or of ``size``."""
    rounded = ROUNDED[value.itemsize]
    largest = float(value.abs().nan_to_num(0, 0, 0).max()) if value.numel() else 0.0
    return torch.allclose(value, other, rounded, rounded * max(largest, size), equal_nan=True)


def between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes on the ways from ``start`` to ``end``, the latter included, in order."""
    found: dict[fx.Node, None] = {}
    for node in sorted(reachable([end], lambda n: [] if n is start else n.all_input_nodes)):
        if any(n is start or n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape."""
    first, second = (str(getattr(n.meta["val"], "shape", None)) for n in (a, b))
    return first == second
