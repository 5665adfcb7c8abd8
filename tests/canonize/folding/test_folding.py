"""What is folded into a layer, in other words or by hand: batch norm, bias, scale, padding."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply
from tests.oracle.spellings import (
    FOR_IMAGES,
    FOR_PADDING,
    FOR_ROWS,
    RULES,
    Case,
    assert_images_agree,
    assert_rows_agree,
    close,
    drawn,
    normal,
)

pytestmark = pytest.mark.usefixtures("each_front")


def _frozen(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm as detectors have it, whose statistics are frozen."""
    weight, bias, var, mean = (
        t.reshape(1, -1, 1, 1) for t in (bn.weight, bn.bias, bn.running_var, bn.running_mean)
    )
    scale = weight * (var + bn.eps).rsqrt()
    return x * scale + (bias - mean * scale)


def _scaled_up(m: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``m.up`` with three batch norms behind it, worked out by hand."""
    weight, bias = m.up.weight, m.up.bias
    for bn in (m.bn, m.bn, m.bn2):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        weight, bias = weight * scale[:, None, None], (bias - bn.running_mean) * scale + bn.bias
    return weight, bias


IMAGES: dict[str, Case] = {
    "batch norm before the convolution": (
        lambda m, x: m.one(m.bn(F.relu(x))),
        lambda m, x: m.fused_ahead(F.relu(x)),
    ),
    "batch norm registered elsewhere": (
        lambda m, x: m.bn2(m.conv(F.relu(m.bn(m.two(x))))),
        lambda m, x: nn.Sequential(m.two, m.bn, nn.ReLU(), m.conv, m.bn2)(x),
    ),
    "batch norm as F.batch_norm": (
        lambda m, x: F.batch_norm(
            m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias
        ),
        lambda m, x: m.bn(m.conv(x)),
    ),
    "batch norm folded by hand": (
        lambda m, x: m.bn(m.conv(x)),
        lambda m, x: m.fused(x),
    ),
    "batch norm used twice": (
        lambda m, x: (y := m.bn(m.conv(x))) + F.relu(y),
        lambda m, x: (y := m.fused(x)) + F.relu(y),
    ),
    "one batch norm for two convolutions": (
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.two(x)),
        lambda m, x: m.fused(x) + m.fused_two(x),
    ),
    "padding by F.pad": (
        lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.conv.weight, m.conv.bias),
        lambda m, x: m.conv(x),
    ),
    "padding by name": (
        lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding="same"),
        lambda m, x: m.conv(x),
    ),
    "frozen batch norm": (
        lambda m, x: _frozen(m.bn, m.conv(F.relu(x))),
        lambda m, x: m.bn(m.conv(F.relu(x))),
        (*FOR_IMAGES, "no_bias"),
    ),
    "batch norm step by step": (
        lambda m, x: (
            (m.two(F.relu(x)) - m.bn.running_mean[:, None, None])
            / (m.bn.running_var + m.bn.eps).sqrt()[:, None, None]
            * m.bn.weight[:, None, None]
            + m.bn.bias[:, None, None]
        ),
        lambda m, x: m.bn(m.two(F.relu(x))),
        (*FOR_IMAGES, "no_bias"),
    ),
    "frozen behind a transposed convolution, and twice": (
        lambda m, x: _frozen(m.bn2, m.bn(_frozen(m.bn, m.up(F.relu(x))))),
        lambda m, x: F.conv_transpose2d(F.relu(x), *_scaled_up(m), stride=2),
        (*FOR_IMAGES, "no_bias"),
    ),
    "a bias by itself": (
        lambda m, x: m.conv.bias[:, None, None] + F.conv2d(F.relu(x), m.conv.weight, padding=1),
        lambda m, x: m.conv(F.relu(x)),
        (*FOR_IMAGES, "no_bias"),
    ),
    "padding by itself": (
        lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.conv.weight, m.conv.bias),
        lambda m, x: m.conv(x),
        FOR_PADDING,
    ),
    "padding of one side": (
        lambda m, x: F.conv2d(nn.ZeroPad2d((1, 2, 1, 1))(x), m.conv.weight, m.conv.bias),
        lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=(1, 2))[..., 1:],
        FOR_PADDING,
    ),
    "padding in steps": (
        lambda m, x: F.conv2d(
            F.pad(F.relu(F.pad(F.pad(x, (-1, 1, 2, 0)), (1, 0, -1, 1))), (0, 0, 0, 0)),
            m.conv.weight,
            m.conv.bias,
        ),
        lambda m, x: F.conv2d(
            F.pad(F.relu(x[..., 1:]), (1, 0)), m.conv.weight, m.conv.bias, padding=(1, 1)
        )[..., 1:],
        FOR_PADDING,
    ),
    "no bias: one per pixel": (
        lambda m, x: m.two(F.relu(x)) + m.mask[:, 0].repeat(1, 2, 2),
        lambda m, x: torch.add(m.two(F.relu(x)), m.mask[:, 0].repeat(1, 2, 2)[None]),
    ),
    "no bias: the convolution is read twice": (
        lambda m, x: (y := m.two(F.relu(x))) + m.bn.bias[:, None, None] + 2 * y,
        lambda m, x: (y := m.two(F.relu(x))) + m.bn.bias.view(1, 4, 1, 1) + y * 2,
    ),
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)


ROWS: dict[str, Case] = {
    "x @ W + b": (
        lambda m, x: F.relu(x) @ m.fc.weight.T + m.fc.bias,
        lambda m, x: m.fc(F.relu(x)),
        (*FOR_ROWS, "no_bias"),
    ),
    "einsum and a bias": (
        lambda m, x: torch.einsum("ni,oi->no", F.relu(x), m.fc.weight) + m.fc.bias,
        lambda m, x: m.fc(F.relu(x)),
        (*FOR_ROWS, "no_bias"),
    ),
    "a layer's outputs scaled": (
        lambda m, x: m.fc(F.relu(x)) / m.constant * m.norm.weight - m.norm.bias,
        lambda m, x: F.linear(
            F.relu(x),
            m.fc.weight * (m.norm.weight / m.constant)[:, None],
            m.fc.bias * m.norm.weight / m.constant - m.norm.bias,
        ),
        (*FOR_ROWS, "no_bias"),
    ),
    "batch norm by hand": (
        lambda m, x: m.bn(m.fc(x)),
        lambda m, x: F.linear(
            x,
            m.fc.weight * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())[:, None],
            (m.fc.bias - m.bn.running_mean) * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())
            + m.bn.bias,
        ),
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)


@pytest.mark.parametrize("rules", FOR_PADDING[1:])
def test_padding_by_an_amount_that_varies(rules: str) -> None:
    """As "same" padding by hand has it: so much as the size of the image asks for."""
    conv = drawn(nn.Conv2d(2, 3, 3, stride=2), seed=5)

    def forward(m: Any, x: Tensor) -> Tensor:
        missing = -x.shape[3] % 2 + 1
        return m.conv(F.pad(x, (0, missing, 1, missing))).mean((2, 3))

    model = Apply(forward, conv=conv)
    explainer = lrpfx.Explainer(model, normal(2, 2, 6, 6), RULES[rules], dynamic=(2, 3))
    for size in (6, 8):
        x = normal(2, 2, size, size)
        fixed = lrpfx.explain(Apply(forward, conv=conv), x, 1, rules=RULES[rules])
        for ledger in (True, False):
            assert close(explainer(x, 1, ledger=ledger).relevance, fixed.relevance)
