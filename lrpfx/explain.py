"""explain() and Explainer: the pipeline from a model to its relevance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrpfx.assign import assign
from lrpfx.backward import at_a_time, pull
from lrpfx.canonize import canonize
from lrpfx.capture import TRACING, Captured, capture, check_faithful, run_model
from lrpfx.carriers import find_carriers
from lrpfx.composites import RulesLike
from lrpfx.errors import (
    CaptureError,
    InputError,
    NonFiniteError,
    SelectorError,
    TargetError,
)
from lrpfx.explanation import Explanation, LayerCalls, LayerRelevance, stacked
from lrpfx.freeze import state_of, versions
from lrpfx.graph import (
    HELD,
    Record,
    annotate,
    explained_leaves,
    final_softmax,
    output_leaves,
    reachable,
    record,
    used_nodes,
)
from lrpfx.hold import DIVISOR
from lrpfx.inputs import Inputs, check_inputs, copies, flatten_inputs, varying_sizes
from lrpfx.ledger import Booking, Ledger
from lrpfx.preserve import preserved
from lrpfx.report import Report, make_report, with_ledger
from lrpfx.rewrite import instrument, rewrite
from lrpfx.rules import Stop
from lrpfx.starts import find_starts, index_places
from lrpfx.taps import find_taps
from lrpfx.targets import Seed, Target, each_target, is_several, make_seed


def explain(
    model: nn.Module,
    inputs: Inputs,
    target: Target = None,
    *,
    rules: RulesLike = None,
    layers: Sequence[str] = (),
    create_graph: bool = False,
    ledger: bool = True,
) -> Explanation:
    """Explain a model's output by the relevance of its inputs.

    Args:
        model: Any module that torch.export can trace, in evaluation mode. It is not modified.
        inputs: A tensor (N, ...), a tuple of positional or a dict of keyword arguments. Floating
            tensors are explained, and so are integer tensors that index an embedding: at its
            output, summed over features. Everything else is passed through as a constant.
        target: What to explain: None (argmax per sample), a class, one class per sample (sequence
            or integer tensor), a tuple (index into a sample's output), a callable
            ``output -> (N,)``, or a floating tensor shaped like the output, used unchanged as the
            seed relevance. For the index forms the seed is one-hot times the output value. A
            softmax or log-softmax at the output is left out: the seed is laid on its logits.
            Several targets of each sample, as a list of N lists of K classes or "all" for every
            class, share one forward pass: every tensor of the explanation but ``output`` then has
            a leading dimension K, and no ledger is kept.
        rules: A composite, its snake_case name, or a list of (selector, rule) laid over the
            default. A selector is an op kind ("conv"), a module class, a module-path glob
            ("layer4.*"), "*", or a predicate on the node's record. None picks by what the graph
            holds.
        layers: Module paths (globs allowed) whose relevance and activation are returned, too.
        create_graph: Keep the graph of the relevance, so that it can be differentiated with
            respect to inputs and parameters.
        ledger: Keep the sums of relevance at each node for the report. Without them (and without
            ``create_graph``) neighbouring rules share their work, so that relevance costs little
            more than a gradient; its values are the same up to round-off.

    Returns:
        The explanation; ``relevance`` is structured like ``inputs``.

    Raises:
        CaptureError: The model cannot be captured as a graph.
        UnsupportedOpError: Ops that depend on the input have no rule; all are listed.
        InputError: Inputs that do not fit the model, or NonFiniteError for NaN and infinity.
        TargetError: A target that does not fit the output.
        RuleError: A rule with illegal parameters, or on an op that it does not fit.
        SelectorError: A selector, composite or layer that names nothing.
    """
    explainer = Explainer(model, inputs, rules)
    return explainer(inputs, target, layers=layers, create_graph=create_graph, ledger=ledger)


class Explainer:
    """A model captured once, to be explained many times and at any batch size.

    It reads the model's live parameters: an optimizer step, ``load_state_dict`` or a change of
    ``.data`` between calls is seen. Other attributes of the model's modules are constants of the
    graph: after changing one, make a new Explainer. Calls from several threads do not disturb
    each other.

    Args:
        model: See ``explain``.
        example_inputs: Inputs of the shapes to come (the batch size may differ).
        rules: See ``explain``.
        dynamic: Further dimensions that may vary between calls, of every input tensor that has
            them: (1,) for the number of tokens, (2, 3) for height and width. Those that the model
            fixes by how it computes stay fixed. Other sizes are checked against the model when
            they are first met.
        freeze: Promise that parameters and buffers stay as they are: with ``ledger=False`` what
            depends on them only is then computed once, at the cost of the memory it takes. A
            promise that is seen to be broken is an error.

    Raises:
        LrpError: As ``explain``, for everything that concerns model and rules.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        rules: RulesLike = None,
        *,
        dynamic: Sequence[int] = (),
        freeze: bool = False,
    ) -> None:
        self._versions: dict[str, tuple[int, int]] | None = None
        if freeze and isinstance(model, nn.Module):
            self._versions = versions(state_of(model))
        with TRACING:  # meanwhile another thread's trace may hold fake tensors in the model
            self._set_up(model, example_inputs, rules, dynamic)

    def _set_up(
        self, model: nn.Module, example_inputs: Inputs, rules: RulesLike, dynamic: Sequence[int]
    ) -> None:
        self._captured: Captured = capture(model, example_inputs, dynamic)
        self._module = canonize(self._captured.program)
        graph = self._module.graph
        self._placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self._starts = find_starts(graph)
        notes = []
        self._live = annotate(graph, self._starts, self._captured.prefix)
        self._check_live()
        check_faithful(self._captured, self._module, example_inputs)
        self._plan = assign(self._records(), rules, model)
        stopped = [a.record for a in self._plan.assignments.values() if isinstance(a.rule, Stop)]
        if stopped:
            held = {r.name for r in stopped}
            kinds = {a.record.kind for a in self._plan.assignments.values()}
            self._live = annotate(graph, self._starts, self._captured.prefix, held)
            self._check_live()
            self._plan = assign(self._records(), rules, model, kinds=kinds)
            which = ", ".join(sorted({r.kind for r in stopped}))
            notes.append(f"{len(stopped)} nodes count as constants by rule Stop: {which}")
        self._places = {
            start: index_places(self._module, start, source)
            for start, source in self._starts.items()
            if start is not source
        }
        self._forms = _state_forms(state_of(model))
        self._pointed: list[int] = []
        leaves = flatten_inputs(example_inputs)[0]
        self._met = {self._sizes(leaves)}
        #: Bytes of the largest activation, per element of the inputs.
        self._widest = max(_bytes(n.meta.get("val")) for n in self._live) / _elements(leaves)
        self._public: fx.GraphModule | None = None  # as the others: made when it is asked for
        self._instrumented: dict[
            tuple[tuple[str, ...], bool], tuple[fx.GraphModule, dict[str, int]]
        ] = {}
        constants = sum(
            n.op == "call_function" and n not in self._live for n in used_nodes(self._module.graph)
        )
        if self._captured.why_static:
            size = self._captured.signature.batch
            notes.append(f"captured for a batch of {size} only: {self._captured.why_static}")
        if any(final_softmax(leaf) for leaf in output_leaves(graph)):
            notes.append("the softmax at the output is left out: explained are its logits")
        quotients = [n for n in graph.nodes if n.meta.get(HELD) == DIVISOR]
        if divisors := [n for n in quotients if not reachable(n.args).isdisjoint(self._starts)]:
            notes.append(f"{len(divisors)} divisors of live tensors count as constants")
        carriers = find_carriers(graph, self._plan.assignments, self._live, self._starts, ())
        multipliers = {node.name: carry.takes for node, carry in carriers.items()}
        self._report = make_report(self._plan, constants, notes, multipliers)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph: forward is the model's, backward puts relevance into ``x.grad``."""
        if self._public is None:
            self._public = rewrite(self._module, self._plan.assignments, self._live)
        self._refresh()
        return self._public

    @property
    def report(self) -> Report:
        """Which rule each node got and why; what an explanation adds is in its own report."""
        return self._report

    def __repr__(self) -> str:
        model = type(self._captured.model).__name__
        return f"Explainer({model}, {len(self._report.rows)} nodes, rules: {self._plan.rules})"

    def __call__(
        self,
        inputs: Inputs,
        target: Target = None,
        *,
        layers: Sequence[str] = (),
        create_graph: bool = False,
        ledger: bool = True,
    ) -> Explanation:
        """Explain the model's output for ``inputs``; arguments and errors as in ``explain``."""
        # Autograd is off for good in what inference mode creates, so the work happens outside.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            return self._explain(inputs, target, layers, create_graph, ledger)

    def _explain(
        self,
        inputs: Inputs,
        target: Target,
        layers: Sequence[str],
        create_graph: bool,
        ledger: bool,
    ) -> Explanation:
        leaves = check_inputs(self._captured.signature, inputs)
        with TRACING:
            self._refresh()
            self._check_sizes(inputs, leaves)
        paths = _paths(layers)
        several = is_several(target)
        ledger = ledger and not several
        module, calls = self._instrument(paths, fast=not ledger and not create_graph)
        kept = [_kept(v, create_graph) for v in leaves]
        book = Ledger() if ledger else None
        with torch.set_grad_enabled(create_graph):
            try:
                clean, explained, phantoms, starts, taps = module(*kept, book)
            except (IndexError, ValueError, RuntimeError):  # token ids out of range, for instance
                self._refuse_if_the_model_does(leaves)
                raise
            targets = each_target(explained, target) if several else [target]
            seeds = [make_seed(explained, one, self._finish) for one in targets]
            for seed in seeds:
                if not all(bool(s.isfinite().all()) for s in seed.seeds if s is not None):
                    self._refuse_seed(seed, explained, kept)
            found = pull(
                seeds,
                phantoms,
                starts,
                [relevance for _, relevance in taps],
                together=1 if create_graph else at_a_time(self._widest * _elements(leaves)),
                create_graph=create_graph,
            )
            parts = []
            for one, seed, pulled in zip(targets, seeds, found, strict=True):
                if not all(bool(r.isfinite().all()) for r in pulled.starts if r is not None):
                    if book is None:  # the plain form can name the place
                        self._explain(inputs, one, layers, create_graph, ledger=True)
                    self._refuse_relevance(book.bookings() if book is not None else {})
                at = _layers(calls, taps, pulled.taps)
                parts.append(self._explanation(inputs, leaves, clean, seed, pulled.starts, at))
        return self._reported(parts if several else parts[0], book, seeds[0].description)

    # -- set-up -----------------------------------------------------------------------------------

    def _records(self) -> list[Record]:
        return [r for n in self._module.graph.nodes if (r := record(n)) is not None]

    def _check_live(self) -> None:
        if not any(
            isinstance(n, fx.Node) and n in self._live for n in explained_leaves(self._module.graph)
        ):
            raise CaptureError(
                "no output of the model depends on the explained inputs.",
                where=[f"inputs: {', '.join(self._captured.signature.paths)}"],
                fix="check forward() for detach(), argmax or other steps that have no gradient.",
            )

    def _instrument(
        self, paths: tuple[str, ...], fast: bool = False
    ) -> tuple[fx.GraphModule, dict[str, int]]:
        """The graph that also returns what is asked for of ``layers``; calls per module path."""
        if (paths, fast) not in self._instrumented:
            found = find_taps(self._module.graph, self._live, paths, self._captured.prefix)
            taps = [tap for calls in found.values() for tap in calls]
            plan = self._plan.assignments
            frozen = self._versions is not None
            starts = list(self._starts)
            module = instrument(
                self._module, plan, self._live, starts, taps, fast=fast, frozen=frozen
            )
            calls_of = {path: len(calls) for path, calls in found.items()}
            self._instrumented[paths, fast] = module, calls_of
        return self._instrumented[paths, fast]

    def _refresh(self) -> None:
        """Point every graph at the parameters that the model holds now."""
        model, prefix = self._captured.model, self._captured.prefix
        state = state_of(model)
        forms = _state_forms(state)
        if forms != self._forms:
            changed = [n for n in self._forms if forms.get(n) != self._forms[n]]
            raise CaptureError(
                "the model's parameters changed form since it was captured.",
                where=[f"{n}: {self._forms[n]} -> {forms.get(n)}" for n in changed[:5]],
                fix="make a new Explainer after .to(), .half() or a change of architecture.",
            )
        if self._versions is not None and (now := versions(state)) != self._versions:
            raise CaptureError(
                "the model's parameters changed, though they were promised to stay (freeze=True).",
                where=[n for n in self._versions if now.get(n) != self._versions[n]][:5],
                fix="make a new Explainer, or leave freeze=False.",
            )
        graphs = [self._module, *(m for m, _ in self._instrumented.values())]
        graphs += [] if self._public is None else [self._public]
        # The graphs hold what they point at, so that no other tensor can have its id.
        pointed = [len(graphs), *map(id, state.values())]
        if pointed == self._pointed:
            return
        self._pointed = pointed
        for module in graphs:
            for name, held in state_of(module).items():
                current = state.get(name.removeprefix(prefix))
                if current is not None and current is not held:
                    owner, _, attribute = name.rpartition(".")
                    setattr(module.get_submodule(owner), attribute, current)

    def _sizes(self, leaves: Sequence[Any]) -> frozenset[tuple[str, int]]:
        """The sizes besides the batch that may vary, as these inputs have them."""
        sizes = varying_sizes(self._captured.signature, leaves).items()
        return frozenset((letter, max(values)) for letter, values in sizes if letter != "N")

    def _check_sizes(self, inputs: Inputs, leaves: Sequence[Any]) -> None:
        """Compare the graph with the model at sizes not met before: a guard may have been lost."""
        if (sizes := self._sizes(leaves)) in self._met:
            return
        try:
            check_faithful(self._captured, self._module, inputs)
        except (CaptureError, RuntimeError, IndexError, ValueError) as error:
            shown = ", ".join(f"{letter}={size}" for letter, size in sorted(sizes))
            raise InputError(
                f"the captured graph does not hold for {shown}.",
                where=[str(error).splitlines()[0]],
                fix="make an Explainer for inputs of this size.",
            ) from error
        self._met.add(sizes)

    # -- one explanation --------------------------------------------------------------------------

    def _rebuild(self, leaves: Sequence[Any]) -> Any:
        spec = self._module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        return self._captured.rebuild(pytree.tree_unflatten(list(leaves), spec))

    def _finish(self, explained: Sequence[Any]) -> Any:
        """The model's own output from the explained leaves: callables see probabilities."""
        leaves = zip(output_leaves(self._module.graph), explained, strict=True)
        return self._rebuild(
            [n.target(v, *n.args[1:], **n.kwargs) if final_softmax(n) else v for n, v in leaves]
        )

    def _refuse_if_the_model_does(self, leaves: Sequence[Any]) -> None:
        """Raise InputError if the model itself fails on these inputs."""
        with TRACING, preserved(self._captured.model):
            run_model(self._captured.model, copies(leaves), self._captured.signature.spec)

    def _refuse_seed(self, seed: Seed, clean: Sequence[Any], leaves: Sequence[Any]) -> None:
        """Raise the error of a seed that is not finite, by the fault of model or target."""
        finder = _FirstNonFinite(self._module)
        with torch.no_grad():
            finder.run(*leaves, enable_io_processing=False)
        if finder.found is None:
            raise TargetError(
                f"{seed.description}: the seed has NaN or infinite entries.",
                where=[f"outputs of shape {[tuple(t.shape) for t in clean if _floating(t)]}"],
                fix="look at the target's own arithmetic; the model's output is finite.",
            )
        else:
            r = record(finder.found)
            raise NonFiniteError(
                "the model's own forward pass makes NaN or infinity.",
                where=[str(r), *filter(None, [r.source])] if r else [str(finder.found)],
                fix="look at the activations that enter this op; the inputs are finite.",
            )

    def _refuse_relevance(self, bookings: dict[str, Booking]) -> None:
        """Raise the error of relevance that is not finite, with the place if it is known."""
        bad = [n for n, b in bookings.items() if not math.isfinite(b.passed)] or list(bookings)
        where = []
        if bad:
            assignment = self._plan.assignments[bad[0]]
            where = [f"first at {assignment.record} under {assignment.rule}"]
            where += filter(None, [assignment.record.source])
        raise NonFiniteError(
            "the relevance has NaN or infinite entries.",
            where=where,
            fix="give the rule a larger stabilizer; epsilon = 0 divides by what may be near zero.",
        )

    def _explanation(
        self,
        inputs: Inputs,
        leaves: Sequence[Any],
        clean: Sequence[Any],
        seed: Seed,
        relevance: Sequence[Tensor | None],
        layers: dict[str, LayerCalls],
    ) -> Explanation:
        """What is explained of one target; its report is still that of the plan."""
        by_input, per_feature = self._by_input(leaves, relevance)
        arrived = [r for r in relevance if r is not None]
        seeds = [s for s in seed.seeds if s is not None]
        return Explanation(
            relevance=self._structured(by_input, inputs),
            output=self._rebuild(clean),
            target=seed.classes,
            seed=seeds[0] if len(seeds) == 1 else tuple(seeds),
            absorbed=_absorbed(seeds, arrived),
            report=self._report,
            layers=layers,
            embeddings=self._structured(per_feature, inputs)
            if any(r is not None for r in per_feature)
            else None,
            inputs=inputs,
        )

    def _reported(
        self, found: Explanation | list[Explanation], book: Ledger | None, target: str
    ) -> Explanation:
        """The explanation with its own report; several as one."""
        if isinstance(found, list):
            target = f"{len(found)} targets of each sample, one-hot times output"
            found = stacked(found)
        arrived = [r for r in pytree.tree_leaves(found.relevance) if isinstance(r, Tensor)]
        report = with_ledger(
            self._report,
            {} if book is None else book.bookings(),
            target=target,
            started=_total(pytree.tree_leaves(found.seed)),
            reached=_total(arrived),
        )
        return replace(found, report=report)

    def _structured(self, flat: Sequence[Tensor | None], inputs: Inputs) -> Any:
        """One value per flat input, in the structure of the inputs as they were given."""
        args, kwargs = pytree.tree_unflatten(list(flat), self._captured.signature.spec)
        if isinstance(inputs, Tensor):
            return args[0]
        return {key: kwargs[key] for key in inputs} if isinstance(inputs, Mapping) else tuple(args)

    def _by_input(
        self, leaves: Sequence[Any], relevance: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Relevance per flat input, and for token ids that of their embedding per feature.

        The relevance of token ids is their embedding's, summed over features. An id that is looked
        up several times collects it all.
        """
        index = {node: i for i, node in enumerate(self._placeholders)}
        found: list[Tensor | None] = [None] * len(leaves)
        per_feature: list[Tensor | None] = [None] * len(leaves)
        for (start, placeholder), r in zip(self._starts.items(), relevance, strict=True):
            i = index[placeholder]
            if start is placeholder:
                found[i] = torch.zeros_like(leaves[i]) if r is None else r
            elif r is not None:
                ids = leaves[i]
                own = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
                at = self._places[start](*leaves[:i], own, *leaves[i + 1 :]).flatten()
                vectors = r.new_zeros(ids.numel(), r.shape[-1])
                vectors = vectors.index_add(0, at, r.reshape(-1, r.shape[-1]))
                before = per_feature[i]
                vectors = vectors.reshape(*ids.shape, -1)
                per_feature[i] = vectors = vectors if before is None else before + vectors
                found[i] = vectors.sum(-1)
        return found, per_feature


class _FirstNonFinite(fx.Interpreter):
    """Runs a graph and remembers the first node with NaN or infinity in its value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.found is None and n.op == "call_function" and _floating(value):
            if not bool(value.isfinite().all()):
                self.found = n
        return value


def _paths(layers: Any) -> tuple[str, ...]:
    """The module paths of ``layers``."""
    try:
        paths = (layers,) if isinstance(layers, str) else () if layers is None else tuple(layers)
    except (TypeError, NotImplementedError):  # nothing that can be iterated over
        paths = (layers,)
    if not all(isinstance(path, str) for path in paths):
        raise SelectorError(
            f"layers={layers!r} are no module paths.", fix='give strings such as "layer4.*".'
        )
    return paths


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _kept(leaf: Any, create_graph: bool) -> Any:
    """The input as the graph gets it: part of the caller's autograd graph only if asked for."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.clone() if leaf.is_inference() else leaf
    return leaf if create_graph else leaf.detach()


def _state_forms(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and device of each parameter and buffer, and which other it is tied to."""
    first: dict[int, str] = {}
    return {
        name: (tuple(t.shape), t.dtype, t.device, f"same as {first.setdefault(id(t), name)}")
        for name, t in state.items()
    }


def _absorbed(seeds: Sequence[Tensor], relevance: Sequence[Tensor]) -> Tensor:
    """Seed less relevance per sample, shape (N,); one total where the samples share an input."""
    tensors = [*seeds, *relevance]
    batch = seeds[0].shape[:1]
    per_sample = all(t.shape[:1] == batch for t in tensors) and bool(batch)

    def total(parts: Sequence[Tensor]) -> Tensor:
        flat = [t.detach().reshape(len(t) if per_sample else 1, -1).double() for t in parts]
        sums = torch.stack([t.sum(1) for t in flat]).sum(0)
        return (sums if per_sample else sums[0]).to(seeds[0].dtype)

    return total(seeds) - total(relevance)


def _elements(leaves: Sequence[Any]) -> int:
    return sum(t.numel() for t in leaves if isinstance(t, Tensor))


def _bytes(value: Any) -> int:
    """Of the largest tensor in a node's value, as it was captured."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    sizes = [math.prod(map(_captured_size, t.shape)) * t.dtype.itemsize for t in tensors]
    return max(sizes, default=1)


def _captured_size(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _total(tensors: Sequence[Tensor]) -> float:
    return sum(t.detach().sum(dtype=torch.float64).item() for t in tensors)


def _layers(
    calls: dict[str, int], taps: Sequence[tuple[Tensor, Tensor]], relevance: Sequence[Tensor]
) -> dict[str, LayerCalls]:
    entries = iter(
        LayerRelevance(r, activation) for (activation, _), r in zip(taps, relevance, strict=True)
    )
    return {path: LayerCalls(next(entries) for _ in range(n)) for path, n in calls.items()}
