"""Norms, softmaxes and what else is divided by a size of its own, written by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.spellings import LAYERS_DIFFER, Case, assert_images_agree, assert_rows_agree

pytestmark = pytest.mark.usefixtures("each_front")


def _group_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    y = F.layer_norm(x.reshape(x.shape[0], 2, -1), (2 * 36,)).reshape(x.shape)
    return y * m.gn.weight[:, None, None] + m.gn.bias[:, None, None]


def _layer_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + m.norm.eps).sqrt() * m.norm.weight + m.norm.bias


IMAGES: dict[str, Case] = {
    "group norm by hand": (_group_norm_by_hand, lambda m, x: m.gn(x)),
    "instance norm as group norm": (
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.group_norm(x, 4),
    ),
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)


ROWS: dict[str, Case] = {
    "layer norm by hand": (_layer_norm_by_hand, lambda m, x: m.norm(x)),
    "layer norm in one op less": (
        lambda m, x: F.layer_norm(x, (8,)) * m.norm.weight + m.norm.bias,
        lambda m, x: m.norm(x),
    ),
    "rms norm by hand": (
        lambda m, x: m.rms.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.rms(x),
    ),
    **{
        f"rms norm by hand, {name}": (
            lambda m, x, inverse=inverse: m.rms.weight * (x * inverse(x)),
            lambda m, x: m.rms(x),
        )
        for name, inverse in {
            "unsqueezed": lambda x: torch.rsqrt(x.pow(2).mean(-1) + 1e-6)[:, None],
            "reshaped": lambda x: torch.rsqrt(x.pow(2).mean(-1) + 1e-6).view(-1, 1),
            "einsum": lambda x: torch.rsqrt(torch.einsum("nd,nd->n", x, x) / 8 + 1e-6)[:, None],
            "clamped": lambda x: torch.rsqrt((x * x).mean(1, True).clamp(min=0.0) + 1e-6),
            "transposed": lambda x: torch.rsqrt(x.T.pow(2).mean(0, keepdim=True) + 1e-6).T,
            "repeated": lambda x: torch.rsqrt((x * x).mean(1, True) + 1e-6).repeat(1, 8),
            "matmul": lambda x: torch.rsqrt((x[:, None] @ x[..., None])[..., 0] / 8 + 1e-6),
            "pooled": lambda x: torch.rsqrt(F.adaptive_avg_pool1d(x * x, 1) + 1e-6),
        }.items()
    },
    **{
        f"rms norm by hand, {name}": (
            lambda m, x, inverse=inverse: (
                m.rms.weight * (x * inverse(x.square().mean(-1, keepdim=True) + 1e-6))
            ),
            lambda m, x: m.rms(x),
        )
        for name, inverse in {
            "through a logarithm": lambda v: (-0.5 * v.log()).exp(),
            "through that of a root": lambda v: (-v.sqrt().log()).exp(),
            "through powers of ten": lambda v: 10 ** (torch.log10(v) / -2),
            "to the power of a tensor": lambda v: torch.pow(v, torch.tensor(-0.5).to(v)),
            "a root over its square": lambda v: v.sqrt() / v,
            "a product of powers": lambda v: v.pow(-0.75) * v.pow(0.25),
        }.items()
    },
    "layer norm by moments": (
        lambda m, x: (
            (x - x.mean(-1, keepdim=True))
            * torch.rsqrt(x.square().mean(1, True) - x.mean(1, True) ** 2 + m.norm.eps)
            * m.norm.weight
            + m.norm.bias
        ),
        lambda m, x: m.norm(x),
    ),
    "rms norm of energies by hand": (
        lambda m, x: (e := x[:, None].square().mean(1)) * (e.square().mean(1, True) + 1e-6) ** -0.5,
        lambda m, x: F.rms_norm(x[:, None].square().mean(1), (8,), eps=1e-6),
    ),
    "times an inverse": (
        lambda m, x: m.fc(x) * (1 / m.two(x).abs().amax(1, keepdim=True)),
        lambda m, x: m.fc(x) / m.two(x).abs().amax(1, keepdim=True),
    ),
    "an energy over its mean": (
        lambda m, x: (
            m.fc(x) * ((e := x.view(-1, 4, 2).square().mean(1)) / (2 * e.mean(1, True)))[:, :1]
        ),
        lambda m, x: m.fc(x) * ((e := x.view(-1, 4, 2).square().mean(1)) / e.sum(1, True))[:, :1],
    ),
    "softmax by hand": (
        lambda m, x: m.two(x) * ((e := m.fc(x).exp()) / e.sum(1, keepdim=True)),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax by hand, in range": (
        lambda m, x: (
            (e := ((s := m.fc(x)) - s.amax(-1, keepdim=True)).exp())
            * (1 / e.sum(-1)[:, None])
            * m.two(x)
        ),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "divided by the size of the batch": (
        lambda m, x: m.fc(x) / x.shape[0] + (m.two(x) - x.shape[0]).softmax(1),
        lambda m, x: m.fc(x) / 3 + m.two(x).softmax(1),
    ),
    "softmax less the largest of all": (
        lambda m, x: m.two(x) * ((s := m.fc(x)) - s.detach().max()).softmax(1),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax by hand, less the mean": (
        lambda m, x: (
            (e := ((s := m.fc(x)) - s.mean(-1, keepdim=True)).exp()) / e.sum(1, True) * m.two(x)
        ),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "norm that keeps the mean": (
        lambda m, x: (
            (mean := m.fc(x).mean(1, True))
            + (c := m.fc(x) - mean) * (c.square().mean(1, True) + 1e-5).rsqrt()
        ),
        lambda m, x: (
            (mean := m.fc(x).mean(1, True))
            + (c := m.fc(x) - mean) / (c.square().mean(1, True) + 1e-5).sqrt()
        ),
    ),
    "inverses in chunks": (
        lambda m, x: (r := (1 / (1 + m.two(x) ** 2)).chunk(2, 1))[0] * x[:, :4] + r[1] * m.slim(x),
        lambda m, x: x[:, :4] / (1 + (y := m.two(x) ** 2)[:, :4]) + m.slim(x) / (1 + y[:, 4:]),
    ),
    "softmax by hand, exponentials twice": (
        lambda m, x: m.two(x) * ((s := m.fc(x)).exp() / s.exp().sum(1, keepdim=True)),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax in range": (
        lambda m, x: m.two(x) * ((s := m.fc(x)) - s.amax(1, keepdim=True).detach()).softmax(1),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "no softmax: another dimension": (
        lambda m, x: (e := m.fc(x)[:, :4, None].exp() @ x[:, None, :4]) / e.sum(1)[:, :, None],
        lambda m, x: (e := m.fc(x)[:, :4, None].exp() @ x[:, None, :4]) / e.sum(1).unsqueeze(2),
    ),
    "variance and mean at once": (
        lambda m, x: (
            ((y := m.fc(x)) - (var_mean := torch.var_mean(y, 1, keepdim=True))[1])
            / (var_mean[0] + 1e-5).sqrt()
        ),
        lambda m, x: ((y := m.fc(x)) - y.mean(1, True)) / (y.var(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "normalize": (
        lambda m, x: F.normalize(x, dim=-1),
        lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12),
    ),
    "cosine similarity": (
        lambda m, x: nn.CosineSimilarity(dim=1)(m.fc(x), x)[:, None],
        lambda m, x: (F.normalize(m.fc(x), dim=1) * F.normalize(x, dim=1)).sum(1, keepdim=True),
    ),
    "cosine similarity to prototypes": (
        lambda m, x: F.cosine_similarity(x[:, None], m.two.weight[None], dim=-1),
        lambda m, x: F.linear(F.normalize(x), F.normalize(m.two.weight)),
        LAYERS_DIFFER,
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)
