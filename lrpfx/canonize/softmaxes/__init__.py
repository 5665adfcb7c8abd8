"""Softmaxes in any words -> softmaxes: found by what all their spellings share, or compute."""

from lrpfx.canonize.softmaxes.anyhow import whole_weights
from lrpfx.canonize.softmaxes.exponentials import whole_exponentials
from lrpfx.canonize.softmaxes.joined import join_exponentials, one_exponential_each
from lrpfx.canonize.softmaxes.logarithms import open_exponentials
from lrpfx.canonize.softmaxes.normalized import whole_softmaxes
from lrpfx.canonize.softmaxes.pairwise import whole_inverse_softmaxes
from lrpfx.canonize.softmaxes.side_by_side import products_with_parts
from lrpfx.canonize.softmaxes.simplex import whole_entmax
from lrpfx.canonize.softmaxes.two import gates_of_two

__all__ = [
    "gates_of_two",
    "join_exponentials",
    "one_exponential_each",
    "open_exponentials",
    "products_with_parts",
    "whole_entmax",
    "whole_exponentials",
    "whole_inverse_softmaxes",
    "whole_softmaxes",
    "whole_weights",
]
