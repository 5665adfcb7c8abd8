"""Ops that stand for several others, or that have two names -> the ops the table knows."""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx, nn

from lrpfx.canonize.functionalize import insert
from lrpfx.errors import UnsupportedOpError
from lrpfx.ops import bound_arguments, einsum, hardsigmoid, reachable, source_line, varying

aten = torch.ops.aten

_ALIASES: dict[Any, Any] = {
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.negative.default: aten.neg.default,
    aten.absolute.default: aten.abs.default,
    aten.clip.default: aten.clamp.default,
    aten.concatenate.default: aten.cat.default,
    aten.row_stack.default: aten.vstack.default,
    aten.special_expit.default: aten.sigmoid.default,
    aten.special_softmax.default: aten.softmax.int,
    aten.linalg_matmul.default: aten.matmul.default,
    aten.hardsigmoid.default: hardsigmoid,
    aten.mv.default: aten.matmul.default,
    aten.dot.default: aten.matmul.default,
}


def one_name_each(module: fx.GraphModule) -> fx.GraphModule:
    """``multiply(a, b)`` -> ``mul(a, b)``: the names that PyTorch has twice."""
    for node in module.graph.nodes:
        node.target = _ALIASES.get(node.target, node.target)
    return module


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


class Writer:
    """Writes calls into the graph in the place of ``node``; a factor or summand of 1 or 0 falls."""

    def __init__(
        self, node: fx.Node, module: fx.GraphModule, changing: Container[fx.Node] = ()
    ) -> None:
        self.node, self._module, self._changing = node, module, changing

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call."""
        return insert(self.node, target, args, kwargs)

    def changes(self, node: fx.Node) -> bool:
        """Whether the values of a node, and not just its sizes, depend on the inputs."""
        return node in self._changing

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, unlike buffers such as tables of positions."""
        if node.op != "get_attr":
            return False
        return isinstance(operator.attrgetter(str(node.target))(self._module), nn.Parameter)

    def times(self, a: fx.Node, number: Any) -> fx.Node:
        """``number * a``."""
        return a if isinstance(number, (int, float)) and number == 1 else self._mul(a, number)

    def _mul(self, a: Any, b: Any) -> fx.Node:
        return self(aten.mul.Tensor, a, b)

    def sum(self, a: Any, b: Any) -> fx.Node:
        """``a + b``."""
        return self(aten.add.Tensor, a, b)

    def plus(self, a: Any, beta: Any, b: fx.Node) -> fx.Node:
        """``beta * a + b``, where a beta of 0 drops what a holds, were it NaN, as PyTorch does."""
        return b if beta == 0 else self.sum(self.times(a, beta), b)


_LETTERS = string.ascii_letters

Parts = Callable[..., "fx.Node | None"]


def _varies(node: Any) -> bool:
    """Whether the node depends on the graph's inputs."""
    return isinstance(node, fx.Node) and any(n.op == "placeholder" for n in reachable([node]))


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
    if not _varies(self) and beta != 0:
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


def _scatter(op: Writer, self: Any, dim: int, index: Any, src: Any, **rest: Any) -> fx.Node | None:
    """Cuts ``src`` to what ``index`` reads of it, which PyTorch's own derivative fails to do."""
    cut = src
    for d, (size, read) in enumerate(
        zip(src.meta["val"].shape, index.meta["val"].shape, strict=True)
    ):
        if isinstance(size, int) and isinstance(read, int) and size != read:
            cut = op(aten.slice.Tensor, cut, d, 0, read)
    return None if cut is src else op(op.node.target, self, dim, index, cut)


def _scatter_reduce(
    op: Writer, self: Any, dim: int, index: Any, src: Any, reduce: str, include_self: bool
) -> fx.Node | None:
    if reduce != "sum" or not include_self:
        return None
    return op(aten.scatter_add.default, self, dim, index, src)


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
    """A linear layer, if one of two operands is a constant; else left whole."""
    terms, out = _explicit(equation, [t.meta["val"].ndim for t in tensors])
    live = [_varies(t) for t in tensors]
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


def _embedding_bag(
    op: Writer,
    weight: Any,
    indices: Any,
    offsets: Any,
    mode: int,
    per_sample_weights: Any,
    padding_idx: Any,
    **rest: Any,
) -> None:
    """Replaces the bags' first output by an embedding and its sum, mean or maximum over a bag."""
    if not _varies(indices):
        return None
    step = offsets.args[2] if offsets.target is aten.arange.start_step else None
    padded = padding_idx is not None and padding_idx >= 0
    if not isinstance(step, int) or padded:
        raise UnsupportedOpError(
            "token ids enter an embedding bag whose bags "
            + ("leave out a padding index." if padded else "differ in size or have offsets."),
            where=[f"{op.node.target}   {source_line(op.node)}"],
            fix="give ids of shape (N, T) without padding_idx, or use nn.Embedding and a sum.",
        )
    ids = op(aten.reshape.default, indices, [-1, step])
    vectors = op(aten.embedding.default, weight, ids)
    if per_sample_weights is not None:
        shares = op(aten.reshape.default, per_sample_weights, [-1, step, 1])
        vectors = op(aten.mul.Tensor, vectors, shares)
    reduction = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
    bags = op(reduction, vectors, [1])
    for user in list(op.node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(bags)
    return None


def _var_mean(
    op: Writer,
    self: Any,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    correction: Any = None,
) -> None:
    """Replaces the two outputs by what computes one each."""
    dims = dim or list(range(self.meta["val"].ndim))
    correction = int(unbiased) if correction is None else correction
    two = (
        op(aten.var.correction, self, dims, correction=correction, keepdim=keepdim),
        op(aten.mean.dim, self, dims, keepdim),
    )
    for user in list(op.node.users):
        user.replace_all_uses_with(two[0 if user.args[1] == 0 else 1])


def _logsumexp(op: Writer, self: Any, dim: Any, keepdim: bool = False) -> fx.Node:
    """``m + log(sum(exp(self - m)))``, m the largest, a constant."""
    largest = op(aten.detach.default, op(aten.amax.default, self, dim, True))
    sums = op(
        aten.sum.dim_IntList, op(aten.exp.default, op(aten.sub.Tensor, self, largest)), dim, True
    )
    whole = op.sum(largest, op(aten.log.default, sums))
    return whole if keepdim else op(aten.squeeze.dims, whole, dim)


def _embedding(op: Writer, weight: Any, indices: Any, **rest: Any) -> fx.Node | None:
    """Rows that are picked, where the table itself depends on the input."""
    if getattr(weight.target, "__name__", "").startswith("embedding_renorm"):
        raise UnsupportedOpError(
            "an embedding rescales its table in forward(), by max_norm.",
            where=[f"{op.node.target}   {source_line(op.node)}"],
            fix="rescale the table once, and set max_norm to None.",
        )
    return op(aten.index.Tensor, weight, [indices]) if _varies(weight) else None


def _index(op: Writer, self: Any, indices: Any) -> fx.Node | None:
    """An embedding, where integers from the input pick rows of a parameter."""
    if len(indices) != 1 or not op.is_parameter(self):
        return None
    (ids,) = indices
    if ids.meta["val"].dtype not in (torch.int32, torch.int64) or not op.changes(ids):
        return None
    rows = self.meta["val"].shape[0]
    from_end = op(aten.add.Tensor, ids, rows)
    ids = op(aten.where.self, op(aten.lt.Scalar, ids, 0), from_end, ids)
    return _rows(op, self, ids)


def _index_select(op: Writer, self: Any, dim: int, index: Any) -> fx.Node | None:
    """Likewise."""
    first = dim in (0, -self.meta["val"].ndim)
    if not first or not op.is_parameter(self) or not op.changes(index):
        return None
    return _rows(op, self, index)


def _rows(op: Writer, table: fx.Node, ids: fx.Node) -> fx.Node:
    """``table[ids]`` as an embedding, whose tables have two dimensions."""
    rows, *form = table.meta["val"].shape
    if len(form) == 1:
        return op(aten.embedding.default, table, ids)
    vectors = op(aten.embedding.default, op(aten.reshape.default, table, [rows, -1]), ids)
    return op(aten.unflatten.int, vectors, -1, form) if form else op(aten.squeeze.dim, vectors, -1)


_PARTS: dict[Any, Parts] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.glu.default: _glu,
    aten.logsumexp.default: _logsumexp,
    aten.var_mean.default: _var_mean,
    aten.var_mean.dim: _var_mean,
    aten.var_mean.correction: _var_mean,
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
    aten.scatter.src: _scatter,
    aten.scatter_add.default: _scatter,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.einsum.default: _einsum,
    aten.tensordot.default: _tensordot,
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten.embedding_bag.default: _embedding_bag,
}
