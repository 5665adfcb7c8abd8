"""How the op table is written: overloads of one kind -> their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrpfx.ops import maps
from lrpfx.ops.call import Op, Sign, never
from lrpfx.ops.pools import Pool

#: An ATen overload, and what it is with one pattern of live arguments.
Row = tuple[Any, Op]

#: The kinds with f(0) = 0 for all their parameters, and a finite slope there.
_VANISHING = {"relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu"}
_VANISHING |= {"silu", "mish", "hardswish", "tanh", "hardshrink", "softshrink", "abs"}
_VANISHING |= {"square", "erf"}


def row(
    targets: Sequence[Any],
    kind: str,
    family: str,
    live: Sequence[str | tuple[str, ...]] = (),
    *,
    affine: maps.Builder | None = None,
    weighted: bool = False,
    nonneg: Sign = never,
    pool: Pool | None = None,
) -> list[Row]:
    """Rows for several overloads.

    Args:
        targets: The overloads.
        kind: See ``Op``, as the arguments that follow.
        family: See ``Op``.
        live: The patterns of live arguments, a name or several; the first argument alone by
            default.
        affine: By default an op of the family "affine" counts as linear, without weights.
        weighted: See ``Op``.
        nonneg: See ``Op``.
        pool: See ``Op``.
    """
    if family == "affine" and affine is None:
        affine = maps.linear_op
    found = []
    for target in targets:
        patterns = live or (target._schema.arguments[0].name,)
        sets = tuple(frozenset([p] if isinstance(p, str) else p) for p in patterns)
        vanishes = kind in _VANISHING
        found.append((target, Op(kind, family, sets, affine, weighted, nonneg, vanishes, pool)))
    return found
