"""Pictures of relevance: red speaks for the target, blue against it, white is zero.

Colours are comparable within a sample, not between samples: the scale of every sample is symmetric
and reaches to its largest absolute relevance, which the picture states.

Figures are made without pyplot, so that drawing touches no global state and needs no display.
matplotlib is imported when a picture is drawn; `import lrpfx` does not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Kind = Literal["image", "signal", "table"]
Array = NDArray[np.float64]

_RED, _BLUE, _INK, _FRAME = "#b2182b", "#2166ac", "#222222", "#c8c8c8"
_PANEL = 1.6  # inches: the height of an image, and its width where it is square
_MAX_LABELS = 30  # a table with more features than this has bars too thin for names
_DPI = 200


def heatmap(
    relevance: Tensor,
    *,
    images: Tensor | None = None,
    titles: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    kind: Kind | None = None,
    features: Sequence[str] | None = None,
) -> Figure:
    """Draw relevance, one row per sample.

    An image is drawn as its relevance summed over channels, beside the input. A signal is drawn as
    a strip of relevance per channel, with the input as a line over it. A table row is drawn as a
    bar per feature, with the input as its label.

    Args:
        relevance: image (N, C, H, W) or (N, H, W); signal (N, C, L); table (N, F).
        images: the explained inputs: (N, C, H, W), (N, C, L) or (N, F). C = 1 is drawn gray, C = 3
            in colour, any other number of channels as their mean.
        titles: N titles, such as `"class 3: 4.21"`.
        path: file to write to; the suffix chooses the format (png, pdf, svg).
        kind: what the relevance belongs to. By default the number of dimensions tells; three
            dimensions are a signal if `images` has three too, else images without channels.
        features: F names for the bars of a table.

    Returns:
        The figure: notebooks display it, `savefig` writes it.

    Raises:
        ValueError: shapes do not belong together, or the relevance is empty or not finite.
    """
    kind = kind or _kind(relevance, images)
    expected = {"image": (3, 4), "signal": (3,), "table": (2,)}
    if kind not in expected:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(map(repr, expected))}")
    if relevance.ndim not in expected[kind]:
        raise _shape_error("relevance", relevance, f"kind {kind!r}: {_SHAPES[kind]}")
    values = _values("relevance", relevance)
    inputs = None if images is None else _values("images", images)
    if inputs is not None:
        _check_inputs(kind, values, inputs)
    _check_count("titles", titles, len(values))
    if features is not None:
        if kind != "table":
            raise ValueError(f"features: names are for tables, this relevance is of kind {kind!r}")
        _check_count("features", features, values.shape[1])

    if kind == "image":
        figure = _draw_images(_sum_channels(values), inputs, titles)
    elif kind == "signal":
        figure = _draw_signals(values, inputs, titles)
    else:
        figure = _draw_tables(values, inputs, titles, features)
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure


def grid(
    images: Tensor,
    columns: Mapping[str, Tensor],
    titles: Sequence[str] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Compare explanations: the inputs in the first column, then one column of maps per name.

    Args:
        images: the explained inputs (N, C, H, W), drawn as in `heatmap`.
        columns: name -> relevance (N, C, H, W) or (N, H, W), usually one composite each.
        titles: N titles for the rows.
        path: file to write to; the suffix chooses the format (png, pdf, svg).

    Returns:
        The figure: notebooks display it, `savefig` writes it.

    Raises:
        ValueError: shapes do not belong together, or a relevance is empty or not finite.
    """
    if not columns:
        raise ValueError("columns: got no relevance to draw, expected name -> relevance")
    inputs = _values("images", images)
    _check_count("titles", titles, len(inputs))
    maps: dict[str, Array] = {}
    for name, relevance in columns.items():
        if relevance.ndim not in (3, 4):
            raise _shape_error(f"columns[{name!r}]", relevance, _SHAPES["image"])
        values = _values(f"columns[{name!r}]", relevance)
        _check_inputs("image", values, inputs)
        maps[name] = _sum_channels(values)

    n = len(inputs)
    figure = _figure((1 + len(maps)) * (_width(inputs) + 0.1) + 0.9, n * (_PANEL + 0.2) + 0.8)
    axes = figure.subplots(n, 1 + len(maps), squeeze=False)
    for i in range(n):
        _show_input(axes[i, 0], inputs[i])
        if titles is not None:
            side = axes[i, 0].set_ylabel(titles[i], rotation=0, ha="right", va="center", labelpad=8)
            side.set_parse_math(False)
        for ax, values in zip(axes[i, 1:], maps.values(), strict=True):
            shown = _show_map(ax, values[i])
            ax.set_xlabel(f"\N{PLUS-MINUS SIGN}{_scale(values[i]):.2g}", fontsize=7, labelpad=2)
    for ax, name in zip(axes[0], ["input", *maps], strict=True):
        ax.set_title(name, fontsize=9, parse_math=False)
    pad = 0.1 / figure.get_figheight()
    bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=40, shrink=0.5, pad=pad)
    limit = shown.get_clim()[1]
    bar.set_ticks([-limit, 0, limit], labels=["against", "0", "for the target"])
    bar.set_label("the colours of a map reach to the value below it", fontsize=7)
    _quiet(bar)
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure


# What is drawn: checks, and tensors to arrays.

_SHAPES: dict[Kind, str] = {
    "image": "(N, C, H, W) or (N, H, W)",
    "signal": "(N, C, L)",
    "table": "(N, F)",
}


def _kind(relevance: Tensor, images: Tensor | None) -> Kind:
    """What the number of dimensions says the relevance belongs to."""
    if relevance.ndim == 3:
        return "signal" if images is not None and images.ndim == 3 else "image"
    kinds: dict[int, Kind] = {2: "table", 4: "image"}
    if relevance.ndim not in kinds:
        expected = ", ".join(f"{kind} {shape}" for kind, shape in _SHAPES.items())
        raise _shape_error("relevance", relevance, expected)
    return kinds[relevance.ndim]


def _values(name: str, tensor: Tensor) -> Array:
    """The tensor as float64 on the host, refused if there is nothing that could be drawn."""
    if tensor.numel() == 0:
        raise _shape_error(name, tensor, "at least one sample and no empty dimension")
    values: Array = tensor.detach().cpu().double().numpy()
    finite = np.isfinite(values)
    if not finite.all():
        first = np.argwhere(~finite)[0, 0]
        raise ValueError(
            f"{name}: {values.size - finite.sum()} of {values.size} values are not finite, "
            f"the first in sample {first}"
        )
    return values


def _check_inputs(kind: Kind, relevance: Array, inputs: Array) -> None:
    """Images need the same N only: a map of an inner layer is coarser than its input."""
    if kind == "image":
        fits = inputs.ndim == 4 and len(inputs) == len(relevance)
        expected = f"(N, C, H, W) with N = {len(relevance)}"
    else:
        fits = inputs.shape == relevance.shape
        expected = f"the shape of the relevance, {relevance.shape}"
    if not fits:
        raise ValueError(f"images: got shape {inputs.shape}, expected {expected}")


def _check_count(name: str, given: Sequence[str] | None, count: int) -> None:
    if given is not None and len(given) != count:
        raise ValueError(f"{name}: got {len(given)}, expected {count}")


def _shape_error(name: str, tensor: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")


def _sum_channels(values: Array) -> Array:
    """(N, C, H, W) or (N, H, W) -> (N, H, W)."""
    summed: Array = values.sum(axis=1) if values.ndim == 4 else values
    return summed


def _scale(values: Array) -> float:
    """The largest absolute value; 1 where there is no relevance at all, which is drawn white."""
    return float(np.abs(values).max()) or 1.0


# How it is drawn.


def _figure(width: float, height: float) -> Figure:
    """An empty figure that moves its parts close together; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("compressed", w_pad=0.06, h_pad=0.06)
    return figure


def _width(images: Array) -> float:
    """The width in inches that gives images (..., H, W) the height of a panel, within reason."""
    height, width = images.shape[-2:]
    return _PANEL * float(np.clip(width / height, 0.5, 2.0))


def _colormap() -> Colormap:
    """Blue to red through exact white: the odd number of colours puts zero on one of them."""
    from matplotlib.colors import LinearSegmentedColormap

    blues = ["#053061", _BLUE, "#4393c3", "#92c5de", "#d1e5f0"]
    reds = ["#fddbc7", "#f4a582", "#d6604d", _RED, "#67001f"]
    return LinearSegmentedColormap.from_list("relevance", [*blues, "#ffffff", *reds], N=257)


def _draw_images(maps: Array, inputs: Array | None, titles: Sequence[str] | None) -> Figure:
    """One row per sample: the input, where given, its map (N, H, W), and the scale."""
    n = len(maps)
    columns = 1 if inputs is None else 2
    row = _PANEL + (0.3 if titles else 0.1)
    figure = _figure(columns * (_width(maps) + 0.1) + 0.5, n * row)
    axes = figure.subplots(n, columns, squeeze=False)
    for i in range(n):
        if inputs is not None:
            _show_input(axes[i, 0], inputs[i])
        shown = _show_map(axes[i, -1], maps[i])
        _colorbar(figure, shown, axes[i, -1], fraction=0.08, pad=0.03)
        if titles is not None:
            axes[i, 0].set_title(titles[i], loc="left", fontsize=9, parse_math=False)
    return figure


def _draw_signals(values: Array, inputs: Array | None, titles: Sequence[str] | None) -> Figure:
    """One row per sample: a strip per channel of values (N, C, L), the inputs as lines over it."""
    from matplotlib.ticker import MaxNLocator

    n, channels, length = values.shape
    row = min(max(0.45 * channels, 0.9), 4.0) + (0.3 if titles else 0.1)
    figure = _figure(7.0, n * row + 0.35)
    axes = figure.subplots(n, 1, squeeze=False, sharex=True)[:, 0]
    for i, ax in enumerate(axes):
        # Channel c fills the band from c - 0.5 to c + 0.5, the first one on top.
        shown = _show_map(ax, values[i], aspect="auto", interpolation="nearest")
        _colorbar(figure, shown, ax, fraction=0.02, pad=0.01)
        if inputs is not None:
            lines = np.arange(channels)[:, None] + 0.4 - 0.8 * _min_max(inputs[i], axis=-1)
            ax.plot(np.arange(length), lines.T, color=_INK, linewidth=1.0)
        ax.hlines(np.arange(1, channels) - 0.5, -0.5, length - 0.5, color=_FRAME, linewidth=0.5)
        ax.tick_params(labelsize=7, length=0)
        if titles is not None:
            ax.set_title(titles[i], loc="left", fontsize=9, parse_math=False)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("position", fontsize=8)
    return figure


def _draw_tables(
    values: Array,
    inputs: Array | None,
    titles: Sequence[str] | None,
    features: Sequence[str] | None,
) -> Figure:
    """One row per sample: a bar per feature of values (N, F), the first one on top."""
    n, count = values.shape
    names = list(features) if features is not None else [f"feature {j}" for j in range(count)]
    row = min(max(0.22 * count, 0.6), 6.0) + (0.55 if titles else 0.3)
    figure = _figure(5.0, n * row)
    axes = figure.subplots(n, 1, squeeze=False)[:, 0]
    for i, ax in enumerate(axes):
        colors = np.where(values[i] < 0, _BLUE, _RED).tolist()
        ax.barh(np.arange(count), values[i], color=colors, height=0.75)
        limit = 1.05 * _scale(values[i])
        ax.set(xlim=(-limit, limit), ylim=(count - 0.5, -0.5))
        ax.axvline(0, color=_INK, linewidth=0.6)
        ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
        ax.grid(axis="x", color=_FRAME, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=7, length=0)
        if count > _MAX_LABELS:
            ax.set_yticks([])
        elif inputs is None:
            ax.set_yticks(np.arange(count), labels=names, parse_math=False)
        else:
            labels = [f"{name} = {x:.3g}" for name, x in zip(names, inputs[i], strict=True)]
            ax.set_yticks(np.arange(count), labels=labels, parse_math=False)
        if titles is not None:
            ax.set_title(titles[i], loc="left", fontsize=9, parse_math=False)
    return figure


def _show_input(ax: Axes, image: Array) -> None:
    """Image (C, H, W), stretched to the full range: colour for three channels, else gray."""
    image = _min_max(image) if len(image) == 3 else _min_max(image.mean(axis=0))
    ax.imshow(image.transpose(1, 2, 0) if image.ndim == 3 else image, cmap="gray", vmin=0, vmax=1)
    _frame(ax)


def _show_map(
    ax: Axes,
    values: Array,
    *,
    aspect: Literal["equal", "auto"] = "equal",
    interpolation: str | None = None,
) -> AxesImage:
    """Values (H, W) on the symmetric scale of this sample."""
    limit = _scale(values)
    shown = ax.imshow(
        values,
        cmap=_colormap(),
        vmin=-limit,
        vmax=limit,
        aspect=aspect,
        interpolation=interpolation,
    )
    _frame(ax)
    return shown


def _colorbar(figure: Figure, shown: AxesImage, ax: Axes, *, fraction: float, pad: float) -> None:
    """The scale of one sample, beside it; fraction and pad in widths of the axes."""
    bar = figure.colorbar(shown, ax=ax, aspect=14, fraction=fraction, pad=pad)
    limit = shown.get_clim()[1]
    bar.set_ticks([-limit, 0, limit], labels=[f"\N{MINUS SIGN}{limit:.2g}", "0", f"+{limit:.2g}"])
    _quiet(bar)


def _quiet(bar: Colorbar) -> None:
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)


def _frame(ax: Axes) -> None:
    """A hairline in place of axes; a white map would otherwise have no border."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=_FRAME, linewidth=0.6)


def _min_max(values: Array, axis: int | None = None) -> Array:
    """Stretched to 0..1 along the axis; constant values become 0."""
    low = values.min(axis=axis, keepdims=True)
    span = values.max(axis=axis, keepdims=True) - low
    stretched: Array = (values - low) / np.where(span == 0, 1.0, span)
    return stretched
