"""Batch norm, and constants per channel -> part of the affine ops beside them."""

from lrpfx.canonize.folding.batch_norm import (
    BatchStatistics,
    batch_statistics,
    hold_batch_statistics,
    is_of_batch,
    write_out_batch_norm,
)
from lrpfx.canonize.folding.fold import fold_into_layers

__all__ = [
    "BatchStatistics",
    "batch_statistics",
    "fold_into_layers",
    "hold_batch_statistics",
    "is_of_batch",
    "write_out_batch_norm",
]
