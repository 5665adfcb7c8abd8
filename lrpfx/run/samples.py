"""Outputs -> whether their first dimension is that of the samples."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
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
    fixed, the model is asked, by the first sample: of a batch it makes an output of one. An image
    (3, H, W) alone is no batch of three, as a convolution does not take one of them.

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
    return shape[0] in sizes and _follows(captured, leaves, shape)


def _follows(captured: Captured, leaves: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether an output's first size follows that of the inputs, by what the model makes of one."""

    def shapes(given: list[Any]) -> list[tuple[int, ...]]:
        try:
            with TRACING, preserved(captured.model, plainly=True):
                captured.model.eval()  # in training mode batch norm refuses a single sample
                output = run_model(captured.model, copies(given), captured.signature.spec)
        except InputError:
            return []
        return [tuple(t.shape) for t in tensors_in(output)]

    sized = [isinstance(v, Tensor) and v.shape[:1] == shape[:1] for v in leaves]

    def rows(take: Callable[[Tensor], Tensor]) -> list[tuple[int, ...]]:
        return shapes([take(v) if is_it else v for v, is_it in zip(leaves, sized, strict=True)])

    def of_one() -> list[tuple[int, ...]]:
        return rows(lambda leaf: leaf[:1])

    if not (of_first := of_one()):
        alone = [leaf[None] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if (1, *shape) not in shapes(alone):
            return True
        if not (of_first := of_one()):  # what failed for lack of memory may run now
            return False
    # Or, as for sums with a table of n rows, n is all that it takes.
    return (1, *shape[1:]) in of_first or not rows(lambda leaf: torch.cat([leaf, leaf[:1]]))
