"""An explanation that was made fast -> its ledger, by the plain form, once that is asked for.

The plain form runs on what the explanation was made of. It has to give the same relevance, so
that every report that is read checks a fast map.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.capture import (
    Versions,
    is_finite,
    leaves_in,
    rounded,
    tensors_in,
    tensors_of,
    versions,
    worst_difference,
)
from lrpfx.errors import InputError, some, warn
from lrpfx.explanation import Explanation, Layers
from lrpfx.ops import HALVES, record, used_nodes
from lrpfx.plan import Plan
from lrpfx.rewrite import Booking, Ledger
from lrpfx.run.backward import Pulled, Run
from lrpfx.run.halves import in_float16, pull_scaled
from lrpfx.run.refuse import refuse_relevance
from lrpfx.run.targets import Seed

#: Relative difference (Euclidean norm) up to which two maps are equal but for round-off.
_ROUND_OFF = {torch.float64: 1e-6, torch.float32: 1e-2}
_IN_HALVES = 0.5
#: How many times as far they may be from each other as rounded inputs take one of them.
_CHAOS = 10.0


@dataclass(frozen=True)
class Made:
    """What an explanation was made of, and what came out.

    Args:
        found: The explanation, without the report of its own.
        leaves: Flat inputs.
        seed: What was pulled back.
        versions: Of parameters and buffers, of the inputs, and of what came out.
        casts: Autocast at that time: per device, whether it was on, and its dtype.
    """

    found: Explanation
    leaves: Sequence[Any]
    seed: Seed
    versions: tuple[Versions, Versions, Versions]
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @contextlib.contextmanager
    def as_then(self) -> Iterator[None]:
        """Autocast as it was, and neither autograd nor inference mode."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            yield

    def refuse_changes(self, state: Mapping[str, Tensor]) -> None:
        """Raise InputError if parameters, buffers or inputs were written into or replaced."""
        now = _versions(state, self.leaves, self.found)
        what = ("parameters and buffers", "inputs")
        for then, current, kind in zip(self.versions, now, what, strict=False):
            if changed := [name for name in then if current.get(name) != then[name]]:
                raise _outdated(f"{len(changed)} of the {kind}", some(changed))

    def unwritten(self, again: Explanation) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, and value then and now, of what came out and was not written into since."""
        now = _versions({}, (), self.found)[2]
        values = _came_out(again)
        for name, then in _came_out(self.found).items():
            if now[name] == self.versions[2][name]:
                yield name, then, values[name]


def _outdated(what: str, where: Sequence[str]) -> InputError:
    return InputError(
        f"{what} changed since the explanation was made: its ledger cannot be had any more.",
        where=where,
        fix="read the report before they change, or explain with ledger=True, which books at once.",
    )


def _versions(
    state: Mapping[str, Tensor], leaves: Sequence[Any], found: Explanation
) -> tuple[Versions, Versions, Versions]:
    inputs = {f"input {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    return versions(state), versions(inputs), versions(_came_out(found))


def _came_out(found: Explanation) -> dict[str, Tensor]:
    """Output and relevance, tensor by tensor."""
    relevance = leaves_in((found.relevance, found.embeddings))
    parts = {"output": tensors_in(found.output), "relevance": relevance}
    return {
        f"{name} {i}": value
        for name, values in parts.items()
        for i, value in enumerate(values)
        if isinstance(value, Tensor)
    }


class Books:
    """Makes ledgers of explanations that were made without.

    Args:
        module: The canonical graph.
        plan: The rule of each node.
        current: Returns parameters and buffers as they are now.
        instrumented: Makes graphs for these, fast or plain, maybe with a node tapped.
        explanation: Makes one from inputs, clean outputs, seed, and relevance per start.
        look: What looks at the books, with the flat inputs and the seed.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        current: Callable[[], Mapping[str, Tensor]],
        instrumented: Callable[[bool, fx.Node | None], fx.GraphModule],
        explanation: Callable[[Made, Run, Pulled], Explanation],
        look: Callable[[Mapping[str, Booking], Sequence[Any], Seed], None],
    ) -> None:
        self._module, self._plan, self._current = module, plan, current
        self._instrumented, self._explanation, self._look = instrumented, explanation, look

    def later(
        self, found: Explanation, leaves: Sequence[Any], seed: Seed, state: Mapping[str, Tensor]
    ) -> Callable[[], Mapping[str, Booking]]:
        """What books an explanation that has been made; it keeps inputs, output and relevance."""
        devices = sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)})
        casts = tuple(
            (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices
        )
        found = replace(found, layers=Layers())
        made = Made(found, leaves, seed, _versions(state, leaves, found), casts)
        return functools.partial(self._book, made)

    def _book(self, made: Made) -> Mapping[str, Booking]:
        with made.as_then():
            made.refuse_changes(self._current())
            book = Ledger()
            again = self._run(made, made.leaves, fast=False, book=book)[0]
            relevance = tensors_of(again.relevance)
            if not all(map(is_finite, relevance)):
                refuse_relevance(self._plan, book.bookings())
            self._compare(made, again)
            bookings = book.bookings()
            self._look(bookings, made.leaves, made.seed)
        return bookings

    def _run(
        self,
        made: Made,
        leaves: Sequence[Any],
        fast: bool,
        node: fx.Node | None = None,
        book: Ledger | None = None,
    ) -> tuple[Explanation, list[Tensor]]:
        """The explanation once more, and the relevance at the node that is tapped."""
        run = Run(*self._instrumented(fast, node)(*leaves, book))
        (pulled,) = (
            pull_scaled(run, [made.seed], book=book)
            if in_float16(self._plan, made.leaves)
            else run.pull([made.seed])
        )
        return self._explanation(made, run, pulled), pulled.taps

    def _compare(self, made: Made, again: Explanation) -> None:
        """Warn if the maps differ by more than round-off, and say from which node on."""
        pairs = list(made.unwritten(again))
        outputs = [(then, now) for name, then, now in pairs if name.startswith("output")]
        then, now = (list(map(operator.itemgetter(i), outputs)) for i in (0, 1))
        if not worst_difference(then, now) <= 1:
            raise _outdated("what the model returns", ["by writes that PyTorch does not count"])
        worst, bound = _apart([pair[1:] for pair in pairs]), self._bound(made)
        if worst <= bound:
            return
        near = self._run(made, [rounded(leaf) for leaf in made.leaves], fast=True)[0]
        bound = max(bound, _CHAOS * _apart([pair[1:] for pair in made.unwritten(near)]))
        if worst <= bound:
            return
        warn(
            f"relevance that was computed fast differs by {worst:.1e} from that of the "
            f"plain form (relative, Euclidean norm), {self._place(made, bound)}. The report has "
            "the sums of the plain form. Explain with ledger=True, and report this, please."
        )

    def _bound(self, made: Made) -> float:
        dtypes = {a.record.dtype for a in self._plan.assignments.values()}
        if not dtypes.isdisjoint(HALVES) or any(enabled for _, enabled, _ in made.casts):
            return _IN_HALVES
        return max((_ROUND_OFF.get(dtype, 0.0) for dtype in dtypes), default=_IN_HALVES)

    def _place(self, made: Made, bound: float) -> str:
        """Where the two forms part, by bisection from the output to the inputs."""
        used = used_nodes(self._module.graph)
        nodes = [
            n
            for n in reversed(self._module.graph.nodes)
            if n in used and record(n) is not None and isinstance(n.meta["val"], Tensor)
        ]
        first, last = 0, len(nodes)
        while first < last:
            middle = (first + last) // 2
            plain, fast = (
                self._run(made, made.leaves, form, nodes[middle])[1] for form in (False, True)
            )
            if _apart(list(zip(plain, fast, strict=True))) > bound:
                last = middle
            else:
                first = middle + 1
        before = record(nodes[max(first - 1, 0)])
        assert before is not None
        rule = self._plan.assignments[before.name].rule
        return f"behind {before} under {rule}   {before.source}".rstrip()


def _apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference of two tensors, in the Euclidean norm."""
    differences = []
    for a, b in pairs:
        a, b = a.detach().double(), b.detach().double()
        size = max(b.norm().item(), torch.finfo(torch.float32).tiny)
        differences.append((a - b).norm().item() / size)
    return max(differences, default=0.0)
