"""Relevance as arrays -> a matplotlib figure, laid out in cells of fixed size, without pyplot.

matplotlib is imported here, and this folder where a picture is drawn: `import lrpfx` does not wait.
"""

<<<<<<< HEAD
from lrpfx.draw.curves import draw_curves
=======
from lrpfx.draw.colors import SHADES, colormap, palette
from lrpfx.draw.given import check_count, look_of, positive, shape_error, values_of, written
>>>>>>> 29807d6 (Volumes by slices, matrices of tokens, curves with bands, mosaics with indexed colours; colour maps in words, ranges of percentiles)
from lrpfx.draw.images import draw_image, draw_images
from lrpfx.draw.look import Array, Look
from lrpfx.draw.plots import draw_curves, draw_matrix
from lrpfx.draw.signals import draw_signal, draw_signals
from lrpfx.draw.tables import draw_table, draw_tables
from lrpfx.draw.volumes import draw_volumes

__all__ = [
    "Array",
    "Look",
<<<<<<< HEAD
=======
    "SHADES",
    "check_count",
    "colormap",
>>>>>>> 29807d6 (Volumes by slices, matrices of tokens, curves with bands, mosaics with indexed colours; colour maps in words, ranges of percentiles)
    "draw_curves",
    "draw_image",
    "draw_images",
    "draw_matrix",
    "draw_signal",
    "draw_signals",
    "draw_table",
    "draw_tables",
    "draw_volumes",
    "look_of",
    "palette",
    "positive",
    "shape_error",
    "values_of",
    "written",
]
