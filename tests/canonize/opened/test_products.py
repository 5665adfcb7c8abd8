"""Linear layers as products of any form, products of activations, selections, cells."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.spellings import Case, assert_rows_agree

pytestmark = pytest.mark.usefixtures("each_front")


def _gru_by_hand(gru: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    above, state = F.linear(x, gru.weight_ih, gru.bias_ih), F.linear(h, gru.weight_hh, gru.bias_hh)
    (r, z, n), (r_h, z_h, n_h) = above.chunk(3, 1), state.chunk(3, 1)
    z = (z + z_h).sigmoid()
    return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h


def _routed(m: Any, x: Tensor) -> Tensor:
    return x.gather(1, x.topk(3, dim=1).indices)


def _mixed(m: Any, x: Tensor) -> Tensor:
    """Mixture of experts: the best of three by a router whose choice counts as a constant."""
    experts = torch.stack([m.fc(x), m.two(x), x], 1)
    best = m.slim(x)[:, :3].argmax(1)
    return experts[torch.arange(x.shape[0]), best]


def _mixed_plain(m: Any, x: Tensor) -> Tensor:
    experts = torch.stack([m.fc(x), m.two(x), x], 1)
    chosen = F.one_hot(m.slim(x)[:, :3].argmax(1), 3)
    return experts.where(chosen[..., None] > 0, 0.0).sum(1)


def _lstm_cell(m: Any, x: Tensor) -> Tensor:
    """LSTMCell written out of ops, from a state of zeros, two steps."""
    h = c = x.new_zeros(x.shape[0], 4)
    for _ in range(2):
        gates = F.linear(x, m.lstm.weight_ih, m.lstm.bias_ih)
        gates = gates + F.linear(h, m.lstm.weight_hh, m.lstm.bias_hh)
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


def _lstm_cell_otherwise(m: Any, x: Tensor) -> Tensor:
    """The same by four pairs of linear layers, and in-place sums."""
    h, c = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
    w, u = (t.split(4) for t in (m.lstm.weight_ih, m.lstm.weight_hh))
    b, d = (t.split(4) for t in (m.lstm.bias_ih, m.lstm.bias_hh))
    for _ in range(2):
        gates = [F.linear(x, w[k], b[k]).add_(F.linear(h, u[k], d[k])) for k in range(4)]
        i, f, o = (gates[k].sigmoid_() for k in (0, 1, 3))
        c = c.mul(f).add_(i * gates[2].tanh())
        h = o * c.tanh()
    return h


ROWS: dict[str, Case] = {
    "F.linear": (
        lambda m, x: F.linear(F.relu(x), m.fc.weight, m.fc.bias),
        lambda m, x: m.fc(F.relu(x)),
    ),
    "x @ W": (lambda m, x: x @ m.two.weight.T, lambda m, x: m.two(x)),
    "(W @ x')'": (lambda m, x: (m.two.weight @ x.T).T, lambda m, x: m.two(x)),
    "matmul with a column": (
        lambda m, x: torch.matmul(m.two.weight, x[..., None]).squeeze(-1),
        lambda m, x: m.two(x),
    ),
    "einsum": (lambda m, x: torch.einsum("ni,oi->no", x, m.two.weight), lambda m, x: m.two(x)),
    "einsum without an arrow": (
        lambda m, x: torch.einsum("ni, oi", x, m.two.weight),
        lambda m, x: m.two(x),
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.two.weight, dims=([1], [1])),
        lambda m, x: m.two(x),
    ),
    "inner": (lambda m, x: torch.inner(x, m.two.weight), lambda m, x: m.two(x)),
    "addmm": (lambda m, x: torch.addmm(m.fc.bias, x, m.fc.weight.T), lambda m, x: m.fc(x)),
    "addmm with a live summand": (
        lambda m, x: torch.addmm(x, x, m.two.weight.T, beta=0.5, alpha=2.0),
        lambda m, x: 0.5 * x + 2.0 * m.two(x),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, None], x[:, None], m.two.weight.T.expand(x.shape[0], 8, 8)),
        lambda m, x: (x + m.two(x))[:, None],
    ),
    "baddbmm of live factors": (
        lambda m, x: torch.baddbmm(
            x[:, None], m.two(x)[:, :, None].mT, x.view(-1, 8, 1) @ x[:, None, :], beta=0.5, alpha=2
        ),
        lambda m, x: (
            0.5 * x[:, None] + 2 * (m.two(x)[:, None] @ (x.view(-1, 8, 1) @ x[:, None, :]))
        ),
    ),
    "addbmm": (
        lambda m, x: torch.addbmm(x, x[None], m.two.weight.T[None]),
        lambda m, x: x + m.two(x),
    ),
    "outer": (
        lambda m, x: torch.stack([torch.outer(row, row[:3]) for row in x]),
        lambda m, x: x[:, :, None] * x[:, None, :3],
    ),
    "dot": (
        lambda m, x: torch.stack([torch.dot(row, m.constant) for row in x])[:, None],
        lambda m, x: x @ m.constant[:, None],
    ),
    "mv": (
        lambda m, x: torch.mv(x, m.constant)[:, None],
        lambda m, x: F.linear(x, m.constant[None]),
    ),
    "bilinear": (
        lambda m, x: m.bilinear(x, x[:, 4:]),
        lambda m, x: torch.einsum("ni,oij,nj->no", x, m.bilinear.weight, x[:, 4:]),
    ),
    "division": (lambda m, x: x / m.constant / 4, lambda m, x: x * (1 / m.constant) * 0.25),
    "true_divide": (lambda m, x: torch.true_divide(x, 2), lambda m, x: 0.5 * x),
    "piece of a product": (
        lambda m, x: (m.fc(x) * m.two(x)).chunk(2, 1)[0] * m.slim(x),
        lambda m, x: (m.fc(x) * m.two(x))[:, :4] * m.slim(x),
    ),
    "three factors with views between": (
        lambda m, x: ((m.fc(x) * m.two(x)).view(-1, 2, 4) * x.view(-1, 2, 4) / 2).flatten(1),
        lambda m, x: m.fc(x) * m.two(x) * x / 2,
    ),
    "addmm with beta 0": (
        lambda m, x: torch.addmm(x * torch.nan, x, m.two.weight.T, beta=0),
        lambda m, x: m.two(x),
    ),
    "division by integers": (
        lambda m, x: x / torch.arange(1, 9),
        lambda m, x: x / torch.arange(1.0, 9.0, dtype=x.dtype),
    ),
    "gru cell by its equation": (
        lambda m, x: m.gru(x, x[:, :4]),
        lambda m, x: _gru_by_hand(m.gru, x, x[:, :4]),
    ),
    "top-k by gather": (_routed, lambda m, x: x.topk(3, dim=1).values),
    "routed experts": (_mixed, _mixed_plain),
    "index_select": (
        lambda m, x: torch.index_select(x, 1, torch.tensor([5, 0, 0])),
        lambda m, x: torch.stack([x[:, 5], x[:, 0], x[:, 0]], 1),
    ),
    "weights tied across a transpose": (
        lambda m, x: F.linear(F.relu(F.linear(x, m.slim.weight)), m.slim.weight.t()),
        lambda m, x: F.relu(x @ m.slim.weight.T) @ m.slim.weight.clone(),
    ),
    "LSTM cell by hand": (_lstm_cell, _lstm_cell_otherwise),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)
