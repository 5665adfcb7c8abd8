"""explain() and Explainer: the pipeline from a model to its relevance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrpfx.assign import assign
from lrpfx.canonize import canonize
from lrpfx.capture import (
    Captured,
    Inputs,
    TensorForm,
    capture,
    check_faithful,
    flatten_inputs,
)
from lrpfx.composites import RulesLike
from lrpfx.errors import CaptureError, InputError, NonFiniteError, SelectorError, TargetError
from lrpfx.explanation import Explanation, LayerCalls, LayerRelevance
from lrpfx.graph import annotate, output_leaves, reachable, record
from lrpfx.ledger import Booking, Ledger
from lrpfx.report import Report, make_report, with_ledger
from lrpfx.rewrite import instrument, rewrite
from lrpfx.taps import find_taps
from lrpfx.targets import Seed, Target, make_seed


def explain(
    model: nn.Module,
    inputs: Inputs,
    target: Target = None,
    *,
    rules: RulesLike = None,
    layers: Sequence[str] = (),
    create_graph: bool = False,
) -> Explanation:
    """Explain a model's output by the relevance of its inputs.

    Args:
        model: Any module that torch.export can trace, in evaluation mode. It is not modified.
        inputs: A tensor (N, ...), a tuple of positional or a dict of keyword arguments. Floating
            tensors are explained, everything else is passed through as a constant.
        target: What to explain: None (argmax per sample), a class, one class per sample (sequence
            or integer tensor), a tuple (index into a sample's output), a callable
            ``output -> (N,)``, or a floating tensor shaped like the output, used unchanged as the
            seed relevance. For the index forms the seed is one-hot times the output value.
        rules: A composite, its snake_case name, or a list of (selector, rule) laid over the
            default. A selector is an op kind ("conv"), a module class, a module-path glob
            ("layer4.*"), "*", or a predicate on the node's record. None picks by what the graph
            holds.
        layers: Module paths (globs allowed) whose relevance and activation are returned, too.
        create_graph: Keep the graph of the relevance, so that it can be differentiated with
            respect to inputs and parameters.

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
    return explainer(inputs, target, layers=layers, create_graph=create_graph)


class Explainer:
    """A model captured once, to be explained many times and at any batch size.

    It reads the model's live parameters: an optimizer step, ``load_state_dict`` or a change of
    ``.data`` between calls is seen. Calls from several threads do not disturb each other.

    Args:
        model: See ``explain``.
        example_inputs: Inputs of the shapes to come (the batch size may differ).
        rules: See ``explain``.

    Raises:
        LrpError: As ``explain``, for everything that concerns model and rules.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, rules: RulesLike = None) -> None:
        self._captured: Captured = capture(model, example_inputs)
        self._module = canonize(self._captured.program)
        placeholders = [n for n in self._module.graph.nodes if n.op == "placeholder"]
        flags = zip(placeholders, self._captured.explained, strict=True)
        explained = {node.name: flag for node, flag in flags}
        self._explained = [n for n in placeholders if explained[n.name]]
        self._live = annotate(self._module.graph, explained, self._captured.prefix)
        self._check_live()
        check_faithful(self._captured, self._module, example_inputs)
        records = [r for n in self._module.graph.nodes if (r := record(n)) is not None]
        self._plan = assign(records, rules, model)
        self._forms = _state_forms(model)
        self._public = rewrite(self._module, self._plan.assignments, self._live)
        self._instrumented: dict[tuple[str, ...], tuple[fx.GraphModule, dict[str, int]]] = {}
        constants = sum(
            n.op == "call_function" and n not in self._live for n in reachable(self._module.graph)
        )
        notes = []
        if self._captured.why_static:
            size = self._captured.signature.batch
            notes.append(f"captured for a batch of {size} only: {self._captured.why_static}")
        self._report = make_report(self._plan, constants, notes)
        self._instrument(())

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph: forward is the model's, backward puts relevance into ``x.grad``."""
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
    ) -> Explanation:
        """Explain the model's output for ``inputs``; arguments and errors as in ``explain``."""
        leaves = self._check_inputs(inputs)
        self._refresh()
        paths = (layers,) if isinstance(layers, str) else tuple(layers)
        if not all(isinstance(path, str) for path in paths):
            raise SelectorError(
                f"layers={layers!r} are no module paths.", fix='give strings such as "layer4.*".'
            )
        module, calls = self._instrument(paths)
        kept = [v.detach() if isinstance(v, Tensor) and not create_graph else v for v in leaves]
        with torch.enable_grad():
            starts = [_start(v) for v, e in zip(kept, self._captured.explained, strict=True) if e]
        ledger = Ledger()
        with torch.set_grad_enabled(create_graph):
            clean, phantoms, taps = module(*kept, ledger, *starts)
            self._check_outputs(clean, kept)
            seed = make_seed(clean, target, self._rebuild)
            relevance, at_taps = self._pull(seed, phantoms, starts, taps, create_graph)
        bookings = ledger.bookings()
        self._check_relevance(relevance, bookings)
        return self._explanation(
            inputs, leaves, clean, seed, relevance, _layers(calls, taps, at_taps), bookings
        )

    # -- set-up -----------------------------------------------------------------------------------

    def _check_live(self) -> None:
        if not any(
            isinstance(n, fx.Node) and n in self._live for n in output_leaves(self._module.graph)
        ):
            raise CaptureError(
                "no output of the model depends on the explained inputs.",
                where=[f"inputs: {', '.join(self._captured.signature.paths)}"],
                fix="check forward() for detach(), argmax or other steps that have no gradient.",
            )

    def _instrument(self, paths: tuple[str, ...]) -> tuple[fx.GraphModule, dict[str, int]]:
        """The graph that also returns what is asked for of ``layers``; calls per module path."""
        if paths not in self._instrumented:
            found = find_taps(self._module.graph, self._live, paths, self._captured.prefix)
            taps = [tap for calls in found.values() for tap in calls]
            plan = self._plan.assignments
            module = instrument(self._module, plan, self._live, self._explained, taps)
            self._instrumented[paths] = module, {path: len(c) for path, c in found.items()}
        return self._instrumented[paths]

    def _refresh(self) -> None:
        """Point every graph at the parameters that the model holds now."""
        model, prefix = self._captured.model, self._captured.prefix
        forms = _state_forms(model)
        if forms != self._forms:
            changed = [n for n in self._forms if forms.get(n) != self._forms[n]]
            raise CaptureError(
                "the model's parameters changed form since it was captured.",
                where=[f"{n}: {self._forms[n]} -> {forms.get(n)}" for n in changed[:5]],
                fix="make a new Explainer after .to(), .half() or a change of architecture.",
            )
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state.update(model.named_buffers(remove_duplicate=False))
        for module in (self._module, self._public, *(m for m, _ in self._instrumented.values())):
            for name, held in [
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ]:
                current = state.get(name.removeprefix(prefix))
                if current is not None and current is not held:
                    owner, _, attribute = name.rpartition(".")
                    setattr(module.get_submodule(owner), attribute, current)

    # -- one explanation --------------------------------------------------------------------------

    def _rebuild(self, leaves: Sequence[Any]) -> Any:
        spec = self._module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
        return self._captured.rebuild(pytree.tree_unflatten(list(leaves), spec))

    def _check_inputs(self, inputs: Inputs) -> list[Any]:
        """The flat inputs; raise InputError unless they are what the graph was captured for."""
        signature = self._captured.signature
        leaves, spec, paths = flatten_inputs(inputs)
        if spec != signature.spec:
            raise InputError(
                "the inputs are structured otherwise than those the model was captured with.",
                where=[f"captured: {', '.join(signature.paths)}", f"given: {', '.join(paths)}"],
                fix="make an Explainer for this structure.",
            )
        bad = []
        sizes = {
            leaf.shape[0]
            for leaf, form in zip(leaves, signature.leaves, strict=True)
            if isinstance(leaf, Tensor)
            and isinstance(form, TensorForm)
            and leaf.ndim
            and form.shape[:1] == (None,)
        }
        for leaf, form, path in zip(leaves, signature.leaves, paths, strict=True):
            if not isinstance(form, TensorForm):
                if isinstance(leaf, Tensor) or leaf != form:
                    bad.append(f"{path}: {leaf!r}, captured with the constant {form!r}")
            elif not isinstance(leaf, Tensor) or not _has_form(leaf, form):
                bad.append(f"{path}: {_describe(leaf)}, captured with {form}")
        if bad:
            raise InputError(
                "the inputs do not fit what the model was captured with.",
                where=bad,
                fix="convert them, or make an Explainer for inputs of this form.",
            )
        if len(sizes) > 1 or 0 in sizes:
            raise InputError(
                f"the inputs have batch sizes {sorted(sizes)}.", fix="give one size, at least 1."
            )
        infinite = [
            f"{path}: {int((~leaf.isfinite()).sum())} of {leaf.numel()} entries"
            for leaf, path in zip(leaves, paths, strict=True)
            if isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and not bool(leaf.isfinite().all())
        ]
        if infinite:
            raise NonFiniteError(
                "the inputs have NaN or infinite entries.", where=infinite, fix="clean them first."
            )
        return leaves

    def _check_outputs(self, clean: Sequence[Any], leaves: Sequence[Any]) -> None:
        if all(bool(t.isfinite().all()) for t in clean if _floating(t)):
            return
        finder = _FirstNonFinite(self._module)
        with torch.no_grad():
            finder.run(*leaves, enable_io_processing=False)
        if finder.found is not None:
            r = record(finder.found)
            raise NonFiniteError(
                "the model's own forward pass makes NaN or infinity.",
                where=[str(r), *filter(None, [r.source])] if r else [str(finder.found)],
                fix="look at the activations that enter this op; the inputs are finite.",
            )

    def _pull(
        self,
        seed: Seed,
        phantoms: Sequence[Tensor | None],
        starts: Sequence[Tensor],
        taps: Sequence[tuple[Tensor, Tensor]],
        create_graph: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Relevance at the inputs and at the taps: the ordinary gradient of the phantom stream."""
        pairs = [(p, s) for p, s in zip(phantoms, seed.seeds, strict=True) if s is not None]
        if not any(p is not None for p, _ in pairs):
            raise TargetError(
                f"{seed.description}: this output does not depend on the explained inputs.",
                fix="choose another output by a callable target.",
            )
        begun = [(p, s) for p, s in pairs if p is not None]
        ends = [*starts, *(relevance for _, relevance in taps)]
        grads = torch.autograd.grad(
            [p for p, _ in begun],
            ends,
            [s for _, s in begun],
            create_graph=create_graph,
            allow_unused=True,
        )
        found = [torch.zeros_like(e) if g is None else g for g, e in zip(grads, ends, strict=True)]
        return found[: len(starts)], found[len(starts) :]

    def _check_relevance(self, relevance: Sequence[Tensor], bookings: dict[str, Booking]) -> None:
        if all(bool(r.isfinite().all()) for r in relevance):
            return
        first = next(
            (n for n, b in bookings.items() if not math.isfinite(b.passed)), next(iter(bookings))
        )
        assignment = self._plan.assignments[first]
        raise NonFiniteError(
            "the relevance has NaN or infinite entries.",
            where=[
                f"first at {assignment.record} under {assignment.rule}",
                *filter(None, [assignment.record.source]),
            ],
            fix="give the rule a larger stabilizer; epsilon = 0 divides by what may be near zero.",
        )

    def _explanation(
        self,
        inputs: Inputs,
        leaves: Sequence[Any],
        clean: Sequence[Any],
        seed: Seed,
        relevance: Sequence[Tensor],
        layers: dict[str, LayerCalls],
        bookings: dict[str, Booking],
    ) -> Explanation:
        explained = iter(relevance)
        structure = [next(explained) if e else None for e in self._captured.explained]
        args, kwargs = pytree.tree_unflatten(structure, self._captured.signature.spec)
        seeds = [s for s in seed.seeds if s is not None]
        return Explanation(
            relevance=args[0] if isinstance(inputs, Tensor) else kwargs or tuple(args),
            output=self._rebuild(clean),
            target=seed.classes,
            seed=seeds[0],
            absorbed=_per_sample(seeds) - _per_sample(relevance),
            report=with_ledger(
                self._report,
                bookings,
                target=seed.description,
                started=sum(s.detach().sum(dtype=torch.float64).item() for s in seeds),
                reached=sum(r.detach().sum(dtype=torch.float64).item() for r in relevance),
            ),
            layers=layers,
            inputs=inputs,
        )


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


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _start(leaf: Tensor) -> Tensor:
    """The phantom of an input: a leaf whose gradient will be the input's relevance."""
    return leaf.detach().new_zeros(()).expand(leaf.shape).requires_grad_()


def _has_form(leaf: Tensor, form: TensorForm) -> bool:
    same_shape = len(leaf.shape) == len(form.shape) and all(
        size is None or size == given for size, given in zip(form.shape, leaf.shape, strict=True)
    )
    return same_shape and leaf.dtype == form.dtype and leaf.device == form.device


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return str(TensorForm(tuple(leaf.shape), leaf.dtype, leaf.device))


def _state_forms(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    state = [*model.named_parameters(remove_duplicate=False)]
    state += model.named_buffers(remove_duplicate=False)  # type: ignore[arg-type]
    return {name: (tuple(t.shape), t.dtype, t.device) for name, t in state}


def _per_sample(tensors: Sequence[Tensor]) -> Tensor:
    """Sums per sample over all tensors, shape (N,); a scalar where there is no batch."""
    sums = [t.detach().flatten(1).sum(1) if t.ndim > 1 else t.detach() for t in tensors]
    total = sums[0]
    for s in sums[1:]:
        total = total + s
    return total


def _layers(
    calls: dict[str, int], taps: Sequence[tuple[Tensor, Tensor]], relevance: Sequence[Tensor]
) -> dict[str, LayerCalls]:
    entries = iter(
        LayerRelevance(r, activation) for (activation, _), r in zip(taps, relevance, strict=True)
    )
    return {path: LayerCalls(next(entries) for _ in range(n)) for path, n in calls.items()}
