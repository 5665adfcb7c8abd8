"""Rows of affine ops, z = W x + b, and of what is one with a divisor held: norms."""

from __future__ import annotations

from typing import Any

import torch

from lrpfx.ops import maps
from lrpfx.ops.call import inherited
from lrpfx.ops.own import einsum
from lrpfx.ops.row import Row, row

aten = torch.ops.aten

_CONVS = [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
_CONVS += [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding]
_TRANSPOSED = [aten.conv_transpose1d.default, aten.conv_transpose2d.input]
_TRANSPOSED += [aten.conv_transpose3d.input]

#: Affine ops with weights; of convolutions and linear layers the weight may be the live one.
WEIGHTED: list[Row] = [
    *row(_CONVS, "conv", "affine", affine=maps.convolution, weighted=True),
    *row(_TRANSPOSED, "conv", "affine", affine=maps.transposed_convolution, weighted=True),
    *row([aten.linear.default], "linear", "affine", affine=maps.linear, weighted=True),
    *row(_CONVS, "conv", "affine", ["weight"], affine=maps.by_weight, weighted=True),
    *row(_TRANSPOSED, "conv", "affine", ["weight"], affine=maps.by_weight, weighted=True),
    *row(
        [aten.linear.default],
        "linear",
        "affine",
        ["weight"],
        affine=maps.by_weight,
        weighted=True,
    ),
    *row(
        [aten.matmul.default],
        "linear",
        "affine",
        ["self", "other"],
        affine=maps.matrix_product,
        weighted=True,
    ),
    *row(
        [aten.mm.default, aten.bmm.default],
        "linear",
        "affine",
        ["self", "mat2"],
        affine=maps.matrix_product,
        weighted=True,
    ),
    *row(
        [aten.addmm.default],
        "linear",
        "affine",
        ["mat1", "mat2"],
        affine=maps.matrix_product,
        weighted=True,
    ),
    *row([einsum], "linear", "affine", ["x"], affine=maps.einsum, weighted=True),
    *row([aten.batch_norm.default], "batch_norm", "affine", affine=maps.batch_norm, weighted=True),
]

_POOLS = [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default]
_POOLS += [aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default]
_POOLS += [aten.adaptive_avg_pool3d.default]
_REDUCTIONS = [aten.mean.default, aten.mean.dim, aten.sum.default, aten.sum.dim_IntList]
_REDUCTIONS += [aten.nansum.default, aten.trace.default, aten.col2im.default, aten.cumsum.default]
_LINEARLY = [aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec]
_LINEARLY += [aten.upsample_trilinear3d.vec, aten._upsample_bilinear2d_aa.vec]
_CUBICALLY = [aten.upsample_bicubic2d.vec, aten._upsample_bicubic2d_aa.vec]
#: Systems of equations with a constant matrix.
_SOLVED = [aten.linalg_solve.default, aten.linalg_solve_triangular.default]

_FOURIER = [aten.fft_fft.default, aten.fft_fft2.default, aten.fft_fftn.default]
_FOURIER += [aten.fft_ifft.default, aten.fft_ifft2.default, aten.fft_ifftn.default]
_FOURIER += [aten.fft_rfft.default, aten.fft_rfft2.default, aten.fft_rfftn.default]
_FOURIER += [aten.fft_irfft.default, aten.fft_irfft2.default, aten.fft_irfftn.default]
_FOURIER += [aten.fft_hfft.default, aten.fft_hfft2.default, aten.fft_hfftn.default]
_FOURIER += [aten.fft_ihfft.default, aten.fft_ihfft2.default, aten.fft_ihfftn.default]
_FOURIER += [aten.stft.default, aten.stft.center, aten.istft.default]

#: Affine ops without weights, of one tensor.
UNWEIGHTED: list[Row] = [
    *row(
        _POOLS,
        "avg_pool",
        "affine",
        nonneg=lambda args, inputs: inputs and (args.get("divisor_override") or 1) > 0,
    ),
    *row(_REDUCTIONS, "reduction", "affine", nonneg=inherited),
    *row(_LINEARLY, "interpolate", "affine", nonneg=inherited),
    *row(_CUBICALLY, "interpolate", "affine"),
    *row(
        [aten.grid_sampler.default],
        "interpolate",
        "affine",
        nonneg=lambda args, inputs: inputs and args["interpolation_mode"] != 2,  # 2 is cubic
    ),
    *row(_FOURIER, "fourier", "affine"),
    *row(_SOLVED, "solve", "affine", ["B"]),
    *row([aten.cholesky_solve.default], "solve", "affine"),
    *row([aten.linalg_cross.default], "scale", "affine", ["self", "other"]),
]


def _nonneg_sum(args: dict[str, Any], inputs: bool) -> bool:
    return inputs and args.get("alpha", 1) >= 0


def _nonneg_shift(args: dict[str, Any], inputs: bool) -> bool:
    numbers = [v for v in (args["self"], args["other"]) if isinstance(v, (int, float))]
    return _nonneg_sum(args, inputs) and bool(numbers) and numbers[0] >= 0


def _nonneg_scale(args: dict[str, Any], inputs: bool) -> bool:
    other = args["other"]
    return inputs and isinstance(other, (int, float)) and other > 0


_BOTH = [("self", "other")]

#: Sums of live tensors, and arithmetic with a constant.
ARITHMETIC: list[Row] = [
    *row(
        [aten.index_add.default],
        "sum",
        "affine",
        ["self", "source", ("self", "source")],
        affine=maps.affine_op,
    ),
    *row(
        [aten.scatter_add.default],
        "sum",
        "affine",
        ["self", "src", ("self", "src")],
        affine=maps.affine_op,
    ),
    *row(
        [aten._unsafe_index_put.default],  # index_put with accumulate
        "sum",
        "affine",
        ["self", "values", ("self", "values")],
        affine=maps.affine_op,
    ),
    *row(
        [aten.add.Tensor],
        "sum",
        "affine",
        _BOTH,
        affine=maps.addition(lambda alpha: (1, alpha)),
        nonneg=_nonneg_sum,
    ),
    *row(
        [aten.sub.Tensor],
        "sum",
        "affine",
        _BOTH,
        affine=maps.addition(lambda alpha: (1, -alpha)),
    ),
    *row(
        [aten.rsub.Tensor],
        "sum",
        "affine",
        _BOTH,
        affine=maps.addition(lambda alpha: (-alpha, 1)),
    ),
    *row(
        [aten.add.Tensor],
        "shift",
        "affine",
        ["self", "other"],
        affine=maps.shift,
        nonneg=_nonneg_shift,
    ),
    *row([aten.add.Scalar], "shift", "affine", affine=maps.shift, nonneg=_nonneg_shift),
    *row([aten.sub.Tensor], "shift", "affine", ["self", "other"], affine=maps.subtract),
    *row([aten.sub.Scalar], "shift", "affine", affine=maps.subtract),
    *row([aten.rsub.Scalar], "shift", "affine", affine=maps.subtract_from),
    *row([aten.rsub.Tensor], "shift", "affine", ["self"], affine=maps.subtract_from),
    *row(
        [aten.mul.Tensor],
        "scale",
        "affine",
        ["self", "other"],
        affine=maps.scale,
        nonneg=_nonneg_scale,
    ),
    *row([aten.mul.Scalar], "scale", "affine", affine=maps.scale, nonneg=_nonneg_scale),
    *row(
        [aten.div.Tensor, aten.div.Scalar],
        "scale",
        "affine",
        affine=maps.divide,
        nonneg=_nonneg_scale,
    ),
    *row([aten.neg.default], "scale", "affine", affine=maps.negate),
    *row([aten._conj.default, aten.conj_physical.default], "scale", "affine"),
    *row([aten.deg2rad.default, aten.rad2deg.default], "scale", "affine", nonneg=inherited),
]

NORMS: list[Row] = [
    *row([aten.layer_norm.default], "layer_norm", "normalize", affine=maps.layer_norm),
    *row([aten.group_norm.default], "group_norm", "normalize", affine=maps.group_norm),
    *row([aten.instance_norm.default], "instance_norm", "normalize", affine=maps.instance_norm),
    *row([aten.rms_norm.default], "rms_norm", "normalize", affine=maps.rms_norm),
]
