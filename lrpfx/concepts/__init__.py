"""Concepts: what parts of a layer's relevance mean, beside where in the input it goes."""

from lrpfx.concepts.graph import AttributionGraph, attribution_graph
from lrpfx.concepts.prototypes import Prototype, Prototypes
from lrpfx.concepts.scan import scan
from lrpfx.concepts.table import ConceptTable, load
from lrpfx.concepts.views import Reference
from lrpfx.conditions import Channel, Concept, Direction, Head, Neuron, Subspace, Token

__all__ = [
    "AttributionGraph",
    "Channel",
    "Concept",
    "ConceptTable",
    "Direction",
    "Head",
    "Neuron",
    "Prototype",
    "Prototypes",
    "Reference",
    "Subspace",
    "Token",
    "attribution_graph",
    "load",
    "scan",
]

# As in lrpfx itself: what is public shows the public path.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
