"""A node -> by what power of a factor on it what is computed from it grows."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.hold import is_inverse
from lrpfx.ops import SHAPED, live_names, nodes_in

aten = torch.ops.aten

NORM = aten.linalg_vector_norm.default
#: Kinds of ops that are proportional to their input, those with a guard such as a small number.
SUMS = {"reduction", "avg_pool", "sum", "linear"}
PROPORTIONAL = {*SUMS, "scale", "shift", "clamp", "max", "where", "abs", "relu"}


def powers_of(start: fx.Node) -> dict[fx.Node, float | None]:
    """By what power of a factor on ``start`` the nodes grow that depend on it, None for none.

    Where that is 0 or None it is followed no further.
    """
    powers: dict[fx.Node, float | None] = {start: 1}
    pending = set(start.users)
    while pending:
        node = min(pending)
        pending.remove(node)
        if node.op == "output":
            continue
        powers[node] = _power(node, powers)
        if powers[node]:
            pending.update(node.users)
    return powers


def _power(node: fx.Node, powers: Mapping[fx.Node, float | None]) -> float | None:
    given = [powers[n] for n in nodes_in(node.args) if n in powers]
    if node.target in SHAPED:
        given = given[:1]
    if any(power is None for power in given):
        return None
    known = [power for power in given if power is not None]
    if node.target in (operator.getitem, aten.detach.default, NORM):
        return known[0]
    if node.target is aten.div.Tensor:
        above, below = (n in powers for n in node.args)
        return known[0] * above - known[-1] * below
    if is_inverse(node):
        return (
            -known[0] if node.target is aten.reciprocal.default or node.args[1:] == (-1,) else None
        )
    if (exponent := exponent_of(node)) is not None:
        return exponent * known[0]
    op = ops.find(node.target, frozenset(live_names(node, powers)))
    if op is None:
        return None
    if op.family in ("product", "matmul"):
        return sum(known)
    alike = len(set(known)) == 1 and (op.family in ("move", "select") or op.kind in PROPORTIONAL)
    return known[0] if alike else None


def exponent_of(node: fx.Node) -> float | None:
    """The positive number that a node is a power by, None if it is none."""
    if node.target is aten.pow.Tensor_Scalar:
        exponent: Any = node.args[1]
        return float(exponent) if isinstance(exponent, (int, float)) and exponent > 0 else None
    if node.target is aten.square.default:
        return 2.0
    return 0.5 if node.target is aten.sqrt.default else None


def kind_of(node: fx.Node, live: Container[fx.Node]) -> str:
    """The kind of a node's op, "" if it has none."""
    op = ops.find(node.target, frozenset(live_names(node, live)))
    return "" if op is None else op.kind
