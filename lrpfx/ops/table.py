"""The op table: ATen overload -> what kind of op it is, which arguments may be live, its map.

Everything lrpfx knows about an operation is one row here. An op that depends on the explained
input and has no row is an error; nothing falls back to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lrpfx.ops import maps
from lrpfx.ops.call import Composed, Op, Sign, always, einsum, hardsigmoid, inherited, never

aten = torch.ops.aten

_COMPOSED = {
    "activation": Op("composed", "activation", (frozenset(["x"]),)),
    "softmax": Op("softmax", "softmax", (frozenset(["x"]),), nonneg=always),
}
_TABLE: dict[Any, list[Op]] = {}
#: The kinds with f(0) = 0 for all their parameters, and a finite slope there.
_VANISHING = {"relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu"}
_VANISHING |= {"silu", "mish", "hardswish", "tanh", "hardshrink", "softshrink", "abs"}
_VANISHING |= {"square", "erf"}


def find(target: Any, live: frozenset[str]) -> Op | None:
    """The row for a call of ``target`` whose live arguments are exactly ``live``."""
    composed = isinstance(target, Composed)
    rows = (_COMPOSED[target.family],) if composed else _TABLE.get(target, ())
    return next((op for op in rows if live in op.live), None)


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
        target: An ATen (or custom) overload, such as ``torch.ops.aten.cumsum.default``.
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
        >>> register_op(torch.ops.aten.cumsum.default, "cumsum", "affine")
    """
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(
            f"register_op: {target!r} is no op overload; name one, "
            "such as torch.ops.aten.cumsum.default."
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
    _add([target], kind, family, alternatives, affine=affine, weighted=weighted, nonneg=nonneg)


def _add(
    targets: Sequence[Any],
    kind: str,
    family: str,
    live: Sequence[str | tuple[str, ...]] = (),
    *,
    affine: maps.Builder | None = None,
    weighted: bool = False,
    nonneg: Sign = never,
) -> None:
    """Rows for several overloads; ``live`` lists patterns, the first argument alone by default."""
    if family == "affine" and affine is None:
        affine = maps.linear_op
    for target in targets:
        patterns = live or (target._schema.arguments[0].name,)
        sets = tuple(frozenset([p] if isinstance(p, str) else p) for p in patterns)
        op = Op(kind, family, sets, affine, weighted, nonneg, kind in _VANISHING)
        _TABLE[target] = [old for old in _TABLE.get(target, []) if not set(old.live) & set(sets)]
        _TABLE[target].append(op)


# -- affine ops with weights ----------------------------------------------------------------------

_add(
    [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
    + [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding],
    "conv",
    "affine",
    affine=maps.convolution,
    weighted=True,
)
_add(
    [aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input],
    "conv",
    "affine",
    affine=maps.transposed_convolution,
    weighted=True,
)
_add([aten.linear.default], "linear", "affine", affine=maps.linear, weighted=True)
_add(
    [aten.matmul.default, aten.mm.default, aten.bmm.default],
    "linear",
    "affine",
    affine=maps.matrix_product,
    weighted=True,
)
for _target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
    _other = _target._schema.arguments[1].name
    _add([_target], "linear", "affine", [_other], affine=maps.matrix_product, weighted=True)
_add(
    [aten.addmm.default],
    "linear",
    "affine",
    ["mat1", "mat2"],
    affine=maps.matrix_product,
    weighted=True,
)
_add([einsum], "linear", "affine", ["x"], affine=maps.einsum, weighted=True)
_add([aten.batch_norm.default], "batch_norm", "affine", affine=maps.batch_norm, weighted=True)

# -- affine ops without weights -------------------------------------------------------------------

_add(
    [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default]
    + [aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default]
    + [aten.adaptive_avg_pool3d.default],
    "avg_pool",
    "affine",
    nonneg=lambda args, inputs: inputs and (args.get("divisor_override") or 1) > 0,
)
_add(
    [aten.mean.default, aten.mean.dim, aten.sum.default, aten.sum.dim_IntList],
    "reduction",
    "affine",
    nonneg=inherited,
)
_add(
    [aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec]
    + [aten._upsample_bilinear2d_aa.vec],
    "interpolate",
    "affine",
    nonneg=inherited,
)
_add([aten.upsample_bicubic2d.vec, aten._upsample_bicubic2d_aa.vec], "interpolate", "affine")
_add(
    [aten.grid_sampler.default],
    "interpolate",
    "affine",
    nonneg=lambda args, inputs: inputs and args["interpolation_mode"] != 2,  # 2 is cubic
)
_add([aten.col2im.default], "reduction", "affine", nonneg=inherited)
for _target, _added in (
    (aten.index_add.default, "source"),
    (aten.scatter_add.default, "src"),
    (aten._unsafe_index_put.default, "values"),  # index_put with accumulate
):
    _add([_target], "sum", "affine", ["self", _added, ("self", _added)], affine=maps.affine_op)


def _nonneg_sum(args: dict[str, Any], inputs: bool) -> bool:
    return inputs and args.get("alpha", 1) >= 0


def _nonneg_shift(args: dict[str, Any], inputs: bool) -> bool:
    numbers = [v for v in (args["self"], args["other"]) if isinstance(v, (int, float))]
    return _nonneg_sum(args, inputs) and bool(numbers) and numbers[0] >= 0


def _nonneg_scale(args: dict[str, Any], inputs: bool) -> bool:
    other = args["other"]
    return inputs and isinstance(other, (int, float)) and other > 0


_add(
    [aten.add.Tensor],
    "sum",
    "affine",
    [("self", "other")],
    affine=maps.addition(lambda alpha: (1, alpha)),
    nonneg=_nonneg_sum,
)
_add(
    [aten.sub.Tensor],
    "sum",
    "affine",
    [("self", "other")],
    affine=maps.addition(lambda alpha: (1, -alpha)),
)
_add(
    [aten.rsub.Tensor],
    "sum",
    "affine",
    [("self", "other")],
    affine=maps.addition(lambda alpha: (-alpha, 1)),
)
_add(
    [aten.add.Tensor],
    "shift",
    "affine",
    ["self", "other"],
    affine=maps.shift,
    nonneg=_nonneg_shift,
)
_add([aten.add.Scalar], "shift", "affine", affine=maps.shift, nonneg=_nonneg_shift)
_add([aten.sub.Tensor], "shift", "affine", ["self", "other"], affine=maps.subtract)
_add([aten.sub.Scalar], "shift", "affine", affine=maps.subtract)
_add([aten.rsub.Scalar], "shift", "affine", affine=maps.subtract_from)
_add([aten.rsub.Tensor], "shift", "affine", ["self"], affine=maps.subtract_from)
_add(
    [aten.mul.Tensor],
    "scale",
    "affine",
    ["self", "other"],
    affine=maps.scale,
    nonneg=_nonneg_scale,
)
_add([aten.mul.Scalar], "scale", "affine", affine=maps.scale, nonneg=_nonneg_scale)
_add(
    [aten.div.Tensor, aten.div.Scalar],
    "scale",
    "affine",
    affine=maps.divide,
    nonneg=_nonneg_scale,
)
_add([aten.neg.default], "scale", "affine", affine=maps.negate)

# -- normalisations and products ------------------------------------------------------------------

_add([aten.layer_norm.default], "layer_norm", "normalize", affine=maps.layer_norm)
_add([aten.group_norm.default], "group_norm", "normalize", affine=maps.group_norm)
_add([aten.instance_norm.default], "instance_norm", "normalize", affine=maps.instance_norm)
_add([aten.rms_norm.default], "rms_norm", "normalize", affine=maps.rms_norm)
_add([aten.mul.Tensor], "product", "product", [("self", "other")], nonneg=inherited)
_add([aten.matmul.default], "matmul", "matmul", [("self", "other")], nonneg=inherited)
_add([aten.mm.default, aten.bmm.default], "matmul", "matmul", [("self", "mat2")], nonneg=inherited)
_add([aten.einsum.default], "matmul", "matmul", ["tensors"], nonneg=inherited)
_add(
    [aten.softmax.int, aten._softmax.default, aten._safe_softmax.default],
    "softmax",
    "softmax",
    nonneg=always,
)

# -- activations ----------------------------------------------------------------------------------


def _clamped(args: dict[str, Any], inputs: bool) -> bool:
    low = args.get("min", args.get("min_val"))
    high = args.get("max", args.get("max_val"))
    below = high is None or (isinstance(high, (int, float)) and high >= 0)
    return below and (inputs or (isinstance(low, (int, float)) and low >= 0))


def _power(args: dict[str, Any], inputs: bool) -> bool:
    exponent = args["exponent"]
    return inputs or (isinstance(exponent, (int, float)) and exponent % 2 == 0)


_ACTIVATIONS: dict[str, tuple[list[Any], Sign]] = {
    "relu": ([aten.relu.default], always),
    "relu6": ([aten.relu6.default], always),
    "leaky_relu": ([aten.leaky_relu.default], inherited),
    "prelu": ([aten.prelu.default], inherited),
    "rrelu": ([aten.rrelu.default], inherited),
    "elu": ([aten.elu.default], inherited),
    "selu": ([aten.selu.default], inherited),
    "celu": ([aten.celu.default], inherited),
    "gelu": ([aten.gelu.default], inherited),
    "silu": ([aten.silu.default], inherited),
    "mish": ([aten.mish.default], inherited),
    "hardswish": ([aten.hardswish.default], inherited),
    "hardtanh": ([aten.hardtanh.default], _clamped),
    "clamp": (
        [aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.clamp.Tensor],
        _clamped,
    ),
    "sigmoid": ([aten.sigmoid.default], always),
    "log_sigmoid": ([aten.log_sigmoid.default], never),
    "tanh": ([aten.tanh.default], inherited),
    "softplus": ([aten.softplus.default], lambda args, inputs: args["beta"] > 0),
    "hardshrink": ([aten.hardshrink.default], inherited),
    "softshrink": ([aten.softshrink.default], inherited),
    "threshold": ([aten.threshold.default], never),
    "abs": ([aten.abs.default], always),
    "exp": ([aten.exp.default], always),
    "log": ([aten.log.default, aten.log1p.default], never),
    "sqrt": ([aten.sqrt.default], always),
    "square": ([aten.square.default], always),
    "pow": ([aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor], _power),
    "sin": ([aten.sin.default, aten.cos.default], never),
    "erf": ([aten.erf.default], inherited),
    "reciprocal": ([aten.reciprocal.default, aten.rsqrt.default], inherited),
}
for _kind, (_targets, _sign) in _ACTIVATIONS.items():
    _add(_targets, _kind, "activation", nonneg=_sign)
_add([hardsigmoid], "hardsigmoid", "activation", ["x"], nonneg=always)

# -- selections: winner takes all, by the gradient ------------------------------------------------

_add(
    [aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default]
    + [aten.max_pool1d_with_indices.default, aten.max_pool2d_with_indices.default]
    + [aten.max_pool3d_with_indices.default, aten.adaptive_max_pool1d.default]
    + [aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default],
    "max_pool",
    "select",
    nonneg=inherited,
)
_add(
    [aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim]
    + [aten.max.default, aten.min.default],
    "max",
    "select",
    nonneg=inherited,
)
_add([aten.topk.default], "topk", "select", nonneg=inherited)
_add([aten.sort.default, aten.sort.stable], "sort", "select", nonneg=inherited)
for _target in (aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other):
    _add([_target], "max", "select", ["self", "other", ("self", "other")])

# -- moves: relevance is carried ------------------------------------------------------------------


def _padded(args: dict[str, Any], inputs: bool) -> bool:
    value = args.get("value")
    return inputs and (value is None or value >= 0)


_add(
    [aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int]
    + [aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default]
    + [aten.mT.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int]
    + [aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist]
    + [aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default]
    + [aten.expand.default, aten.broadcast_to.default]
    + [aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index.Tensor]
    + [aten.index_select.default, aten.gather.default, aten.take_along_dim.default]
    + [aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default]
    + [aten.unsafe_split.Tensor, aten.unsafe_chunk.default, aten.unbind.int]
    + [aten.tensor_split.sections, aten.tensor_split.indices, aten.diagonal.default]
    + [aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default]
    + [aten.unfold.default, aten.tril.default, aten.triu.default],
    "reshape",
    "move",
    nonneg=inherited,
)
#: Of the other tensor only shape and dtype are read, so nothing depends on it if it is live.
_LIKE = [aten.view_as.default, aten.reshape_as.default, aten.expand_as.default]
_LIKE += [aten.type_as.default, aten.to.other]
_add(_LIKE, "reshape", "move", ["self", ("self", "other")])
_add(_LIKE, "constant", "constant", ["other"])
_add(
    [aten.cat.default, aten.concat.default, aten.stack.default]
    + [aten.hstack.default, aten.vstack.default, aten.dstack.default],
    "cat",
    "move",
    nonneg=inherited,
)
_add(
    [aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int]
    + [aten.flip.default, aten.roll.default, aten.rot90.default, aten.im2col.default]
    + [aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default],
    "reshape",
    "move",
    nonneg=inherited,
)
_add([aten.pad.default, aten.constant_pad_nd.default], "pad", "move", nonneg=_padded)
_add(
    [aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default]
    + [aten.replication_pad1d.default, aten.replication_pad2d.default]
    + [aten.replication_pad3d.default],
    "pad",
    "move",
    nonneg=inherited,
)
_add(
    [aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec]
    + [aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec]
    + [aten._upsample_nearest_exact3d.vec],
    "interpolate",
    "move",
    nonneg=inherited,
)
_add([aten.where.self], "where", "move", ["self", "other", ("self", "other")])
_add([aten.where.ScalarOther], "where", "move", ["self"])
_add([aten.where.ScalarSelf], "where", "move", ["other"])
_add([aten.masked_fill.Scalar, aten.masked_fill.Tensor], "where", "move")
_add(
    [aten.slice_scatter.default, aten.select_scatter.default],
    "scatter",
    "move",
    ["self", "src", ("self", "src")],
)
_add([aten.index_put.default], "scatter", "move", ["self", "values", ("self", "values")])
_add([aten.scatter.src], "scatter", "move", ["self", "src", ("self", "src")])
_add([aten.index_copy.default], "scatter", "move", ["self", "source", ("self", "source")])
_add([aten.fill.Tensor], "scatter", "move", ["value", ("self", "value")])

# -- piecewise constant ops: relevance ends here --------------------------------------------------

_add(
    [aten.detach.default, aten.sign.default, aten.floor.default, aten.ceil.default]
    + [aten.round.default, aten.trunc.default, aten.zeros_like.default, aten.ones_like.default]
    + [aten.full_like.default, aten.empty_like.default, aten.new_zeros.default]
    + [aten.new_ones.default, aten.new_full.default, aten.new_empty.default]
    + [aten.fill.Scalar, aten.fill.Tensor, aten.zero.default, aten.floor_divide.default],
    "constant",
    "constant",
)
