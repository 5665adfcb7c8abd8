"""Whether a graph is what it is taken for: by running it and the model."""

from lrpfx.capture.checks.alone import mixing_note
from lrpfx.capture.checks.backwards import backward_note
from lrpfx.capture.checks.faithful import (
    agrees,
    as_captured,
    check_faithful,
    rounded,
    worst_difference,
)

__all__ = [
    "agrees",
    "as_captured",
    "backward_note",
    "check_faithful",
    "mixing_note",
    "rounded",
    "worst_difference",
]
