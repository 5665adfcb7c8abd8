"""model -> what an explanation needs of it: the canonical graph, and the rule of each live node."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, fx, nn

from lrpfx.canonize import batch_statistics, canonize, release
from lrpfx.capture import (
    By,
    Captured,
    Inputs,
    Way,
    Wrt,
    backward_note,
    capture,
    check_faithful,
    chosen_inputs,
    mixing_note,
    quiet,
)
from lrpfx.errors import CaptureError, InputError, TrainingModeError, some
from lrpfx.ops import (
    HELD,
    Record,
    explained_leaves,
    find,
    is_floating,
    live_names,
    nodes_in,
    op_name,
    output_leaves,
    record,
    source_line,
    used_nodes,
)
from lrpfx.plan import Plan, RulesLike, annotate, assign, find_carriers, find_starts, notes_of
from lrpfx.report import Report, make_report
from lrpfx.rewrite import unfollowed
from lrpfx.rules import Stop

#: Which statistics batch norm takes: the running ones, or those of the batch in training mode.
BatchNorm = Literal["running", "batch"]
BY_BATCH = (
    "batch norm uses the statistics of the batch, which are constants for relevance: that of a "
    "sample depends on the others in its batch"
)


class Prepared(NamedTuple):
    """A model that was captured, and how relevance will go through it.

    Args:
        captured: The model, and how it was captured.
        module: Its canonical graph.
        starts: The nodes that relevance is wanted for, see ``starts.find_starts``.
        live: The nodes that carry relevance.
        plan: The rule of each of them.
        report: The report, without an explanation in it.
        expected: What the model returned, if the graph has yet to be compared with it.
    """

    captured: Captured
    module: fx.GraphModule
    starts: dict[fx.Node, fx.Node]
    live: set[fx.Node]
    plan: Plan
    report: Report
    expected: Sequence[Tensor] | None = None


def prepare(
    model: nn.Module,
    inputs: Inputs,
    rules: RulesLike,
    dynamic: Sequence[int] = (),
    wrt: Wrt = None,
    by: Way = "export",
    bn: BatchNorm = "running",
    later: bool = False,
) -> Prepared:
    """Capture a model, and decide what each node of its graph does with relevance.

    Rules have a say in what is live: what is held for them is not where all follow the gradient,
    and behind ``Stop`` nothing is. The nodes are then annotated and given their rules once more.

    Args:
        model: See ``lrpfx.explain``.
        inputs: Example inputs.
        rules: See ``lrpfx.explain``.
        dynamic: See ``lrpfx.Explainer``.
        wrt: See ``lrpfx.explain``.
        by: See ``capture.capture``.
        bn: See ``lrpfx.Explainer``.
        later: Whether a recorded graph is compared with the model when it explains, by that run.

    Raises:
        LrpError: As ``lrpfx.explain``, for everything that concerns model and rules.
    """
    by_batch = bn == "batch"
    with contextlib.ExitStack() as stack:
        off = stack.enter_context(quiet(model, inputs)) if by_batch else []
        prepared = _prepare(model, inputs, rules, dynamic, wrt, by, by_batch, later)
    left = unfollowed(prepared.captured, prepared.module, inputs) if by_batch else []
    notes = []
    for names, what in (
        (off, "in evaluation mode here, as they draw random numbers"),
        (left, "buffers that forward() writes into stay as they are"),
    ):
        if names:
            notes.append(f"{what}: {', '.join(some(names))}")
    return prepared._replace(report=prepared.report.noting(notes))


def _prepare(
    model: nn.Module,
    inputs: Inputs,
    rules: RulesLike,
    dynamic: Sequence[int],
    wrt: Wrt,
    by: Way,
    by_batch: bool,
    later: bool,
) -> Prepared:
    captured, program, expected = capture(model, inputs, dynamic, by)
    chosen = chosen_inputs(model, inputs, wrt)
    module = canonize(program, explained_of(chosen), by_batch)
    graph, prefix = module.graph, captured.prefix
    starts = find_starts(graph)
    _check_chosen(graph, starts, chosen, captured)
    live = annotate(graph, starts, prefix)
    _check_live(graph, live, starts, captured)
    later = later and by == "record"
    if not later:
        check_faithful(captured, module, inputs, expected)
    plan = assign(records(graph), rules, model)
    notes = list(plan.notes)
    released = plan.by_gradient and release(graph)
    if released:
        live = annotate(graph, starts, prefix, (), released)
        plan = assign(records(graph), rules, model, again=plan)
    stopped = [a.record for a in plan.assignments.values() if isinstance(a.rule, Stop)]
    if stopped:
        live = annotate(graph, starts, prefix, {r.name for r in stopped}, released)
        _check_live(graph, live, starts, captured, stopped)
        plan = assign(records(graph), rules, model, again=plan, stop=False)
        which = ", ".join(sorted({r.kind for r in stopped}))
        notes.append(f"{len(stopped)} nodes count as constants by rule Stop: {which}")
    notes += notes_of(graph, captured, starts)
    if batch_statistics(graph):
        notes.append(BY_BATCH)
    elif mixes := mixing_note(captured, module, inputs, expected):
        notes.append(mixes)
    if own := backward_note(captured, module, inputs):
        notes.append(own)
    if chosen is not None:
        notes.append(f"explained by wrt= are {', '.join(chosen)}; the other inputs are constants")
    carriers = find_carriers(graph, plan.assignments, live, starts, ())
    multipliers = {node.name: carry.takes for node, carry in carriers.items()}
    report = make_report(plan, constants(graph, live), notes, multipliers)
    given = captured, module, starts, live, plan, report
    return Prepared(*given, expected if later else None)


def prepare_by(
    by: By,
    model: nn.Module,
    inputs: Inputs,
    rules: RulesLike,
    dynamic: Sequence[int] = (),
    wrt: Wrt = None,
    bn: BatchNorm = "running",
    once: bool = False,
) -> Prepared:
    """As ``prepare``; "auto" is the way that suits, or the other where that is refused.

    Args:
        by: See ``lrpfx.explain``.
        model: See ``lrpfx.explain``.
        inputs: Example inputs.
        rules: See ``lrpfx.explain``.
        dynamic: See ``lrpfx.Explainer``.
        wrt: See ``lrpfx.explain``.
        bn: See ``lrpfx.Explainer``.
        once: Whether the graph is for these inputs only, so that a record of their run suits; that
            is compared with the model when it explains.

    Raises:
        LrpError: As ``prepare``.
    """
    if bn not in ("running", "batch"):
        raise InputError(
            f"bn={bn!r} is no way to take batch norm.",
            fix='give "running" for running statistics, or "batch" for a model as it trains.',
        )
    if by not in ("auto", *_INSTEAD):
        raise InputError(
            f"capture={by!r} is no way to capture a model.",
            fix='give "export", "record", or "auto" for the one that suits, and else the other.',
        )
    if by != "auto":
        return prepare(model, inputs, rules, dynamic, wrt, by, bn, later=once)
    first: Way = "record" if once else "export"
    try:
        return prepare(model, inputs, rules, dynamic, wrt, first, bn, later=once)
    except TrainingModeError:
        raise
    except CaptureError as error:
        with instead_of(first, error) as other:
            return prepare(model, inputs, rules, dynamic, wrt, other, bn)


@contextlib.contextmanager
def instead_of(way: Way, refused: CaptureError) -> Iterator[Way]:
    """Yields the other way of capture; if that is refused as well, the error names both reasons."""
    other, instead = _INSTEAD[way]
    try:
        yield other
    except CaptureError as again:
        if again.what == refused.what:
            raise refused from None
        where = [*refused.where, f"{instead}: {again.what}", *again.where]
        raise CaptureError(refused.what, where=where, fix=again.fix) from again


#: The other way of capture, and what is said where it is tried.
_INSTEAD: dict[Way, tuple[Way, str]] = {
    "export": ("record", "recording a run instead"),
    "record": ("export", "by torch.export instead"),
}


def records(graph: fx.Graph) -> list[Record]:
    """Those of all live nodes, in execution order."""
    return [r for node in graph.nodes if (r := record(node)) is not None]


def constants(graph: fx.Graph, live: set[fx.Node]) -> int:
    """How many nodes are computed without a live input."""
    return sum(n.op == "call_function" and n not in live for n in used_nodes(graph))


def explained_of(chosen: Mapping[str, Sequence[int]] | None) -> set[int] | None:
    """The flat inputs that are explained, None for all."""
    return None if chosen is None else {i for leaves in chosen.values() for i in leaves}


def _check_chosen(
    graph: fx.Graph,
    starts: Mapping[fx.Node, fx.Node],
    chosen: Mapping[str, Sequence[int]] | None,
    captured: Captured,
) -> None:
    """Raise InputError for entries of ``wrt=`` that cannot be explained."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for name, leaves in (chosen or {}).items():
        if not {inputs[i] for i in leaves} & set(starts.values()):
            forms = captured.signature.leaves
            raise InputError(
                f"wrt: there is nothing to explain in {name!r}: only floating inputs are "
                "explained, and integers that an embedding is indexed by.",
                where=[f"{captured.signature.paths[i]}: {forms[i]}" for i in leaves],
                fix="give it as a floating tensor, or leave it out of wrt.",
            )


def _check_live(
    graph: fx.Graph,
    live: set[fx.Node],
    starts: Collection[fx.Node],
    captured: Captured,
    stopped: Sequence[Record] = (),
) -> None:
    """Raise CaptureError if relevance comes to no input."""
    if any(isinstance(n, fx.Node) and n in live for n in explained_leaves(graph)):
        return
    if stopped:
        raise CaptureError(
            "no output depends on the explained inputs other than through what the rule Stop "
            "makes a constant.",
            where=some([str(r) for r in stopped]),
            fix="leave some way open: a Stop on fewer ops.",
        )
    if not starts:
        raise CaptureError(
            "there is nothing to explain: only floating inputs are explained, and integers "
            "that an embedding is indexed by.",
            where=[f"inputs: {', '.join(captured.signature.paths)}"],
            fix="give the input as a floating tensor, or its embedding.",
        )
    if not nodes_in(output_leaves(graph)):
        raise CaptureError(
            "the model returns no tensor.",
            where=[f"forward() of {type(captured.model).__name__}"],
            fix="explain a wrapper module that returns the score in question.",
        )
    raise CaptureError(
        "no output of the model depends on the explained inputs: relevance ends on the way.",
        where=[f"leaves PyTorch: {read}" for read in captured.decisions or () if read.leaves]
        or some([f"{op_name(n.target)}   {source_line(n)}" for n in _ends(graph, starts)])
        or [f"inputs: {', '.join(captured.signature.paths)}"],
        fix="explain a wrapper module without what has no gradient there: detach(), a region of "
        "no_grad(), argmax, rounding, quantisation or numpy.",
    )


def _ends(graph: fx.Graph, starts: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that an output depends on, and an explained input, but not as relevance has it."""
    flowing, ends = set(starts), []
    used = used_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or flowing.isdisjoint(node.all_input_nodes):
            continue
        row = find(node.target, frozenset(live_names(node, flowing)))
        constant = row is not None and row.family == "constant"
        if is_floating(node.meta.get("val")) and not constant and HELD not in node.meta:
            flowing.add(node)
        elif node in used:
            ends.append(node)
    return ends
