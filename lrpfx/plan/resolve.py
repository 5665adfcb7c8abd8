"""``rules=`` -> the composites it stands for, the default by what is in the graph."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence

from lrpfx.composites import NAMED, AttnLRP, Composite, Entry, EpsilonAll, EpsilonPlus, Named
from lrpfx.errors import RuleError, SelectorError

RulesLike = Composite | str | Sequence[Entry] | None


def by_name(name: str) -> Composite:
    """The composite of a snake_case name, with its default parameters.

    Raises:
        SelectorError: No composite has that name, or it has no defaults.
    """
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=3)
        raise SelectorError(
            f"there is no composite {name!r}.",
            fix=f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"the names are {', '.join(NAMED)}.",
        )
    required = [
        p.name
        for p in inspect.signature(NAMED[name]).parameters.values()
        if p.default is inspect.Parameter.empty
    ]
    if required:
        cls = NAMED[name].__name__
        raise SelectorError(
            f"composite {name!r} has parameters without defaults: {', '.join(required)}.",
            fix=f"give lrpfx.composites.{cls}({', '.join(p + '=...' for p in required)}).",
        )
    return NAMED[name]()  # type: ignore[call-arg]  # those without required parameters


def resolve(rules: RulesLike, kinds: set[str]) -> tuple[tuple[Composite, ...], str]:
    """The layers of composites that ``rules`` stands for, uppermost first, and how it was read.

    Args:
        rules: What the user gave.
        kinds: Op kinds in the graph, by which the default is picked.

    Raises:
        SelectorError: Unknown name.
        RuleError: ``rules`` is nothing that can be read as rules.
    """
    default: Composite
    if {"softmax", "matmul"} <= kinds:
        default, reason = AttnLRP(), "the graph has attention"
    elif "conv" in kinds:
        default, reason = EpsilonPlus(), "the graph has convolutions"
    else:
        default, reason = EpsilonAll(), "the graph has no convolutions"
    if rules is None:
        return (default,), f"{default.name} (default: {reason})"
    if isinstance(rules, str):
        return (by_name(rules),), rules
    if isinstance(rules, Named):
        return (rules,), rules.name
    if isinstance(rules, Composite):
        own = rules
    elif isinstance(rules, (list, tuple)):
        own = Composite(rules)
    else:
        raise RuleError(
            f"rules={rules!r} is no composite, name or list of (selector, rule).",
            fix="give a name such as 'epsilon_plus', a composite, or [('conv', lrpfx.ZPlus())].",
        )
    return (own, default), f"{len(own.entries)} entries over {default.name} (default: {reason})"
