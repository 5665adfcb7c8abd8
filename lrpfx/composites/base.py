"""An ordered list of (selector, rule); the first that matches a node and fits it wins."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lrpfx import rules
from lrpfx.composites.select import Selector, describe, input_scales
from lrpfx.errors import RuleError
from lrpfx.neuralize import Offset
from lrpfx.rules import (
    Bilinear,
    Epsilon,
    Gradient,
    Norm,
    Pass,
    Rule,
    StabilizerLike,
    Taylor,
    Uniform,
    ZeroParams,
)

Entry = tuple[Selector, Rule]
#: What stands for entries: pairs, a single one, a dict, or a rule for every op that it fits.
Entries = Iterable["Entry | Rule"] | Mapping[Any, Rule] | Entry | Rule
#: The complete composites of this library, by name.
NAMED: dict[str, type[Named]] = {}


class Composite:
    """An ordered list of (selector, rule), which may stand in front of another one.

    ``EpsilonPlusFlat() + [("layer4.*", Gamma())]`` are entries of your own, which come first, in
    front of those of the composite.

    Args:
        entries: Pairs of selector and rule; the first match wins. A dict, a single pair, or a rule
            for every op that it fits, stand for such a list.
        over: The composite that the entries stand in front of; None for the default. The named
            composites below are complete, and stand in front of nothing.

    Raises:
        RuleError: An entry is no pair of a selector and a rule.
    """

    def __init__(self, entries: Entries, over: Composite | None = None) -> None:
        self.entries = tuple(map(_entry, _listed(entries)))
        self.over = over

    #: What it is registered as, if it is.
    _registered = ""

    @property
    def name(self) -> str:
        """The name it can be given by, "rules" for a list of the user's own."""
        names = (name for name, cls in NAMED.items() if cls is type(self))
        return self._registered or next(names, "rules")

    def called(self, name: str) -> Composite:
        """The same under a name."""
        found = copy.copy(self)
        found._registered = name
        return found

    def __add__(self, entries: Entries) -> Composite:
        """The composite with entries of one's own, which come first."""
        return Composite([*_listed(entries), *self.entries], over=self.over)

    def __radd__(self, entries: Entries) -> Composite:
        """The same: entries of one's own come first, on whichever side they are written."""
        return self + entries

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}(["]
        lines += [f"    ({describe(selector)}, {rule})," for selector, rule in self.entries]
        return "\n".join([*lines, "])" if self.over is None else f"], over={self.over.name})"])


class Offered(tuple[Selector, Rule]):
    """An entry of a named composite: these are made for any model, and need not match anything."""


class Named(Composite):
    """A complete rule set, for any model; it stands in front of no other."""

    def __init_subclass__(cls, name: str = "", **keywords: Any) -> None:
        """Take in a composite under its name; one of the user's own needs none."""
        super().__init_subclass__(**keywords)
        if name:
            NAMED[name] = cls

    def __init__(self, entries: Iterable[Entry]) -> None:
        super().__init__(map(Offered, entries))

    def __add__(self, entries: Entries) -> Composite:
        """Entries of your own in front of the composite."""
        return Composite(entries, over=self)


def base_map(stabilizer: StabilizerLike, affine: Rule) -> list[Entry]:
    """What all relevance composites share, for everything but conv and linear layers.

    Activations Pass; residual sums, average pooling, batch norm that could not be folded, constant
    factors and summands Norm; layer, group and instance norm Norm with their 1 / std as a
    constant; products of live tensors Uniform, matrix products Bilinear, softmax Taylor; moves
    and selections follow the gradient. Shifts and scales of an input before its first layer Pass:
    relevance of the normalised pixel is the pixel's. So do points of reference of ``neuralize``.

    Args:
        stabilizer: Of Norm.
        affine: Rule of affine ops with weights that nothing else is said of.
    """
    return [
        ("activation", Pass()),
        (input_scales, Pass()),
        (Offset, Pass()),
        ("affine", Norm(stabilizer)),
        ("affine", affine),
        ("normalize", Norm(stabilizer)),
        ("product", Uniform()),
        ("matmul", Bilinear(stabilizer)),
        ("softmax", Taylor()),
        ("move", Gradient()),
        ("select", Gradient()),
    ]


def conv_and_linear(
    conv: Rule, epsilon: StabilizerLike, stabilizer: StabilizerLike, zero_params: ZeroParams
) -> list[Entry]:
    """A rule on convolutions, Epsilon on linear layers, and what all composites share."""
    linear = Epsilon(epsilon, zero_params=zero_params)
    return [("conv", conv), ("linear", linear), *base_map(stabilizer, linear)]


def _listed(given: Any) -> list[Any]:
    """What stands for a list of entries, as one."""
    if isinstance(given, Composite):
        if isinstance(given, Named):
            name = type(given).__name__
            raise RuleError(
                f"{name} is complete, and cannot stand in front of another composite.",
                fix=f"lay entries of your own over it: {name}() + [(selector, rule), ...].",
            )
        return list(given.entries)
    if isinstance(given, Mapping):
        return list(given.items())
    single = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Rule)
    if isinstance(given, Rule) or (single and not isinstance(given[0], Rule)):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise RuleError(f"{given!r} are no entries.", fix=_PAIRS)
    return list(given)


_PAIRS = 'give pairs such as ("conv", lrpfx.ZPlus()) or ("layer4.*", lrpfx.Epsilon()).'


def _entry(given: Any) -> Entry:
    """An entry, if it is one; a rule by itself is for every op that it fits."""
    if isinstance(given, Rule):
        return "*", given
    if isinstance(given, Composite):
        raise RuleError(
            f"{type(given).__name__} stands among entries.",
            fix="put last the composite, or add the entries to it: composite + [...].",
        )
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise RuleError(f"{given!r} is no (selector, rule) pair.", fix=_PAIRS)
    selector, rule = given
    several = isinstance(selector, (tuple, list))
    for one in selector if several else [selector]:
        if not isinstance(one, str) and not callable(one):
            raise RuleError(f"{one!r} is no selector.", fix=_PAIRS)
    if several and not selector:
        raise RuleError(f"no selector is given for {rule}.", fix=_PAIRS)
    if not isinstance(rule, Rule):
        raise RuleError(f"{rule!r} is no rule.", fix=_instead(selector, rule))
    if isinstance(given, Offered):
        return given
    return tuple(selector) if several else selector, rule


def _instead(selector: Selector, rule: Any) -> str:
    """How an entry is written that has a class, or a name, in the place of its rule."""
    name = rule.__name__ if isinstance(rule, type) and issubclass(rule, Rule) else str(rule)
    known = {n.lower(): n for n in rules.__all__ if isinstance(getattr(rules, n), type)}
    near = difflib.get_close_matches(name.lower().replace("_", ""), known, n=1, cutoff=0.8)
    if isinstance(rule, type) and issubclass(rule, Rule) or isinstance(rule, str) and near:
        shown = f"lrpfx.{known[near[0]]}" if near else name
        return f"an instance is needed: ({describe(selector)}, {shown}(...))."
    return _PAIRS
