"""Complex tensors -> pairs of real ones, for which relevance is defined."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx.canonize.writer import Writer
from lrpfx.ops import Paired, bound_arguments, nodes_in, varying

aten = torch.ops.aten

Pairs = dict[fx.Node, fx.Node]


def pair_complex(module: fx.GraphModule) -> fx.GraphModule:
    """``irfft(rfft(x) * c)`` -> the same of tensors (..., 2) that hold real and imaginary parts.

    So a Fourier transform is a linear map of real numbers to real numbers, the absolute value a
    norm of pairs, and the product of two complex numbers a sum of products, as a matrix product is.
    What is constant stays complex, and so does what the model returns.
    """
    changing, pairs = varying(module.graph), dict[fx.Node, fx.Node]()
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node not in changing:
            continue
        returns = _is_complex(node)
        if not returns and not any(n in pairs for n in node.all_input_nodes):
            continue
        with module.graph.inserting_before(node):
            new = _paired(node, Writer(node, module, changing), pairs, returns)
        if returns:
            pairs[node] = new
        else:
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    for node in reversed(pairs):
        if not node.users:
            module.graph.erase_node(node)
    return module


def _is_complex(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(t, Tensor) and t.is_complex() for t in leaves)


def _paired(node: fx.Node, op: Writer, pairs: Pairs, returns: bool) -> fx.Node:
    """What stands for a node that takes or returns complex numbers."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: pairs.get(n, n))
    if node.target is operator.getitem:
        return op(operator.getitem, *args)
    if node.target in _OF_PAIRS:
        given = [pairs.get(value, value) for value in bound_arguments(node).values()]
        return _OF_PAIRS[node.target](op, *given)
    if node.target in _ARITHMETIC and not kwargs:
        operands = [_beside(op, n, pairs, node.target in _SUMS) for n in node.args]
        if None not in operands:
            return op(node.target, *operands)
    named = bound_arguments(node).items()
    names = frozenset(k for k, v in named if any(n in pairs for n in nodes_in(v)))
    apart = node.target in _INTO
    return op(Paired(node.target, names, returns, apart), *args, **kwargs)


def _beside(op: Writer, operand: Any, pairs: Pairs, summed: bool) -> Any:
    """An operand as it stands beside pairs, None if there is no such form.

    Sums are those of the parts, and real factors are those of both.
    """
    if operand in pairs:
        # Two complex factors make a sum of products.
        return pairs[operand] if summed or _one_is_real(op.node, pairs) else None
    if not isinstance(operand, fx.Node):
        return None if summed or isinstance(operand, complex) else operand
    if _is_complex(operand):
        if not summed:
            return None
        return op(aten.view_as_real.default, op(aten.resolve_conj.default, operand))
    if summed:
        return op(aten.stack.default, [operand, op(aten.zeros_like.default, operand)], -1)
    return op(aten.unsqueeze.default, operand, -1)


def _one_is_real(node: fx.Node, pairs: Pairs) -> bool:
    a, b = node.args
    if node.target is aten.div.Tensor and b in pairs:
        return False
    return not all(isinstance(n, complex) or (n in pairs) for n in (a, b))


#: What writes values into others.
_INTO = {aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default}
_INTO |= {aten.index_put.default, aten.scatter.src, aten.index_copy.default}
_INTO |= {aten.masked_scatter.default, aten.index_add.default, aten.scatter_add.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_ARITHMETIC = _SUMS | {aten.mul.Tensor, aten.div.Tensor}


def _itself(op: Writer, pair: Any, *rest: Any) -> fx.Node:
    """Nothing to do: it is a pair already."""
    found: fx.Node = pair
    return found


def _part(index: int) -> Callable[..., fx.Node]:
    return lambda op, pair: op(aten.select.int, pair, -1, index)


def _size(op: Writer, pair: Any) -> fx.Node:
    return op(aten.linalg_vector_norm.default, pair, 2, [-1])


def _stacked(op: Writer, real: Any, imag: Any) -> fx.Node:
    return op(aten.stack.default, [real, imag], -1)


def _polar(op: Writer, abs: Any, angle: Any) -> fx.Node:
    parts = (op(function, angle) for function in (aten.cos.default, aten.sin.default))
    return _stacked(op, *(op.mul(abs, part) for part in parts))


_OF_PAIRS: dict[Any, Callable[..., fx.Node]] = {
    aten.view_as_complex.default: _itself,
    aten.view_as_real.default: _itself,
    aten.resolve_conj.default: _itself,
    aten.resolve_neg.default: _itself,
    aten.real.default: _part(0),
    aten.imag.default: _part(1),
    aten.complex.default: _stacked,
    aten.polar.default: _polar,
    aten.abs.default: _size,
}
