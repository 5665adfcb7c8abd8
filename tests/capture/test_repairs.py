"""Errors of a user's own call end with what mends it, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import errors

pytestmark = pytest.mark.usefixtures("each_way")


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()


def gray() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).eval()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) + self.right(b)


X = torch.randn(1, 3, 8, 8)
ROW = torch.randn(1, 3)
LACKING: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "an image alone": (images, X[0], r"x\[None\]; the model runs on float32\[1, 3, 8, 8\]"),
    "a gray image for a model of colours": (
        images,
        X[:, :1],
        r"x.repeat\(1, 3, 1, 1\); the model runs on float32\[1, 3, 8, 8\]",
    ),
    "a colour image for a model of gray ones": (gray, X, r"x.mean\(1, keepdim=True\)"),
    "channels last": (images, X.movedim(1, -1), r"channels first: x.movedim\(-1, -3\)"),
    "one image, channels last": (images, X[0].movedim(0, -1), r"x.movedim\(-1, -3\)\[None\]"),
    "double": (images, X.double(), r"dtype float32"),
    "bytes": (images, X.byte(), r"dtype float32"),
    "numpy": (images, X.numpy(), r"torch.from_numpy\(x\)"),
    "numpy in a tuple": (images, (X.numpy(),), r"torch.from_numpy\(x\)"),
    "numpy beside a tensor": (Pair, (ROW, ROW.numpy()), r"torch.from_numpy\(x\)"),
    "one of two": (Pair, ROW, r"forward\(a.*, b.*\).* needs a, b: .*given: 1 by position"),
    "one of two by name": (Pair, {"b": ROW}, "needs a, b: .*given: b"),
}


@pytest.mark.parametrize("case", LACKING)
def test_the_last_line_of_an_error_says_what_the_inputs_lack(case: str) -> None:
    make, inputs, told = LACKING[case]
    with pytest.raises(errors.InputError) as caught:
        lrpfx.explain(make(), inputs, 0)
    assert caught.match(rf"fix: .*{told}")


def test_an_explainer_says_what_inputs_lack_of_those_captured() -> None:
    explainer = lrpfx.Explainer(images(), X)
    for given, told in {
        "alone": (X[0], r"x\[None\]"),
        "double": (X.double(), "dtype and device captured"),
        "double and alone": (X[0].double(), r"x\[None\], and give the dtype"),
        "another size": (X[..., :5], "for inputs of this form"),
    }.values():
        with pytest.raises(errors.InputError, match=rf"fix: .*{told}"):
            explainer(given, 0)


def test_a_model_that_runs_on_nothing_near_is_not_told_otherwise() -> None:
    with pytest.raises(errors.InputError, match=r"check that model\(...\) runs"):
        lrpfx.explain(images(), torch.randn(1, 5, 2, 2), 0)


def test_weights_that_are_not_finite_are_named() -> None:
    model = images()
    explainer = lrpfx.Explainer(model, X)
    with torch.no_grad():
        model[3].weight[0, :2] = np.nan
        model[0].bias[1] = np.inf
    for call in (lambda: lrpfx.explain(model, X, 0), lambda: explainer(X, 0)):
        with pytest.raises(errors.NonFiniteError) as caught:
            call()
        assert "0.bias: 1 of 2 entries" in str(caught.value)
        assert "3.weight: 2 of 216 entries" in str(caught.value)


def test_infinite_buffers_are_no_fault_of_the_weights() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -np.inf]))
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / (x.sum(1, keepdim=True) - x.sum(1, keepdim=True))

    with pytest.raises(errors.NonFiniteError, match="own forward pass makes NaN"):
        lrpfx.explain(Masked().eval(), ROW, 0)


def test_places_of_one_kind_are_counted() -> None:
    blocks = [part for _ in range(5) for part in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())]
    with pytest.raises(errors.TrainingModeError) as caught:
        lrpfx.explain(nn.Sequential(*blocks), torch.randn(4, 3), 0)
    assert len(caught.value.where) == 2
    assert "1, 4, 7 and 2 more: batch_norm uses the statistics" in caught.value.where[0]
    assert "2, 5, 8 and 2 more: dropout is random" in caught.value.where[1]


def test_names_of_modules_that_are_never_called_are_noted() -> None:
    rules: Any = [("never", lrpfx.Gamma()), ("*", lrpfx.Epsilon())]
    report = lrpfx.explain(Pair().eval(), (ROW, ROW), 0, rules=rules).report
    assert any("'never' matches only modules without an op" in note for note in report.notes)
    with pytest.raises(errors.SelectorError, match="nowhere"):
        rules = [("nowhere", lrpfx.Gamma()), ("*", lrpfx.Epsilon())]
        lrpfx.explain(Pair().eval(), (ROW, ROW), 0, rules=rules)


def test_notebooks_show_the_users_lines_and_the_message_alone() -> None:
    with pytest.raises(errors.InputError) as caught:
        lrpfx.explain(images(), X[0], 0)
    shown = "\n".join(caught.value._render_traceback_())
    assert "lrpfx.explain(images(), X[0], 0)" in shown and "x[None]" in shown
    assert "lrpfx/explain.py" not in shown and "lrpfx/capture/" not in shown
