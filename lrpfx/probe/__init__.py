"""A model and a batch of inputs -> what it gives where the inputs are changed.

No graph is captured: the model is run as it is, and stays as it was.
"""

from lrpfx.probe.erase import Eraser, Fill, positions
from lrpfx.probe.lookups import Lookups
from lrpfx.probe.score import Score, per_sample, scores
from lrpfx.probe.subject import (
    MEMORY,
    ModelLike,
    Subject,
    fitted,
    for_each,
    structured,
    subject_of,
)

__all__ = [
    "MEMORY",
    "Eraser",
    "Fill",
    "Lookups",
    "ModelLike",
    "Score",
    "Subject",
    "fitted",
    "for_each",
    "per_sample",
    "positions",
    "scores",
    "structured",
    "subject_of",
]
