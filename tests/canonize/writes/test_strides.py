"""Reads of memory by strides are moves of a tensor as it lay there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply

Fn = Callable[[Tensor], Tensor]


def twice(y: Tensor) -> Tensor:
    y.as_strided((3, 2), (6, 1)).mul_(2)
    return y


PAIRS: dict[str, tuple[Fn, Fn]] = {
    "windows": (lambda y: y.as_strided((3, 4, 3), (6, 1, 1)), lambda y: y.unfold(1, 3, 1)),
    "transposed": (lambda y: y.t().as_strided((6, 2), (1, 6)), lambda y: y[:2].T),
    "behind an offset": (lambda y: y[1:].as_strided((2, 5), (6, 1)), lambda y: y[1:, :5]),
    "at an offset": (lambda y: y[1:].as_strided((2, 5), (6, 1), 7), lambda y: y[1:, 1:]),
    "written into": (twice, lambda y: torch.cat([2 * y[:, :2], y[:, 2:]], 1)),
    "diagonal filled": (
        lambda y: y.fill_diagonal_(0.5),
        lambda y: torch.where(torch.eye(3, 6) > 0, 0.5, y),
    ),
}


def models(one: Fn, other: Fn) -> list[nn.Module]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    make = [
        lambda m, x, f=f: f(m.layer(x)).flatten().cumsum(0)[-1:].expand(3, 1) for f in (one, other)
    ]
    return [Apply(forward, layer=layer).double() for forward in make]


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_strides_are_moves(one: Fn, other: Fn) -> None:
    x = torch.randn(3, 6).double()
    got, expected = (lrpfx.explain(m, x, 0, EpsilonAll(0.0)) for m in models(one, other))
    torch.testing.assert_close(got.output, expected.output)
    torch.testing.assert_close(got.relevance, expected.relevance)
    assert got.relevance.any()


def test_windows_by_strides_are_exported_for_every_batch_size() -> None:
    def windows(y: Tensor) -> Tensor:
        return y.as_strided((y.shape[0], 4, 3), (y.stride(0), 1, 1))

    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    x = torch.randn(5, 6).double()
    found = []
    for f in (windows, lambda y: y.unfold(1, 3, 1)):
        model = Apply(lambda m, x, f=f: f(m.layer(x)).sum(1), layer=layer).double()
        explainer = lrpfx.Explainer(model, x[:2], EpsilonAll(0.0), capture="export")
        found.append(explainer(x, 1).relevance)
    torch.testing.assert_close(*found)


def test_strides_past_what_a_tensor_holds_are_refused() -> None:
    model = Apply(lambda m, x: (2 * x)[:, :2].as_strided((2, 3), (3, 1)))
    with pytest.raises(lrpfx.errors.UnsupportedOpError, match="memory as it lies"):
        lrpfx.explain(model, torch.rand(2, 3), 0)
