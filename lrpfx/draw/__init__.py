"""Relevance as arrays -> a matplotlib figure, laid out in cells of fixed size, without pyplot.

matplotlib is imported here, and this folder where a picture is drawn: `import lrpfx` does not wait.
"""

from lrpfx.draw.colors import SHADES, palette
from lrpfx.draw.curves import draw_curves
from lrpfx.draw.given import check_count, look_of, positive, shape_error, values_of, written
from lrpfx.draw.images import draw_image, draw_images
from lrpfx.draw.look import Array, Look
from lrpfx.draw.matrices import draw_matrix
from lrpfx.draw.signals import draw_signal, draw_signals
from lrpfx.draw.strips import draw_strip
from lrpfx.draw.tables import draw_table, draw_tables
from lrpfx.draw.tokens import draw_tokens
from lrpfx.draw.volumes import draw_volumes

__all__ = [
    "Array",
    "Look",
    "SHADES",
    "check_count",
    "draw_curves",
    "draw_image",
    "draw_images",
    "draw_matrix",
    "draw_signal",
    "draw_signals",
    "draw_strip",
    "draw_table",
    "draw_tables",
    "draw_tokens",
    "draw_volumes",
    "look_of",
    "palette",
    "positive",
    "shape_error",
    "values_of",
    "written",
]
