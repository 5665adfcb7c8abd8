"""AttnLRP as LXT computes it, for Llama: input times a gradient in which some ops count for less.

Equal to the rules where epsilon is 0: a gate's activation gets the slope of its secant, the two
factors of a product get a half each, queries and keys a quarter, values a half, and the norms'
denominators are constants (Achtibat et al. 2024, arXiv 2402.05602). Nothing here uses lrpfx.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Call, Work


def modified_gradient(work: Work) -> Call:
    """Relevance of a Llama's input embeddings."""
    model = with_modified_gradients(work.model)

    def call() -> Tensor:
        x = work.x.detach().requires_grad_()
        (g,) = torch.autograd.grad(work.score(work.run(model, x)).sum(), x)
        return x.detach() * g

    return call


def with_modified_gradients(model: Any) -> nn.Module:
    """A frozen copy whose forward is the same and whose gradient times input is relevance."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("modified_sdpa", attention)
    AttentionMaskInterface.register("modified_sdpa", sdpa_mask)
    modified = copy.deepcopy(model).requires_grad_(False)
    modified.set_attn_implementation("modified_sdpa")
    for layer in modified.modules():
        if type(layer).__name__ == "LlamaRMSNorm":
            layer.forward = functools.partial(rms_norm, layer)
        elif type(layer).__name__ == "LlamaMLP":
            layer.forward = functools.partial(gated, layer)
    return modified


class _Scaled(torch.autograd.Function):
    """x, with its gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scaled(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times ``factor``."""
    return _Scaled.apply(x, factor)


def rms_norm(layer: Any, x: Tensor) -> Tensor:
    """RMSNorm with a constant denominator, in float32 as in the original."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + layer.variance_epsilon).detach()
    return layer.weight * (x32 * scale).to(x.dtype)


def gated(layer: Any, x: Tensor) -> Tensor:
    """The two factors of act(gate) * up share evenly, and act has the slope of its secant."""
    gate = layer.gate_proj(x)
    with torch.no_grad():
        slope = (layer.act_fn(gate) / gate).nan_to_num(0.0)
    return layer.down_proj(scaled(gate * slope * layer.up_proj(x), 0.5))


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
    """Fused attention whose two matrix products share evenly."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = scaled(query, 0.25), scaled(key, 0.25), scaled(value, 0.5)
    return sdpa_attention_forward(module, query, key, value, *args, **options)
