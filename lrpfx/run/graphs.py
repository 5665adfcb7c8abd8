"""The forms of a canonical graph that an Explainer runs, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lrpfx.capture import TRACING, Captured, State, state_of
from lrpfx.conditions import Conditions, Places, channels_of
from lrpfx.errors import SelectorError
from lrpfx.plan import Plan
from lrpfx.rewrite import UNCHANGED, Running, Tap, find_taps, instrument, rewrite
from lrpfx.run.assumptions import Assumptions
from lrpfx.run.compiled import Compiled
from lrpfx.run.gather import Calls

#: How many graphs with conditions are kept at most.
_CONDITIONED = 16


class Graphs:
    """Graphs for one model, input form and plan; all hold the parameters of the moment.

    Args:
        captured: The model.
        module: Its canonical graph.
        starts: The nodes that relevance is wanted for.
        live: The nodes that carry relevance.
        plan: The rule of each node.
        places: Where conditions can be laid.
        state: Parameters and buffers.
        running: Buffers that follow the statistics of batches.
        assumptions: Holds a graph of its own, maybe.
    """

    def __init__(
        self,
        captured: Captured,
        module: fx.GraphModule,
        starts: Mapping[fx.Node, fx.Node],
        live: set[fx.Node],
        plan: Plan,
        places: Places,
        state: State,
        running: Sequence[Running],
        assumptions: Assumptions,
    ) -> None:
        self._captured, self._module, self._starts, self._live = captured, module, starts, live
        self._plan, self._places, self._state, self._running = plan, places, state, running
        self._assumptions = assumptions
        #: Graphs that are compiled, once they are asked for.
        self.compiled: Compiled | None = None
        self._pointed: tuple[dict[str, Tensor], int] = {}, 0
        self.public: fx.GraphModule | None = None
        self.instrumented: dict[tuple[Any, ...], tuple[fx.GraphModule, dict[str, Calls]]] = {}

    def for_users(self) -> fx.GraphModule:
        """The one whose backward puts relevance into ``x.grad``."""
        with TRACING:
            self.refresh()
            if self.public is None:
                plan, prefix = self._plan.assignments, self._captured.prefix
                self.public = rewrite(self._module, plan, self._live, self._running, prefix)
            return self.public

    def for_calls(
        self,
        paths: tuple[str, ...],
        conditions: Conditions | None = None,
        fast: bool = False,
    ) -> tuple[fx.GraphModule, dict[str, Calls]]:
        """The one that also returns what is asked for of ``layers``; calls per module path."""
        edits = UNCHANGED if conditions is None else conditions.edits
        places = () if conditions is None else tuple(conditions.places)
        key = paths, fast, places, edits.key
        if key not in self.instrumented:
            frozen = self._state.fixed is not None
            self.instrumented[key] = self._new(paths, fast, frozen, conditions)
            conditioned = [k for k in self.instrumented if k[2]]
            if len(conditioned) > _CONDITIONED:
                del self.instrumented[conditioned[0]]
        return self.instrumented[key]

    def for_books(self, fast: bool, node: fx.Node | None) -> fx.GraphModule:
        """The graph in one of its forms, with what arrives at a node if there is one."""
        with TRACING:
            if node is None:
                return self.for_calls((), fast=fast)[0]
            tap, starts = Tap(node, node), list(self._starts)
            plan = self._plan.assignments
            return instrument(self._module, plan, self._live, starts, [tap], fast=fast)

    def for_export(self) -> fx.GraphModule:
        """A graph of its own, of the parameters that the model holds now, without fused kernels."""
        self.refresh()
        plan, starts = self._plan.assignments, list(self._starts)
        return instrument(self._module, plan, self._live, starts, fast=True, fused=False)

    def for_compiler(self, paths: tuple[str, ...]) -> fx.GraphModule:
        """A graph of its own; what is constant in it is seen once its ops are written down."""
        return self._new(paths, fast=True, frozen=False)[0]

    def _new(
        self,
        paths: tuple[str, ...],
        fast: bool,
        frozen: bool,
        conditions: Conditions | None = None,
    ) -> tuple[fx.GraphModule, dict[str, Calls]]:
        found: dict[str, list[Tap]] = {}
        for path in paths:
            try:
                found |= find_taps(self._module.graph, self._live, [path], self._captured.prefix)
            except SelectorError:
                place = self._places.known(path)
                if place is None:
                    raise
                found[path] = [place.tap]
        edits = UNCHANGED
        if conditions is not None:
            edits = conditions.edits
            found |= {name: [place.tap] for name, place in conditions.places.items()}
        taps = [tap for calls in found.values() for tap in calls]
        plan, starts = self._plan.assignments, list(self._starts)
        module = instrument(
            self._module, plan, self._live, starts, taps, edits=edits, fast=fast, frozen=frozen
        )
        calls = {
            path: Calls(len(calls), channels_of(calls[0].relevance, self._live))
            for path, calls in found.items()
        }
        return module, calls

    # -- live parameters --------------------------------------------------------------------------

    def current(self) -> dict[str, Tensor]:
        """What relevance hangs on of the model, as it is now; every graph is pointed to it."""
        with TRACING:
            self.refresh()
            state = self._state.current()
        followed = {name for one in self._running for name in (*one.buffers, one.batches)}
        return {name: t for name, t in state.items() if name not in followed}

    def refresh(self) -> None:
        """Point every graph at the parameters that the model holds now."""
        state, prefix = self._state.current(), self._captured.prefix
        graphs = [self._module, *(m for m, _ in self.instrumented.values())]
        graphs += [m for m in (self.public, self._assumptions.module) if m is not None]
        explicit = [] if self.compiled is None else self.compiled.explicit
        graphs += [one.module for one in explicit]
        if self._pointed[0] is state and self._pointed[1] == len(graphs):
            return
        self._pointed = state, len(graphs)
        for module in graphs:
            for name, held in state_of(module).items():
                current = state.get(name.removeprefix(prefix))
                if current is not None and current is not held:
                    owner, _, attribute = name.rpartition(".")
                    setattr(module.get_submodule(owner), attribute, current)
        for one in explicit:
            one.reload()
