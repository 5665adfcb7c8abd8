"""composite + graph -> plan: for each node a rule, and why this rule."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lrpfx import ops
from lrpfx.composites import (
    Attending,
    Auto,
    Composite,
    Entry,
    First,
    Offered,
    Selector,
    describe,
)
from lrpfx.errors import RuleError, SelectorError, some
from lrpfx.ops import FAMILIES, Record
from lrpfx.plan.resolve import RulesLike, resolve
from lrpfx.rules import Gradient, ReLURule, Rule, Stop


@dataclass(frozen=True)
class Assignment:
    """The rule of one node, and the entry it comes from."""

    record: Record
    rule: Rule
    why: str


@dataclass(frozen=True)
class Plan:
    """One assignment per live node, in execution order.

    Args:
        assignments: By node name.
        rules: How ``rules=`` was read, for the report.
        notes: What the user may not have meant, for the report.
        by_gradient: Whether all ops without weights keep their gradient, but for ReLUs.
    """

    assignments: dict[str, Assignment]
    rules: str
    notes: tuple[str, ...] = ()
    by_gradient: bool = False


def assign(
    records: Sequence[Record],
    rules: RulesLike,
    model: nn.Module,
    *,
    again: Plan | None = None,
    stop: bool = True,
) -> Plan:
    """Give every record the rule of the first entry that matches it and fits it.

    Args:
        records: All live nodes.
        rules: See ``lrpfx.explain``.
        model: The model, for selectors that are module classes.
        again: The plan before nodes have become constants, or live; entries need not match what is
            left.
        stop: Whether entries with the rule Stop count. They do once: where what they stopped is
            constant, another node may be first, or the gate of a product.

    Raises:
        SelectorError: An entry of the user's own matches nothing, or a name is unknown.
        RuleError: A rule is laid on ops named outright that it does not fit.
    """
    layers, reading = resolve(rules, records)
    reading = reading if again is None else again.rules
    chosen: dict[str, Assignment] = {}
    notes: list[str] = []
    for composite in layers:
        for entry in composite.entries:
            selector, rule = entry
            if isinstance(rule, Stop) and not stop:
                continue
            type(rule).settle()
            matched = [r for r in records if _matches(selector, r, model)]
            reasons = {r.name: rule.fits(r.op) for r in matched}
            own = not isinstance(entry, Offered) and again is None
            if own:
                notes += _check(selector, rule, matched, reasons, records, model)
            elif not matched and again is None and _is_a_part(entry, composite):
                which = ("modules " if _is_path(selector) else "") + describe(selector)
                notes.append(f"{composite.name} lays {rule} on {which}, and here are none")
            decided = [r for r in matched if not reasons[r.name] and r.name not in chosen]
            why = f"{composite.name}: {_why(selector)}"
            chosen |= {r.name: Assignment(r, rule, why) for r in decided}
            if own and not decided:
                notes.append(
                    f"({describe(selector)}, {rule}) decides nothing: entries before it match first"
                )
    missing = [r for r in records if r.name not in chosen]
    if missing:
        raise RuleError(
            f"{len(missing)} node(s) are left without a rule by {reading}.",
            where=[str(r) for r in missing],
            fix="add an entry for their kind.",
        )
    turned = [
        a
        for a in chosen.values()
        if a.rule.by_sample and a.record.shape[:1] != ("N",) and "N" in a.record.shape
    ]
    if turned:
        raise RuleError(
            "a stabilizer that is scaled by the norm of a sample is laid on ops whose first "
            "dimension is not that of the samples.",
            where=some([f"{a.record} under {a.rule}" for a in turned]),
            fix="give Stabilizer(..., dim=...), or a number, for these.",
        )
    entries = [entry for composite in layers for entry in composite.entries]
    rest = next((rule for selector, rule in entries if selector == "*"), None)
    by_gradient = isinstance(rest, Gradient) and all(
        isinstance(a.rule, (Gradient, ReLURule, Stop)) or a.record.op.weighted
        for a in chosen.values()
    )
    ordered = {r.name: chosen[r.name] for r in records}
    return Plan(ordered, reading, tuple(notes), by_gradient)


def _why(selector: Selector) -> str:
    if isinstance(selector, tuple):
        return " or ".join(map(_why, selector))
    if selector == "*":
        return "every op it fits"
    if isinstance(selector, str):
        if selector in FAMILIES:
            return f"family {selector}"
        return f"kind {selector}" if selector in ops.kinds() else f"path {selector!r}"
    if isinstance(selector, (First, Attending)):
        return str(selector)
    if isinstance(selector, type):
        return f"class {selector.__name__}"
    return f"predicate {describe(selector)}"


def _matches(selector: Selector, r: Record, model: nn.Module) -> bool:
    if isinstance(selector, tuple):
        return any(_matches(one, r, model) for one in selector)
    if isinstance(selector, str):
        if selector == "*":
            return True
        if selector in FAMILIES:
            return r.family == selector
        if r.kind == selector:
            return True
        named = any(fnmatch.fnmatchcase(c.path, selector) for c in r.modules)
        return named and selector not in ops.kinds()
    if isinstance(selector, type):
        calls = ("", *(c.path for c in r.modules))
        return any(isinstance(model.get_submodule(path), selector) for path in calls)
    if isinstance(selector, nn.Module):
        raise SelectorError(
            f"a module of class {type(selector).__name__} is no selector.",
            fix='give its path, such as "layer4.*", or its class.',
        )
    try:
        return bool(selector(r))
    except Exception as error:  # the predicate is the user's code, and may raise anything
        raise SelectorError(
            f"predicate {describe(selector)} fails: {type(error).__name__}: {error}",
            where=[str(r)],
            fix="a predicate takes a node record; see lrpfx.ops.Record for what it has.",
        ) from error


def _is_a_part(entry: Entry, composite: Composite) -> bool:
    """Whether an entry makes a composite what it is: it alone has its rule, and is no base."""
    selector, rule = entry
    if isinstance(composite, Auto):  # it has a part for every model
        return False
    elsewhere = any(other is not entry and other[1] == rule for other in composite.entries)
    base = isinstance(selector, str) and selector in {"*", *FAMILIES}
    return isinstance(rule, Stop) or not (base or elsewhere)


def _is_path(selector: Selector) -> bool:
    return isinstance(selector, str) and selector not in {"*", *FAMILIES, *ops.kinds()}


def _names_outright(selector: Selector) -> bool:
    """Kinds and predicates name single ops; paths, classes, families and "*" name regions."""
    if isinstance(selector, str):
        return selector in ops.kinds() and selector not in FAMILIES
    return not isinstance(selector, type)


def _check(
    selector: Selector,
    rule: Rule,
    matched: Sequence[Record],
    reasons: dict[str, str],
    records: Sequence[Record],
    model: nn.Module,
) -> list[str]:
    """Raise for an entry of the user's own that matches nothing or names what it does not fit.

    Returns:
        A note for each of several selectors that matches nothing, or only modules that the run
        does not need.
    """
    several = selector if isinstance(selector, tuple) else (selector,)
    if not matched and (idle := [path for one in several for path in _idle(one, records, model)]):
        return [
            f"selector {describe(selector)} matches only modules without an op that carries "
            f"relevance, never called or fed by constants: {', '.join(some(idle, 3))}"
        ]
    if not matched:
        raise SelectorError(
            f"selector {describe(selector)} matches nothing in this model.",
            fix=_near_misses(several[0], records, model),
        )
    notes = []
    for one in several:
        named = [r for r in matched if _matches(one, r, model)]
        misfits = [r for r in named if reasons[r.name]]
        if misfits and (_names_outright(one) or len(misfits) == len(named)):
            raise RuleError(
                f"{rule} does not fit what {describe(one)} names.",
                where=some([f"{r}: {reasons[r.name]}" for r in misfits]),
                fix="choose another rule for these ops, or a selector that leaves them out.",
            )
        if not named:
            notes.append(f"selector {describe(one)} of {describe(selector)} matches nothing")
    return notes


def _idle(selector: Selector, records: Sequence[Record], model: nn.Module) -> list[str]:
    """The modules that a path matches, if none of them has been folded into another's op."""
    if not isinstance(selector, str) or not _is_path(selector):
        return []
    paths = [p for p, _ in model.named_modules() if p and fnmatch.fnmatchcase(p, selector)]
    folded = {c.path for r in records for c in r.folded}
    return [] if folded.intersection(paths) else paths


def _near_misses(selector: Selector, records: Sequence[Record], model: nn.Module) -> str:
    kinds = sorted({r.kind for r in records} | {r.family for r in records})
    paths = sorted({c.path for r in records for c in r.modules})
    folded = {c.path: r for r in records for c in r.folded}
    if isinstance(selector, type):
        for path, r in folded.items():
            if isinstance(model.get_submodule(path), selector):
                return f"{path} was folded into {r.module}; select {r.module!r}."
    if selector in ("scale", "shift") and folded:
        return "constants per channel are folded into the layer before them; select that."
    if isinstance(selector, str):
        for path, r in folded.items():
            if fnmatch.fnmatchcase(path, selector):
                return f"{path} was folded into {r.module}; select {r.module!r}."
        near = difflib.get_close_matches(selector, [*kinds, *paths], n=5, cutoff=0.5)
        if near:
            return f"did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
    return f"kinds here: {', '.join(kinds)}; module paths: {shown}"
