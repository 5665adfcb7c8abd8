"""Pictures of relevance: red speaks for the target, blue against it, white is zero.

Each map has its own scale unless another is asked for: symmetric, as far as its largest absolute
relevance, which is written below it.

Figures are made without pyplot, so that drawing touches no global state and needs no display; a
notebook shows the one that a cell ends with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from lrpfx.capture import opened
from lrpfx.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from lrpfx.draw import Array, Look

__all__ = ["Kind", "Scale", "Shown", "grid", "heatmap"]

Kind = Literal["image", "volume", "signal", "sequence", "table"]
Scale = Literal["each", "shared"] | float
Clip = float | tuple[float, float]

_SHAPES: dict[Kind, tuple[tuple[int, ...], str]] = {
    "image": ((3, 4), "(N, C, H, W) or (N, H, W)"),
    "volume": ((4, 5), "(N, C, D, H, W) or (N, D, H, W)"),
    "signal": ((2, 3), "(N, C, L), channels first, or (N, L)"),
    "sequence": ((3,), "(N, T, D), time first"),
    "table": ((2,), "(N, F)"),
}
_MOST: dict[Kind, int] = {"image": 64, "volume": 8, "signal": 16, "sequence": 16, "table": 16}
_WIDE = 64  # a table with more features is asked whether it is a signal
_BARS, _TOP = 30, 20  # of more features than this, the largest so many are drawn


class Shown(Protocol):
    """What ``grid`` asks of an explanation."""

    @property
    def relevance(self) -> Any:
        """A tensor, or a structure that holds one."""

    @property
    def inputs(self) -> Any:
        """Structured alike."""

    @property
    def report(self) -> Any:
        """Its ``rules`` give the name."""


def heatmap(
    relevance: Tensor,
    *,
    inputs: Tensor | None = None,
    titles: str | Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    kind: Kind | None = None,
    feature_names: Sequence[str] | None = None,
    top: int | None = None,
    sort: bool = True,
    cmap: str | Colormap | None = None,
    clip: Clip = 100.0,
    scale: Scale = "each",
    overlay: bool | float = False,
    columns: int | None = None,
    limit: int | None = None,
    slices: int | Sequence[int] = 8,
    axis: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Draw relevance, a cell per sample.

    An image is drawn as its relevance summed over channels, beside the input. A volume, or a video,
    is drawn as slices of that, over the input in gray. A signal is drawn as a strip of relevance
    per channel, with the input as a line over it. A row of a table is drawn as a bar per feature,
    the largest on top, with the input in its label.

    Args:
        relevance: image (N, C, H, W) or (N, H, W); volume (N, C, D, H, W) or (N, D, H, W); signal
            (N, C, L) or (N, L); sequence (N, T, D); table (N, F).
        inputs: The explained inputs; of an image (N, C, H, W), where C = 3 is drawn in colour and
            any other number of channels as their mean in gray; else shaped like the relevance.
        titles: One per sample, such as "class 3: 4.21".
        path: File to write to; the ending names the format (png, pdf, svg).
        kind: "image", "volume", "signal" (channels before time), "sequence" (time before features)
            or "table". By default the shape tells: (N, C, H, W) is an image, (N, C, D, H, W) a
            volume and (N, F) with at most 64 features a table; otherwise you are asked.
        feature_names: Names of the bars of a table, or of the strips of a signal.
        top: How many bars of a table are drawn, the largest; the others become one. By default 20
            where there are more than 30.
        sort: Whether the bars are in order of size, or of the features.
        cmap: A colour map of matplotlib, or its name; or colours by commas, such as "00f,fff,f00"
            or "navy,50%:white,darkred", see `lrpfx.figures.colormap`.
        clip: Percentile of the absolute relevance at which colours end, 100 for the largest. At 99
            the strongest hundredth of the pixels has full colour, and weaker ones show. A pair
            such as (1, 99): the percentiles of the relevance at which either side ends, each side
            on its own scale.
        scale: "each" map its own, "shared" by all samples, or the relevance that has full colour.
        overlay: Draw the map of an image over it in gray: True, or an opacity up to 1. Few pixels
            are as strong as the strongest, so that clip=99 makes more of the map visible.
        columns: How many samples side by side; of a volume, how many slices.
        limit: How many samples at most: by default 64 images, 8 volumes, 16 of anything else. The
            picture says how many it leaves out.
        slices: Of a volume, how many, from the first to the last, or which.
        axis: Of a volume, the dimension that is sliced: 0 is D, 1 is H, 2 is W.
        ax: Axes of your own, for one sample.

    Returns:
        The figure: a notebook displays it, `savefig` writes it.

    Raises:
        InputError: Shapes do not belong together, the relevance is empty or not finite, or an
            option does not fit.
    """
    from lrpfx.draw import check_count, draw_signals, draw_tables, positive, values_of, written

    values = values_of("relevance", relevance)
    kind = _kind(values, kind, feature_names)
    given = None if inputs is None else values_of("inputs", inputs)
    if given is not None:
        _check_inputs(kind, values, given)
    names = [titles] if isinstance(titles, str) else titles
    check_count("titles", names, len(values), "sample")
    if kind in ("image", "volume"):
        values = values.sum(axis=1) if values.ndim == (5 if kind == "volume" else 4) else values
    elif kind != "table":
        values, given = _channels_first(kind, values), _channels_first(kind, given)
    if feature_names is not None:
        if kind in ("image", "volume"):
            raise InputError(
                f"feature_names are for tables and signals, and this relevance is of {kind}s.",
                fix="leave them out, or give kind=.",
            )
        check_count("feature_names", feature_names, values.shape[1], "feature or channel")
    look = _look(cmap, clip, scale, overlay, kind)
    if kind == "table" and top is None and values.shape[1] > _BARS:
        top = _TOP
    part = _Part(values, given, names, feature_names, top, sort)
    if ax is not None:
        return _into(ax, kind, part, look, path)
    note = part.shorten(positive("limit", limit) or _MOST[kind])
    columns = positive("columns", columns)
    if kind == "image":
        figure = _images(part, look, columns, note)
    elif kind == "volume":
        figure = _volumes(part, look, columns, note, slices, axis)
    elif kind == "table":
        figure = draw_tables(
            part.values,
            part.inputs,
            titles=part.titles,
            names=feature_names,
            top=top,
            sort=sort,
            look=look,
            columns=columns,
            note=note,
        )
    else:
        figure = draw_signals(
            list(part.values),
            part.inputs if part.inputs is None else list(part.inputs),
            titles=part.titles,
            names=feature_names,
            look=look,
            columns=columns,
            note=note,
        )
    return written(figure, path)


def grid(
    inputs: Tensor | None,
    columns: Mapping[str, Tensor | Shown] | Sequence[Tensor | Shown] | Tensor | Shown,
    titles: str | Sequence[str] | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    cmap: str | Colormap | None = None,
    clip: Clip = 100.0,
    scale: Scale = "each",
    overlay: bool | float = False,
    wrap: int | None = None,
    limit: int | None = None,
) -> Figure:
    """Compare explanations of images: the input, then a map of each, for every sample.

    Args:
        inputs: The explained inputs (N, C, H, W), drawn as in `heatmap`; None for those of the
            first explanation, if it is one.
        columns: name -> explanation, or relevance (N, C, H, W) or (N, H, W); usually a composite
            each. A list of explanations is named by their rules. One alone is one map.
        titles: One per sample.
        path: File to write to; the ending names the format (png, pdf, svg).
        cmap: See `heatmap`.
        clip: See `heatmap`.
        scale: See `heatmap`; "shared" is across maps and samples.
        overlay: See `heatmap`.
        wrap: How many panels side by side; by default as many as fit a page.
        limit: How many samples at most, by default 16.

    Returns:
        The figure: a notebook displays it, `savefig` writes it.

    Raises:
        InputError: Shapes do not belong together, or a relevance is empty or not finite.
    """
    from lrpfx.draw import check_count, draw_images, positive, shape_error, values_of, written

    named, found = _columns(columns)
    inputs = inputs if inputs is not None else found
    given = None if inputs is None else values_of("inputs", inputs)
    maps: dict[str, Array] = {}
    for name, relevance in named.items():
        values = values_of(f"columns[{name!r}]", relevance)
        if values.ndim not in (3, 4):
            raise shape_error(f"columns[{name!r}]", values, _SHAPES["image"][1])
        if given is not None:
            _check_inputs("image", values, given)
        maps[name] = values.sum(axis=1) if values.ndim == 4 else values
    counts = {len(values) for values in maps.values()}
    if len(counts) > 1:
        raise InputError(
            f"the columns hold {', '.join(map(str, sorted(counts)))} samples.",
            fix="give maps of the same samples.",
        )
    n = counts.pop()
    names = [titles] if isinstance(titles, str) else titles
    check_count("titles", names, n, "sample")
    shown = min(n, positive("limit", limit) or 16)
    figure = draw_images(
        [[values[i] for values in maps.values()] for i in range(shown)],
        None if given is None else list(given[:shown]),
        names=list(maps),
        titles=None if names is None else names[:shown],
        look=_look(cmap, clip, scale, overlay, "image"),
        columns=positive("wrap", wrap),
        note=_left_out(shown, n),
    )
    return written(figure, path)


def explained_pairs(relevance: Any, inputs: Any) -> list[tuple[str, Tensor, Tensor]]:
    """What was explained: name, relevance and input of each, token ids among them."""
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs  # as the relevance is
    keyed, _ = pytree.tree_flatten_with_path(opened(relevance))
    given = {path: x for path, x in pytree.tree_flatten_with_path(opened(inputs))[0]}
    return [
        ("inputs" + pytree.keystr(path), r, given[path])
        for path, r in keyed
        if isinstance(r, Tensor) and isinstance(given.get(path), Tensor)
    ]


# What is drawn: checks, and tensors to arrays.


@dataclass
class _Part:
    """The samples that are drawn."""

    values: Array
    inputs: Array | None
    titles: Sequence[str] | None
    names: Sequence[str] | None
    top: int | None
    sort: bool

    def shorten(self, most: int) -> str:
        """Keep the first samples; what the picture says of the others."""
        n = len(self.values)
        self.values = self.values[:most]
        self.inputs = None if self.inputs is None else self.inputs[:most]
        self.titles = None if self.titles is None else self.titles[:most]
        return _left_out(len(self.values), n)


def _left_out(shown: int, n: int) -> str:
    return "" if shown == n else f"first {shown} of {n} samples (limit={n} draws all)"


def _images(part: _Part, look: Look, columns: int | None, note: str) -> Figure:
    from lrpfx.draw import draw_images

    return draw_images(
        [[values] for values in part.values],
        None if part.inputs is None else list(part.inputs),
        names=[""],
        titles=part.titles,
        look=look,
        columns=columns,
        note=note,
    )


def _volumes(
    part: _Part,
    look: Look,
    columns: int | None,
    note: str,
    slices: int | Sequence[int],
    axis: int,
) -> Figure:
    from lrpfx.draw import draw_volumes, positive

    if axis not in (0, 1, 2):
        raise InputError(f"axis={axis!r}.", fix="give 0 (D), 1 (H) or 2 (W).")
    depth = part.values.shape[1 + axis]
    if isinstance(slices, int):
        count = min(positive("slices", slices) or depth, depth)
        which: list[int] = np.linspace(0, depth - 1, count).round().astype(int).tolist()
    else:
        which = list(slices)
    if not which or not all(isinstance(k, int) and 0 <= k < depth for k in which):
        raise InputError(f"slices={slices!r}.", fix=f"give numbers from 0 to {depth - 1}.")
    gray = None if part.inputs is None else part.inputs.reshape(len(part.values), -1, *_last(part))
    return draw_volumes(
        np.moveaxis(part.values, 1 + axis, 1),
        None if gray is None else np.moveaxis(gray.mean(axis=1), 1 + axis, 1),
        slices=which,
        titles=part.titles,
        look=look,
        columns=columns,
        note=note,
    )


def _last(part: _Part) -> tuple[int, ...]:
    """D, H and W of the inputs, which may be finer than those of the relevance."""
    assert part.inputs is not None
    return part.inputs.shape[-3:]


def _into(
    ax: Axes, kind: Kind, part: _Part, look: Look, path: str | os.PathLike[str] | None
) -> Figure:
    """One sample into the user's axes."""
    from lrpfx.draw import draw_image, draw_signal, draw_table, written

    if kind == "volume":
        raise InputError("ax= holds one picture, and a volume has many.", fix="leave ax= out.")
    if len(part.values) != 1:
        raise InputError(
            f"ax= holds one sample, and there are {len(part.values)}.",
            fix="draw one of them: heatmap(relevance[:1], inputs=x[:1], ax=ax).",
        )
    values, names = part.values[0], part.names
    given = None if part.inputs is None else part.inputs[0]
    title = None if part.titles is None else part.titles[0]
    if kind == "image":
        draw_image(ax, values, given, title, look)
    elif kind == "table":
        draw_table(ax, values, given, title, names, part.top, part.sort, look)
    else:
        draw_signal(ax, values, given, title, names, look)
    figure = ax.get_figure(root=True)
    assert figure is not None  # axes that were removed from theirs
    return written(figure, path)


def _columns(
    columns: Mapping[str, Tensor | Shown] | Sequence[Tensor | Shown] | Tensor | Shown,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Relevance by name, and the input of the first explanation."""
    fix = "give {name: explanation}, or a list of explanations."
    if isinstance(columns, Mapping):
        items: list[tuple[str, Any]] = [(str(name), one) for name, one in columns.items()]
    elif isinstance(columns, (list, tuple)):
        items = []
        for k, one in enumerate(columns):
            name = str(getattr(getattr(one, "report", None), "rules", f"map {k + 1}"))
            name = name.split(" (")[0]
            taken = {name for name, _ in items}
            items.append((f"{name} ({k + 1})" if name in taken else name, one))
    elif isinstance(columns, Tensor) or hasattr(columns, "relevance"):
        return _columns([columns])  # type: ignore[list-item]  # Sequence is excluded above
    else:
        raise InputError(f"columns cannot be of type {type(columns).__name__}.", fix=fix)
    if not items:
        raise InputError("columns holds no relevance to draw.", fix=fix)
    found: dict[str, Tensor] = {}
    image = None
    for name, one in items:
        if isinstance(one, Tensor):
            found[name] = one
            continue
        if not hasattr(one, "relevance"):
            numpy = "give tensors: torch.from_numpy(relevance), or the explanations."
            raise InputError(
                f"columns[{name!r}] is of type {type(one).__name__}.",
                fix=numpy if isinstance(one, np.ndarray) else fix,
            )
        pairs = explained_pairs(one.relevance, one.inputs)
        if len(pairs) != 1:
            raise InputError(
                f"columns[{name!r}] explains {len(pairs)} inputs.",
                fix=f"give the relevance of one of them: {{{name!r}: explanation.relevance[0]}}.",
            )
        found[name] = pairs[0][1]
        image = pairs[0][2] if image is None else image
    return found, image


def _kind(values: Array, kind: Kind | None, names: Sequence[str] | None) -> Kind:
    """What the relevance belongs to: as said, or as the shape tells."""
    from lrpfx.draw import shape_error

    if kind is not None:
        if kind not in _SHAPES:
            raise InputError(
                f"there is no kind {kind!r}.", fix=f"give one of {', '.join(_SHAPES)}."
            )
        dimensions, shape = _SHAPES[kind]
        if values.ndim not in dimensions:
            raise shape_error("relevance", values, f"kind {kind!r}: {shape}")
        return kind
    if values.ndim in (4, 5):
        return "image" if values.ndim == 4 else "volume"
    if values.ndim == 2 and (values.shape[1] <= _WIDE or names is not None):
        return "table"
    if values.ndim == 2:
        raise InputError(
            f"relevance {values.shape} may be of a table or of signals.",
            fix="give kind='table' or feature_names= for bars, kind='signal' for a strip.",
        )
    if values.ndim == 3:
        raise InputError(
            f"relevance {values.shape} may be of signals (N, C, L), of sequences (N, T, D), or of "
            "images without channels (N, H, W).",
            fix="give kind='signal', kind='sequence' or kind='image'.",
        )
    if values.ndim == 1:
        raise InputError(
            f"relevance {values.shape} has no dimension of samples.", fix="give relevance[None]."
        )
    expected = ", ".join(f"{kind} {shape}" for kind, (_, shape) in _SHAPES.items())
    raise shape_error("relevance", values, expected)


def _check_inputs(kind: Kind, relevance: Array, inputs: Array) -> None:
    """Images need the same N only: a map of an inner layer is coarser than its input."""
    from lrpfx.draw import shape_error

    if kind == "image":
        fits = inputs.ndim == 4 and len(inputs) == len(relevance)
        expected = f"(N, C, H, W) with N = {len(relevance)}"
    elif kind == "volume":
        fits = inputs.ndim in (4, 5) and len(inputs) == len(relevance)
        expected = f"(N, C, D, H, W) or (N, D, H, W) with N = {len(relevance)}"
    else:
        fits = inputs.shape == relevance.shape
        expected = f"the shape of the relevance, {relevance.shape}"
    if not fits:
        raise shape_error("inputs", inputs, expected)


def _channels_first(kind: Kind, values: Any) -> Any:
    """Signals (N, L) or (N, C, L), sequences (N, T, D) -> (N, C, L)."""
    if values is None:
        return None
    if values.ndim == 2:
        return values[:, None]
    return values.transpose(0, 2, 1) if kind == "sequence" else values


def _look(
    cmap: str | Colormap | None, clip: Clip, scale: Scale, overlay: bool | float, kind: Kind
) -> Look:
    from lrpfx.draw import look_of

    look = look_of(cmap, clip, scale, overlay)
    if kind == "table" and (clip != 100 or cmap is not None):
        raise InputError("bars have no colour map and are not clipped.", fix="leave it out.")
    if kind != "image" and look.overlay:
        raise InputError(f"overlay= is for images, not for a {kind}.", fix="leave it out.")
    return look
