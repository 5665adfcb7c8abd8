"""explain() and Explainer: the pipeline from a model to its relevance."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from lrpfx.capture import (
    TRACING,
    By,
    Inputs,
    Wrt,
    lines_forgotten,
    state_of,
    trim,
    versions,
)
from lrpfx.conditions import Condition, Places
from lrpfx.engine import Asked, Engine
from lrpfx.errors import CaptureError, CompileError, InputError
from lrpfx.explanation import Explanation
from lrpfx.pipeline import pipeline_of
from lrpfx.plan import RulesLike
from lrpfx.prepare import BatchNorm, instead_of, prepare_by
from lrpfx.progress import told
from lrpfx.report import Report
from lrpfx.rules import Gradient, ReLURule
from lrpfx.run import (
    Init,
    RecordedRun,
    Runs,
    Target,
    is_being_trained,
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
            where it is another. A softmax, log-softmax or sigmoid at the output is left out: its
            logits are explained. Several targets of each sample, as N lists of K classes, an
            integer array (N, K), or "all" for every class of an output (N, C), share one forward
            pass: every tensor of the explanation but ``output`` then has a leading dimension K, and
            no ledger is kept.
        rules: A composite or its name; or entries of your own in front of one:
            ``EpsilonPlusFlat() + [("layer4.*", Gamma())]``, or the same as a list that ends with
            the composite, ``[("layer4.*", Gamma()), "epsilon_plus_flat"]``. The first match wins.
            A list that ends with no composite stands in front of the default,
            ``composites.Auto``, which None is by itself. An entry is a pair of selector and rule. A
            selector is an op kind (``"conv"``), a module class, a path glob (``"layer4.*"``),
            ``"*"``, a predicate on the node's record such as ``First()``, or a tuple of these, any
            of which may match. A dict of entries, and a rule alone (for every op that it fits), are
            taken as well.
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
    asked = Asked(target, layers, create_graph, ledger)
    with lines_forgotten():
        explainer = _OfOneCall(model, inputs, rules, wrt=wrt, capture=capture)
        try:
            return explainer._answer(explainer, inputs, asked)
        except CaptureError as error:  # its graph does not compute what the model does
            if capture != "auto" or explainer._engine.captured.decisions is None:
                raise
            with instead_of("record", error) as other:
                explainer = _OfOneCall(model, inputs, rules, wrt=wrt, capture=other)
                return explainer._answer(explainer, inputs, asked)


#: So many are kept of the modes of a model that is taken by its batches.
_MODES = 4


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
        with (
            told(_long(model)),
            TRACING,
        ):  # meanwhile another thread's trace may hold fake tensors in the model
            given = model, inputs, rules, dynamic, wrt, bn
            prepared = prepare_by(capture, *given, once=self._once)
            self._engine = Engine(prepared, inputs, fixed, bn == "batch")
        example = example_of(inputs, self._engine.captured.signature)
        options = {"dynamic": tuple(dynamic), "freeze": freeze, "wrt": wrt, "capture": capture}
        self._made_of = Recipe(model, example, rules, options | {"bn": bn}, pipeline=self._pipeline)
        self._modes = [(module, module.training) for module in model.modules()]
        self._parameters = versions(dict(self.model.named_parameters()))
        self._in_other_modes: dict[tuple[bool, ...], Explainer] = {}
        self._runs: Runs[Explainer] | None = None
        if self._engine.captured.decisions is None:
            trim()  # of the trace; a record leaves none

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Model, rules, and example inputs; the copy captures the model anew."""
        return _made_again, (type(self), self._recipe())

    def _recipe(self) -> Recipe:
        """What this Explainer is made of, as it is now."""
        paths = {module: path for path, module in self.model.named_modules()}
        training = {paths[m]: was for m, was in self._modes if m in paths}
        compiled = None if self._engine.compiled is None else self._engine.compiled.options
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
            model: The model that it explains, or a pipeline of it; it has to be one with the same
                parameters.
            weights: "same": the model's values have to be those that were saved; others are
                refused by name. "file": those of the file are written into the model. "model": the
                model's are taken as they are.
            rules: In the place of those of the file.

        Raises:
            InputError: The file was not written by ``save``, or is of another model.
            LrpError: As the constructor.
        """
        pipeline = pipeline_of(model)
        model = model if pipeline is None else pipeline.model
        recipe = read_file(path, model, weights, rules)
        return _made_again(cls, replace(recipe, pipeline=pipeline))

    @property
    def model(self) -> nn.Module:
        """The model that is explained."""
        return self._engine.captured.model

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the inputs that the model takes by name."""
        return self._engine.captured.signature.keywords

    @property
    def places(self) -> Places:
        """Where conditions can be laid: finds places by name."""
        return self._engine.places

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph: forward is the model's, backward puts relevance into ``x.grad``."""
        return self._engine.graphs.for_users()

    @property
    def report(self) -> Report:
        """Which rule each node got and why; what an explanation adds is in its own report."""
        return self._engine.report

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
        rules = (assignment.rule for assignment in self._engine.plan.assignments.values())
        return all(isinstance(rule, (Gradient, ReLURule)) for rule in rules)

    def __repr__(self) -> str:
        nodes, rules = len(self.report.rows), self._engine.plan.rules
        return f"Explainer({type(self.model).__name__}, {nodes} nodes, rules: {rules})"

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
        if self._engine.by_batch:
            raise CompileError(
                'an Explainer of bn="batch" cannot be compiled: what it is for, training, is not '
                "served by compiled graphs.",
                fix='compile one of bn="running", made in evaluation mode.',
            )
        self._engine.compile(options)
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
        conditional = conditions, pairing, through, start, init
        asked = Asked(target, layers, create_graph, ledger, *conditional)
        return self._answer(None, inputs, asked)

    def _answer(self, serving: Explainer | None, inputs: Any, asked: Asked) -> Explanation[Any]:
        """The explanation, by the Explainer that serves these inputs."""
        inputs = self._read_inputs(inputs)
        if self._pipeline is not None:
            asked = asked._replace(target=self._pipeline.target(asked.target))

        def explain() -> Explanation[Any]:
            by = self._serving(inputs) if serving is None else serving
            return by._run(inputs, asked)

        if self._parallel is None or not asked.create_graph:
            return explain()
        return through(self._parallel, explain)

    def _read_inputs(self, inputs: Any) -> Any:
        """Inputs as the model takes them: of texts and images what the pipeline makes of them."""
        return inputs if self._pipeline is None else self._pipeline.inputs(inputs)

    def _serving(self, inputs: Inputs) -> Explainer:
        """The Explainer whose graph holds for the inputs and, by batch, for the model's mode."""
        if self._engine.by_batch and any(m.training != was for m, was in self._modes):
            return self._in_this_mode()._serving(inputs)
        if self._engine.captured.decisions is None:
            return self
        with TRACING:
            self._engine.graphs.refresh()
            if self._runs is None:
                self._runs = Runs(
                    RecordedRun(self._engine.captured, self._engine.module, self), self._anew
                )
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
        if self._engine.compiled is not None and not new._engine.captured.decisions:
            new.compile(**self._engine.compiled.options)
        return new._as_run()

    def exported(self) -> Explainer:
        """The same by ``torch.export``, whose graph holds for every batch size: itself, if it is.

        Raises:
            CaptureError: The model can be recorded only.
        """
        if self._engine.captured.decisions is None:
            return self
        made_of = self._recipe()
        options = {**made_of.options, "capture": "export"}
        return _made_again(type(self), replace(made_of, options=options))

    def _as_run(self) -> RecordedRun[Explainer]:
        return RecordedRun(self._engine.captured, self._engine.module, self)

    def _run(self, inputs: Inputs, asked: Asked) -> Explanation:
        a_loss_may_follow = torch.is_grad_enabled() and not asked.create_graph
        # Autograd is off for good in what inference mode creates, so the work happens outside.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
            explanation = self._engine.explain(inputs, asked)
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
        if is_being_trained(self._engine.captured):
            return True
        if not any(module.training for module, _ in self._modes):
            return False
        return (
            self._engine.by_batch
            or versions(dict(self.model.named_parameters())) != self._parameters
        )


class _OfOneCall(Explainer):
    """What ``explain`` makes: its graph is for these inputs only."""

    _once = True


def _long(model: Any) -> str:
    """What is said of a set-up that takes seconds."""
    recurrent = isinstance(model, nn.Module) and any(
        isinstance(module, nn.RNNBase) for module in model.modules()
    )
    steps = ": one part for each step of its recurrent layers" if recurrent else ""
    name = type(model).__name__
    return f"still making the graph of {name}{steps}; an Explainer does so once for all its calls"


def _made_again(cls: type[_Explainer], recipe: Recipe) -> _Explainer:
    """The Explainer of a recipe."""
    model = recipe.model if recipe.pipeline is None else recipe.pipeline
    with recipe.in_its_mode():
        explainer = cls(model, recipe.inputs, recipe.rules, **recipe.options)
    if recipe.compiled is not None:
        explainer.compile(**recipe.compiled)
    return explainer
