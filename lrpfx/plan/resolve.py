"""``rules=`` -> the composites it stands for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

from lrpfx.composites import NAMED, Auto, Composite, CompositeName, Entries, Named
from lrpfx.errors import RuleError, SelectorError
from lrpfx.ops import Record
from lrpfx.rules import Rule

#: A composite, its class or its name; entries, the last of which may be what they are laid over.
RulesLike = Composite | type[Composite] | CompositeName | str | Entries | Sequence[Any] | None

_CLASSES = {cls.__name__: name for name, cls in NAMED.items()}
#: What users have registered.
_OWN: dict[str, Composite] = {}
_T = TypeVar("_T", bound=Callable[[], Any])


@overload
def register_composite(name: str, rules: RulesLike | Callable[[], Any]) -> None: ...
@overload
def register_composite(name: str) -> Callable[[_T], _T]: ...
def register_composite(
    name: str, rules: RulesLike | Callable[[], Any] = None
) -> Callable[[_T], _T] | None:
    """Let ``rules=name`` stand for rules of your own, also below entries and on the command line.

    Args:
        name: A new name, such as "my_rules"; one of yours is replaced.
        rules: What ``rules=`` takes, or a function or class without arguments that makes it; left
            out, this is a decorator of such a function or class.

    Raises:
        SelectorError: The name is that of a composite of lrpfx, or no name.
        RuleError: ``rules`` is nothing that can be read as rules.

    Example:
        >>> lrpfx.register_composite("gamma_top", [("layer4.*", lrpfx.Gamma()), "epsilon_plus"])
        >>> lrpfx.explain(model, x, rules="gamma_top")
    """
    if not isinstance(name, str) or not name.isidentifier() or name in NAMED or name in _CLASSES:
        taken = "a composite of lrpfx" if name in NAMED or name in _CLASSES else "no name"
        raise SelectorError(
            f"register_composite: {name!r} is {taken}.", fix="give a name such as 'my_rules'."
        )

    def register(made: _T) -> _T:
        try:
            inspect.signature(made).bind()
        except TypeError as error:
            raise RuleError(
                f"register_composite: {made!r} has parameters without defaults.",
                fix="register what it makes of yours, or a function without arguments.",
            ) from error
        _OWN[name] = read_rules(made()).called(name)
        return made

    if rules is None:
        return register
    composite = isinstance(rules, Composite)
    register(rules if callable(rules) and not composite else lambda: rules)
    return None


def by_name(name: str) -> Composite:
    """The composite of a name, with its default parameters.

    Args:
        name: As it is written in ``NAMED``, or as its class is.

    Raises:
        SelectorError: No composite has that name, or it has no defaults.
    """
    if name in _OWN:
        return _OWN[name]
    name = _CLASSES.get(name, name)
    if name not in NAMED:
        near = _near(name)
        raise SelectorError(
            f"there is no composite {name!r}.",
            fix=f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"the names are {', '.join([*NAMED, *_OWN])}.",
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


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name, [*NAMED, *_OWN], n=3)


def read_rules(rules: Any) -> Composite:
    """The composite that ``rules`` stands for; None is not read here.

    Raises:
        SelectorError: Unknown name.
        RuleError: ``rules`` is nothing that can be read as rules.
    """
    if isinstance(rules, Composite):
        return rules
    if isinstance(rules, str):
        return by_name(rules)
    if isinstance(rules, type) and issubclass(rules, Named):
        return by_name(_CLASSES.get(rules.__name__, rules.__name__))
    if isinstance(rules, (list, tuple)) and rules and _is_base(rules[-1]):
        *own, last = rules
        return read_rules(last) + own if own else read_rules(last)
    if isinstance(rules, type) or not hasattr(rules, "__iter__") and not isinstance(rules, Rule):
        shown = f"{rules.__name__}(...)" if isinstance(rules, type) else "lrpfx.ZPlus()"
        if isinstance(rules, type) and issubclass(rules, Rule):
            raise RuleError(
                f"rules={rules.__name__} is the class of a rule.",
                fix=f"give an instance: rules={shown}, or [('conv', {shown})] for some of the ops.",
            )
        raise RuleError(
            f"rules={rules!r} is no composite, name, rule or list of (selector, rule).",
            fix="give a name such as 'epsilon_plus', a composite such as "
            f"lrpfx.composites.EpsilonPlus(), or [('conv', {shown})]; an Explainer takes the "
            "target when it is called: explainer(x, target).",
        )
    return Composite(rules)


def _is_base(last: Any) -> bool:
    """Whether the last item of a list is what the others are laid over."""
    if isinstance(last, str):
        return last in {*NAMED, *_OWN, *_CLASSES} or bool(_near(last))
    return isinstance(last, Composite) or (isinstance(last, type) and issubclass(last, Composite))


def resolve(rules: RulesLike, nodes: Iterable[Record]) -> tuple[tuple[Composite, ...], str]:
    """The layers of composites that ``rules`` stands for, uppermost first, and how it was read.

    Args:
        rules: What the user gave.
        nodes: Of the graph, for what is said of the default.

    Raises:
        SelectorError: Unknown name.
        RuleError: ``rules`` is nothing that can be read as rules.
    """
    default = Auto()
    named = f"{default.name} (default: {default.parts(nodes)})"
    if rules is None:
        return (default,), named
    composite = read_rules(rules)
    if isinstance(composite, Named):
        return (composite,), composite.name
    own = f"{composite.name}: " if composite.name != "rules" else ""
    count = len(composite.entries)
    reading = f"{own}{count} {'entry' if count == 1 else 'entries'} over"
    if composite.over is not None:
        return (composite, composite.over), f"{reading} {composite.over.name}"
    return (composite, default), f"{reading} {named}"
