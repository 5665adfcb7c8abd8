"""Outputs -> whether their first dimension is that of the samples."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import Tensor, fx

from lrpfx.capture import TRACING, Captured, copies, preserved, run_model, tensors_in
from lrpfx.errors import InputError
from lrpfx.ops import explained_leaves


def is_batched(
    captured: Captured,
    graph: fx.Graph,
    live: Container[fx.Node],
    index: int,
    leaves: Sequence[Any],
) -> bool:
    """Whether the first dimension of an output is that of the samples.

    Where the batch size may vary, the output's first size varies, too, or does not. Where it is
    fixed, the model is asked: an image (3, H, W) alone is no batch of three, as a convolution does
    not take one of them.

    Args:
        captured: The model.
        graph: Its canonical graph.
        live: The nodes that carry relevance; of other outputs nothing is explained anyway.
        index: Which of the outputs.
        leaves: Flat inputs.
    """
    node = explained_leaves(graph)[index]
    if not isinstance(node, fx.Node) or node not in live:
        return True
    shape = node.meta["val"].shape
    if not shape:
        return False
    if captured.batch_varies:
        return not isinstance(shape[0], int)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if not isinstance(shape[0], int) or shape[0] == 1:
        return True
    return shape[0] in sizes and not _takes_alone(captured, leaves, shape)


def _takes_alone(captured: Captured, leaves: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether the model takes inputs as one sample of a batch, and not the first entry of each."""

    def shapes(given: list[Any]) -> list[tuple[int, ...]]:
        try:
            with TRACING, preserved(captured.model):
                captured.model.eval()  # in training mode batch norm refuses a single sample
                output = run_model(captured.model, copies(given), captured.signature.spec)
        except InputError:
            return []
        return [tuple(t.shape) for t in tensors_in(output)]

    one = [leaf[None] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    first = [leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves]
    return (1, *shape) in shapes(one) and not shapes(first)
