"""Ops that stand for several others -> these others, which have rules of their own."""

from lrpfx.canonize.opened.attention import FUSED, SDPA, group_heads, open_attention
from lrpfx.canonize.opened.compounds import open_compounds
from lrpfx.canonize.opened.names import one_name_each
from lrpfx.canonize.opened.norms import open_statistics
from lrpfx.canonize.opened.pairs import pair_complex
from lrpfx.canonize.opened.parts import lerp, open_parts
from lrpfx.canonize.opened.recurrent import RECURRENT, open_recurrent

__all__ = [
    "FUSED",
    "RECURRENT",
    "SDPA",
    "group_heads",
    "lerp",
    "one_name_each",
    "open_attention",
    "open_compounds",
    "open_parts",
    "open_recurrent",
    "open_statistics",
    "pair_complex",
]
