"""Explanations by compiled graphs: which are there, and when others are to be made.

What is compiled is the explicit form of the fast graph, for inputs of one form (shapes, strides,
dtypes) and seeds on given outputs. At inputs of a new form the plain graph explains, and what is
then compiled has to give the same relevance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.capture import TRACING, is_finite, rounded, worst_difference
from lrpfx.errors import CompileError, LrpError
from lrpfx.run.backward import Pulled, Run
from lrpfx.run.explicit import Explicit, ExplicitRun
from lrpfx.run.targets import Seed

#: Forms of inputs and seeds that one Explainer is compiled for; as many as torch.compile has.
LIMIT = 8
#: How much farther from the plain relevance the compiled one may be than that of rounded inputs.
_CHAOS = 10.0
#: The forward pass without compilation.
Plain = Callable[[Sequence[Any]], Run]


class Compiled:
    """The explicit graphs of one Explainer: one for each form of inputs and seeds that it meets.

    Args:
        instrument: Makes the instrumented graph for what is asked for of ``layers``.
        frozen: Whether the parameters stay as they are.
        options: Of ``torch.compile``.
    """

    def __init__(
        self,
        instrument: Callable[[tuple[str, ...]], fx.GraphModule],
        frozen: bool,
        options: Mapping[str, Any],
    ) -> None:
        self._instrument, self._frozen = instrument, frozen
        self.options = options
        self._options = {"fullgraph": True, "dynamic": False, **options}
        self._known: dict[Hashable, Explicit] = {}
        self._latest: dict[Hashable, Explicit] = {}

    @property
    def explicit(self) -> list[Explicit]:
        """All there are."""
        return list(self._known.values())

    def run(self, paths: tuple[str, ...], leaves: Sequence[Any], plain: Plain) -> CompiledRun:
        """The forward pass.

        Args:
            paths: See ``layers`` of ``lrpfx.explain``.
            leaves: Flat inputs.
            plain: The forward pass without compilation.
        """
        form = paths, *map(_form, leaves), *_autocast(leaves)
        explicit = self._latest.get(form)
        begun = plain(leaves) if explicit is None else explicit.run(leaves)
        return CompiledRun(self, paths, form, leaves, plain, begun)

    def get(self, form: Hashable, seed: Seed) -> Explicit | None:
        """The graphs for inputs of a form and seeds on these outputs, if there are any yet."""
        explicit = self._known.get((form, _seeded(seed)))
        if explicit is not None:
            self._latest[form] = explicit
        return explicit

    def learn(self, run: CompiledRun, seed: Seed, expected: Sequence[Tensor]) -> None:
        """Make the graphs for inputs and seeds of this form.

        Args:
            run: The inputs.
            seed: The seed.
            expected: What the graphs are to give, see ``_values``.

        Raises:
            CompileError: They cannot be made, or give another relevance.
        """
        if len(self._known) >= LIMIT:
            warnings.warn(
                f"lrpfx: compiled for {LIMIT} forms of inputs already; others run uncompiled. "
                "Bring the inputs to a few sizes, by padding the last batch for instance.",
                stacklevel=2,
            )
            return
        try:
            with TRACING:
                module = self._instrument(run.paths)
                explicit = Explicit(module, run.leaves, seed, self._frozen, self._compiler)
            again = explicit.run(run.leaves)
            got = _values(again, *again.pull([seed]))
        except (LrpError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # compilers, which users choose, may raise anything
            raise CompileError(
                f"the explanation cannot be compiled: {type(error).__name__}: {_beginning(error)}",
                fix="explain without compile()."
                if self._options.get("backend") == "eager"
                else 'try compile(backend="eager"), or explain without compile().',
            ) from error
        self._check(run, seed, expected, got)
        self._known[run.form, _seeded(seed)] = self._latest[run.form] = explicit

    def _compiler(self, graph: fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(graph, **self._options)

    def _check(
        self, run: CompiledRun, seed: Seed, expected: Sequence[Tensor], got: Sequence[Tensor]
    ) -> None:
        worst = worst_difference(expected, got)
        if worst <= 1:
            return
        near = run.plain([rounded(leaf) for leaf in run.leaves])
        if not worst <= _CHAOS * worst_difference(expected, _values(near, *near.pull([seed]))):
            raise CompileError(
                "compiled, output or relevance are others than those of the plain graph "
                f"({worst:.1e} times the tolerance).",
                fix="explain without compile(), and report this, please.",
            )


@dataclass(frozen=True)
class CompiledRun:
    """A forward pass, by graphs that are compiled if there are any; see ``backward.Run``.

    Args:
        of: Where the graphs are.
        paths: See ``Compiled.run``.
        form: Of the inputs, for the graphs to be found by.
        leaves: The flat inputs.
        plain: The forward pass without compilation.
        begun: What has been run.
    """

    of: Compiled
    paths: tuple[str, ...]
    form: Hashable
    leaves: Sequence[Any]
    plain: Plain
    begun: Run | ExplicitRun

    @property
    def clean(self) -> list[Any]:
        """Output leaves."""
        return self.begun.clean

    @property
    def explained(self) -> list[Any]:
        """The leaves that are explained."""
        return self.begun.explained

    @property
    def seeded(self) -> list[Any]:
        """What seeds are laid on."""
        return self.explained

    @property
    def activations(self) -> list[Tensor]:
        """What is asked for of ``layers``."""
        return self.begun.activations

    def pull(self, seeds: Sequence[Seed], **options: Any) -> Iterator[Pulled]:
        """Pull the one seed back to the starts; see ``Run.pull``."""
        (seed,) = seeds
        explicit = self.of.get(self.form, seed)
        if explicit is None:
            run = self.begun if isinstance(self.begun, Run) else self.plain(self.leaves)
            (found,) = run.pull([seed], **options)
            if all(map(is_finite, found.tensors)):  # else there is an error
                self.of.learn(self, seed, _values(run, found))
            yield found
        else:
            begun = self.begun
            if not isinstance(begun, ExplicitRun) or begun.explicit is not explicit:
                begun = explicit.run(self.leaves)  # the last seed was on other outputs
            yield from begun.pull([seed])


def _values(run: Run | ExplicitRun, pulled: Pulled) -> list[Tensor]:
    """All that comes of a forward and a backward pass."""
    outputs = [t for t in run.clean if isinstance(t, Tensor)]
    return [*outputs, *run.activations, *pulled.tensors]


def _form(leaf: Any) -> Hashable:
    """What a compiled graph depends on of an input; constants are the same for all calls."""
    if not isinstance(leaf, Tensor):
        return None
    return leaf.shape, leaf.stride(), leaf.dtype, leaf.device


def _autocast(leaves: Sequence[Any]) -> Iterator[Hashable]:
    """The casts that the graphs are made with."""
    for device in sorted({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}):
        yield torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _seeded(seed: Seed) -> tuple[bool, ...]:
    """The outputs that a seed is laid on."""
    return tuple(s is not None for s in seed.seeds)


def _beginning(error: Exception) -> str:
    """Compilers' errors name the compiler in the first line, and the cause in the next."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])
