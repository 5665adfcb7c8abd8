"""What grows as an exponential and is summed up in a divisor -> ``exp``, however it is written."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.forms import exponents
from lrpfx.canonize.hold import is_inverse
from lrpfx.canonize.insert import copied, insert
from lrpfx.canonize.measure import Measured
from lrpfx.canonize.same import Same
from lrpfx.canonize.softmaxes.joined import is_sum, quotients_of
from lrpfx.canonize.softmaxes.proportional import NORM, kind_of
from lrpfx.canonize.whole import is_pointwise, pointwise_regions
from lrpfx.ops import bound_arguments, live_names, output_leaves, precision, varying

aten = torch.ops.aten


def whole_exponentials(module: fx.GraphModule) -> fx.GraphModule:
    """``exp(a) * exp(b)`` -> ``exp(a + b)``, ``sigmoid(a) / sigmoid(-a)`` -> ``exp(a)``.

    So is all that is summed up in a divisor, as weights of a softmax are: the rules for products
    and quotients would give other relevance. Whether a node is an exponential is measured: for
    numbers that are drawn for a and b it must be k exp(c a + d b), where c and d are numbers, and k
    is what it is for zeros.
    """
    graph = module.graph
    if not any(node.target is aten.div.Tensor or is_inverse(node) for node in graph.nodes):
        return module
    live, measured = varying(graph), Measured(module)
    finest = max(map(precision, output_leaves(graph)), default=0)
    belows = {below for _, below in quotients_of(graph, live)}
    pending, seen, written = sorted(belows), set[fx.Node](), False
    while pending:
        node = pending.pop()
        if node in seen or node.target is aten.exp.default:
            continue
        seen.add(node)
        if kind_of(node, live) == "prod":
            written |= precision(node) >= finest and _prod_whole(node, measured, live)
            continue
        inverse = node in belows and is_inverse(node)
        if not inverse and precision(node) >= finest and _make_whole(node, measured, live):
            written = True
        elif node.target is NORM or is_sum(node, live) or inverse:
            pending += [n for n in node.all_input_nodes if n in live]
    if written:
        graph.eliminate_dead_code()
    return module


def _make_whole(node: fx.Node, measured: Measured, live: set[fx.Node]) -> bool:
    """Write a node, and those that compute the same, as an exponential, if it is one."""
    if not is_pointwise(node) or kind_of(node, live) == "scale":
        return False  # what it scales may be
    for region in pointwise_regions(node, live, measured.same):
        found = exponents(measured, region)
        if found is not None:
            same = Same(node.graph)
            first, entries = same.first(node), [same.first(n) for n in region.entries]
            with node.graph.inserting_before(first):
                new = _written(first, dict(zip(entries, found.powers, strict=True)), live)
                if not found.plain:
                    new = _times(new, first, entries, [same.first(n) for n in region.inside])
            live.add(new)
            for other in same.group(node):
                other.replace_all_uses_with(new)
            return True
    return False


#: Of ops that multiply entries: what adds them up.
_SUMS: dict[Any, Any] = {
    aten.prod.default: aten.sum.default,
    aten.prod.dim_int: aten.sum.dim_IntList,
    aten.cumprod.default: aten.cumsum.default,
}


def _prod_whole(node: fx.Node, measured: Measured, live: set[fx.Node]) -> bool:
    """Write a product of the entries of exponentials, moved or put together maybe, as one."""
    same = Same(node.graph)
    node = same.first(node)
    (x,) = (n for n in node.all_input_nodes if n in live)
    pending, logarithms = [x], dict[fx.Node, fx.Node | None]()
    while pending:
        end = pending.pop()
        if end in logarithms:
            continue
        logarithms[end] = None
        inputs = [n for n in end.all_input_nodes if n in live]
        if end.target is aten.exp.default:
            logarithms[end] = inputs[0]
        elif _is_move(end, live):
            pending += inputs
        elif _make_whole(end, measured, live) and x.target is not end.target:
            return _prod_whole(node, measured, live)  # now with an exponential in its place
        else:
            return False
    given = bound_arguments(node)
    with node.graph.inserting_before(node):
        copies = {n: exponent for n, exponent in logarithms.items() if exponent is not None}
        for end in sorted(n for n in logarithms if n not in copies):
            copies[end] = copied(end, copies, node)
        dims = {} if "dim" not in given else {"dim": given["dim"]}
        target = _SUMS[node.target]
        if target is aten.sum.dim_IntList:
            dims = {"dim": [given["dim"]], "keepdim": given["keepdim"]}
        total = insert(node, target, (copies[x],), dims)
        new = insert(node, aten.exp.default, (total,))
    live.update([*copies.values(), total, new])
    for other in same.group(node):
        other.replace_all_uses_with(new)
    return True


def _is_move(node: fx.Node, live: Collection[fx.Node]) -> bool:
    op = ops.find(node.target, frozenset(live_names(node, live)))
    return node.target is operator.getitem or (op is not None and op.family == "move")


def _written(like: fx.Node, powers: Mapping[fx.Node, float], live: set[fx.Node]) -> fx.Node:
    """``exp(c a + d b)``; at the insert point."""
    total: fx.Node | None = None
    for node, power in sorted(powers.items(), key=lambda item: item[1] < 0):
        if power == 0:
            continue
        number = power if total is None else abs(power)
        term = node if number == 1 else insert(like, aten.mul.Tensor, (node, number))
        if total is None:
            total = term
        else:
            target = aten.add.Tensor if power > 0 else aten.sub.Tensor
            total = insert(like, target, (total, term))
        live.update((term, total))
    assert total is not None
    new = insert(like, aten.exp.default, (total,))
    live.add(new)
    return new


def _times(
    exponential: fx.Node, end: fx.Node, entries: Sequence[fx.Node], inside: Sequence[fx.Node]
) -> fx.Node:
    """The exponential times the value of ``end`` for zeros."""
    copies = {n: insert(end, aten.zeros_like.default, (n,)) for n in entries}
    for node in inside:
        copies[node] = copied(node, copies, end)
    return insert(end, aten.mul.Tensor, (exponential, copies[end]))
