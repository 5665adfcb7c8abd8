"""A graph and its plan -> a `GraphModule` whose backward pass is relevance."""

from lrpfx.rewrite.freeze import freeze, written
from lrpfx.rewrite.ledger import Booking, Ledger
from lrpfx.rewrite.masks import UNCHANGED, Edge, Edits
from lrpfx.rewrite.modules import Tap, instrument, rewrite
from lrpfx.rewrite.statistics import Running, running_of, unfollowed
from lrpfx.rewrite.streams import ARRIVES
from lrpfx.rewrite.taps import find_taps

__all__ = [
    "ARRIVES",
    "UNCHANGED",
    "Edge",
    "Edits",
    "Tap",
    "Booking",
    "Ledger",
    "find_taps",
    "freeze",
    "instrument",
    "rewrite",
    "Running",
    "running_of",
    "unfollowed",
    "written",
]
