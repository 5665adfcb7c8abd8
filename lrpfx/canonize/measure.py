"""What nodes of a graph compute for the example inputs, and what that does not depend on.

A property that is measured holds for every spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lrpfx.ops import reachable

aten = torch.ops.aten

#: In ``GraphModule.meta`` while the passes run: the flat inputs that the graph was captured with.
INPUTS = "lrpfx_inputs"
#: Relative error that is round-off, by bytes of a number.
_ROUNDED = {8: 1e-9, 4: 1e-4, 2: 2e-2}


class Exponents(NamedTuple):
    """A node is k exp(c a + d b).

    Args:
        powers: c and d.
        plain: Whether k, which is constant, is one everywhere.
    """

    powers: tuple[float, ...]
    plain: bool


class Measured:
    """Runs parts of a graph on the inputs that it was captured with.

    Args:
        module: With these inputs in its ``meta``; without them nothing can be measured.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._interpreter = fx.Interpreter(module)
        arguments = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._values: dict[fx.Node, Any] = dict(
            zip(arguments, module.meta.get(INPUTS, ()), strict=False)
        )

    def ignores(self, end: fx.Node, shift: fx.Node) -> bool:
        """Whether ``end`` keeps its value where all of ``shift`` is moved by numbers of its own."""
        return self._same(end, lambda: self._with(end, {shift: self._drawn(shift)}))

    def moves(self, end: fx.Node, shift: fx.Node) -> bool:
        """Whether every entry of ``end`` is another where all of ``shift`` is moved so."""
        try:
            with torch.no_grad():
                value, other = self._value(end), self._with(end, {shift: self._drawn(shift)})
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return False
        return bool((value != other).all())

    def ignores_number(self, end: fx.Node, total: fx.Node) -> bool:
        """Whether ``end`` keeps its value where one number is added to all of ``total``."""
        return self._same(end, lambda: self._with(end, {total: self._value(total) + 0.7}))

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
            of_x = self._with(groups, {total: scale})
            return self._with(end, {x: self._value(x) * of_x, total: self._value(total) * scale})

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
            rest = self._value(total.all_input_nodes[0])
            if isinstance(shift, fx.Node):
                zero = torch.zeros_like(self._value(shift))
                rest = self._with(total, {shift: zero})
            (t,) = exponential.all_input_nodes
            moved = self._value(t) - self._with(t, {total: rest})
            e, moved = self._value(exponential), -moved.nan_to_num(0, 0, 0)
            (log,) = (n for n in between(exponential, logarithm) if n.target is aten.log.default)
            (sums,) = log.all_input_nodes
            of_all, once, twice = (
                self._with(sums, {exponential: e * c}) for c in (1, moved, moved.square())
            )
            mean = once / of_all
            if not _close(twice / of_all, mean.square()) or not bool(mean.any()):
                return mean.new_full((), torch.nan)  # not the same for all of a sum
            return self._with(logarithm, {log: self._value(log) + mean})

        return self._same(end, without)

    def exponents(self, end: fx.Node, entries: Sequence[fx.Node]) -> Exponents | None:
        """How ``end`` is an exponential of some nodes, whatever numbers these have, if it is one.

        Args:
            end: The node in question.
            entries: What it is computed from; what else it reads stays as it is.
        """
        try:
            with torch.no_grad():
                return self._exponents(end, entries)
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return None

    def _exponents(self, end: fx.Node, entries: Sequence[fx.Node]) -> Exponents | None:
        zeros = {n: torch.zeros_like(self.drawn(n)) for n in entries}
        k: Tensor = self._with(end, zeros)
        counts = k != 0
        powers = []
        for n in entries:
            grown = (self._with(end, {**zeros, n: zeros[n] + 1}) / k)[counts].log()
            power = float(grown.double().mean())
            whole = round(12 * power) / 12  # of roots, too; what is measured has round-off
            powers.append(whole if abs(power - whole) < 1e-5 else power)

        def is_so(values: dict[fx.Node, Any]) -> bool:
            total = sum(c * values[n] for n, c in zip(entries, powers, strict=True))
            value = self._with(end, values)
            return bool(value.isfinite().all()) and _close(value, k * total.exp())

        drawn = [{n: size * self.drawn(n, i) for i, n in enumerate(entries)} for size in (1, 3)]
        if not any(powers) or not all(map(is_so, drawn)):
            return None
        if not is_so({n: self._value(n) for n in entries}):  # it is too coarse there
            return None
        return Exponents(tuple(powers), _close(k, torch.ones_like(k)))

    def sigmoid(self, end: fx.Node, entry: fx.Node) -> tuple[float, float] | None:
        """Whether a node is a sigmoid of another, whatever numbers that has.

        Args:
            end: The node in question.
            entry: The other; what else is read stays as it is.

        Returns:
            C and c, if ``end`` is C sigmoid(c entry).
        """
        try:
            with torch.no_grad():
                drawn = self.drawn(entry)
                zero, one = (self._with(end, {entry: torch.full_like(drawn, n)}) for n in (0, 1))
                scale = 2 * float(zero.flatten()[0])
                power = float(torch.logit(one.flatten()[0].double() / scale))
                power = round(power) if abs(power - round(power)) < 1e-5 else power
                for x in (drawn, 3 * drawn, 30 * drawn):
                    value, expected = self._with(end, {entry: x}), scale * (power * x).sigmoid()
                    if not torch.allclose(value, expected, 0, _ROUNDED[x.itemsize] * abs(scale)):
                        return None
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return None
        return scale, power

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
        return self._same(end, lambda: compute(self._value(of)))

    def _drawn(self, node: fx.Node) -> Tensor:
        """The value of a node with something added to each number."""
        value: Tensor = self._value(node)
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
        return value + 0.5 + noise.to(value)

    def _with(self, end: fx.Node, changed: dict[fx.Node, Any]) -> Any:
        """The value of ``end`` if those of some nodes are others."""
        changed = dict(changed)
        for node in sorted({n for start in changed for n in between(start, end)} - {*changed}):
            own = {n: changed[n] if n in changed else self._value(n) for n in node.all_input_nodes}
            changed[node] = self._call(node, own)
        return changed[end]

    def _same(self, end: fx.Node, other: Callable[[], Any]) -> bool:
        try:
            with torch.no_grad():
                value, expected = self._value(end), other()
        except Exception:  # ops of the user's on values that mean nothing: nothing is known
            return False
        return bool(value.shape == expected.shape) and _close(value, expected)

    def _value(self, end: fx.Node) -> Any:
        needed = reachable([end], lambda n: [] if n in self._values else n.all_input_nodes)
        for node in sorted(needed):
            if node not in self._values:
                self._values[node] = self._call(node, self._values)
        return self._values[end]

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def _close(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for round-off."""
    rounded = _ROUNDED[value.itemsize]
    size = float(value.abs().nan_to_num(0, 0, 0).max()) if value.numel() else 0.0
    return torch.allclose(value, other, rounded, rounded * size, equal_nan=True)


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
