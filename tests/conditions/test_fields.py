"""Receptive fields by the graph, against where the gradient of a random network is not zero."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from tests.conditions.test_conditions import draw, fill


class Joined(nn.Module):
    """Branches of different reach, joined by a sum and by channels, padded and made larger."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 5, padding=4, dilation=2)
        self.c = nn.Conv2d(4, 3, 3, stride=2)
        self.up = nn.Upsample(scale_factor=2)
        self.d = nn.Conv2d(3, 3, (1, 3))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).sigmoid()
        b = a + self.b(a)
        c = self.c(nn.functional.pad(torch.cat([a, b], 1), (1, 0, 0, 2)))
        return self.fc(self.d(self.up(c)).mean((2, 3)))


STACK = nn.Sequential(
    nn.Conv2d(1, 2, 3, stride=2, padding=1),
    nn.BatchNorm2d(2),
    nn.ELU(),
    nn.AvgPool2d(3, 2, 1),
    nn.Conv2d(2, 3, (1, 3)),
    nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1),
    nn.AdaptiveAvgPool2d(3),
    nn.Flatten(),
    nn.Linear(18, 2),
)


@pytest.mark.parametrize(
    "model, layers",
    [(Joined(), ["a", "b", "c", "up", "d"]), (STACK, ["0", "3", "4", "5", "6"])],
)
def test_nothing_outside_of_a_field_reaches_its_position(model: Any, layers: list[str]) -> None:
    model, x = fill(model), draw(2, 1, 21, 25)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    for layer in layers:
        values: dict[str, Tensor] = {}
        module = model.get_submodule(layer)
        hook = module.register_forward_hook(lambda m, i, out: values.update(out=out))  # noqa: B023
        given = x[:1].clone().requires_grad_()
        model(given)
        hook.remove()
        maps = values["out"][0].sum(0).flatten()
        for position in {0, 1, len(maps) // 3, len(maps) // 2, len(maps) - 1}:
            (grad,) = torch.autograd.grad(maps[position], given, retain_graph=True)
            rows, columns = (grad[0, 0] != 0).nonzero(as_tuple=True)
            wanted = tuple((int(i.min()), int(i.max())) for i in (rows, columns))
            found = explainer.places.receptive_field(layer, position)
            assert found is not None
            slack = 2 if layer in ("up", "d") else 0  # interpolation is taken as the widest kind
            for (a, b), (c, d) in zip(found, wanted, strict=True):
                assert a <= c <= a + slack * 3 and d <= b <= d + slack * 3, (layer, position)


def test_what_mixes_all_positions_sees_all(one_trace: Any) -> None:
    model = fill(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1)))
    explainer = lrpfx.Explainer(model, draw(2, 1, 8, 9))
    assert explainer.places.receptive_field("2", 0) == ((0, 7), (0, 8))
    assert explainer.places.receptive_field("0", 0) == ((0, 2), (0, 2))
    assert explainer.places.receptive_field("0", -1) is None
