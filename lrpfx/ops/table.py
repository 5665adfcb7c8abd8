"""The op table: ATen overload -> what kind of op it is, which arguments may be live, its map.

Everything lrpfx knows about an operation is one row here. An op that depends on the explained
input and has no row is an error; nothing falls back to the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lrpfx.ops import maps, table_affine, table_moves, table_products
from lrpfx.ops.call import Composed, Op, Paired, Sign, always, inherited, never
from lrpfx.ops.row import Row, row

_COMPOSED = {
    "activation": Op("composed", "activation", (frozenset(["x"]),)),
    "softmax": Op("softmax", "softmax", (frozenset(["x"]),), nonneg=always),
}
_TABLE: dict[Any, list[Op]] = {}


def find(target: Any, live: frozenset[str]) -> Op | None:
    """The row for a call of ``target`` whose live arguments are exactly ``live``."""
    if isinstance(target, Paired):
        return _paired(find(target.target, live))
    composed = isinstance(target, Composed)
    rows = (_COMPOSED[target.family],) if composed else _TABLE.get(target) or _named(target)
    return next((op for op in rows if live in op.live), None)


@functools.cache
def _named(target: Any) -> tuple[Op, ...]:
    """Rows of an op of another package, which there is once that is imported."""
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    if name not in table_moves.NAMED:
        return ()
    kind, family = table_moves.NAMED[name]
    return tuple(op for _, op in row([target], kind, family, nonneg=inherited))


def _paired(op: Op | None) -> Op | None:
    """The row of an op on pairs, which make complex numbers, by what it is on real numbers."""
    if op is None or op.kind == "prod":
        return None
    if op.family in ("product", "matmul"):  # z = (a c - b d, a d + b c)
        return replace(op, kind="matmul", family="matmul", nonneg=never)
    if op.family == "affine":
        plain = op.affine if op.affine is maps.linear_op else maps.affine_op
        # A factor mixes the two parts, so nothing that holds for scales and shifts holds here.
        kind = "fourier" if op.keeps_shape else op.kind
        return replace(op, kind=kind, affine=plain, weighted=False, nonneg=never)
    return replace(op, nonneg=never) if op.family in ("move", "constant") else None


def rows() -> Iterable[tuple[Any, Op]]:
    """All rows, with the overload each belongs to."""
    return ((target, op) for target, ops in _TABLE.items() for op in ops)


def kinds() -> set[str]:
    """All kinds in the table."""
    return {op.kind for _, op in rows()} | {op.kind for op in _COMPOSED.values()}


#: Families that an op can be added to: their rules need to know no more of it than its row.
_OPEN = ("affine", "activation", "move", "select", "constant")


def register_op(
    target: torch._ops.OpOverload,
    kind: str,
    family: str,
    *,
    live: Sequence[str] | str | None = None,
    affine: maps.Builder | None = None,
    weighted: bool = False,
    nonneg: Sign = never,
) -> None:
    """Add a row to the op table, or replace the one with the same live arguments.

    Args:
        target: A custom (or ATen) overload, such as ``torch.ops.my_ops.running_total.default``.
        kind: The name by which selectors reach it.
        family: One of "affine", "activation", "move", "select", "constant"; the others have rules
            of their own for each op.
        live: Name of the argument that may depend on the explained input, or several names that
            may do so each by itself; the op's first argument by default.
        affine: For the family "affine": builds the ``AffineMap``. By default the op counts as
            linear in its live input, without weights.
        weighted: Whether that map has weights, so that rules can split them by sign.
        nonneg: When the output is proven non-negative.

    Raises:
        ValueError: ``target`` is no overload, the family is unknown, or an argument does not
            exist in the op's schema.

    Example:
        >>> register_op(torch.ops.my_ops.running_total.default, "running_total", "affine")
    """
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(
            f"register_op: {target!r} is no op overload; name one, "
            "such as torch.ops.my_ops.running_total.default."
        )
    if family not in _OPEN:
        raise ValueError(f"register_op: family {family!r} is none of {list(_OPEN)}.")
    if not isinstance(kind, str):
        raise ValueError(f"register_op: kind {kind!r} is no name.")
    names = [argument.name for argument in target._schema.arguments]
    alternatives = [names[0]] if live is None else [live] if isinstance(live, str) else list(live)
    unknown = set(alternatives) - set(names)
    if unknown:
        raise ValueError(f"register_op: {target} has no arguments {sorted(unknown)}, only {names}.")
    _add(row([target], kind, family, alternatives, affine=affine, weighted=weighted, nonneg=nonneg))


def _add(rows: Iterable[Row]) -> None:
    """Enter rows; each replaces one with the same live arguments."""
    for target, op in rows:
        old = _TABLE.get(target, [])
        _TABLE[target] = [o for o in old if not set(o.live) & set(op.live)] + [op]


for _rows in (
    table_affine.WEIGHTED,
    table_affine.UNWEIGHTED,
    table_affine.ARITHMETIC,
    table_affine.NORMS,
    table_products.PRODUCTS,
    table_products.SOFTMAX,
    table_products.ACTIVATIONS,
    table_moves.SELECTIONS,
    table_moves.MOVES,
    table_moves.CONSTANTS,
):
    _add(_rows)
