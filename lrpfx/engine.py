"""One captured run of a model and its plan -> explanations of inputs that the graph holds for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrpfx.capture import (
    TRACING,
    Inputs,
    State,
    Versions,
    check_faithful,
    check_inputs,
    flatten_inputs,
    is_finite,
    varying_sizes,
)
from lrpfx.conditions import Condition, Conditions, Places, read_conditions
from lrpfx.errors import CaptureError, InputError, SelectorError
from lrpfx.explanation import Explanation, Layers
from lrpfx.prepare import Prepared
from lrpfx.report import Report
from lrpfx.rewrite import Booking, Ledger, running_of
from lrpfx.run import (
    Alarm,
    Assumptions,
    Bookings,
    Books,
    Calls,
    Compiled,
    CompiledRun,
    Gather,
    Gauge,
    Graphs,
    Init,
    Largest,
    Made,
    Pulled,
    Run,
    Seed,
    Target,
    Watched,
    at_a_time,
    blank_notes,
    by_layer,
    column_notes,
    condition_seeds,
    each_target,
    in_float16,
    is_batched,
    is_several,
    make_seed,
    mode_notes,
    pull_scaled,
    refuse_if_the_model_does,
    refuse_relevance,
    refuse_seed,
    reported,
    target_per_condition,
)

_ONE_HOT = "one-hot times output"
_NOT_FAST = "computed in the plain form: the fast one is not finite here"


class Asked(NamedTuple):
    """What is asked for of some inputs; see ``Explainer.__call__``."""

    target: Target = None
    layers: Any = ()
    create_graph: bool = False
    ledger: bool | None = None
    conditions: Sequence[Condition] | None = None
    pairing: str = "each"
    through: str = "only"
    start: str | None = None
    init: Init = "activation"


class Engine:
    """Explains inputs of one form; what an ``Explainer`` has one of, or several.

    Args:
        prepared: The graph, and a rule for each of its nodes.
        inputs: What it was captured with.
        fixed: Versions of parameters and buffers, if they are promised to stay.
        by_batch: Whether batch norm takes the model's mode as it is.
    """

    def __init__(
        self, prepared: Prepared, inputs: Inputs, fixed: Versions | None, by_batch: bool
    ) -> None:
        self.captured, self.module, self.starts, self.live, self.plan, self.report = prepared[:-1]
        self._expected = prepared.expected
        self.by_batch = by_batch
        graph, prefix = self.module.graph, self.captured.prefix
        self.running = running_of(self.captured.model, graph, prefix)
        self.places = Places(graph, self.live, prefix)
        self.gather = Gather(self.captured, self.module, self.starts)
        self.assumptions = Assumptions(self.module, self.plan.assignments)
        self.alarm = Alarm(self.module, self.plan, self.live)
        self.state = State(self.captured.model, fixed, self.captured.read)
        self.graphs = Graphs(
            self.captured,
            self.module,
            self.starts,
            self.live,
            self.plan,
            self.places,
            self.state,
            self.running,
            self.assumptions,
        )
        self.books = Books(
            self.module,
            self.plan,
            self.graphs.current,
            self.graphs.for_books,
            _again(self.gather, self.report),
            self.alarm.look,
        )
        self.compiled: Compiled | None = None
        leaves = flatten_inputs(inputs)[0]
        self.largest = Largest(self.live, leaves)
        self._met = {self._sizes(leaves)}
        self._batched: dict[int, bool] = {}

    def compile(self, options: Mapping[str, Any]) -> None:
        """Compile the graphs from now on, where neither ledger nor derivatives are wanted."""
        frozen = self.state.fixed is not None
        self.compiled = Compiled(self.graphs.for_compiler, frozen, options)
        self.graphs.compiled = self.compiled

    def explain(self, inputs: Inputs, asked: Asked) -> Explanation:
        """What is asked for of the inputs."""
        return self._call(inputs, asked).explanation()

    def exactly(self, inputs: Inputs, asked: Asked) -> Explanation:
        """The same by the plain form, once more: running statistics stay as they are."""
        return self._call(inputs, asked._replace(ledger=True)).explanation(again=True)

    def _call(self, inputs: Inputs, asked: Asked) -> _Call:
        leaves = check_inputs(self.captured.signature, inputs)
        paths = _paths(asked.layers, self.captured.model)
        with TRACING:
            conditions = self._read(asked)
            self.graphs.refresh()
            self._check_sizes(inputs, leaves)
        kept = [_kept(leaf, asked.create_graph) for leaf in leaves]
        return _Call(self, inputs, asked, leaves, kept, paths, conditions)

    def compare(self, inputs: Inputs, clean: Sequence[Any]) -> None:
        """Compare what the graph returns with what the model did, if that has yet to be done."""
        expected, self._expected = self._expected, None
        if expected is not None:
            got = [t for t in clean if isinstance(t, Tensor)]
            check_faithful(self.captured, self.module, inputs, expected, got)

    def _read(self, asked: Asked) -> Conditions | None:
        """The conditions of a call as they are laid on the graph, None if there are none."""
        if asked.conditions is None and asked.start is None:
            return None
        return read_conditions(
            asked.conditions,
            pairing=asked.pairing,
            through=asked.through,
            start=asked.start,
            places=self.places,
            starts=self.starts,
        )

    def is_batched(self, leaves: Sequence[Any], index: int) -> bool:
        """Whether the first dimension of an output is that of the samples."""
        if index not in self._batched:
            of = self.captured, self.module.graph, self.live
            self._batched[index] = is_batched(*of, index, leaves)
        return self._batched[index]

    def booked(self, leaves: Sequence[Any], seed: Seed) -> Mapping[str, Booking]:
        """The ledger of the plain form."""
        book = Ledger()
        with torch.no_grad():
            run = Run(*self.graphs.for_books(fast=False, node=None)(*leaves, book))
            scaled = in_float16(self.plan, leaves)
            list(pull_scaled(run, [seed], book=book) if scaled else run.pull([seed]))
        return book.bookings()

    def _sizes(self, leaves: Sequence[Any]) -> frozenset[tuple[str, int]]:
        """The sizes that may vary, as these inputs have them."""
        sizes = varying_sizes(self.captured.signature, leaves).items()
        return frozenset((letter, max(values)) for letter, values in sizes)

    def _check_sizes(self, inputs: Inputs, leaves: Sequence[Any]) -> None:
        """Compare the graph with the model at sizes not met before: a guard may have been lost."""
        if (sizes := self._sizes(leaves)) in self._met:
            return
        try:
            with contextlib.ExitStack() as plainly:
                for device in {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}:
                    plainly.enter_context(torch.autocast(device, enabled=False))
                check_faithful(self.captured, self.module, inputs)
        except (CaptureError, RuntimeError, IndexError, ValueError) as error:
            shown = ", ".join(f"{letter}={size}" for letter, size in sorted(sizes))
            raise InputError(
                f"the captured graph does not hold for {shown}.",
                where=[str(error).splitlines()[0]],
                fix="make an Explainer for inputs of this size.",
            ) from error
        self._met.add(sizes)


@dataclass
class _Call:
    """One call: inputs and what is asked for of them, as they were read.

    Args:
        engine: What explains.
        inputs: As they were given.
        asked: What of them.
        leaves: Flat inputs.
        kept: The same as the graph gets them.
        paths: Modules whose relevance is returned.
        conditions: As they are laid on the graph.
    """

    engine: Engine
    inputs: Inputs
    asked: Asked
    leaves: Sequence[Any]
    kept: Sequence[Any]
    paths: tuple[str, ...]
    conditions: Conditions | None

    def __post_init__(self) -> None:
        target, conditions, asked = self.asked.target, self.conditions, self.asked
        single = not is_several(target) and (conditions is None or conditions.passes == 1)
        #: Whether explanations get a leading dimension.
        self.several = is_several(target) or (conditions is not None and conditions.several)
        #: Whether the ledger waits until it is asked for.
        self.later = (
            asked.ledger is None and single and not asked.create_graph and conditions is None
        )
        ledger = (asked.ledger is None or asked.ledger) and single and not self.later
        self.book = Ledger() if ledger else None
        self.fast = not ledger and not asked.create_graph
        plain = single and conditions is None
        compiled = self.fast and not self.several and conditions is None
        #: The compiled graphs, if they serve this call; and whether the edges may be measured
        #: (compiled ones where the plain graph runs once, which is at first).
        self.compiled = self.engine.compiled if compiled else None
        self.measured = self.book is None and plain

    def explanation(self, again: bool = False) -> Explanation:
        """The answer.

        Args:
            again: Whether the same inputs have been run before.
        """
        engine, asked, conditions = self.engine, self.asked, self.conditions
        with TRACING:
            module, calls = engine.graphs.for_calls(self.paths, conditions, fast=self.fast)
        gauge = engine.alarm.gauge(module) if self.measured else None
        with torch.set_grad_enabled(asked.create_graph):
            run = self._forward(module if gauge is None else gauge.run)
            engine.compare(self.inputs, run.clean)
            if isinstance(run, Run) and not again:
                for running, statistics in zip(engine.running, run.statistics, strict=True):
                    running.follow(statistics, engine.state.current())
            report = engine.report.noting(engine.assumptions.check(self.kept))
            targets, seeds = self._seeds(run, calls)
            parts, blank = [], dict[str, None]()
            for one, seed, pulled in zip(targets, seeds, self._pulled(run, seeds), strict=True):
                if not all(is_finite(r) for r in pulled.starts if r is not None):
                    if self.book is None and conditions is None:  # which can name the place
                        exact = engine.exactly(self.inputs, asked._replace(target=one))
                        if not self.several:  # or is finite: it keeps apart what is joined here
                            return replace(exact, report=exact.report.noting([_NOT_FAST]))
                    refuse_relevance(engine.plan, self.book.bookings() if self.book else {})
                at = by_layer(calls, run.activations, pulled)
                given = self.inputs, self.leaves, run.clean, seed, pulled.starts, at
                parts.append(engine.gather.explanation(*given, report))
                blank |= dict.fromkeys(blank_notes(seed, pulled.starts))
        return self._told(parts, seeds, module, gauge, blank)

    def _forward(self, module: Callable[..., Any]) -> Run | CompiledRun:
        """The forward pass of the rewritten graph."""

        def plain(leaves: Sequence[Any]) -> Run:
            return Run(*module(*leaves, self.book))

        try:
            if self.compiled is not None:
                return self.compiled.run(self.paths, self.kept, plain)
            return plain(self.kept)
        except (IndexError, ValueError, RuntimeError):  # token ids out of range, for instance
            refuse_if_the_model_does(self.engine.captured, self.leaves)
            raise

    def _seeds(
        self, run: Run | CompiledRun, calls: Mapping[str, Calls]
    ) -> tuple[Sequence[Target], Sequence[Seed]]:
        """Each target, and what relevance begins with for it."""
        engine, target, conditions = self.engine, self.asked.target, self.conditions
        targets = each_target(run.explained, target) if is_several(target) else [target]
        if conditions is not None:
            n = next((len(t) for t in self.leaves if isinstance(t, Tensor) and t.ndim), 1)
            targets = [t for one in targets for t in target_per_condition(one, conditions, n)]
        batched, finish = functools.partial(engine.is_batched, self.leaves), engine.gather.finish
        seeds = [make_seed(run.explained, one, finish, batched) for one in targets]
        if conditions is not None:
            assert isinstance(run, Run)
            names = [name for name, each in calls.items() for _ in range(each.number)]
            seeds = condition_seeds(conditions, run, names, seeds, self.asked.init)
            targets = [*targets] * (len(seeds) if len(targets) == 1 else 1)
        for seed in seeds:
            if not all(is_finite(s) for s in seed.seeds if s is not None):
                of = engine.captured.model, engine.module, seed, run.explained, self.kept
                refuse_seed(*of)
        return targets, seeds

    def _pulled(self, run: Run | CompiledRun, seeds: Sequence[Seed]) -> Any:
        """The relevance of each seed."""
        create_graph, largest = self.asked.create_graph, self.engine.largest
        pull = functools.partial(run.pull, seeds)
        if in_float16(self.engine.plan, self.kept):
            pull = functools.partial(pull_scaled, run, seeds, book=self.book)
        together = 1 if create_graph else at_a_time(largest.bytes_for(self.leaves))
        return pull(together=together, create_graph=create_graph)

    def _told(
        self,
        parts: list[Explanation],
        seeds: Sequence[Seed],
        module: nn.Module,
        gauge: Gauge | None,
        blank: Mapping[str, None],
    ) -> Explanation:
        """The explanation with its notes, and its ledger or what will make it."""
        engine, conditions, first = self.engine, self.conditions, seeds[0]
        told, notes = first.description, [*first.notes, *blank]
        said = [] if engine.by_batch else mode_notes(engine.captured)
        said += conditions.notes() if conditions is not None else []
        if self.several:
            what = "target" if conditions is None else "condition"
            what += "s" * (len(parts) > 1)
            told = f"{len(parts)} {what} of each sample, {told if conditions else _ONE_HOT}"
            said += column_notes(self.asked.target)
        booked = self.book.bookings() if self.book else {}

        def book_now(seed: Seed) -> Mapping[str, Booking]:
            return {} if conditions is not None else engine.booked(self.kept, seed)

        # Several go through the backward pass together, where edges cannot be measured.
        again = module if self.fast and self.several and conditions is None else None
        watched = Watched(self.kept, seeds, booked, gauge, again, book_now)
        said += engine.alarm.notes(parts, watched)
        bookings: Bookings = booked
        if self.later:
            bookings = engine.books.later(parts[0], self.kept, first, engine.graphs.current())
        seed = replace(first, description=told, notes=(*said, *notes))
        return reported(parts if self.several else parts[0], bookings, seed)


def _again(gather: Gather, report: Report) -> Callable[[Made, Run, Pulled], Explanation]:
    """Makes an explanation once more, of no layers; it does not keep the Explainer."""

    def explanation(made: Made, run: Run, pulled: Pulled) -> Explanation:
        inputs, seed = made.found.inputs, made.seed
        given = inputs, made.leaves, run.clean, seed, pulled.starts, Layers()
        return gather.explanation(*given, report)

    return explanation


def _paths(layers: Any, model: nn.Module) -> tuple[str, ...]:
    """The module paths of ``layers``."""
    try:
        paths = (layers,) if isinstance(layers, str) else () if layers is None else tuple(layers)
    except (TypeError, NotImplementedError):  # nothing that can be iterated over
        paths = (layers,)
    if not all(isinstance(path, str) for path in paths):
        named = {module: path for path, module in model.named_modules()}
        known = [named[one] for one in paths if isinstance(one, nn.Module) and one in named]
        shown = ", ".join(type(p).__name__ if isinstance(p, nn.Module) else repr(p) for p in paths)
        raise SelectorError(
            f"layers=[{shown}] are no module paths.",
            fix=f"give the paths: layers={known}." if known else 'give strings such as "layer4.*".',
        )
    return paths


def _kept(leaf: Any, create_graph: bool) -> Any:
    """The input as the graph gets it: part of the caller's autograd graph only if asked for."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.clone() if leaf.is_inference() else leaf
    return leaf if create_graph else leaf.detach()
