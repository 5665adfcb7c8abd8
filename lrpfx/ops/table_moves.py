"""Rows of ops that move or pick values, and of those that relevance ends at."""

from __future__ import annotations

from typing import Any

import torch

from lrpfx.ops.call import inherited
from lrpfx.ops.own import strided, strided_scatter
from lrpfx.ops.pools import Pool, pairs, reduced, windows
from lrpfx.ops.row import Row, row

aten = torch.ops.aten

_MAX_POOLS = {
    1: [aten.max_pool1d, aten.max_pool1d_with_indices, aten.adaptive_max_pool1d],
    2: [aten.max_pool2d, aten.max_pool2d_with_indices, aten.adaptive_max_pool2d],
    3: [aten.max_pool3d, aten.max_pool3d_with_indices, aten.adaptive_max_pool3d],
}
_LARGEST = [aten.amax.default, aten.max.dim, aten.max.default]
_SMALLEST = [aten.amin.default, aten.min.dim, aten.min.default]
_EXTREMES = [aten.aminmax.default, aten.cummax.default, aten.cummin.default]
_ORDERED = [aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.mode.default]
_ORDERED += [aten.median.default, aten.median.dim, aten.nanmedian.default, aten.nanmedian.dim]
_LARGER = [aten.maximum.default, aten.max.other, aten.fmax.default]
_SMALLER = [aten.minimum.default, aten.min.other, aten.fmin.default]
_TWO: list[str | tuple[str, ...]] = ["self", "other", ("self", "other")]
_EITHER = pairs(("self", "other"))

#: Kind and family of ops of other packages, by name: they exist once the package is imported.
#: Relevance goes to the features; where the boxes lie is a constant.
NAMED = {
    "torchvision::roi_align": ("roi_align", "affine"),
    "torchvision::roi_pool": ("max_pool", "select"),
}

#: Winner takes all, by the gradient.
SELECTIONS: list[Row] = [
    *(
        found
        for n, packets in _MAX_POOLS.items()
        for found in row(
            [packet.default for packet in packets],
            "max_pool",
            "select",
            nonneg=inherited,
            pool=Pool(windows(n)),
        )
    ),
    *row(_LARGEST, "max", "select", nonneg=inherited, pool=Pool(reduced)),
    *row(_SMALLEST, "max", "select", nonneg=inherited, pool=Pool(reduced, -1)),
    *row(_EXTREMES, "max", "select", nonneg=inherited),
    *row(_LARGER, "max", "select", _TWO, pool=Pool(_EITHER)),
    *row(_SMALLER, "max", "select", _TWO, pool=Pool(_EITHER, -1)),
    *row(
        [aten.clamp_min.Tensor],
        "max",
        "select",
        ["min", ("self", "min")],
        pool=Pool(pairs(("self", "min"))),
    ),
    *row(
        [aten.clamp_max.Tensor],
        "max",
        "select",
        ["max", ("self", "max")],
        pool=Pool(pairs(("self", "max")), -1),
    ),
    # By maximum or minimum; other reductions are opened, or refused, see ``canonize.scatters``.
    *row([aten.scatter_reduce.two], "max", "select", ["self", "src", ("self", "src")]),
    *row([aten.index_reduce.default], "max", "select", ["self", "source", ("self", "source")]),
    *row([aten.topk.default], "topk", "select", nonneg=inherited),
    *row(_ORDERED, "sort", "select", nonneg=inherited),
    # Of the logarithm of a sum of exponentials each gets its share in the sum, as by the gradient.
    *row([aten.logsumexp.default], "logsumexp", "select", pool=Pool(reduced)),
    *row([aten.logcumsumexp.default], "logsumexp", "select"),
    *row([aten.logaddexp.default], "logsumexp", "select", _TWO, pool=Pool(_EITHER)),
    *row([aten.logaddexp2.default], "logsumexp", "select", _TWO),
]


def _padded(args: dict[str, Any], inputs: bool) -> bool:
    value = args.get("value")
    return inputs and (value is None or value >= 0)


def _filled(args: dict[str, Any], inputs: bool) -> bool:
    return inputs and (args["nan"] is None or args["nan"] >= 0)


_VIEWS = [aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int]
_VIEWS += [aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default]
_VIEWS += [aten.mT.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int]
_VIEWS += [aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist]
_VIEWS += [aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default]
_VIEWS += [aten.expand.default, aten.broadcast_to.default]
_VIEWS += [aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.index.Tensor]
_VIEWS += [aten.index_select.default, aten.gather.default, aten.take_along_dim.default]
_VIEWS += [aten.take.default, aten.masked_select.default]
_VIEWS += [aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default]
_VIEWS += [aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default]
_VIEWS += [aten.unsafe_chunk.default, aten.unbind.int, aten.diagonal.default]
_VIEWS += [aten.tensor_split.sections, aten.tensor_split.indices]
_VIEWS += [aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default]
_VIEWS += [aten.unfold.default, aten.tril.default, aten.triu.default, aten.diag_embed.default]
_VIEWS += [aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int]
_VIEWS += [aten.flip.default, aten.roll.default, aten.rot90.default, aten.im2col.default]
_VIEWS += [aten.pixel_shuffle.default, aten.pixel_unshuffle.default]
_VIEWS += [aten.channel_shuffle.default]
#: Of the other tensor only shape and dtype are read, so nothing depends on it if it is live.
_LIKE = [aten.view_as.default, aten.reshape_as.default, aten.expand_as.default]
_LIKE += [aten.type_as.default, aten.to.other]
_CATS = [aten.cat.default, aten.concat.default, aten.stack.default, aten.block_diag.default]
_CATS += [aten.hstack.default, aten.vstack.default, aten.dstack.default]
_PADS = [aten.reflection_pad1d.default, aten.reflection_pad2d.default]
_PADS += [aten.reflection_pad3d.default, aten.replication_pad1d.default]
_PADS += [aten.replication_pad2d.default, aten.replication_pad3d.default]
_NEAREST = [aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec]
_NEAREST += [aten.upsample_nearest3d.vec, aten._upsample_nearest_exact1d.vec]
_NEAREST += [aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec]
_FILLS = [aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.scatter.value]
_FILLS += [aten.index_fill.int_Scalar, aten.index_fill.int_Tensor]
_INTO = [aten.slice_scatter.default, aten.select_scatter.default, aten.scatter.src]
_INTO += [aten.diagonal_scatter.default]

#: Relevance is carried.
MOVES: list[Row] = [
    *row(_VIEWS, "reshape", "move", nonneg=inherited),
    *row([strided], "reshape", "move", ["x"], nonneg=inherited),
    *row([strided_scatter], "scatter", "move", ["x", "src", ("x", "src")]),
    *row(_LIKE, "reshape", "move", ["self", ("self", "other")]),
    *row(_CATS, "cat", "move", nonneg=inherited),
    *row([aten.pad.default, aten.constant_pad_nd.default], "pad", "move", nonneg=_padded),
    *row(_PADS, "pad", "move", nonneg=inherited),
    *row(_NEAREST, "interpolate", "move", nonneg=inherited),
    *row([aten.where.self], "where", "move", ["self", "other", ("self", "other")]),
    *row([aten.where.ScalarOther], "where", "move", ["self"]),
    *row([aten.where.ScalarSelf], "where", "move", ["other"]),
    *row(_FILLS, "where", "move"),
    *row([aten.nan_to_num.default], "where", "move", nonneg=_filled),
    *row(_INTO, "scatter", "move", ["self", "src", ("self", "src")]),
    *row([aten.index_put.default], "scatter", "move", ["self", "values", ("self", "values")]),
    *row(
        [aten.index_copy.default, aten.masked_scatter.default],
        "scatter",
        "move",
        ["self", "source", ("self", "source")],
    ),
    *row([aten.fill.Tensor], "scatter", "move", ["value", ("self", "value")]),
    *row([aten.max_unpool2d.default, aten.max_unpool3d.default], "scatter", "move"),
]

_STEPS = [aten.detach.default, aten.sign.default]
_STEPS += [aten.div.Tensor_mode, aten.div.Scalar_mode]  # without rounding they are quotients
_STEPS += [aten.floor.default, aten.ceil.default, aten.round.default, aten.round.decimals]
_STEPS += [aten.trunc.default, aten.floor_divide.default, aten.heaviside.default]
_STEPS += [aten.histc.default]
_MADE = [aten.zeros_like.default, aten.ones_like.default, aten.full_like.default]
_MADE += [aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default]
_MADE += [aten.new_full.default, aten.new_empty.default]
_MADE += [aten.fill.Scalar, aten.fill.Tensor, aten.zero.default]

#: Piecewise constant ops: relevance ends here.
CONSTANTS: list[Row] = [
    *row(_STEPS + _MADE, "constant", "constant"),
    *row(_LIKE, "constant", "constant", ["other"]),
]
