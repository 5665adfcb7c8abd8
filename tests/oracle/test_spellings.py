"""The comparison of spellings can fail: wrong twins are caught."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lrpfx
from tests.oracle.spellings import (
    FOR_IMAGES,
    FOR_ROWS,
    LAYERS_DIFFER,
    Forward,
    assert_same,
    image_model,
    normal,
    row_model,
)

pytestmark = pytest.mark.usefixtures("each_front")

WRONG: dict[str, tuple[Forward, Forward]] = {
    # What tools that hook modules compute, as networks of the same output.
    "a residual counted twice": (
        lambda m, x: m.conv(x) + (2 * x - x.detach()),
        lambda m, x: m.conv(x) + x,
    ),
    "a gate held constant": (
        lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)),
        lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)).detach(),
    ),
    "the first of two calls forgotten": (
        lambda m, x: m.conv(x) + m.conv(F.relu(x)),
        lambda m, x: m.conv(x).detach() + m.conv(F.relu(x)),
    ),
    "a bias in the wrong place": (
        lambda m, x: m.two(x) + x + m.conv.bias[:, None, None],
        lambda m, x: (m.two(x) + m.conv.bias[:, None, None]) + x,
    ),
    "an average that is a maximum": (
        lambda m, x: F.avg_pool2d(x, 2),
        lambda m, x: F.max_pool2d(x, 2),
    ),
}


@pytest.mark.parametrize(("wrong", "plain"), WRONG.values(), ids=WRONG)
def test_a_wrong_twin_is_caught(wrong: Forward, plain: Forward) -> None:
    with pytest.raises(AssertionError, match="relative error|different outputs"):
        assert_same(image_model(wrong), image_model(plain), normal(2, 2, 6, 6), FOR_IMAGES)


def test_relevance_off_by_a_thousandth_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lrpfx.Epsilon.multiply

    def wrong(self: Any, call: Any, x: Any, z: Any, m: Any, carry: Any) -> Any:
        factor = 1.001 if "bias" in call.site.arguments else 1.0
        return tuple(c * factor for c in right(self, call, x, z, m, carry))

    spelled, plain = (lambda m, x: x @ m.two.weight.T), (lambda m, x: m.two(x))
    assert_same(row_model(spelled), row_model(plain), normal(3, 6), FOR_ROWS)
    monkeypatch.setattr(lrpfx.Epsilon, "multiply", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(row_model(spelled), row_model(plain), normal(3, 6), LAYERS_DIFFER)
