"""Ops that PyTorch has under two names -> the one that the table knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lrpfx.ops import hardsigmoid

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
    aten.multiply.Scalar: aten.mul.Scalar,
    aten.subtract.Scalar: aten.sub.Scalar,
    aten.divide.Scalar: aten.div.Scalar,
    aten.true_divide.Scalar: aten.div.Scalar,
    aten.divide.Tensor_mode: aten.div.Tensor_mode,
    aten.divide.Scalar_mode: aten.div.Scalar_mode,
    aten.fix.default: aten.trunc.default,
    aten.clip.Tensor: aten.clamp.Tensor,
    aten.ger.default: aten.outer.default,
    aten.native_channel_shuffle.default: aten.channel_shuffle.default,
    aten.arccos.default: aten.acos.default,
    aten.arccosh.default: aten.acosh.default,
    aten.arcsin.default: aten.asin.default,
    aten.arcsinh.default: aten.asinh.default,
    aten.arctan.default: aten.atan.default,
    aten.arctan2.default: aten.atan2.default,
    aten.arctanh.default: aten.atanh.default,
    aten.special_digamma.default: aten.digamma.default,
    aten.special_erf.default: aten.erf.default,
    aten.special_erfc.default: aten.erfc.default,
    aten.special_erfinv.default: aten.erfinv.default,
    aten.special_exp2.default: aten.exp2.default,
    aten.special_expm1.default: aten.expm1.default,
    aten.special_gammaln.default: aten.lgamma.default,
    aten.special_i0.default: aten.i0.default,
    aten.special_log1p.default: aten.log1p.default,
    aten.special_log_softmax.default: aten.log_softmax.int,
    aten.special_logit.default: aten.logit.default,
    aten.special_logsumexp.default: aten.logsumexp.default,
    aten.special_multigammaln.default: aten.mvlgamma.default,
    aten.special_polygamma.default: aten.polygamma.default,
    aten.special_psi.default: aten.digamma.default,
    aten.special_gammainc.default: aten.igamma.default,
    aten.special_gammaincc.default: aten.igammac.default,
    aten.special_sinc.default: aten.sinc.default,
    aten.special_xlogy.default: aten.xlogy.Tensor,
    aten.special_xlogy.self_scalar: aten.xlogy.Scalar_Self,
    aten.special_xlogy.other_scalar: aten.xlogy.Scalar_Other,
    aten.conj.default: aten._conj.default,
    aten.hardsigmoid.default: hardsigmoid,
    aten.mv.default: aten.matmul.default,
    aten.dot.default: aten.matmul.default,
}


def one_name_each(module: fx.GraphModule) -> fx.GraphModule:
    """``multiply(a, b)`` -> ``mul(a, b)``: the names that PyTorch has twice.

    So are ``diagonal_copy(x)`` and the like: views that have memory of their own.
    """
    for node in module.graph.nodes:
        node.target = _ALIASES.get(node.target) or _viewed(node.target)
    return module


def _viewed(target: Any) -> Any:
    """``diagonal_copy.default`` -> ``diagonal.default``; others as they are."""
    name = getattr(target, "_schema", None) and target._schema.name
    if not name or not name.startswith("aten::") or not name.endswith("_copy"):
        return target
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_copy"), None)
    other = getattr(packet, target._overloadname, None)
    view = other is not None and any(a.alias_info is not None for a in other._schema.arguments)
    return other if view else target
