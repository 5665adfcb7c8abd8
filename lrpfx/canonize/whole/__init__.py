"""Functions that users write in pieces -> the op that has their name."""

from lrpfx.canonize.whole.by_hand import whole_functions, whole_lerps, whole_relus
from lrpfx.canonize.whole.composed import compose, whole_activations, whole_quantisation
from lrpfx.canonize.whole.gates import whole_gates
from lrpfx.canonize.whole.grouped import factors_of_one_tensor
from lrpfx.canonize.whole.powers import whole_inverses
from lrpfx.canonize.whole.regions import is_pointwise, pointwise_regions, sources
from lrpfx.canonize.whole.sigmoids import whole_sigmoids

__all__ = [
    "compose",
    "factors_of_one_tensor",
    "is_pointwise",
    "pointwise_regions",
    "sources",
    "whole_activations",
    "whole_functions",
    "whole_gates",
    "whole_inverses",
    "whole_lerps",
    "whole_quantisation",
    "whole_relus",
    "whole_sigmoids",
]
