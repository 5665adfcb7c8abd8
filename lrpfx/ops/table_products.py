"""Rows of products of live tensors, of softmaxes, and of elementwise functions of one tensor."""

from __future__ import annotations

from typing import Any

import torch

from lrpfx.ops.call import Sign, always, inherited, never
from lrpfx.ops.own import entmax, hardsigmoid
from lrpfx.ops.row import Row, row

aten = torch.ops.aten

_LAYERS = [aten.conv1d.default, aten.conv2d.default, aten.conv3d.default]
_LAYERS += [aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding]
_LAYERS += [aten.conv_transpose1d.default, aten.conv_transpose2d.input]
_LAYERS += [aten.conv_transpose3d.input, aten.linear.default]

PRODUCTS: list[Row] = [
    *row([aten.mul.Tensor], "product", "product", [("self", "other")], nonneg=inherited),
    *row(
        [aten.prod.default, aten.prod.dim_int, aten.cumprod.default],
        "prod",
        "product",
        nonneg=inherited,
    ),
    *row([aten.matmul.default], "matmul", "matmul", [("self", "other")], nonneg=inherited),
    *row(
        [aten.mm.default, aten.bmm.default],
        "matmul",
        "matmul",
        [("self", "mat2")],
        nonneg=inherited,
    ),
    *row([aten.einsum.default], "matmul", "matmul", ["tensors"], nonneg=inherited),
    *row([aten.linalg_cross.default], "matmul", "matmul", [("self", "other")]),
    # Their bias has been added by itself, see ``canonize.parts``.
    *row(_LAYERS, "matmul", "matmul", [("input", "weight")], nonneg=inherited),
]

#: The softmax of a log-softmax has the rule, and its logarithm hands on what it gets.
SOFTMAX: list[Row] = [
    *row(
        [aten.softmax.int, aten._softmax.default, aten._safe_softmax.default],
        "softmax",
        "softmax",
        nonneg=always,
    ),
    *row([entmax], "entmax", "softmax", ["x"], nonneg=always),
]


def _clamped(args: dict[str, Any], inputs: bool) -> bool:
    low = args.get("min", args.get("min_val"))
    high = args.get("max", args.get("max_val"))
    below = high is None or (isinstance(high, (int, float)) and high >= 0)
    return below and (inputs or (isinstance(low, (int, float)) and low >= 0))


def _power(args: dict[str, Any], inputs: bool) -> bool:
    exponent = args["exponent"]
    return inputs or (isinstance(exponent, (int, float)) and exponent % 2 == 0)


_CLAMPS = [aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.clamp.Tensor]
_CLAMPS += [aten.clamp_min.Tensor, aten.clamp_max.Tensor]
_LOGARITHMS = [aten.log.default, aten.log1p.default, aten.log2.default, aten.log10.default]
_LOGARITHMS += [aten.logit.default]
_PERIODIC = [aten.sin.default, aten.cos.default, aten.tan.default, aten.sinc.default]
_ARCS = [aten.asin.default, aten.acos.default, aten.atan.default]
_ARCS += [aten.asinh.default, aten.acosh.default, aten.atanh.default]
_REMAINDERS = [aten.fmod.Scalar, aten.fmod.Tensor, aten.remainder.Scalar, aten.remainder.Tensor]
_REMAINDERS += [aten.frac.default]
_SPECIAL = [aten.erfc.default, aten.erfinv.default, aten.lgamma.default, aten.digamma.default]
_SPECIAL += [aten.mvlgamma.default, aten.i0.default, aten.special_i0e.default]
_SPECIAL += [aten.special_i1.default, aten.special_i1e.default, aten.special_ndtri.default]
_SPECIAL += [aten.special_log_ndtr.default, aten.special_erfcx.default, aten.special_entr.default]

_BY_KIND: dict[str, tuple[list[Any], Sign]] = {
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
    "clamp": (_CLAMPS, _clamped),
    "sigmoid": ([aten.sigmoid.default], always),
    "log_sigmoid": ([aten.log_sigmoid.default], never),
    "tanh": ([aten.tanh.default], inherited),
    "softplus": ([aten.softplus.default], lambda args, inputs: args["beta"] > 0),
    "hardshrink": ([aten.hardshrink.default], inherited),
    "softshrink": ([aten.softshrink.default], inherited),
    "threshold": ([aten.threshold.default], never),
    "abs": ([aten.abs.default], always),
    "copysign": ([aten.copysign.Scalar, aten.copysign.Tensor], never),
    "exp": ([aten.exp.default, aten.exp2.default], always),
    "expm1": ([aten.expm1.default], inherited),
    "log": (_LOGARITHMS, never),
    "sqrt": ([aten.sqrt.default], always),
    "square": ([aten.square.default], always),
    "pow": ([aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor], _power),
    "sin": (_PERIODIC, never),
    "arc": (_ARCS, never),
    "sinh": ([aten.sinh.default], inherited),
    "cosh": ([aten.cosh.default], always),
    "remainder": (_REMAINDERS, never),
    "erf": ([aten.erf.default], inherited),
    "special": (_SPECIAL, never),
    "reciprocal": ([aten.reciprocal.default, aten.rsqrt.default], inherited),
}
ACTIVATIONS: list[Row] = [
    *(
        found
        for kind, (targets, sign) in _BY_KIND.items()
        for found in row(targets, kind, "activation", nonneg=sign)
    ),
    *row([aten.pow.Scalar, aten.pow.Tensor_Tensor], "pow", "activation", ["exponent"]),
    *row([aten.polygamma.default], "special", "activation", ["self"]),
    *row([aten.special_ndtr.default], "special", "activation", nonneg=always),
    *row([hardsigmoid], "hardsigmoid", "activation", ["x"], nonneg=always),
]
