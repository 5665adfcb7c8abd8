"""explain() and Explainer: the pipeline from a model to its relevance."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from lrpfx.capture import (
    TRACING,
    By,
    Inputs,
    State,
    Versions,
    Wrt,
    check_faithful,
    check_inputs,
    flatten_inputs,
    is_finite,
    lines_forgotten,
    state_of,
    trim,
    varying_sizes,
    versions,
)
from lrpfx.conditions import Condition, Conditions, Places, read_conditions
from lrpfx.errors import CaptureError, CompileError, InputError, SelectorError
from lrpfx.explanation import Explanation, Layers
from lrpfx.pipeline import pipeline_of
from lrpfx.plan import RulesLike
from lrpfx.prepare import BatchNorm, Prepared, prepare_by
from lrpfx.report import Report
from lrpfx.rewrite import (
    Booking,
    Ledger,
    running_of,
)
from lrpfx.rules import Gradient, ReLURule
from lrpfx.run import (
    Alarm,
    Assumptions,
    Bookings,
    Books,
    Compiled,
    CompiledRun,
    Gather,
    Graphs,
    Init,
    Largest,
    Made,
    Pulled,
    RecordedRun,
    Run,
    Runs,
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
    is_being_trained,
    is_several,
    make_seed,
    mode_notes,
    pull_scaled,
    refuse_if_the_model_does,
    refuse_relevance,
    refuse_seed,
    reported,
    target_per_condition,
    through,
    without_graph,
)
from lrpfx.saved import Recipe, Weights, example_of, read_file, write_file

#: The form of the inputs, which the relevance has, too.
_Form = TypeVar("_Form", Tensor, Sequence[Any], Mapping[str, Any])
_Explainer = TypeVar("_Explainer", bound="Explainer")


def explain(
    model: nn.Module,
    inputs: _Form,
    target: Target = None,
    rules: RulesLike = None,
    *,
    layers: Sequence[str] = (),
    create_graph: bool = False,
    ledger: bool | None = None,
    wrt: Wrt = None,
    capture: By = "auto",
) -> Explanation[_Form]:
    """Explain a model's output by the relevance of its inputs.

    The model is captured anew for each call; for several explanations make an ``Explainer``.

    Args:
        model: Any module, in evaluation mode. It is not modified. A ``transformers`` pipeline
            stands for its model; inputs may then be texts or images, and the target a label.
        inputs: A tensor (N, ...), a tuple of positional or a dict of keyword arguments. Floating
            tensors are explained, and so are integer tensors that index an embedding: at its
            output, summed over features. Everything else is passed through as a constant.
        target: What to explain: None (argmax per sample), a class (an index into dimension 1 of an
            output (N, C) or (N, C, H, W)), one class per sample (sequence or integer tensor), a
            tuple (index into a sample's output, such as a position and a token), a callable
            ``output -> (N,)``, or one number for the batch, or a floating tensor shaped like the
            output, used unchanged as the seed relevance. Negative indices count from the end. For
            the index forms the seed is one-hot times the output value; of a callable it is the
            gradient times output, which is its value where it picks or adds outputs, and noted
            where it is another. A softmax or log-softmax at the output is left out: the seed is
            laid on its logits. Several targets of each sample, as N lists of K classes, an integer
            array (N, K), or "all" for every class of an output (N, C), share one forward pass:
            every tensor of the explanation but ``output`` then has a leading dimension K, and no
            ledger is kept.
        rules: A composite or its name; entries of your own, laid over one:
            ``EpsilonPlusFlat() + [("layer4.*", Gamma())]``, or the same as a list that ends with
            what it is laid over, ``[("layer4.*", Gamma()), "epsilon_plus_flat"]``. Your own
            entries come first, and the first match wins. A list without an end is laid over the
            default, ``composites.Auto``, which None is by itself. An entry is a pair of selector
            and rule. A selector is an op kind (``"conv"``), a module class, a module-path glob
            (``"layer4.*"``), ``"*"``, a predicate on the node's record such as ``First()``, or a
            tuple of these, any of which may match. A dict of entries, and a rule alone (for every
            op that it fits), are taken as well.
        layers: Module paths (globs allowed), or names of nodes in the report, whose relevance and
            activation are returned, too.
        create_graph: Keep the graph of the relevance, so that it can be differentiated with
            respect to inputs and parameters: a loss of it trains the model. Where it is seen that
            the model is being trained (it is in training mode, and was turned to it or has new
            parameters since the Explainer was made), a loss of relevance without its graph is an
            error that says so. Elsewhere such a loss gives the parameters no gradient.
        ledger: When the sums of relevance at each node are computed, for the report. None: once
            the report is asked for them, by the plain form of all rules, run on inputs and
            parameters as they were (the explanation keeps the model for that; a change since is an
            error). True: at once, and by this form relevance, too. False: never, and nothing is
            kept. Without them (and without ``create_graph``) neighbouring rules share their work,
            so that relevance costs little more than a gradient; its values are the same up to
            round-off, which is checked where the sums are computed later.
        wrt: The inputs to explain, by name (the parameter of forward(), a key, dotted below that as
            in "batch.pixels") or by position; the others are constants. None for all that can be
            explained.
        capture: How the model becomes a graph: "record" by writing down what one run does, which
            is quick and follows branches on values; "export" by torch.export, one graph for all
            inputs; "auto" records, and exports what cannot be recorded.

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
    with lines_forgotten():
        explainer = _OfOneCall(model, inputs, rules, wrt=wrt, capture=capture)
        return explainer._answer(explainer, inputs, target, layers, create_graph, ledger, _Asked())


#: So many are kept of the modes of a model that is taken by its batches.
_MODES = 4
_ONE_HOT = "one-hot times output"
_NOT_FAST = "computed in the plain form: the fast one is not finite here"


class _Asked(NamedTuple):
    """What is asked for beside an explanation; see ``Explainer.__call__``."""

    conditions: Sequence[Condition] | None = None
    pairing: str = "each"
    through: str = "only"
    start: str | None = None
    init: Init = "activation"


class Explainer:
    """A model captured once, to be explained many times and at any batch size.

    It reads the model's live parameters: an optimizer step, ``load_state_dict`` or a change of
    ``.data`` between calls is seen. Other attributes of the model's modules are constants of the
    graph: after changing one, make a new Explainer. So is the mode: made in evaluation mode and
    called while the model trains, it explains the model with running statistics and without
    dropout, and the report says so; its parameters are those of the moment. At a batch size, or
    another size that may vary, which it has not met before, the graph is compared with the model.
    Calls from several threads do not disturb each other.

    Args:
        model: Any module, in evaluation mode. It is not modified.
        inputs: Example inputs of the shapes to come (the batch size may differ): a tensor, a tuple
            of positional or a dict of keyword arguments.
        rules: A composite, its name, or a list of (selector, rule); None picks by what the graph
            holds. Details are in the help of ``lrpfx.explain``.
        dynamic: Further dimensions that may vary between calls, of every input tensor that has
            them: (1,) for the number of tokens, (2, 3) for height and width. Those that the model
            fixes by how it computes stay fixed. Other sizes are checked against the model when
            they are first met.
        freeze: Promise that parameters and buffers stay as they are: with ``ledger=False`` what
            depends on them only is then computed once, at the cost of the memory it takes. Tensors
            that are replaced or written into are seen, and an error; writes through ``.data``,
            which PyTorch does not count, are not, and make the relevance wrong.
        wrt: The inputs to explain, by name (the parameter of forward(), a key, dotted below that as
            in "batch.pixels") or by position; the others are constants. None for all that can be
            explained.
        capture: See ``explain``; "auto" exports, and records what cannot be exported. A recorded
            graph serves the inputs of its form (structure, shapes, dtypes, what is no tensor), if
            its run read no values and it computes what the model computes; else the call records
            another.
        bn: What batch norm takes. "running": running statistics, of a model in evaluation mode.
            "batch": the model is taken in the mode that it is in at each call. In training mode
            these are the statistics of the batch: constants for relevance, though not for its
            derivatives. Each call then updates running statistics once, as the model's own forward
            does, and modules that draw random numbers, such as dropout, are off, which is noted.

    Raises:
        LrpError: As ``explain``, for everything that concerns model and rules.
    """

    #: Whether it is made for one call.
    _once = False

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        rules: RulesLike = None,
        *,
        dynamic: Sequence[int] = (),
        freeze: bool = False,
        wrt: Wrt = None,
        capture: By = "auto",
        bn: BatchNorm = "running",
    ) -> None:
        if freeze and bn == "batch":
            raise InputError(
                'freeze=True promises buffers that stay, and bn="batch" updates them.',
                fix="leave out one of the two.",
            )
        self._parallel = model if isinstance(model, DistributedDataParallel) else None
        model = model if self._parallel is None else self._parallel.module
        self._pipeline = pipeline_of(model)
        if self._pipeline is not None:
            model, inputs = self._pipeline.model, self._pipeline.inputs(inputs)
            wrt, dynamic = self._pipeline.wrt(inputs, wrt), dynamic or self._pipeline.dynamic
        fixed = None
        if freeze and isinstance(model, nn.Module):
            fixed = versions(state_of(model))
        with TRACING:  # meanwhile another thread's trace may hold fake tensors in the model
            given = model, inputs, rules, dynamic, wrt, bn
            prepared = prepare_by(capture, *given, once=self._once)
            self._set_up(prepared, model, inputs, fixed)
        example = example_of(inputs, self._captured.signature)
        options = {"dynamic": tuple(dynamic), "freeze": freeze, "wrt": wrt, "capture": capture}
        self._made_of = Recipe(model, example, rules, options | {"bn": bn})
        self._by_batch = bn == "batch"
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = versions(dict(self.model.named_parameters()))
        self._in_other_modes: dict[tuple[bool, ...], Explainer] = {}
        self._runs: Runs[Explainer] | None = None
        trim()

    def _set_up(
        self,
        prepared: Prepared,
        model: nn.Module,
        inputs: Inputs,
        fixed: Versions | None,
    ) -> None:
        self._captured, self._module, self._starts, self._live, self._plan, self._report = prepared
        self._running = running_of(model, self._module.graph, self._captured.prefix)
        self._places = Places(self._module.graph, self._live, self._captured.prefix)
        self._gather = Gather(self._captured, self._module, self._starts)
        self._assumptions = Assumptions(self._module, self._plan.assignments)
        self._alarm = Alarm(self._module, self._plan, self._live)
        self._state = State(model, fixed, self._captured.read)
        self._graphs = Graphs(
            self._captured,
            self._module,
            self._starts,
            self._live,
            self._plan,
            self._places,
            self._state,
            self._running,
            self._assumptions,
        )
        graphs = self._graphs
        self._books = Books(
            self._module,
            self._plan,
            graphs.current,
            graphs.for_books,
            _again(self._gather, self._report),
            self._alarm.look,
        )
        self._compiled: Compiled | None = None
        leaves = flatten_inputs(inputs)[0]
        self._met = {self._sizes(leaves)}
        self._batched: dict[int, bool] = {}
        self._largest = Largest(self._live, leaves)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Model, rules, and example inputs; the copy captures the model anew."""
        return _made_again, (type(self), self._recipe())

    def _recipe(self) -> Recipe:
        """What this Explainer is made of, as it is now."""
        paths = {module: path for path, module in self.model.named_modules()}
        training = {paths[m]: was for m, was in self._modes if m in paths}
        compiled = None if self._compiled is None else self._compiled.options
        return replace(self._made_of, training=training, compiled=compiled)

    def save(self, path: str | os.PathLike[str], *, weights: bool = False) -> None:
        """Write what makes this Explainer to a file without code: rules, options, example inputs.

        The file holds no graph; ``load`` captures the model anew. Of a batch two samples of the
        example inputs are stored.

        Args:
            path: Of the file, such as "explainer.lrpfx".
            weights: Whether parameters and buffers are stored, too; without, digests of them are.

        Raises:
            InputError: Rules or inputs are of classes of your own, which are code.
            ImportError: safetensors is not installed.
        """
        write_file(path, self._recipe(), weights)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        weights: Weights = "same",
        rules: RulesLike = None,
    ) -> Self:
        """The Explainer that ``save`` wrote, made again; no code in the file is ever run.

        Args:
            path: Of the file.
            model: The model that it explains; it has to be one with the same parameters.
            weights: "same": the model's values have to be those that were saved; others are
                refused by name. "file": those of the file are written into the model. "model": the
                model's are taken as they are.
            rules: In the place of those of the file.

        Raises:
            InputError: The file was not written by ``save``, or is of another model.
            LrpError: As the constructor.
        """
        return _made_again(cls, read_file(path, model, weights, rules))

    @property
    def model(self) -> nn.Module:
        """The model that is explained."""
        return self._captured.model

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the inputs that the model takes by name."""
        return self._captured.signature.keywords

    @property
    def places(self) -> Places:
        """Where conditions can be laid: finds places by name."""
        return self._places

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph: forward is the model's, backward puts relevance into ``x.grad``."""
        return self._graphs.for_users()

    @property
    def report(self) -> Report:
        """Which rule each node got and why; what an explanation adds is in its own report."""
        return self._report

    @property
    def rules(self) -> RulesLike:
        """The rules that it was made with."""
        return self._made_of.rules

    @property
    def wrt(self) -> Wrt:
        """The inputs that are explained, as it was made with."""
        wrt: Wrt = self._made_of.options["wrt"]
        return wrt

    @property
    def modifies_gradient(self) -> bool:
        """Whether relevance is a gradient, modified at ReLUs if anywhere."""
        rules = (assignment.rule for assignment in self._plan.assignments.values())
        return all(isinstance(rule, (Gradient, ReLURule)) for rule in rules)

    def __repr__(self) -> str:
        model = type(self._captured.model).__name__
        return f"Explainer({model}, {len(self._report.rows)} nodes, rules: {self._plan.rules})"

    def compile(self, **options: Any) -> Explainer:
        """Explain by compiled graphs from now on, where neither ledger nor derivatives are wanted.

        Conditions, inner starts and several targets of each sample are explained as before.

        Compiled are the forward pass and the backward pass of relevance, rules included, when
        inputs of a form (shapes, strides, dtypes) are first met; that takes up to minutes, and
        what comes out is compared with the relevance of the plain graph. At most 8 forms are
        compiled, the rest run as before.

        Args:
            **options: Of ``torch.compile``, such as ``mode="max-autotune"`` or
                ``options={"freezing": True}``; ``backend="eager"`` only leaves out the overhead of
                autograd, and needs no C++ compiler.

        Returns:
            The Explainer itself.

        Raises:
            CompileError: On the call that compiles: PyTorch cannot compile the graphs, or they
                give another relevance.
        """
        if self._by_batch:
            raise CompileError(
                'an Explainer of bn="batch" cannot be compiled: what it is for, training, is not '
                "served by compiled graphs.",
                fix='compile one of bn="running", made in evaluation mode.',
            )
        frozen = self._state.fixed is not None
        self._compiled = Compiled(self._graphs.for_compiler, frozen, options)
        self._graphs.compiled = self._compiled
        return self

    def __call__(
        self,
        inputs: _Form,
        target: Target = None,
        *,
        layers: Sequence[str] = (),
        create_graph: bool = False,
        ledger: bool | None = None,
        conditions: Sequence[Condition] | None = None,
        pairing: Literal["each", "zip"] = "each",
        through: Literal["only", "all"] = "only",
        start: str | None = None,
        init: Init = "activation",
    ) -> Explanation[_Form]:
        """Explain the model's output for ``inputs``; arguments and errors as in ``explain``.

        Conditional relevance: which of the model's own features carried the relevance.

        Args:
            inputs: See ``explain``; so are ``target``, ``layers``, ``create_graph`` and ``ledger``.
            target: With conditions also one per condition: K classes (where there are not as many
                samples, for which K classes are one per sample), or N lists of K classes.
            layers: The conditioned places are among them.
            create_graph: See ``explain``.
            ledger: See ``explain``; several conditions of each sample keep no ledger.
            conditions: K dicts from places to the channels that are kept there (all places of a
                condition hold together), or to a kind of concept and the concepts kept, such as
                ``{"attn": (lrpfx.concepts.Head(4), [0])}``. A place is a module path, "path@k" for
                its k-th further call, or the name of a node in the report. The explanation then
                has a leading dimension K, as with several targets.
            pairing: "zip": the k-th condition is for the k-th sample, and there is no leading
                dimension.
            through: "only": relevance goes through the conditioned places, and enters no branch
                that is parallel to them. "all": masks act where they stand.
            start: A place to begin at, in the place of the output.
            init: What relevance begins with there: "activation", "relevance" (what arrives there
                of ``target``), a tensor, or a function of the activation.

        Raises:
            SelectorError: Places, concepts or conditions that are not there or of a wrong form.

        Source: Achtibat et al. 2023 (CRP), https://doi.org/10.1038/s42256-023-00711-8, eq. 4 and 5.
        """
        asked = _Asked(conditions, pairing, through, start, init)
        return self._answer(None, inputs, target, layers, create_graph, ledger, asked)

    def _answer(
        self,
        serving: Explainer | None,
        inputs: Any,
        target: Any,
        layers: Sequence[str],
        create_graph: bool,
        ledger: bool | None,
        asked: _Asked,
    ) -> Explanation[Any]:
        """The explanation, by the Explainer that serves these inputs."""
        if self._pipeline is not None:
            inputs, target = self._pipeline.inputs(inputs), self._pipeline.target(target)

        def explain() -> Explanation[Any]:
            by = self._serving(inputs) if serving is None else serving
            return by._run(inputs, target, layers, create_graph, ledger, asked)

        if self._parallel is None or not create_graph:
            return explain()
        return through(self._parallel, explain)

    def _serving(self, inputs: Inputs) -> Explainer:
        """The Explainer whose graph holds for the inputs and, by batch, for the model's mode."""
        if self._by_batch and any(m.training != was for m, was in self._modes):
            return self._in_this_mode()._serving(inputs)
        if self._captured.decisions is None:
            return self
        with TRACING:
            self._graphs.refresh()
            if self._runs is None:
                self._runs = Runs(RecordedRun(self._captured, self._module, self), self._anew)
            return self._runs.serving(inputs)

    def _in_this_mode(self) -> Explainer:
        """The same for the model in the mode that it is in now."""
        mode = tuple(module.training for module, _ in self._modes)
        if mode not in self._in_other_modes:
            made_of = self._made_of
            new = type(self)(made_of.model, made_of.inputs, made_of.rules, **made_of.options)
            kept = list(self._in_other_modes.items())[1 - _MODES :]
            self._in_other_modes = dict(kept) | {mode: new}
        return self._in_other_modes[mode]

    def _anew(self, inputs: Inputs) -> RecordedRun[Explainer]:
        """The same for another run of the model."""
        made_of = self._made_of
        options = {**made_of.options, "dynamic": (), "capture": "record"}
        new = Explainer(made_of.model, inputs, made_of.rules, **options)
        if self._compiled is not None and not new._captured.decisions:
            new.compile(**self._compiled.options)
        return RecordedRun(new._captured, new._module, new)

    def _run(
        self,
        inputs: Inputs,
        target: Target,
        layers: Sequence[str],
        create_graph: bool,
        ledger: bool | None,
        asked: _Asked,
    ) -> Explanation:
        a_loss_may_follow = torch.is_grad_enabled() and not create_graph
        # Autograd is off for good in what inference mode creates, so the work happens outside.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            explanation = self._explain(inputs, target, layers, create_graph, ledger, asked)
        if a_loss_may_follow and self._is_being_trained():
            return replace(
                explanation,
                relevance=without_graph(explanation.relevance),
                embeddings=without_graph(explanation.embeddings),
                layers=explanation.layers.mapped(without_graph),
            )
        return explanation

    def _is_being_trained(self) -> bool:
        """In training mode, and turned to it since; or with parameters that have moved since."""
        if is_being_trained(self._captured):
            return True
        if not any(module.training for module, _ in self._modes):
            return False
        return self._by_batch or versions(dict(self.model.named_parameters())) != self._parameters

    def _explain(
        self,
        inputs: Inputs,
        target: Target,
        layers: Sequence[str],
        create_graph: bool,
        ledger: bool | None,
        asked: _Asked,
        again: bool = False,
    ) -> Explanation:
        leaves = check_inputs(self._captured.signature, inputs)
        paths = _paths(layers, self.model)
        with TRACING:
            conditions = self._read(asked)
        several = is_several(target) or (conditions is not None and conditions.several)
        single = not is_several(target) and (conditions is None or conditions.passes == 1)
        later = ledger is None and single and not create_graph and conditions is None
        ledger = (ledger is None or ledger) and single and not later
        fast = not ledger and not create_graph
        with TRACING:
            self._graphs.refresh()
            self._check_sizes(inputs, leaves)
            module, calls = self._graphs.for_calls(paths, conditions, fast=fast)
        kept = [_kept(v, create_graph) for v in leaves]
        book = Ledger() if ledger else None
        compiled = fast and not several and conditions is None and self._compiled is not None
        gauge = None
        if book is None and single and conditions is None and not compiled:
            gauge = self._alarm.gauge(module)
        instrumented = module if gauge is None else gauge.run

        def plain(leaves: Sequence[Any]) -> Run:
            return Run(*instrumented(*leaves, book))

        with torch.set_grad_enabled(create_graph):
            try:
                if compiled and self._compiled is not None:
                    run: Run | CompiledRun = self._compiled.run(paths, kept, plain)
                else:
                    run = plain(kept)
            except (IndexError, ValueError, RuntimeError):  # token ids out of range, for instance
                refuse_if_the_model_does(self._captured, leaves)
                raise
            if isinstance(run, Run) and not again:
                for running, statistics in zip(self._running, run.statistics, strict=True):
                    running.follow(statistics, self._state.current())
            report = self._report.noting(self._assumptions.check(kept))
            targets = each_target(run.explained, target) if is_several(target) else [target]
            if conditions is not None:
                n = next((len(t) for t in leaves if isinstance(t, Tensor) and t.ndim), 1)
                targets = [t for one in targets for t in target_per_condition(one, conditions, n)]
            batched = functools.partial(self._is_batched, leaves)
            finish = self._gather.finish
            seeds = [make_seed(run.explained, one, finish, batched) for one in targets]
            if conditions is not None:
                assert isinstance(run, Run)
                names = [name for name, each in calls.items() for _ in range(each.number)]
                seeds = condition_seeds(conditions, run, names, seeds, asked.init)
                targets = [*targets] * (len(seeds) if len(targets) == 1 else 1)
            for seed in seeds:
                if not all(is_finite(s) for s in seed.seeds if s is not None):
                    refuse_seed(self._captured.model, self._module, seed, run.explained, kept)
            together = 1 if create_graph else at_a_time(self._largest.bytes_for(leaves))
            pull = functools.partial(run.pull, seeds)
            if in_float16(self._plan, kept):
                pull = functools.partial(pull_scaled, run, seeds, book=book)
            found = pull(together=together, create_graph=create_graph)
            parts, blank = [], dict[str, None]()
            for one, seed, pulled in zip(targets, seeds, found, strict=True):
                if not all(is_finite(r) for r in pulled.starts if r is not None):
                    if book is None and conditions is None:  # the plain form can name the place
                        exact = self._explain(inputs, one, layers, create_graph, True, asked, True)
                        if not several:  # or is finite: it keeps apart what the fast form joins
                            return replace(exact, report=exact.report.noting([_NOT_FAST]))
                    refuse_relevance(self._plan, book.bookings() if book is not None else {})
                at = by_layer(calls, run.activations, pulled)
                part = self._gather.explanation(
                    inputs, leaves, run.clean, seed, pulled.starts, at, report
                )
                parts.append(part)
                blank |= dict.fromkeys(blank_notes(seed, pulled.starts))
        told = seeds[0].description
        notes = [] if self._by_batch else mode_notes(self._captured)
        notes += conditions.notes() if conditions is not None else []
        if several:
            what = "targets" if conditions is None else "conditions"
            told = f"{len(parts)} {what} of each sample, {told if conditions else _ONE_HOT}"
            notes += column_notes(target)
        booked = book.bookings() if book else {}

        def book_now(seed: Seed) -> Mapping[str, Booking]:
            return {} if conditions is not None else self._booked(kept, seed)

        watched = Watched(kept, seeds, booked, gauge, book_now)
        notes = [*notes, *self._alarm.notes(parts, watched)]
        bookings: Bookings = booked
        if later:
            bookings = self._books.later(parts[0], kept, seeds[0], self._graphs.current())
        seed = replace(seeds[0], description=told, notes=(*notes, *seeds[0].notes, *blank))
        return reported(parts if several else parts[0], bookings, seed)

    # -- set-up -----------------------------------------------------------------------------------

    def _read(self, asked: _Asked) -> Conditions | None:
        """The conditions of a call as they are laid on the graph, None if there are none."""
        if asked.conditions is None and asked.start is None:
            return None
        return read_conditions(
            asked.conditions,
            pairing=asked.pairing,
            through=asked.through,
            start=asked.start,
            places=self._places,
            starts=self._starts,
        )

    def _is_batched(self, leaves: Sequence[Any], index: int) -> bool:
        """Whether the first dimension of an output is that of the samples."""
        if index not in self._batched:
            of = self._captured, self._module.graph, self._live
            self._batched[index] = is_batched(*of, index, leaves)
        return self._batched[index]

    def _booked(self, leaves: Sequence[Any], seed: Seed) -> Mapping[str, Booking]:
        """The ledger of the plain form."""
        book = Ledger()
        with torch.no_grad():
            run = Run(*self._graphs.for_books(fast=False, node=None)(*leaves, book))
            scaled = in_float16(self._plan, leaves)
            list(pull_scaled(run, [seed], book=book) if scaled else run.pull([seed]))
        return book.bookings()

    def _sizes(self, leaves: Sequence[Any]) -> frozenset[tuple[str, int]]:
        """The sizes that may vary, as these inputs have them."""
        sizes = varying_sizes(self._captured.signature, leaves).items()
        return frozenset((letter, max(values)) for letter, values in sizes)

    def _check_sizes(self, inputs: Inputs, leaves: Sequence[Any]) -> None:
        """Compare the graph with the model at sizes not met before: a guard may have been lost."""
        if (sizes := self._sizes(leaves)) in self._met:
            return
        try:
            with contextlib.ExitStack() as plainly:
                for device in {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}:
                    plainly.enter_context(torch.autocast(device, enabled=False))
                check_faithful(self._captured, self._module, inputs)
        except (CaptureError, RuntimeError, IndexError, ValueError) as error:
            shown = ", ".join(f"{letter}={size}" for letter, size in sorted(sizes))
            raise InputError(
                f"the captured graph does not hold for {shown}.",
                where=[str(error).splitlines()[0]],
                fix="make an Explainer for inputs of this size.",
            ) from error
        self._met.add(sizes)


class _OfOneCall(Explainer):
    """What ``explain`` makes: its graph is for these inputs only."""

    _once = True


def _again(gather: Gather, report: Report) -> Callable[[Made, Run, Pulled], Explanation]:
    """Makes an explanation once more, of no layers; it does not keep the Explainer."""

    def explanation(made: Made, run: Run, pulled: Pulled) -> Explanation:
        inputs, seed = made.found.inputs, made.seed
        given = inputs, made.leaves, run.clean, seed, pulled.starts, Layers()
        return gather.explanation(*given, report)

    return explanation


def _made_again(cls: type[_Explainer], recipe: Recipe) -> _Explainer:
    """The Explainer of a recipe."""
    with recipe.in_its_mode():
        explainer = cls(recipe.model, recipe.inputs, recipe.rules, **recipe.options)
    if recipe.compiled is not None:
        explainer.compile(**recipe.compiled)
    return explainer


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
