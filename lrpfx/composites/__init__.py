"""Composites: named rule sets. A composite is an ordered list of (selector, rule).

The first entry whose selector matches a node and whose rule fits it wins.
"""

from typing import Literal

from lrpfx.composites.attention import CPLRP, AttnLRP, EpsilonAll, MambaLRP
from lrpfx.composites.auto import Auto
from lrpfx.composites.base import NAMED, Composite, Entries, Entry, Named, Offered, base_map
from lrpfx.composites.convolutions import (
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGamma,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
)
from lrpfx.composites.gradients import BetaSmooth, DeconvNet, ExcitationBackprop, GuidedBackprop
from lrpfx.composites.select import (
    Attending,
    First,
    Selector,
    describe,
    gates,
    input_scales,
    patch_embeddings,
    pointwise_convolutions,
    recurrent_gates,
)

#: The names of the composites; ``NAMED`` has the same.
CompositeName = Literal[
    "auto",
    "epsilon_all",
    "attnlrp",
    "cplrp",
    "mambalrp",
    "epsilon_plus",
    "epsilon_alpha2_beta1",
    "epsilon_gamma",
    "epsilon_gamma_box",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1_flat",
    "excitation_backprop",
    "guided_backprop",
    "deconvnet",
    "beta_smooth",
]

__all__ = [
    "AttnLRP",
    "Attending",
    "Auto",
    "BetaSmooth",
    "CPLRP",
    "Composite",
    "CompositeName",
    "DeconvNet",
    "Entries",
    "Entry",
    "EpsilonAll",
    "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat",
    "EpsilonGamma",
    "EpsilonGammaBox",
    "EpsilonPlus",
    "EpsilonPlusFlat",
    "ExcitationBackprop",
    "First",
    "GuidedBackprop",
    "MambaLRP",
    "NAMED",
    "Named",
    "Offered",
    "Selector",
    "base_map",
    "describe",
    "gates",
    "input_scales",
    "patch_embeddings",
    "pointwise_convolutions",
    "recurrent_gates",
]

# Who reads it should look for it where it can be imported from.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
