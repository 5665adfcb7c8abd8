"""Pictures: what stands in them, how large they are, and what is asked instead of guessed."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn

import lrpfx
from lrpfx import Explanation, errors
from lrpfx.heatmap import grid, heatmap
from tests.conftest import Apply
from tests.test_errors import ConvNet, check_form
from tests.test_explanation import PNG, draw, mask_and_two, round_trip


@pytest.fixture(scope="module")
def images() -> Explanation:
    torch.manual_seed(0)
    return lrpfx.explain(ConvNet(), draw(2, 1, 4, 4), [2, 0])


@pytest.fixture(scope="module")
def several() -> Explanation:
    torch.manual_seed(0)
    model = Apply(mask_and_two, a=nn.Linear(3, 2))
    inputs = {"x": draw(2, 3), "y": draw(2, 3, seed=4), "mask": torch.eye(2).long(), "scale": 2.0}
    return lrpfx.explain(model, inputs, lambda out: out.logits[:, 0])


@pytest.fixture(scope="module")
def table() -> Explanation:
    torch.manual_seed(0)
    return lrpfx.explain(nn.Linear(3, 2), draw(2, 3))


def test_plot_writes_a_picture(images: Explanation, table: Explanation, tmp_path: Path) -> None:
    for name, explanation in {"images": images, "table": table}.items():
        path = tmp_path / f"{name}.png"
        figure = explanation.plot(path)
        assert path.read_bytes()[:8] == PNG
        assert len(figure.axes) >= len(explanation.relevance)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_plot_names_the_classes(images: Explanation) -> None:
    shown = texts(images.plot())
    for target, value in zip(images.target.tolist(), images.seed.sum(1).tolist(), strict=True):
        assert any(f"class {target}" in text and f"{value:.3g}" in text for text in shown), shown


def test_plot_takes_options(images: Explanation, tmp_path: Path) -> None:
    shown = texts(images.plot(str(tmp_path / "e.png"), titles=["first", "second"]))
    assert "first" in shown and "second" in shown


def test_plot_of_a_loaded_explanation(images: Explanation, tmp_path: Path) -> None:
    loaded = round_trip(images, tmp_path / "e.npz")
    loaded.plot(tmp_path / "loaded.png")
    images.plot(tmp_path / "made.png")
    assert (tmp_path / "loaded.png").read_bytes() == (tmp_path / "made.png").read_bytes()


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param((draw(2, 3),), id="tuple"),
        pytest.param({"x": draw(2, 3)}, id="dict"),
        pytest.param((draw(2, 3), torch.ones(2, 2).long()), id="with-a-mask"),
        pytest.param({"mask": torch.ones(2, 2) > 0, "x": draw(2, 3)}, id="with-a-mask-first"),
        pytest.param((draw(2, 3), None), id="with-None"),
        pytest.param((draw(2, 3), 2), id="with-a-number"),
    ],
)
def test_plot_finds_the_explained_input(inputs: Any, tmp_path: Path) -> None:
    """What is not explained is not drawn, and is not in the way."""

    def forward(m: Any, x: Tensor, mask: Any = None) -> Tensor:
        return m.fc(x) if mask is None else m.fc(x) * mask

    lrpfx.explain(Apply(forward, fc=nn.Linear(3, 2)), inputs).plot(tmp_path / "e.png")
    assert (tmp_path / "e.png").read_bytes()[:8] == PNG


def test_plot_of_several_inputs_is_refused(several: Explanation) -> None:
    with pytest.raises(errors.LrpError, match="2") as caught:
        several.plot()
    check_form(caught.value)


def test_plot_of_a_differentiable_relevance(tmp_path: Path) -> None:
    x = draw(2, 3).requires_grad_()
    lrpfx.explain(nn.Linear(3, 2), x, create_graph=True).plot(tmp_path / "e.png")
    assert (tmp_path / "e.png").exists()


def test_dollars_in_names_are_dollars() -> None:
    figure = lrpfx.heatmap.heatmap(
        torch.rand(1, 2), titles=["$5 and $6"], feature_names=["$a_$", "b"]
    )
    figure.canvas.draw()
    (axes,) = figure.axes
    shown = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(shown) >= 2 and not any(text.get_parse_math() for text in shown)


def maps(figure: Figure) -> list[Any]:
    """What is drawn as an image, without the legend."""
    shown = [image for ax in figure.axes for image in ax.images]
    return [image for image in shown if np.asarray(image.get_array()).shape != (1, 257)]


# -- samples and options --------------------------------------------------------------------------


def test_many_samples_stand_side_by_side_in_little_time() -> None:
    began = time.process_time()
    figure = heatmap(draw(64, 1, 20, 20), inputs=draw(64, 1, 20, 20), titles=["one"] * 64)
    figure._repr_png_()
    assert time.process_time() - began < 3  # under 1 on a machine that is not busy
    width, height = figure.get_size_inches()
    assert len(maps(figure)) == 128 and height < 3 * width


@pytest.mark.parametrize("shape", [(569, 30), (100, 2, 50)])
def test_a_picture_says_how_many_samples_it_leaves_out(shape: tuple[int, ...]) -> None:
    figure = heatmap(draw(*shape), kind="table" if len(shape) == 2 else "signal")
    assert any(f"first 16 of {shape[0]} samples" in text for text in texts(figure))
    figure = heatmap(draw(*shape)[:2], kind="table" if len(shape) == 2 else "signal")
    assert not any("first" in text for text in texts(figure))


def test_the_largest_bars_come_first_and_the_rest_is_one() -> None:
    names = [f"f{i}" for i in range(500)]
    values = torch.zeros(1, 500)
    values[0, [7, 300, 400]] = torch.tensor([1.0, -3.0, 2.0])
    values[0, [1, 2]] = 0.25
    figure = heatmap(values, feature_names=names, top=3)
    (ax,) = figure.axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["f300", "f400", "f7", "497 others together"]
    assert [bar.get_width() for bar in ax.patches] == [-3, 2, 1, 0.5]
    (ax,) = heatmap(values, feature_names=names, top=3, sort=False).axes
    assert [label.get_text() for label in ax.get_yticklabels()][:3] == ["f7", "f300", "f400"]


def test_colours_end_at_a_percentile_a_number_or_the_largest_of_all() -> None:
    relevance = torch.ones(2, 1, 10, 10)
    relevance[0, 0, 0, 0], relevance[1] = 100, 2
    ends = lambda **options: [image.get_clim()[1] for image in maps(heatmap(relevance, **options))]  # noqa: E731
    assert ends() == [100, 2] and ends(clip=98) == [1, 2]
    assert ends(scale="shared") == [100, 100] and ends(scale=5.0) == [5, 5]
    (image, _) = maps(heatmap(relevance, cmap="PiYG"))
    assert image.get_cmap() == colormaps["PiYG"]


def test_a_map_lies_over_its_image() -> None:
    figure = heatmap(draw(1, 1, 4, 4), inputs=draw(1, 3, 8, 8), overlay=0.5)
    below, above = maps(figure)
    assert len(figure.axes) == 2 and below.get_extent() == above.get_extent()
    assert above.get_alpha().max() == 0.5 and above.get_alpha().min() < 0.1


def test_axes_of_ones_own_take_one_sample(tmp_path: Path) -> None:
    for shape, kind in (((1, 1, 4, 4), None), ((1, 5), None), ((1, 2, 5), "signal")):
        figure = Figure()
        ax = figure.subplots()
        assert heatmap(draw(*shape), ax=ax, titles="own", kind=kind) is figure
        assert "own" in texts(figure)
        figure.savefig(tmp_path / "own.png")
    with pytest.raises(errors.InputError, match="one sample"):
        heatmap(draw(2, 5), ax=ax)


def test_dead_maps_say_so() -> None:
    for shape, kind in (((1, 1, 4, 4), "image"), ((1, 5), "table"), ((1, 2, 5), "signal")):
        assert "zero everywhere" in texts(heatmap(torch.zeros(shape), kind=kind))
    assert "zero everywhere" in texts(grid(None, {"dead": torch.zeros(2, 1, 4, 4)}))


# -- what is time, and what is asked --------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0][:, -1])


TIME: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {  # and how many strips
    "convolution": (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)),
        (2, 2, 6),
        2,
    ),
    "recurrent": (Recurrent(), (2, 3, 2), 2),
    "transposed first": (
        Apply(lambda m, x: m.conv(x.transpose(1, 2)).mean(2), conv=nn.Conv1d(2, 3, 3)),
        (2, 6, 2),
        2,
    ),
}


@pytest.mark.parametrize(("model", "shape", "strips"), TIME.values(), ids=TIME)
def test_the_layer_that_takes_it_tells_what_is_time(
    model: nn.Module, shape: tuple[int, ...], strips: int
) -> None:
    figure = lrpfx.explain(model.eval(), draw(*shape), 1).plot()
    assert maps(figure)[0].get_array().shape == (strips, max(shape[1:]))


@pytest.mark.parametrize("shape", [(2, 400), (2, 30, 3), (2, 3, 30)])
def test_what_the_shape_does_not_tell_is_asked(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.InputError, match="may be of") as caught:
        heatmap(draw(*shape))
    check_form(caught.value)
    assert maps(heatmap(draw(*shape), kind="signal"))[0].get_array().shape[-1] == shape[-1]


WRONG: dict[str, dict[str, Any]] = {
    "kind": dict(kind="sound"),
    "names of an image": dict(feature_names=["a"]),
    "titles": dict(titles="one for two"),
    "clip": dict(clip=0),
    "clip as a share": dict(clip=0.99),
    "scale": dict(scale="log"),
    "negative scale": dict(scale=-1.0),
    "cmap": dict(cmap="no such"),
    "overlay": dict(overlay=2.0),
    "limit": dict(limit=0),
    "inputs": dict(inputs=torch.zeros(3, 1, 4, 4)),
    "path": dict(path="no/such/folder.png"),
    "format": dict(path="picture.bmpx"),
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_options_that_do_not_fit_are_errors_in_the_librarys_form(options: dict[str, Any]) -> None:
    with pytest.raises(errors.InputError) as caught:
        heatmap(draw(2, 1, 4, 4), **options)
    check_form(caught.value)


# -- grids ----------------------------------------------------------------------------------------


def test_a_grid_takes_explanations_lists_and_tensors(images: Explanation) -> None:
    for columns in (
        images,
        images.relevance,
        {"a": images},
        [images],
        {"a": images.relevance},
        [images.relevance, images],
    ):
        for inputs in (images.inputs, None):
            assert len(maps(grid(inputs, columns))) >= 2
    shown = texts(grid(None, [images, images], "one two".split()))
    assert {"input", "one", "two"} <= set(shown)
    assert sum(text.startswith("auto") for text in shown) == 2


def test_a_grid_of_many_maps_wraps() -> None:
    many = {f"rules {i}": draw(1, 1, 8, 8) for i in range(13)}
    figure = grid(draw(1, 1, 8, 8), many)
    width, height = figure.get_size_inches()
    assert width < 12 and height < 14 and {*many, "input"} <= set(texts(figure))
    narrow = grid(draw(1, 1, 8, 8), many, wrap=2)
    assert narrow.get_size_inches()[0] < width / 1.5


@pytest.mark.parametrize(
    "columns", [{}, [], 3, {"a": 3}, {"a": draw(2, 3)}, [draw(1, 4, 4), draw(2, 4, 4)]]
)
def test_a_grid_of_something_else_is_refused(columns: Any) -> None:
    with pytest.raises(errors.InputError) as caught:
        grid(None, columns)
    check_form(caught.value)


def test_images_are_not_shown_as_tokens_but_drawn(images: Explanation) -> None:
    with pytest.raises(errors.InputError, match=r"explanation\.plot\(\)") as caught:
        images.show_tokens(["a"])
    check_form(caught.value)


def test_token_ids_are_not_drawn_but_shown() -> None:
    model = Apply(lambda m, i: m.fc(m.e(i).mean(1)), e=nn.Embedding(5, 3), fc=nn.Linear(3, 2))
    with pytest.raises(errors.InputError, match=r"show_tokens\(tokenizer\)"):
        lrpfx.explain(model, torch.tensor([[0, 1, 2]])).plot()
