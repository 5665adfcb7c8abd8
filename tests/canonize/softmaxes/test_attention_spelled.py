"""Attention as modules, functions and one head at a time: the relevance of its plain twin."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.oracle.spellings import Case, assert_tokens_agree

pytestmark = pytest.mark.usefixtures("each_front")


def heads(x: Tensor) -> Tensor:
    """(N, T, 8) -> (N, 2, T, 4)."""
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of two heads, plainly: (N, T, 8) each."""
    q, k, v = heads(q), heads(k), heads(v)
    weights = torch.softmax((q @ k.transpose(-2, -1)) * 0.5, -1)
    return (weights @ v).transpose(1, 2).reshape(q.shape[0], -1, 8)


def _mha_plain(m: Any, x: Tensor) -> Tensor:
    a = m.mha
    q, k, v = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    return F.linear(attend(q, k, v), a.out_proj.weight, a.out_proj.bias)


def _rearranged(m: Any, x: Tensor) -> Tensor:
    q, k, v = (rearrange(f(x), "n t (h d) -> n h t d", h=2) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return rearrange(y, "n h t d -> n t (h d)")


def _fused_projection(m: Any, x: Tensor) -> Tensor:
    weight = torch.cat([m.q.weight, m.k.weight, m.v.weight])
    bias = torch.cat([m.q.bias, m.k.bias, m.v.bias])
    q, k, v = F.linear(x, weight, bias).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.mT).div(2).softmax(dim=-1)
    return (weights @ v).permute(0, 2, 1, 3).flatten(2)


def _one_head_at_a_time(m: Any, x: Tensor) -> Tensor:
    parts = []
    for q, k, v in zip(*(f(x).split(4, -1) for f in (m.q, m.k, m.v)), strict=True):
        parts.append(torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul_(0.5).softmax(-1), v))
    return torch.cat(parts, -1)


def _causal_by_masked_fill_(m: Any, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).mT / 8**0.5
    scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ m.v(x)


def _causal(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), is_causal=True)


def _encoder_plain(m: Any, x: Tensor) -> Tensor:
    n = m.layer
    a = n.self_attn
    q, k, v = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    x = n.norm1(x + a.out_proj(attend(q, k, v)))
    return n.norm2(x + n.linear2(F.relu(n.linear1(x))))


def _pre_norm_plain(m: Any, x: Tensor) -> Tensor:
    n = m.pre
    a = n.self_attn
    q, k, v = F.linear(n.norm1(x), a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    x = x + a.out_proj(attend(q, k, v))
    return x + n.linear2(F.relu(n.linear1(n.norm2(x))))


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1
    return torch.einsum("ntd,nde->nte", q, torch.einsum("nsd,nse->nde", k, m.v(x)))


TOKENS: dict[str, Case] = {
    "sdpa": (_rearranged, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "fused projection": (_fused_projection, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "one head at a time": (_one_head_at_a_time, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "MultiheadAttention": (lambda m, x: m.mha(x, x, x)[0], _mha_plain),
    "MultiheadAttention without weights": (
        lambda m, x: m.mha(x, x, x, need_weights=False)[0],
        _mha_plain,
    ),
    "MultiheadAttention, time first": (
        lambda m, x: m.late(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        lambda m, x: m.mha(x, x, x)[0],
    ),
    "MultiheadAttention by F": (
        lambda m, x: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            8,
            2,
            m.mha.in_proj_weight,
            m.mha.in_proj_bias,
            None,
            None,
            False,
            0.0,
            m.mha.out_proj.weight,
            m.mha.out_proj.bias,
            training=False,
        )[0].transpose(0, 1),
        _mha_plain,
    ),
    "causal by masked_fill_": (_causal_by_masked_fill_, _causal),
    "TransformerEncoderLayer": (lambda m, x: m.layer(x), _encoder_plain),
    "TransformerEncoderLayer, norm first": (lambda m, x: m.pre(x), _pre_norm_plain),
    "TransformerEncoder": (lambda m, x: m.encoder(x), _encoder_plain),
    "linear attention": (
        _linear_attention,
        lambda m, x: (1 + F.elu(m.q(x))) @ ((1 + F.elu(m.k(x))).mT @ m.v(x)),
    ),
    "normalised linear attention": (
        lambda m, x: torch.einsum(
            "ntd,nt->ntd",
            _linear_attention(m, x),
            1 / torch.einsum("ntd,nd->nt", F.elu(m.q(x)) + 1, (F.elu(m.k(x)) + 1).sum(1)),
        ),
        lambda m, x: (
            _linear_attention(m, x)
            / ((F.elu(m.q(x)) + 1) * (F.elu(m.k(x)) + 1).sum(1, keepdim=True)).sum(2, keepdim=True)
        ),
    ),
    "projection per head by einsum": (
        lambda m, x: torch.einsum("nthd,hde->nhte", x.view(-1, 5, 2, 4), m.heads),
        lambda m, x: torch.stack(
            [F.linear(x[..., 4 * h : 4 * h + 4], m.heads[h].T) for h in range(2)], 1
        ),
    ),
    "linear layer by einsum with an ellipsis": (
        lambda m, x: torch.einsum("...i,oi->...o", x, m.q.weight) + m.q.bias,
        lambda m, x: x.matmul(m.q.weight.mT).add_(m.q.bias),
    ),
    "one by one convolution": (
        lambda m, x: F.conv1d(x.transpose(1, 2), m.q.weight[..., None]).transpose(1, 2),
        lambda m, x: F.linear(x, m.q.weight),
    ),
}


@pytest.mark.parametrize("case", TOKENS.values(), ids=TOKENS)
def test_tokens(case: Case) -> None:
    assert_tokens_agree(*case)
