"""Activations in other words, and written by hand: the relevance of their plain twins."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracle.spellings import FOR_RELUS, Case, assert_images_agree, assert_rows_agree

pytestmark = pytest.mark.usefixtures("each_front")

IMAGES: dict[str, Case] = {
    "nn.ReLU": (lambda m, x: nn.ReLU()(x), lambda m, x: F.relu(x)),
    "nn.ReLU in place": (lambda m, x: nn.ReLU(inplace=True)(x), lambda m, x: F.relu(x)),
    "relu_": (lambda m, x: x.relu_(), lambda m, x: F.relu(x), FOR_RELUS),
    "F.relu in place": (lambda m, x: F.relu(x, inplace=True), lambda m, x: F.relu(x)),
    "clamp": (lambda m, x: x.clamp(min=0), lambda m, x: F.relu(x), FOR_RELUS),
    "clamp_": (lambda m, x: x.clamp_(min=0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "clamp_min": (lambda m, x: torch.clamp_min(x, 0), lambda m, x: F.relu(x), FOR_RELUS),
    "clip": (lambda m, x: x.clip(0, None), lambda m, x: F.relu(x), FOR_RELUS),
    "maximum": (
        lambda m, x: torch.maximum(x, torch.zeros_like(x)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "max(x, 0)": (lambda m, x: torch.max(x, x.new_zeros(())), lambda m, x: F.relu(x), FOR_RELUS),
    "where": (lambda m, x: torch.where(x > 0, x, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "where with zeros": (
        lambda m, x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "where the other way round": (
        lambda m, x: torch.where(x <= 0, x.new_zeros(()), x),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "maximum with a number": (
        lambda m, x: torch.maximum(x, torch.tensor(0.0, dtype=x.dtype)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "times a mask of numbers": (
        lambda m, x: (x > 0).to(x.dtype) * x,
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "no relu: the mask of another": (
        lambda m, x: x * (m.one(x) > 0),
        lambda m, x: torch.where(m.one(x) > 0, x, 0.0),
        FOR_RELUS,
    ),
    "times a mask": (lambda m, x: x * (x > 0), lambda m, x: F.relu(x), FOR_RELUS),
    "masked_fill": (lambda m, x: x.masked_fill(x < 0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "masked_fill_": (lambda m, x: x.masked_fill_(x < 0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "indexed by a mask": (
        lambda m, x: x.index_put((x < 0,), x.new_zeros(())),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "threshold": (lambda m, x: F.threshold(x, 0.0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "leaky with slope 0": (lambda m, x: F.leaky_relu(x, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "(x + |x|) / 2": (lambda m, x: (x + x.abs()) / 2, lambda m, x: F.relu(x)),
    "relu6": (lambda m, x: x.clamp(0, 6), lambda m, x: F.relu6(x)),
    "PReLU": (
        lambda m, x: m.prelu(x),
        lambda m, x: torch.where(x > 0, x, x * m.prelu.weight[:, None, None]),
    ),
    "PReLU in two halves": (
        lambda m, x: F.relu(x) - m.prelu.weight[:, None, None] * F.relu(-x),
        lambda m, x: m.prelu(x),
    ),
    "hardswish": (lambda m, x: x * F.relu6(x + 3) / 6, lambda m, x: F.hardswish(x)),
    "hardswish in place": (
        lambda m, x: x.mul_(F.relu6(x.clone().add_(3))).div_(6),
        lambda m, x: nn.Hardswish()(x),
    ),
    "silu": (lambda m, x: x * x.sigmoid(), lambda m, x: nn.SiLU()(x)),
    "softmax over channels": (lambda m, x: nn.Softmax2d()(x), lambda m, x: x.softmax(1)),
    "square": (lambda m, x: x**2, lambda m, x: torch.square(x)),
    "x * x": (lambda m, x: x * x, lambda m, x: x.pow(2)),
    "glu": (
        lambda m, x: F.glu(x, dim=1),
        lambda m, x: x[:, :2] * torch.sigmoid(x[:, 2:]),
    ),
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)


ROWS: dict[str, Case] = {
    "x ** 3": (lambda m, x: torch.pow(x, 3), lambda m, x: x * x * x),
    "sqrt of a power": (lambda m, x: (x * x + 1) ** 0.5, lambda m, x: torch.sqrt(x.square() + 1)),
    "swiglu": (
        lambda m, x: F.silu(m.fc(x)) * m.two(x),
        lambda m, x: m.two(x) * ((gate := m.fc(x)) * torch.sigmoid(gate)),
    ),
    "glu": (
        lambda m, x: nn.GLU()(x),
        lambda m, x: operator.mul(x.chunk(2, -1)[0], torch.sigmoid(x.chunk(2, -1)[1])),
    ),
    "no relu and no softplus: of integers, and of what is not a number": (
        lambda m, x: (
            m.fc(x)
            + torch.log1p(torch.exp(torch.arange(8)))
            + torch.arange(-3, 5).clamp(min=0)
            + torch.where((y := (m.two(x) - 99).sqrt()) > 0, y, 0.0)
        ),
        lambda m, x: (
            m.fc(x)
            + torch.tensor([max(k, 0.0) for k in range(-3, 5)], dtype=x.dtype)
            + torch.log1p(torch.exp(torch.arange(8)))
        ),
    ),
    "sigmoid by hand": (
        lambda m, x: m.two(x) * (1 / (1 + torch.exp(-m.fc(x)))),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "sigmoid by hand, as a power": (
        lambda m, x: m.two(x) * (1 + torch.exp(-m.fc(x))) ** -1,
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "sigmoid by hand, as a divisor": (
        lambda m, x: m.two(x) / (1 + torch.exp(-m.fc(x))),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "hard sigmoid by hand": (
        lambda m, x: (
            m.two(x) * (F.relu6(m.fc(x) + 3) / 6) * ((m.slim(x) + 3).clamp(0, 6) * (1 / 6))[:, :1]
        ),
        lambda m, x: m.two(x) * F.hardsigmoid(m.fc(x)) * F.hardsigmoid(m.slim(x))[:, :1],
    ),
    "softplus by hand": (
        lambda m, x: torch.log(1 + m.fc(x).exp()) + torch.log1p(m.two(x).exp()),
        lambda m, x: F.softplus(m.fc(x)) + F.softplus(m.two(x)),
    ),
    "a power that is learned": (
        lambda m, x: (m.fc(x).abs() + 1).pow(m.constant[:1]),
        lambda m, x: (m.constant[:1] * (m.fc(x).abs() + 1).log()).exp(),
    ),
    "sigmoid by hand, of the negative": (
        lambda m, x: m.two(x) * (1 / (1 + torch.exp(m.fc(x)))),
        lambda m, x: m.two(x) * (-m.fc(x)).sigmoid(),
    ),
    "sigmoid by hand, exponentials twice": (
        lambda m, x: m.two(x) * ((e := torch.exp(m.fc(x))) / (1 + e)),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)
