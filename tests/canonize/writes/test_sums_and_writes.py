"""Sums in other words, and what is written into a tensor or a part of it."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from tests.conftest import Apply
from tests.oracle.spellings import (
    RULES,
    Case,
    assert_images_agree,
    assert_rows_agree,
    block,
    close,
    normal,
)

pytestmark = pytest.mark.usefixtures("each_front")


def _slice_added_to(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2] += x[:, 2:]
    return y


def _scaled_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[..., 0].mul_(2.0)
    return y


def _last_axis_scaled(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * torch.tensor([2.0, 1, 1, 1, 1, 1], dtype=x.dtype)


def _half_rectified_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2].relu_()
    return y


def _half_rectified(m: Any, x: Tensor) -> Tensor:
    first, second = m.conv(x).chunk(2, dim=1)
    return torch.cat([F.relu(first), second], 1)


def _kept_then_written_over(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    kept = y + 0 * x[:, :1].detach()
    y.relu_()
    return kept * 0.5 + y


IMAGES: dict[str, Case] = {
    "functional residual block": (
        block,
        lambda m, x: nn.ReLU()(torch.add(nn.Sequential(m.conv, m.bn)(x), x)),
    ),
    "residual add_": (lambda m, x: m.conv(x).add_(x).relu_(), lambda m, x: F.relu(m.conv(x) + x)),
    "residual +=": (lambda m, x: operator.iadd(m.conv(x), x), lambda m, x: m.conv(x) + x),
    "residual into x": (lambda m, x: x.add_(m.conv(x)), lambda m, x: x + m.conv(x)),
    "sum of a list": (
        lambda m, x: sum([x, m.conv(x), m.two(x)]),
        lambda m, x: x + m.conv(x) + m.two(x),
    ),
    "sums associated otherwise": (
        lambda m, x: x + (m.conv(x) + m.two(x)),
        lambda m, x: (x + m.conv(x)) + m.two(x),
    ),
    "stack and sum": (
        lambda m, x: torch.stack([x, m.conv(x)]).sum(0),
        lambda m, x: x + m.conv(x),
    ),
    "stack and mean": (
        lambda m, x: torch.stack([x, m.conv(x)], -1).mean(-1),
        lambda m, x: (x + m.conv(x)) / 2,
    ),
    "concatenated and summed": (
        lambda m, x: torch.cat([x, m.conv(x)], 1).view(-1, 2, 4, 6, 6).sum(1),
        lambda m, x: x + m.conv(x),
    ),
    "add with alpha": (
        lambda m, x: torch.add(m.conv(x), x, alpha=-0.5),
        lambda m, x: m.conv(x) - 0.5 * x,
    ),
    "sub_ with alpha": (
        lambda m, x: m.conv(x).sub_(x, alpha=2),
        lambda m, x: m.conv(x) - 2 * x,
    ),
    "rsub": (lambda m, x: torch.rsub(m.conv(x), x), lambda m, x: x - m.conv(x)),
    "lerp": (lambda m, x: torch.lerp(x, m.conv(x), 0.3), lambda m, x: x * 0.7 + m.conv(x) * 0.3),
    "lerp by a tensor": (
        lambda m, x: torch.lerp(x, m.conv(x), m.mask[0, 0, 0, 0] * 0.5 + 0.2),
        lambda m, x: (
            x * (0.8 - m.mask[0, 0, 0, 0] * 0.5) + m.conv(x) * (m.mask[0, 0, 0, 0] * 0.5 + 0.2)
        ),
    ),
    "addcmul": (
        lambda m, x: torch.addcmul(x, m.conv(x), m.two(x), value=0.5),
        lambda m, x: x + 0.5 * (m.conv(x) * m.two(x)),
    ),
    "addcmul_ with constants": (
        lambda m, x: m.conv(x).addcmul_(x, m.mask[0, :, 0, :1, None]),
        lambda m, x: m.conv(x) + x * m.mask[0, :, 0, :1, None],
    ),
    "addcdiv": (
        lambda m, x: torch.addcdiv(m.conv(x), x, m.mask[0, :, 0, :1, None] + 2, value=3.0),
        lambda m, x: m.conv(x) + 3.0 * (x / (m.mask[0, :, 0, :1, None] + 2)),
    ),
    "+= into a slice": (
        _slice_added_to,
        lambda m, x: torch.cat([m.conv(x)[:, :2] + x[:, 2:], m.conv(x)[:, 2:]], 1),
    ),
    "mul_ through a view": (_scaled_through_a_view, _last_axis_scaled),
    "relu_ on a slice": (_half_rectified_in_place, _half_rectified),
    "value kept before relu_": (
        _kept_then_written_over,
        lambda m, x: m.conv(x) * 0.5 + F.relu(m.conv(x)),
    ),
    "index_put with accumulate": (
        lambda m, x: m.conv(x).index_put_(
            (slice(None), torch.tensor([0, 0]))
            and (torch.arange(2)[:, None], torch.tensor([0, 0])),
            x[:, :2],
            accumulate=True,
        ),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x[:, :1] + x[:, 1:2], m.conv(x)[:, 1:]], 1),
    ),
    "scatter_add": (
        lambda m, x: m.conv(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x.sum(1, keepdim=True), m.conv(x)[:, 1:]], 1),
    ),
    "scatter of less than is given": (
        lambda m, x: torch.zeros_like(x).scatter(1, torch.tensor([2]).expand(2, 1, 6, 6), x),
        lambda m, x: F.pad(x[:, :1], (0, 0, 0, 0, 2, 1)),
    ),
    "scatter into zeros": (
        lambda m, x: torch.zeros_like(x).scatter(3, x.argsort(3), x),
        lambda m, x: torch.zeros_like(x).add(x.gather(3, x.argsort(3).argsort(3))),
    ),
    "index_add_": (
        lambda m, x: m.conv(x).index_add_(1, torch.tensor([0, 2]), x[:, 1:3]),
        lambda m, x: m.conv(x) + torch.stack([x[:, 1], 0 * x[:, 0], x[:, 2], 0 * x[:, 0]], 1),
    ),
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)


ROWS: dict[str, Case] = {
    "1 - x": (lambda m, x: 1 - x, lambda m, x: -x + torch.ones((), dtype=x.dtype)),
    "x - c": (lambda m, x: x - m.constant, lambda m, x: torch.add(x, m.constant, alpha=-1)),
    "div_": (lambda m, x: x.div_(m.constant), lambda m, x: x / m.constant),
    "difference over a divisor": (
        lambda m, x: x + (m.fc(x) - x) * (1 / (1 + m.two(x) ** 2)),
        lambda m, x: x + (m.fc(x) - x) / (1 + m.two(x) ** 2),
    ),
    "sum() of a list": (
        lambda m, x: sum([m.fc(x), 1 * m.two(x)]) / 1.0,
        lambda m, x: m.fc(x) + m.two(x),
    ),
    "lerp by hand": (
        lambda m, x: m.fc(x).sigmoid() * (m.two(x) - x) + x,
        lambda m, x: (1 - m.fc(x).sigmoid()) * x + m.fc(x).sigmoid() * m.two(x),
    ),
    "lerp from its end": (
        lambda m, x: x - m.fc(x).sigmoid() * (x - m.two(x)),
        lambda m, x: (1 - m.fc(x).sigmoid()) * x + m.fc(x).sigmoid() * m.two(x),
    ),
    "two lerps of one difference": (
        lambda m, x: (x + (d := m.two(x) - x) * m.fc(x).sigmoid()) * (x + d * m.slim(x)[:, :1]),
        lambda m, x: (
            torch.lerp(x, m.two(x), m.fc(x).sigmoid())
            * torch.lerp(x, m.two(x), m.slim(x)[:, :1].expand(-1, 8))
        ),
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)


def test_a_piecewise_linear_net_without_biases_is_gradient_times_input() -> None:
    """LRP-0: of whatever spelling; here a recurrent loop with writes into a buffer of states."""
    w, u = normal(5, 3), normal(5, 5, seed=2)

    def forward(m: Any, x: Tensor) -> Tensor:
        states = x.new_zeros(x.shape[0], 5, 5)
        h = states[:, 0]
        for t in range(4):
            h = F.relu(x[:, t] @ m.w.T + h @ m.u.T)
            states[:, t + 1] = h
        return states[:, 1:].amax(1) + states.mean(1)

    x = normal(2, 4, 3)
    model = Apply(forward, w=w, u=u)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    r = lrpfx.explain(model, x, 2, rules=RULES["epsilon_all"]).relevance
    assert close(r, gradient * x)
