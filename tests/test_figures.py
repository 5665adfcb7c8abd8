"""Colour maps in words, mosaics, matrices, curves, volumes: their arrays, and what is refused."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zennit.image
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import lrpfx
from lrpfx import errors, figures
from lrpfx.heatmap import heatmap
from tests.test_heatmap import maps, texts


def wave(*shape: int) -> Tensor:
    """Values between -1 and 1 that are the same on every machine, a few of them zero."""
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((steps * 7) % 17 - 8).div(8).reshape(shape)


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def shown(figure: Figure) -> str:
    """Of the colours of every map, as 8-bit numbers."""
    return digest(
        [np.asarray(image.to_rgba(image.get_array(), bytes=True)) for image in maps(figure)]
    )


# Colour maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["wred", "cold", "coldnhot", "coleus", "08f,40:000,c:fff,f80", "20:0f0,f00"]
)
def test_codes_of_zennit_give_its_palettes(code: str) -> None:
    theirs = np.asarray(zennit.image.palette(code)).reshape(256, 3).astype(int)
    ours = figures.colormap(code)(np.linspace(0, 1, 256), bytes=True)[:, :3].astype(int)
    assert np.abs(theirs - ours).max() <= 6  # theirs has the middle at 128 of 255


@pytest.mark.parametrize(
    ("words", "at", "color"),
    [
        ("f00,00f", 0.0, "#ff0000"),
        ("f00,0f0,00f", 0.5, "#00ff00"),
        ("navy,50%:white,darkred", 0.5, "white"),
        ("navy, 80:white, darkred", 0.5, "white"),
        ("#102030,ffffff", 0.0, "#102030"),
        ("000,25%:fff,fff,000", 0.25, "white"),
        ("25%:f00,75%:00f", 0.1, "#ff0000"),
        ("coldnhot", 0.5, "black"),
    ],
)
def test_a_colour_map_in_words(words: str, at: float, color: str) -> None:
    np.testing.assert_allclose(figures.colormap(words)(at), to_rgba(color), atol=0.005)


def test_names_and_colour_maps_of_matplotlib_stand_for_themselves() -> None:
    assert figures.colormap("viridis") == colormaps["viridis"]
    assert figures.colormap(colormaps["magma"]) == colormaps["magma"]


@pytest.mark.parametrize(
    "words", ["f00", "f00,nocolour", "viridiss", "80:fff,40:000,f00", "f00,150%:fff", "", 3]
)
def test_what_is_no_colour_map_is_refused(words: Any) -> None:
    with pytest.raises(errors.InputError, match="colour map"):
        figures.colormap(words)
    with pytest.raises(errors.InputError, match="colour map"):
        heatmap(wave(1, 1, 4, 4), cmap=words)


# Mosaics ------------------------------------------------------------------------------------------


def test_a_mosaic_has_a_pixel_for_each_value_and_zero_is_white(tmp_path: Path) -> None:
    values = wave(3, 2, 4, 5)
    picture = figures.mosaic(values, path=tmp_path / "maps.png", columns=2)
    assert picture.mode == "P" and picture.size == (2 * 5 + 1, 2 * 4 + 1)
    read = Image.open(tmp_path / "maps.png")
    assert read.mode == "P"
    colors = np.asarray(read.convert("RGB"))
    summed = values.sum(1).numpy()
    assert (colors[:4, :5][summed[0] == 0] == 255).all() and (summed[0] == 0).any()
    assert (colors[4] == 255).all()  # a gap
    index = np.asarray(read)[:4, :5]
    assert index[np.unravel_index(np.abs(summed[0]).argmax(), (4, 5))] in (0, 254)
    np.testing.assert_array_equal(np.sign(index.astype(int) - 127), np.sign(summed[0]))
    assert digest(np.asarray(figures.mosaic(values, zoom=3, gap=2, cmap="coldnhot"))) == MOSAIC
    assert digest(figures.palette()) == PALETTE


def test_a_mosaic_may_share_its_scale() -> None:
    values = torch.stack([wave(4, 4), 10 * wave(4, 4)])
    each, shared = (np.asarray(figures.mosaic(values, scale=s)) for s in ("each", "shared"))
    np.testing.assert_array_equal(each[:, :4], each[:, 5:])
    assert np.abs(shared[:, :4].astype(int) - 127).max() == 13
    np.testing.assert_array_equal(shared[:, 5:], each[:, 5:])


# Ranges -------------------------------------------------------------------------------------------


def test_each_side_of_zero_may_end_at_its_own_percentile() -> None:
    values = torch.cat([torch.linspace(-1, 0, 21), torch.linspace(0, 4, 81)[1:]]).reshape(1, 1, -1)
    (image,) = maps(heatmap(values, kind="image", clip=(0, 100)))
    low, high = (float(v) for v in (image.norm.vmin, image.norm.vmax))
    assert (low, high) == (-1, 4) and image.norm(0.0) == 0.5
    (image,) = maps(heatmap(values, kind="image", clip=(10, 90)))
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((-0.5, 3.5))
    assert "-0.5 to 3.5" in texts(heatmap(values, kind="image", clip=(10, 90)))


def test_without_negative_values_zero_stays_white_unless_a_colour_map_is_given() -> None:
    values = torch.linspace(1, 3, 101).reshape(1, 1, -1)
    (image,) = maps(heatmap(values, kind="image", clip=(1, 99)))
    assert image.norm(0.0) == 0.5 and (image.norm.vmax) == pytest.approx(2.98)
    figure = heatmap(values, kind="image", clip=(1, 99), cmap="viridis")
    (image,) = maps(figure)
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((1.02, 2.98))
    assert "low" in texts(figure) and "against" not in texts(figure)


@pytest.mark.parametrize("clip", [(99, 1), (5, 5), (-1, 99), (1, 101), (1, 2, 3), 0])
def test_ranges_without_meaning_are_refused(clip: Any) -> None:
    with pytest.raises(errors.InputError, match="clip"):
        heatmap(wave(1, 1, 4, 4), clip=clip)


# Volumes ------------------------------------------------------------------------------------------


def test_a_volume_is_drawn_by_slices_of_one_scale() -> None:
    values = wave(2, 1, 6, 4, 5)
    figure = heatmap(values, slices=[0, 5], titles=["first", "second"])
    found = maps(figure)
    assert len(found) == 4
    for image, (i, k) in zip(found, [(0, 0), (0, 5), (1, 0), (1, 5)], strict=True):
        np.testing.assert_array_equal(image.get_array(), values[i, 0, k])
        assert image.norm.vmax == values[i].abs().max()
    assert {"slice 0", "slice 5"} <= {*texts(figure)}
    across = heatmap(values, slices=3, axis=2)
    np.testing.assert_array_equal(maps(across)[1].get_array(), values[0, 0, :, :, 2])
    assert shown(figure) == VOLUME


def test_a_video_model_is_drawn_over_its_input() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(2),
    )
    x = torch.rand(1, 1, 4, 5, 6)
    model(x)
    figure = lrpfx.explain(model.eval(), x, 1).plot(slices=2)
    assert len(maps(figure)) == 4  # each over its image


@pytest.mark.parametrize(
    "options", [{"axis": 3}, {"slices": []}, {"slices": [9]}, {"slices": 0}, {"overlay": True}]
)
def test_options_that_do_not_fit_a_volume_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InputError):
        heatmap(wave(1, 1, 3, 4, 5), **options)


# Matrices and curves ------------------------------------------------------------------------------


def test_a_matrix_names_its_rows_and_columns_and_writes_its_numbers(tmp_path: Path) -> None:
    values = wave(2, 3)
    figure = figures.matrix(
        values, rows=["a", "$b$"], columns=["The", "capital", "of"], path=tmp_path / "m.pdf"
    )
    assert {"a", "$b$", "capital", f"{values[1, 2]:.2f}"} <= {*texts(figure)}
    (image, *_) = maps(figure)
    np.testing.assert_array_equal(image.get_array(), values)
    assert image.norm(0.0) == 0.5
    assert b"/Type3" not in (tmp_path / "m.pdf").read_bytes()  # which journals refuse
    ax = Figure().add_subplot()
    figures.matrix(wave(20, 20), ax=ax, clip=90)
    assert not ax.texts and shown(ax.figure) == MATRIX


def test_a_band_holds_the_means_of_samples_drawn_again() -> None:
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
    figure = figures.curves({"auto": values, "exact": values[0]}, x=[0, 0.5, 1])
    (ax,) = figure.axes
    first, second = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(first, values.mean(0))
    np.testing.assert_allclose(second, values[0])
    (band,) = ax.collections
    low, high = (f(band.get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    width = 1.96 * values.std(0).numpy() / np.sqrt(200)
    assert low == pytest.approx((first - width).min(), abs=0.02)
    assert high == pytest.approx((first + width).max(), abs=0.02)
    assert not figures.curves({"auto": values}, band=None).axes[0].collections


@pytest.mark.parametrize(
    "make",
    [
        lambda: figures.matrix(wave(2, 3, 4)),
        lambda: figures.matrix(wave(2, 3), rows=["a"]),
        lambda: figures.matrix(wave(2, 3) / 0),
        lambda: figures.curves({}),
        lambda: figures.curves({"a": wave(3), "b": wave(4)}),
        lambda: figures.curves({"a": wave(3)}, x=[1, 2]),
        lambda: figures.curves({"a": wave(2, 3)}, band=95),
        lambda: figures.mosaic(wave(3)),
        lambda: figures.mosaic(wave(1, 3, 3), gap=-1),
        lambda: figures.mosaic(wave(1, 3, 3), path="nowhere/m.png"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_of_the_library(make: Any) -> None:
    with pytest.raises(errors.InputError):
        make()


# As they were when they were looked at.
MOSAIC, PALETTE = "3ae6501840f2", "b12510bef0fd"
VOLUME, MATRIX = "3507ce8d4eb8", "9fbc7be2af64"
