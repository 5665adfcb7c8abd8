"""What an Explainer is made of -> a pickle or a file, and the Explainer made of it again."""

from lrpfx.saved.file import Weights, read_file, write_file
from lrpfx.saved.recipe import Recipe, example_of

__all__ = ["Recipe", "Weights", "example_of", "read_file", "write_file"]
