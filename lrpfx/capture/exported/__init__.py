"""A model -> one graph for all inputs, by torch.export."""

from lrpfx.capture.exported.constants import Answers
from lrpfx.capture.exported.export import export

__all__ = [
    "Answers",
    "export",
]
