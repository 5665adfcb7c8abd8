"""What Python does around ops leaves no trace in relevance: regions, loops, calls."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrpfx
from tests.conftest import Apply
from tests.oracle.spellings import (
    FOR_IMAGES,
    LAYERS_DIFFER,
    RULES,
    Case,
    assert_images_agree,
    assert_rows_agree,
    block,
    close,
    drawn,
    layers,
    net,
    normal,
)

pytestmark = pytest.mark.usefixtures("each_front")


def _looped(m: Any, x: Tensor) -> Tensor:
    return torch.stack([F.relu(m.conv(sample[None]))[0] for sample in x])


def _cut(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(m.one(x))
    return m.conv(x) * gate


def _cut_beside_a_write(m: Any, x: Tensor) -> Tensor:
    """The write makes the whole graph be functionalised, the region included."""
    y = m.conv(x)
    y[:, :2] += x[:, 2:]
    with torch.no_grad():
        gate = torch.sigmoid(m.one(x))
    return y * gate


def _cut_beside_a_sum(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.conv(x)[:, :2] + x[:, 2:], m.conv(x)[:, 2:]], 1)
    return y * torch.sigmoid(m.one(x)).detach()


def _autocast_off(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.conv(x))


IMAGES: dict[str, Case] = {
    "loop over samples": (_looped, lambda m, x: F.relu(m.conv(x))),
    "detached gate": (_cut, lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)).detach()),
    "no_grad beside a write into a slice": (_cut_beside_a_write, _cut_beside_a_sum),
    "autocast switched off": (_autocast_off, lambda m, x: F.relu(m.conv(x))),
    "checkpoint": (
        lambda m, x: checkpoint(lambda y: block(m, y), x, use_reentrant=False),
        block,
    ),
    "checkpoint, reentrant": (
        lambda m, x: checkpoint(lambda y: block(m, y), x, use_reentrant=True),
        block,
    ),
    "dropout": (
        lambda m, x: F.dropout2d(F.dropout(x, 0.9, m.training), 0.5, m.training),
        lambda m, x: x,
    ),
    "stochastic depth": (
        lambda m, x: x + (m.conv(x) if not m.training or torch.rand(()) > 0.5 else 0),
        lambda m, x: x + m.conv(x),
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpoint
@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)


ROWS: dict[str, Case] = {
    "lambda as a module": (
        lambda m, x: Apply(lambda _, y: F.relu(y))(m.fc(x)),
        lambda m, x: F.relu(m.fc(x)),
    ),
    "functools.partial": (
        lambda m, x: functools.partial(F.leaky_relu, negative_slope=0.2)(x),
        lambda m, x: nn.LeakyReLU(0.2)(x),
    ),
    "keyword call": (lambda m, x: m.fc(input=F.relu(input=x)), lambda m, x: m.fc(F.relu(x))),
    "forward called directly": (lambda m, x: m.fc.forward(x), lambda m, x: m.fc(x)),
    "nested Sequential": (
        lambda m, x: nn.Sequential(nn.Sequential(m.fc, nn.Sequential(nn.ReLU())), m.two)(x),
        lambda m, x: m.two(F.relu(m.fc(x))),
    ),
    "nn.Identity": (
        lambda m, x: nn.Sequential(nn.Identity(), m.fc, nn.Identity(), nn.Dropout().eval())(x),
        lambda m, x: m.fc(x),
    ),
    "running mean": (
        lambda m, x: torch.stack([x[:, : i + 1].mean(1) for i in range(8)], 1),
        lambda m, x: x @ (torch.ones(8, 8, dtype=x.dtype).triu() / torch.arange(1, 9)),
        LAYERS_DIFFER,
    ),
    "non-contiguous": (
        lambda m, x: m.fc(torch.stack([x, x], -1)[..., 0]),
        lambda m, x: m.fc(x),
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: Case) -> None:
    assert_rows_agree(*case)


def test_autocast_in_forward_is_right_to_its_own_precision() -> None:
    def cast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(m, x)
        return y.float()

    parts = {name: layer.float() for name, layer in layers().items()}
    x = normal(2, 2, 5, 5).float()
    for rules in FOR_IMAGES:
        a, b = (
            lrpfx.explain(Apply(f, **parts), x, 1, rules=by_name(rules)).relevance
            for f in (cast, net)
        )
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.1 * b.norm()


def by_name(rules: str) -> str:
    """The composite with its usual stabilizer, which half precision needs."""
    return "epsilon_alpha2_beta1_flat" if rules == "alpha_beta_flat" else rules


def test_no_grad_around_a_transformer_changes_nothing() -> None:
    """There eager PyTorch takes a fused fast path that no hook sees."""
    layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    model, x = drawn(nn.TransformerEncoder(layer, 2)), normal(2, 5, 8)
    seed = normal(2, 5, 8, seed=3)
    expected = lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance
    with torch.no_grad():
        assert close(lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance, expected)
    with torch.inference_mode():
        assert close(lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance, expected)
