"""A position of a feature map -> the part of the input that can reach it, by the graph alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from lrpfx.ops import bound_arguments, record

#: Of each spatial dimension, the first and the last index.
Box = tuple[tuple[int, int], ...]
#: Families of ops that compute each position from the same position, where shapes stay.
_POINTWISE = {"activation", "affine", "product", "constant"}
_GLIDING = {"conv", "max_pool", "avg_pool"}


def receptive_field(place: fx.Node, position: int) -> Box | None:
    """The part of the input that a position of a feature map (N, C, ...) can depend on.

    Args:
        place: The node of the feature map.
        position: Flat, over its spatial dimensions.

    Returns:
        Of each spatial dimension of the input, the first and the last index; None where the place
        is no feature map, or depends on no input with as many dimensions.
    """
    sizes = _sizes(place)
    if not sizes or not 0 <= position < math.prod(sizes):
        return None
    at = []
    for size in reversed(sizes):
        position, index = divmod(position, size)
        at.append((index, index))
    boxes: dict[fx.Node, Box] = {place: tuple(reversed(at))}
    found: Box | None = None
    for node in reversed(place.graph.nodes):
        box = boxes.pop(node, None)
        if box is None:
            continue
        if node.op == "placeholder":
            found = box if found is None else _both(found, box)
        for source in node.all_input_nodes:
            if len(_sizes(source)) == len(box):
                part = _inside(_through(node, source, box), _sizes(source))
                boxes[source] = part if source not in boxes else _both(boxes[source], part)
    return found


def _through(node: fx.Node, source: fx.Node, box: Box) -> Box:
    """What of an input a part of the output depends on; all of it where nothing else is known."""
    known, sizes = record(node), _sizes(source)
    everything = tuple((0, size - 1) for size in sizes)
    if known is None:
        return everything
    if known.kind in _GLIDING:
        return _glided(node, sizes, box)
    if known.kind == "pad":
        return _padded(node, box) or everything
    if known.kind == "cat" and sizes == _sizes(node):
        return box
    if known.kind == "interpolate":
        pairs = zip(box, sizes, _sizes(node), strict=True)
        return tuple((_down(a, n, m) - 1, _down(b + 1, n, m) + 1) for (a, b), n, m in pairs)
    same = _sizes(node) == sizes and known.family in _POINTWISE
    return box if same and known.kind not in ("linear", "einsum", "reduction") else everything


def _glided(node: fx.Node, sizes: Sequence[int], box: Box) -> Box:
    """Of a convolution or pooling."""
    given, dims = bound_arguments(node), len(sizes)
    weight = given.get("weight")
    if isinstance(weight, fx.Node):
        kernel = [*_sizes(weight)]
    elif "kernel_size" in given:
        kernel = _each(given["kernel_size"], dims)
    else:  # adaptive pooling
        pairs = zip(box, sizes, _sizes(node), strict=True)
        return tuple((_down(a, n, m), -_down(-(b + 1), n, m) - 1) for (a, b), n, m in pairs)
    stride = _each(given.get("stride") or kernel, dims)
    dilation = _each(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        pad = [w // 2 if padding == "same" else 0 for w in wide]
    else:
        pad = _each(padding, dims)
    transposed = given.get("transposed", "transpose" in str(node.target))
    found = []
    for (a, b), s, p, w in zip(box, stride, pad, wide, strict=True):
        if transposed:
            found.append((-((w - a - p) // s), (b + p) // s))
        else:
            found.append((a * s - p, b * s - p + w))
    return tuple(found)


def _padded(node: fx.Node, box: Box) -> Box | None:
    """Of padding by constants."""
    given = bound_arguments(node)
    pads = given["pad"]
    if given.get("mode", "constant") != "constant" or not all(type(n) is int for n in pads):
        return None
    firsts = [*pads[::2], *[0] * len(box)][: len(box)]
    return tuple((a - p, b - p) for (a, b), p in zip(box, reversed(firsts), strict=True))


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """Sizes of the spatial dimensions of (N, C, ...), none where they vary or it has none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 3:
        return ()
    sizes = tuple(value.shape[2:])
    return sizes if all(type(size) is int for size in sizes) else ()


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _down(index: int, size: int, of: int) -> int:
    return index * size // of


def _inside(box: Box, sizes: Sequence[int]) -> Box:
    pairs = zip(box, sizes, strict=True)
    return tuple((min(max(a, 0), n - 1), min(max(b, 0), n - 1)) for (a, b), n in pairs)


def _both(one: Box, other: Box) -> Box:
    pairs = zip(one, other, strict=True)
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in pairs)
