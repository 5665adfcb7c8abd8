"""What counts as a constant for relevance: statistics of norms written by hand, and divisors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lrpfx import ops
from lrpfx.canonize.insert import insert
from lrpfx.ops import HELD, SHAPED, comes_from, is_floating, live_names, varying

aten = torch.ops.aten

#: Why a divisor is held.
DIVISOR = "divisor of a live tensor"

_STATISTICS = {aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction}
_STATISTICS |= {aten.std.dim, aten.std.default, aten.linalg_vector_norm.default}
_MEANS = {aten.mean.dim, aten.mean.default, aten.sum.dim_IntList}
_STEPS = {aten.add.Tensor, aten.clamp_min.default, aten.mul.Tensor, aten.div.Tensor}
_STEPS |= {aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default}
_STEPS |= {
    aten.pow.Tensor_Scalar,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.expand.default,
    aten.expand_as.default,
    aten.to.dtype,
    aten.clamp.default,
    aten.maximum.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.reshape.default,
    aten.view.default,
    aten.sub.Tensor,
}
#: What keeps a divisor from zero.
_GUARDS = {aten.add.Tensor, aten.clamp_min.default, aten.clamp.default}
#: Kinds that make inverses of inverses.
_OF_INVERSES = ("scale", "product", "pow", "square", "sqrt")
#: Products of several tensors.
PRODUCTS = {aten.mul.Tensor, aten.einsum.default, aten.matmul.default}
PRODUCTS |= {aten.mm.default, aten.bmm.default}


def hold_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """Marks ``rsqrt(mean(x * x) + eps)`` and its like as constants, as in layer norm.

    So a norm written by hand, ``x * rsqrt(mean(x * x) + eps)``, is a constant factor on x. The
    graph computes as before, and derivatives of the relevance still run through the statistic.
    What is no factor in the end (a norm that is itself the output), or multiplies without being
    divided by (an energy as a gate), stays live; but in ``x * (g / mean(g))``, g a statistic of
    that x, as ConvNeXt-V2 normalises responses, all of the factor is constant.
    """
    changing = varying(module.graph)
    statistical: set[fx.Node] = set()  # computed from statistics and constants alone
    for node in module.graph.nodes:
        read = node.all_input_nodes[:1] if node.target in SHAPED else node.all_input_nodes
        read = [n for n in read if n in changing]
        if _is_statistic(node) or (node.target in _STEPS and read and statistical.issuperset(read)):
            statistical.add(node)
    for node in module.graph.nodes:
        if _is_statistic(node) and _only_scales(node, statistical, _measured(node)):
            own = _is_of_what_it_scales(node, statistical)
            node.meta[HELD] = "statistic of a normalisation" if own else DIVISOR
    return module


def _is_of_what_it_scales(node: fx.Node, statistical: set[fx.Node]) -> bool:
    """Whether a statistic is one of the tensors that it scales, or of what these come from."""
    scaled, stack = [], [node]
    while stack:
        for user in (current := stack.pop()).users:
            if user in statistical:
                stack.append(user)
            else:
                scaled += [n for n in user.all_input_nodes if n is not current]
    of = _measured(node)
    return all(comes_from(n, of) or comes_from(of, n) for n in scaled)


def _measured(statistic: fx.Node) -> fx.Node:
    """What it is the statistic of."""
    squared = _mean_of_squares(statistic) or _mean_of_squares(statistic.args[0])
    return squared or statistic.all_input_nodes[0]


def _is_statistic(node: fx.Node) -> bool:
    """Whether the node is a variance, a standard deviation, a norm, or a mean of squares."""
    if node.target in _STATISTICS or _mean_of_squares(node) is not None:
        return True
    if node.target is not aten.sub.Tensor or node.kwargs:
        return False
    squares, mean = node.args[0], _squared(node.args[1])  # E[x^2] - E[x]^2
    of = _mean_of_squares(squares)
    return (
        of is not None
        and mean is not None
        and mean.target in _MEANS
        and mean.all_input_nodes[0] is of
    )


def _mean_of_squares(node: Any) -> fx.Node | None:
    """Of a mean, or sum, of squares what is squared."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in _MEANS:
        return _squared(node.all_input_nodes[0])
    if node.target is aten.einsum.default and len(node.all_input_nodes) == 1:
        terms = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
        squares = len(terms) == 2 and terms[0] == terms[1] and len(set(terms[0])) == len(terms[0])
        return node.all_input_nodes[0] if squares else None
    return None


def _squared(node: Any) -> fx.Node | None:
    """Of a square what is squared."""
    if not isinstance(node, fx.Node):
        return None
    twice = node.target is aten.mul.Tensor and node.args[0] is node.args[1]
    power = node.target is aten.pow.Tensor_Scalar and node.args[1] == 2
    if twice or power or node.target is aten.square.default:
        return node.all_input_nodes[0]
    return None


def _only_scales(
    node: fx.Node,
    statistical: set[fx.Node],
    of: fx.Node,
    inverted: bool = False,
    relative: bool = False,
) -> bool:
    """Whether what becomes of a statistic ends as a divisor of, or a factor on, something else.

    Args:
        node: The statistic, or what has been computed from it.
        statistical: What is computed from statistics and constants alone.
        of: What it is the statistic of.
        inverted: Whether something has been divided by a statistic on the way.
        relative: Whether it has itself been divided by its mean.
    """
    for user in node.users:
        if user in statistical:
            above = user.target is aten.div.Tensor and user.args[0] is node
            if above and user.args[1] in statistical and not _is_relative(user):
                return False
            if not _only_scales(
                user, statistical, of, inverted or _inverts(user, statistical), relative or above
            ):
                return False
        elif user.target is aten.div.Tensor:
            if inverted or user.args[0] is node:
                return False
        elif user.target is not aten.mul.Tensor or not inverted:
            return False
        elif relative and of not in user.args:
            return False
    return bool(node.users)


def _inverts(node: fx.Node, statistical: set[fx.Node]) -> bool:
    if node.target is aten.div.Tensor:
        return node.args[1] in statistical
    return is_inverse(node)


def is_inverse(node: fx.Node) -> bool:
    """Whether a node is the inverse of another, or of a power of it."""
    if node.target is aten.pow.Tensor_Scalar:
        return isinstance(node.args[1], (int, float)) and node.args[1] < 0
    return node.target in (aten.rsqrt.default, aten.reciprocal.default)


def _is_relative(quotient: fx.Node) -> bool:
    """Whether something is divided by its own mean, or that and a constant."""
    numerator: Any = quotient.args[0]
    divisor: Any = quotient.args[1]
    while isinstance(divisor, fx.Node) and divisor.target in _GUARDS:
        divisor = divisor.args[0]
    if not isinstance(divisor, fx.Node) or divisor.target not in _MEANS:
        return False
    return divisor.all_input_nodes[0] is numerator


def hold_divisors(module: fx.GraphModule) -> fx.GraphModule:
    """``x / y`` -> ``x / held(y)``, and ``c / y`` -> ``reciprocal(y) * c``, for y no constant.

    The divisor of a live tensor is a constant factor on it, like the standard deviation of a norm:
    routing weights over their sum, linear attention over its normaliser. So it is where its inverse
    is multiplied with, ``x * (1 / y)``.
    """
    if not any(n.target is aten.div.Tensor or is_inverse(n) for n in module.graph.nodes):
        return module
    _hold_quotients(module)
    live = live_values(module.graph)
    turned = inverted(module.graph, live)
    for node in list(module.graph.nodes):
        if node.target not in PRODUCTS:
            continue
        factors = {n for n in node.all_input_nodes if n in live}
        if factors <= turned:
            continue
        for inverse in factors & turned:
            with module.graph.inserting_before(node):
                node.replace_input_with(inverse, _held(node, inverse))
    return module


def inverted(graph: fx.Graph, live: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are inverses, moved or scaled maybe, powers of these, or their products."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in live]
        inputs = inputs[:1] if node.target in SHAPED else inputs
        if is_inverse(node):
            found.add(node)
        elif node.target is operator.getitem:
            found |= {node} if node.all_input_nodes[0] in found else set()
        elif inputs and found.issuperset(inputs):
            op = ops.find(node.target, frozenset(live_names(node, live)))
            if op is not None and (op.family == "move" or op.kind in _OF_INVERSES):
                found.add(node)
    return found


def _held(before: fx.Node, divisor: fx.Node) -> fx.Node:
    held = insert(before, aten.alias.default, (divisor,))
    held.meta[HELD] = DIVISOR
    return held


def _hold_quotients(module: fx.GraphModule) -> None:
    live = live_values(module.graph)
    for node in [n for n in module.graph.nodes if n.target is aten.div.Tensor]:
        x, y = node.args
        if y not in live:
            continue
        with module.graph.inserting_before(node):
            if x in live:
                node.args = (x, _held(node, y))
                continue
            inverse = insert(node, aten.reciprocal.default, (y,))
            node.replace_all_uses_with(insert(node, aten.mul.Tensor, (inverse, x)))
        module.graph.erase_node(node)


def live_values(graph: fx.Graph) -> set[fx.Node]:
    """What relevance may come through: computed from floating inputs or embeddings."""
    changing, live = varying(graph), set[fx.Node]()
    for node in graph.nodes:
        if HELD in node.meta or not is_floating(node.meta.get("val")):
            continue
        names = live_names(node, live)
        op = ops.find(node.target, frozenset(names))
        ends = node.target is aten.detach.default or (op is not None and op.family == "constant")
        begins = node.op == "placeholder" or (
            node.target is aten.embedding.default and node.args[1] in changing
        )
        picks = node.target is operator.getitem and node.args[0] in live
        if begins or picks or (names and not ends):
            live.add(node)
    return live


def release(graph: fx.Graph) -> bool:
    """Let everything that is held be live again; return whether anything was."""
    ops = [node for node in graph.nodes if node.op != "placeholder"]
    held = [node for node in ops if node.meta.pop(HELD, None) is not None]
    return bool(held)
