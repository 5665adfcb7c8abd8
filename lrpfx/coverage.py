"""coverage(): which nodes of a model have a rule, told before anything is explained."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lrpfx.canonize import canonize
from lrpfx.capture import TRACING, Inputs, Wrt, capture, chosen_inputs
from lrpfx.errors import UnsupportedOpError
from lrpfx.explain import Explainer
from lrpfx.ops import op_name
from lrpfx.plan import RulesLike, Unknown, annotate_known, assign, find_starts
from lrpfx.prepare import constants, explained_of, records
from lrpfx.report import Report, Row, make_report


def coverage(
    model: nn.Module, inputs: Inputs, rules: RulesLike = None, *, wrt: Wrt = None
) -> Report:
    """Tell which rule each node would get, and which ops have none, without an explanation.

    Args:
        model: Any module that torch.export can trace, in evaluation mode. It is not modified.
        inputs: Example inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        rules: A composite, its name, or a list of (selector, rule); None picks by what the graph
            holds. Details are in the help of ``lrpfx.explain``.
        wrt: See ``lrpfx.explain``.

    Returns:
        The report of an ``Explainer``. Ops that the op table does not know are no error here:
        they are rows without a rule, listed by ``Report.unsupported`` and above the table.
        ``Report.ruled`` is the fraction that has one.

    Raises:
        LrpError: As ``explain``, for everything else.
    """
    try:
        return Explainer(model, inputs, rules, wrt=wrt).report
    except UnsupportedOpError:
        with TRACING:
            return _partial(model, inputs, rules, wrt)


def _partial(model: nn.Module, inputs: Inputs, rules: RulesLike, wrt: Wrt) -> Report:
    captured, program, _ = capture(model, inputs)
    graph = canonize(program, explained_of(chosen_inputs(model, inputs, wrt))).graph
    live, unknown = annotate_known(graph, find_starts(graph), captured.prefix)
    plan = assign(records(graph), rules, model)
    report = make_report(plan, constants(graph, live), ())
    rows = {row.node: row for row in (*report.rows, *map(_row, unknown))}
    return replace(report, rows=tuple(rows[n.name] for n in graph.nodes if n.name in rows))


def _row(unknown: Unknown) -> Row:
    return Row(
        node=unknown.name,
        module=str(unknown.modules[-1]) if unknown.modules else "",
        op=op_name(unknown.target),
        kind="",
        rule="",
        why=unknown.call,
        shape=unknown.shape,
        source=unknown.source,
        inputs=unknown.inputs,
    )
