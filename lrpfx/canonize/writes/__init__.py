"""Ops that write into memory, and regions of no_grad and autocast -> plain functional ops."""

from lrpfx.canonize.writes.functional import (
    copies_to_casts,
    functionalize,
    inline_no_grad,
    unlifted,
)
from lrpfx.canonize.writes.memory import writes
from lrpfx.canonize.writes.past import SPLITS, reads_past_writes
from lrpfx.canonize.writes.strides import places_of_strides

__all__ = [
    "SPLITS",
    "copies_to_casts",
    "functionalize",
    "inline_no_grad",
    "reads_past_writes",
    "places_of_strides",
    "unlifted",
    "writes",
]
