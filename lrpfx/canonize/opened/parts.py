"""Ops that stand for several others -> the ops the table knows."""

from __future__ import annotations

import functools
import math
import operator
import string
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfx.canonize.opened import embeddings, live_weights, norms, scatters
from lrpfx.canonize.writer import Writer
from lrpfx.ops import bound_arguments, einsum, precision, varying

aten = torch.ops.aten


def open_parts(module: fx.GraphModule) -> fx.GraphModule:
    """``addcmul(a, b, c)`` -> ``a + b * c``, and so on: fused arithmetic has its parts' rules."""
    changing = varying(module.graph)
    for node in list(module.graph.nodes):
        parts = _PARTS.get(node.target)
        if parts is None:
            continue
        with module.graph.inserting_before(node):
            new = parts(Writer(node, module, changing), **bound_arguments(node))
        if new is not None:
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    return module


_LETTERS = string.ascii_letters

Parts = Callable[..., "fx.Node | None"]


def _power_of_number(op: Writer, self: Any, exponent: fx.Node | None = None) -> fx.Node | None:
    """c ** x is exp(x log c), and 2 ** x by its own name; a softmax may be of either."""
    base, x = (2.0, self) if exponent is None else (self, exponent)
    if not isinstance(base, (int, float)) or base <= 0 or base == 1 or precision(x) < 4:
        return None  # in halves x log c is too far from x
    return op(aten.exp.default, op.times(x, math.log(base)))


def _glu(op: Writer, self: fx.Node, dim: int) -> fx.Node:
    halves = op(aten.chunk.default, self, 2, dim)
    value, gate = (op(operator.getitem, halves, i) for i in (0, 1))
    return op(aten.mul.Tensor, value, op(aten.sigmoid.default, gate))


def lerp(op: Writer, self: Any, end: Any, weight: Any) -> fx.Node:
    """(1 - w) a + w b, in which each counts once, unlike a + w (b - a)."""
    rest = op(aten.rsub.Scalar, weight, 1) if isinstance(weight, fx.Node) else 1 - weight
    return op.sum(op(aten.mul.Tensor, self, rest), op(aten.mul.Tensor, end, weight))


def _addcmul(op: Writer, self: Any, tensor1: Any, tensor2: Any, value: Any) -> fx.Node:
    return op.sum(self, op.times(op(aten.mul.Tensor, tensor1, tensor2), value))


def _addcdiv(op: Writer, self: Any, tensor1: Any, tensor2: Any, value: Any) -> fx.Node:
    return op.sum(self, op.times(op(aten.div.Tensor, tensor1, tensor2), value))


def _addmm(op: Writer, self: Any, mat1: Any, mat2: Any, beta: Any, alpha: Any) -> fx.Node | None:
    """Left whole where ``self`` is a constant: then it is the bias of a linear layer."""
    if beta != 0 and not op.changes(self) and not (op.changes(mat1) and op.changes(mat2)):
        return None
    return op.plus(self, beta, op.times(op(aten.matmul.default, mat1, mat2), alpha))


def _baddbmm(
    op: Writer, self: Any, batch1: Any, batch2: Any, beta: Any, alpha: Any
) -> fx.Node | None:
    return op.plus(self, beta, op.times(op(aten.matmul.default, batch1, batch2), alpha))


def _addbmm(op: Writer, self: Any, batch1: Any, batch2: Any, beta: Any, alpha: Any) -> fx.Node:
    product = op(aten.sum.dim_IntList, op(aten.matmul.default, batch1, batch2), [0])
    return op.plus(self, beta, op.times(product, alpha))


def _addmv(op: Writer, self: Any, mat: Any, vec: Any, beta: Any, alpha: Any) -> fx.Node:
    return op.plus(self, beta, op.times(op(aten.matmul.default, mat, vec), alpha))


def _outer(op: Writer, self: Any, vec2: Any) -> fx.Node:
    return op(aten.mul.Tensor, op(aten.unsqueeze.default, self, 1), vec2)


def _inner(op: Writer, self: Any, other: Any) -> fx.Node:
    if other.meta["val"].ndim > 1:
        other = op(aten.mT.default, other)
    return op(aten.matmul.default, self, other)


def _ravel(op: Writer, self: Any) -> fx.Node:
    return op(aten.reshape.default, self, [-1])


def _bilinear(op: Writer, input1: Any, input2: Any, weight: Any, bias: Any) -> fx.Node:
    equation = "...i,oij,...j->...o"
    product = op(aten.einsum.default, equation, [input1, weight, input2])
    return product if bias is None else op.sum(product, bias)


def _cosine(op: Writer, x1: Any, x2: Any, dim: int, eps: float) -> fx.Node:
    """The sum of a product of two normalised tensors; the norms are statistics."""
    a, b = (
        op(
            aten.div.Tensor,
            x,
            op(
                aten.clamp_min.default,
                op(aten.linalg_vector_norm.default, x, 2, [dim], True),
                eps,
            ),
        )
        for x in (x1, x2)
    )
    return op(aten.sum.dim_IntList, op(aten.mul.Tensor, a, b), [dim])


def _index_put(
    op: Writer, self: Any, indices: Any, values: Any, accumulate: bool
) -> fx.Node | None:
    """With ``accumulate`` a sum, which shares relevance; without, values that are moved."""
    if not accumulate:
        return None
    return op(aten._unsafe_index_put.default, self, indices, values, True)


def _explicit(equation: str, ndims: list[int]) -> tuple[list[str], str]:
    """Subscripts per operand and of the output, with letters for the one ellipsis; [] for more."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if sum("..." in term for term in terms) > 1:
        return [], ""
    hidden = max(n - len(t.replace("...", "")) for t, n in zip(terms, ndims, strict=True))
    dots = "".join([c for c in _LETTERS if c not in equation][:hidden])
    if not arrow:
        once = sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(once)
    return [term.replace("...", dots) for term in terms], out.replace("...", dots)


def _einsum(op: Writer, equation: str, tensors: Any, path: Any) -> fx.Node | None:
    """A sum of one operand, a linear layer if one of two is a constant; else left whole."""
    terms, out = _explicit(equation, [t.meta["val"].ndim for t in tensors])
    if len(terms) == 1 and len(set(terms[0])) == len(terms[0]):
        (term,), (x,) = terms, tensors
        if dims := [i for i, letter in enumerate(term) if letter not in out]:
            x = op(aten.sum.dim_IntList, x, dims)
        kept = [letter for letter in term if letter in out]
        return op(aten.permute.default, x, [kept.index(letter) for letter in out])
    live = [op.changes(t) for t in tensors]
    apart = all(len(set(term)) == len(term) and set(term) <= set(out) for term in terms)
    if len(terms) > 1 and any(live) and apart and set(out) == set("".join(terms)):
        factors = (_aligned(op, t, term, out) for t, term in zip(tensors, terms, strict=True))
        return functools.reduce(op.mul, factors)
    if len(terms) != 2 or sum(live) != 1 or any(len(set(t)) != len(t) for t in terms):
        return None
    i = live.index(True)
    (a, b), (x, weight) = (terms[i], terms[1 - i]), (tensors[i], tensors[1 - i])
    summed = set(a + b) - set(out)
    if not summed or not summed <= set(a) & set(b):
        return None
    sizes = [dict(zip(t, tensors[k].meta["val"].shape, strict=True)) for k, t in enumerate(terms)]
    x = _widened(op, x, sizes[i], sizes[1 - i])
    weight = _widened(op, weight, sizes[1 - i], sizes[i])
    if len(b) == 2 and len(summed) == 1 and a[-1] in summed and out[:-1] == a[:-1]:
        transposed = b == a[-1] + out[-1]
        weight = op(aten.t.default, weight) if transposed else weight
        return op(aten.linear.default, x, weight)
    return op(einsum, f"{a},{b}->{out}", x, weight)


def _aligned(op: Writer, t: Any, term: str, out: str) -> fx.Node:
    """An operand with its dimensions where the output of an einsum has them."""
    kept = [letter for letter in out if letter in term]
    if "".join(kept) != term:
        t = op(aten.permute.default, t, [term.index(letter) for letter in kept])
    missing = [i for i, letter in enumerate(out) if letter not in term]
    for dim in missing:
        t = op(aten.unsqueeze.default, t, dim)
    found: fx.Node = t
    return found


def _widened(op: Writer, t: Any, own: dict[str, Any], other: dict[str, Any]) -> Any:
    """The operand with sizes of 1 as the other operand has them."""
    small = {c for c, n in own.items() if isinstance(n, int) and n == 1}
    grown = [other[c] if c in small and c in other else -1 for c in own]
    return op(aten.expand.default, t, grown) if set(grown) - {-1, 1} else t


def _tensordot(op: Writer, self: Any, other: Any, dims_self: Any, dims_other: Any) -> fx.Node:
    """``einsum`` over the paired dimensions."""
    a, b = self.meta["val"].ndim, other.meta["val"].ndim
    first, second = list(_LETTERS[:a]), list(_LETTERS[a : a + b])
    for i, j in zip(dims_self, dims_other, strict=True):
        second[j] = first[i]
    out = [c for c in first if c not in second] + [c for c in second if c not in first]
    equation = f"{''.join(first)},{''.join(second)}->{''.join(out)}"
    found = _einsum(op, equation, [self, other], None)
    return op(aten.einsum.default, equation, [self, other]) if found is None else found


def _hypot(op: Writer, self: Any, other: Any) -> fx.Node:
    squares = (op(aten.square.default, a) for a in (self, other))
    return op(aten.sqrt.default, op.sum(*squares))


def _xlogy(op: Writer, self: Any, other: Any) -> fx.Node:
    """x log(y), which is 0 where x is."""
    if isinstance(self, fx.Node):
        if not isinstance(other, fx.Node):
            other = op(aten.full_like.default, self, other)
        empty = op(aten.eq.Scalar, self, 0)
        other = op(aten.where.ScalarSelf, empty, 1.0, other)
    return op.mul(op(aten.log.default, other), self)


def _xlog1py(op: Writer, self: Any, other: Any) -> fx.Node:
    """x log(1 + y), likewise."""
    if isinstance(other, fx.Node):
        return _xlogy(op, self, op(aten.add.Scalar, other, 1))
    return _xlogy(op, self, 1 + other)


def _heaviside(op: Writer, self: Any, values: Any) -> fx.Node | None:
    """A step; what it is at zero may depend on the input."""
    if not op.changes(values):
        return None
    step = op(aten.to.dtype, op(aten.gt.Scalar, self, 0), self.meta["val"].dtype)
    return op(aten.where.self, op(aten.eq.Scalar, self, 0), values, step)


def _round(op: Writer, self: Any, decimals: int) -> fx.Node:
    return op(aten.round.decimals, self, decimals=decimals)


def _sign(op: Writer, self: fx.Node) -> fx.Node | None:
    """Of a complex number it is its direction, and no constant."""
    return None if self.meta["val"].is_complex() else op(aten.sign.default, self)


def _quotient(op: Writer, self: Any, other: Any, rounding_mode: str | None) -> fx.Node | None:
    return op.div(self, other) if rounding_mode is None else None


def _quantile(
    op: Writer, self: Any, q: Any, dim: int | None, keepdim: bool, interpolation: str
) -> fx.Node | None:
    """Between two of the sorted entries, by a constant weight."""
    if dim is None:
        self, dim, keepdim = op(aten.reshape.default, self, [-1]), 0, False
    size = self.meta["val"].shape[dim]
    if isinstance(q, fx.Node) or not isinstance(size, int):
        return None
    rank = q * (size - 1)
    low, high = math.floor(rank), math.ceil(rank)
    between = {"linear": rank - low, "lower": 0, "higher": 1, "midpoint": 0.5}
    weight = between.get(interpolation, round(rank) - low)
    ordered = op(operator.getitem, op(aten.sort.default, self, dim), 0)
    ends = (op(aten.narrow.default, ordered, dim, i, 1) for i in (low, high))
    a, b = (end if keepdim else op(aten.squeeze.dim, end, dim) for end in ends)
    return a if weight == 0 else b if weight == 1 else lerp(op, a, b, weight)


def _logsumexp(op: Writer, self: Any, dim: Any, keepdim: bool = False) -> fx.Node | None:
    """``m + log(sum(exp(x - m)))``, m the largest, where x less it is a softmax."""
    if not any(user.target is aten.sub.Tensor and user.args[0] is self for user in op.node.users):
        return None
    largest = op(aten.detach.default, op(aten.amax.default, self, dim, True))
    powers = op(aten.exp.default, op(aten.sub.Tensor, self, largest))
    sums = op(aten.sum.dim_IntList, powers, dim, True)
    whole = op.sum(largest, op(aten.log.default, sums))
    return whole if keepdim else op(aten.squeeze.dims, whole, dim)


_CONVS = [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
_CONVS += [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding]
_CONVS += [aten.conv_transpose1d.default, aten.conv_transpose2d.input]
_CONVS += [aten.conv_transpose3d.input]
_NORMS = [aten.norm.Scalar, aten.norm.ScalarOpt_dtype]
_NORMS += [aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype]

_PARTS: dict[Any, Parts] = {
    aten.exp2.default: _power_of_number,
    aten.pow.Scalar: _power_of_number,
    **dict.fromkeys([*_CONVS, aten.linear.default], live_weights.layer),
    aten.batch_norm.default: live_weights.norm_of_channels,
    aten.group_norm.default: live_weights.norm_of_channels,
    aten.instance_norm.default: live_weights.norm_of_channels,
    aten.layer_norm.default: live_weights.norm_of_features,
    aten.rms_norm.default: live_weights.norm_of_features,
    aten.prelu.default: live_weights.prelu,
    **dict.fromkeys(_NORMS, norms.norm),
    aten.logsumexp.default: _logsumexp,
    aten.cdist.default: norms.distances,
    aten.cov.default: norms.covariances,
    aten.corrcoef.default: norms.correlations,
    aten.renorm.default: norms.renorm,
    aten.hypot.default: _hypot,
    aten.convolution.default: live_weights.convolution,
    aten._convolution.default: live_weights.convolution,
    aten._convolution.deprecated: live_weights.convolution,
    aten.conv_tbc.default: live_weights.convolution_of_sequences,
    aten.heaviside.default: _heaviside,
    aten.special_round.default: _round,
    aten.special_xlog1py.default: _xlog1py,
    aten.special_xlog1py.self_scalar: _xlog1py,
    aten.special_xlog1py.other_scalar: _xlog1py,
    aten.xlogy.Tensor: _xlogy,
    aten.xlogy.Scalar_Self: _xlogy,
    aten.xlogy.Scalar_Other: _xlogy,
    aten.div.Tensor_mode: _quotient,
    aten.div.Scalar_mode: _quotient,
    aten.sgn.default: _sign,
    aten.quantile.scalar: _quantile,
    aten.embedding.default: embeddings.embedding,
    aten.index.Tensor: embeddings.index,
    aten.index_select.default: embeddings.index_select,
    aten.glu.default: _glu,
    aten.var_mean.default: norms.moments,
    aten.std_mean.default: norms.deviation_and_mean,
    aten.var_mean.dim: norms.moments,
    aten.std_mean.dim: norms.deviation_and_mean,
    aten.var_mean.correction: norms.moments,
    aten.std_mean.correction: norms.deviation_and_mean,
    aten.lerp.Scalar: lerp,
    aten.lerp.Tensor: lerp,
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.addbmm.default: _addbmm,
    aten.addmv.default: _addmv,
    aten.outer.default: _outer,
    aten.inner.default: _inner,
    aten.ravel.default: _ravel,
    aten.bilinear.default: _bilinear,
    aten.cosine_similarity.default: _cosine,
    aten.index_put.default: _index_put,
    aten.scatter.src: scatters.cut,
    aten.scatter_add.default: scatters.cut,
    aten.scatter.reduce: scatters.scatter_by_name,
    aten.scatter_reduce.two: scatters.scatter_reduce,
    aten.index_reduce.default: scatters.index_reduce,
    aten.segment_reduce.default: scatters.segment_reduce,
    aten.put.default: scatters.put,
    aten.einsum.default: _einsum,
    aten.tensordot.default: _tensordot,
    aten.embedding_bag.padding_idx: embeddings.bag,
    aten.embedding_bag.default: embeddings.bag,
}
