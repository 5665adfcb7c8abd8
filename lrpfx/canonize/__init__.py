"""Any spelling of a graph -> one form: functional, folded, attention opened, functions whole."""

from lrpfx.canonize.folding import BatchStatistics, batch_statistics
from lrpfx.canonize.hold import DIVISOR, release
from lrpfx.canonize.opened import FUSED, SDPA
from lrpfx.canonize.passes import canonize

__all__ = [
    "BatchStatistics",
    "DIVISOR",
    "FUSED",
    "SDPA",
    "batch_statistics",
    "canonize",
    "release",
]
