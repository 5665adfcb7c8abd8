"""What users want relevance to go through -> masks and gates in the graph."""

from lrpfx.conditions.kinds import Channel, Concept, Direction, Head, Neuron, Subspace, Token
from lrpfx.conditions.places import Places, channels_of
from lrpfx.conditions.read import Condition, Conditions, read_conditions

__all__ = [
    "Channel",
    "Concept",
    "Condition",
    "Conditions",
    "Direction",
    "Head",
    "Neuron",
    "Places",
    "Subspace",
    "Token",
    "channels_of",
    "read_conditions",
]
