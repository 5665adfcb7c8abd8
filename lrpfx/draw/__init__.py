"""Relevance as arrays -> a matplotlib figure, laid out in cells of fixed size, without pyplot.

matplotlib is imported here, and this folder where a picture is drawn: `import lrpfx` does not wait.
"""

from lrpfx.draw.curves import draw_curves
from lrpfx.draw.images import draw_image, draw_images
from lrpfx.draw.look import Array, Look
from lrpfx.draw.signals import draw_signal, draw_signals
from lrpfx.draw.tables import draw_table, draw_tables

__all__ = [
    "Array",
    "Look",
    "draw_curves",
    "draw_image",
    "draw_images",
    "draw_signal",
    "draw_signals",
    "draw_table",
    "draw_tables",
]
