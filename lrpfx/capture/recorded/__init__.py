"""A model and inputs -> the graph of this run."""

from lrpfx.capture.recorded.record import record
from lrpfx.capture.recorded.recorder import AUTOCAST

__all__ = [
    "AUTOCAST",
    "record",
]
