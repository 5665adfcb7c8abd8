"""Variances, norms and distances -> the squares, sums and roots that they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.writer import Writer
from lrpfx.ops import bound_arguments, varying

aten = torch.ops.aten


def open_statistics(module: fx.GraphModule) -> fx.GraphModule:
    """``var(x)`` -> ``mean((x - mean(x)) ** 2)``, and so on, where it is more than a divisor.

    A statistic that is held needs no rule, and stays whole.
    """
    changing = varying(module.graph)
    for node in list(module.graph.nodes):
        if node.target not in _OPENED or node not in changing:
            continue
        with module.graph.inserting_before(node):
            op = Writer(node, module, changing)
            node.replace_all_uses_with(_OPENED[node.target](op, **bound_arguments(node)))
        module.graph.erase_node(node)
    return module


def _variance(
    op: Writer,
    self: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    correction: Any = None,
) -> fx.Node:
    """The sum of the squares, over their number less the correction."""
    correction = int(unbiased) if correction is None else correction
    dims = _dims(self, dim)
    centred = op(aten.sub.Tensor, self, op(aten.mean.dim, self, dims, True))
    squares = op(aten.square.default, centred)
    if correction == 0:
        return op(aten.mean.dim, squares, dims, keepdim)
    ones = op(aten.ones_like.default, squares)  # sizes may vary
    number = op(aten.sum.dim_IntList, ones, dims, keepdim)
    total = op(aten.sum.dim_IntList, squares, dims, keepdim)
    return op.div(total, op(aten.sub.Tensor, number, correction))


def _deviation(op: Writer, self: Any, **options: Any) -> fx.Node:
    return op(aten.sqrt.default, _variance(op, self, **options))


def _norm(
    op: Writer, self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> fx.Node:
    """(sum |x|^p)^(1/p), for p = infinity the largest |x|, for p = 0 the number of entries."""
    dims = _dims(self, dim)
    if dtype is not None and dtype != self.meta["val"].dtype:
        self = op(aten.to.dtype, self, dtype)
    if ord == 0:
        counted = op(aten.to.dtype, op(aten.ne.Scalar, self, 0), self.meta["val"].dtype)
        return op(aten.sum.dim_IntList, counted, dims, keepdim)
    if ord == 2:
        squares = op(aten.sum.dim_IntList, op(aten.square.default, self), dims, keepdim)
        return op(aten.sqrt.default, squares)
    size = op(aten.abs.default, self)
    if math.isinf(ord):
        return op(aten.amax.default if ord > 0 else aten.amin.default, size, dims, keepdim)
    if ord == 1:
        return op(aten.sum.dim_IntList, size, dims, keepdim)
    powers = op(aten.pow.Tensor_Scalar, size, ord)
    return op(aten.pow.Tensor_Scalar, op(aten.sum.dim_IntList, powers, dims, keepdim), 1 / ord)


def _dims(x: fx.Node, dim: Any) -> list[int]:
    dims = [dim] if isinstance(dim, int) else dim
    return list(dims) if dims else list(range(x.meta["val"].ndim))


_OPENED: dict[Any, Any] = {
    aten.var.correction: _variance,
    aten.var.dim: _variance,
    aten.var.default: _variance,
    aten.std.correction: _deviation,
    aten.std.dim: _deviation,
    aten.std.default: _deviation,
    aten.linalg_vector_norm.default: _norm,
}


# -- before it is known which are held ------------------------------------------------------------


def moments(op: Writer, self: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> None:
    """``var_mean(x)`` -> ``var(x), mean(x)``."""
    _moments(op, aten.var.correction, self, dim, keepdim, **options)


def deviation_and_mean(
    op: Writer, self: Any, dim: Any = None, keepdim: bool = False, **options: Any
) -> None:
    """``std_mean(x)`` -> ``std(x), mean(x)``."""
    _moments(op, aten.std.correction, self, dim, keepdim, **options)


def _moments(
    op: Writer,
    spread: Any,
    self: Any,
    dim: Any,
    keepdim: bool,
    unbiased: bool = True,
    correction: Any = None,
) -> None:
    dims = _dims(self, dim)
    correction = int(unbiased) if correction is None else correction
    op.replace_outputs(
        op(spread, self, dims, correction=correction, keepdim=keepdim),
        op(aten.mean.dim, self, dims, keepdim),
    )


def norm(
    op: Writer, self: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> fx.Node:
    """``norm(x)`` -> ``linalg.vector_norm(x)``."""
    p = 2 if p is None else p
    return op(aten.linalg_vector_norm.default, self, p, dim or None, keepdim, dtype=dtype)


def distances(op: Writer, x1: Any, x2: Any, p: float, compute_mode: Any) -> fx.Node:
    """``cdist(x, y)``: the norms of all differences of rows."""
    a, b = op(aten.unsqueeze.default, x1, -2), op(aten.unsqueeze.default, x2, -3)
    return op(aten.linalg_vector_norm.default, op(aten.sub.Tensor, a, b), p, [-1])


def renorm(op: Writer, self: Any, p: Any, dim: int, maxnorm: Any) -> fx.Node | None:
    """``x / max(norm(x) / maxnorm, 1)``, by slices along a dimension."""
    if not op.changes(self):  # of parameters it is what PyTorch computes, to the last digit
        return None
    rank = self.meta["val"].ndim
    dims = [d for d in range(rank) if d != dim % rank]
    size = op(aten.linalg_vector_norm.default, self, p, dims, True)
    times = op.div(op(aten.add.Tensor, size, 1e-7), maxnorm)  # as PyTorch has it
    return op.div(self, op(aten.clamp_min.default, times, 1))


def covariances(
    op: Writer, self: Any, correction: int, fweights: Any, aweights: Any
) -> fx.Node | None:
    """``cov(x)``, of rows: the products of what is left of them without their means."""
    rank = self.meta["val"].ndim
    if rank == 0 or fweights is not None or aweights is not None:
        return None
    rows = op(aten.unsqueeze.default, self, 0) if rank == 1 else self
    rest = op(aten.sub.Tensor, rows, op(aten.mean.dim, rows, [1], True))
    products = op(aten.matmul.default, rest, op(aten.t.default, rest))
    ones = op(aten.select.int, op(aten.ones_like.default, rest), 0, 0)  # sizes may vary
    number = op(aten.sub.Tensor, op(aten.sum.default, ones), correction)
    found = op.div(products, number)
    return op(aten.reshape.default, found, []) if rank == 1 else found


def correlations(op: Writer, self: Any) -> fx.Node | None:
    """``corrcoef(x)``: covariances over both deviations, which are statistics."""
    if self.meta["val"].ndim != 2:
        return None
    rest = op(aten.sub.Tensor, self, op(aten.mean.dim, self, [1], True))
    rows = op.div(rest, op(aten.linalg_vector_norm.default, rest, 2, [1], True))
    return op(aten.matmul.default, rows, op(aten.t.default, rows))
