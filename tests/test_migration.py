"""What `docs/migrate.md` says of other libraries, row by row: their call, and ours."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import EpsilonAll, EpsilonGammaBox, EpsilonPlusFlat


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double().eval()


def images() -> Tensor:
    return torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()


SEED = torch.eye(4).double()[[3, 3]]


def by_zennit(composite: Any) -> Tensor:
    from zennit.attribution import Gradient

    with Gradient(net(), composite) as attributor:
        return attributor(images().requires_grad_(), SEED)[1]


def zennit_rows() -> dict[str, Any]:
    import zennit.composites as zc
    import zennit.rules as zr
    from zennit.types import Convolution, Linear

    flat, epsilon = lrpfx.Flat(), lrpfx.Epsilon()
    by_class = [(Convolution, zr.ZPlus()), (Linear, zr.Epsilon())]
    by_name = [(["0"], zr.Flat()), (["4"], zr.Epsilon())]
    first = [(Convolution, zr.WSquare())]
    return {
        "EpsilonPlusFlat": (zc.EpsilonPlusFlat(), "epsilon_plus_flat"),
        "EpsilonGammaBox": (
            zc.EpsilonGammaBox(low=-3.0, high=3.0),
            EpsilonGammaBox(low=-3.0, high=3.0),
        ),
        "LayerMapComposite": (
            zc.LayerMapComposite(by_class),
            [("conv", lrpfx.ZPlus()), "epsilon_plus"],
        ),
        "NameMapComposite": (zc.NameMapComposite(by_name), [("0", flat), ("4", epsilon)]),
        "SpecialFirstLayerMapComposite": (
            zc.SpecialFirstLayerMapComposite(layer_map=by_class, first_map=first),
            [(lrpfx.First(), lrpfx.WSquare()), "epsilon_plus"],
        ),
    }


@pytest.mark.parametrize("row", ["EpsilonPlusFlat", "EpsilonGammaBox", "LayerMapComposite",
                                 "NameMapComposite", "SpecialFirstLayerMapComposite"])  # fmt: skip
def test_a_composite_of_zennit(row: str) -> None:
    theirs, ours = zennit_rows()[row]
    got = lrpfx.explain(net(), images(), SEED, rules=ours).relevance
    torch.testing.assert_close(got, by_zennit(theirs))


def test_a_picture_of_zennit() -> None:
    """As ``imgify(..., symmetric=True)`` indexes its palette, which Pillow no longer takes."""
    from zennit.image import palette

    relevance = lrpfx.explain(net(), images(), 3, rules=EpsilonPlusFlat()).relevance.sum(1)[:1]
    place = (relevance[0] / relevance.abs().max() + 1).numpy() / 2
    theirs = np.asarray(palette("coldnhot")).reshape(256, 3)[(255 * place).astype(np.uint8)]
    ours = np.asarray(lrpfx.figures.mosaic(relevance, cmap="coldnhot").convert("RGB"))
    # Theirs is a shade below; where colours change fastest, a shade is 8 of 255.
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 12


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double().eval()


def test_the_calls_of_captum() -> None:
    attr = pytest.importorskip("captum.attr", reason="pip install captum")
    x, model = torch.randn(2, 5).double(), dense()
    theirs, delta = attr.LRP(model).attribute(x, target=3, return_convergence_delta=True)
    ours = lrpfx.explain(model, x, 3, rules=EpsilonAll(1e-9), layers=["0"])
    torch.testing.assert_close(ours.relevance, theirs)
    torch.testing.assert_close(ours.output[:, 3] - ours.relevance.sum(1), delta)
    layer = attr.LayerLRP(model, model[0]).attribute(x, target=3)
    torch.testing.assert_close(ours.layers["0"].relevance, layer)
