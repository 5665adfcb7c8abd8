"""How good an explanation is: perturbation, randomisation, localisation, agreement.

Each metric names its paper. ``interval`` and ``paired`` say what differences mean.
"""

from lrpfx.evaluate.curves import Curves
from lrpfx.evaluate.erasing import perturbation
from lrpfx.evaluate.masks import Localization, localization
from lrpfx.evaluate.ranks import Agreement, agreement
from lrpfx.evaluate.sanity import Randomization, randomization
from lrpfx.evaluate.statistics import Interval, Paired, interval, paired
from lrpfx.evaluate.tokens import LeaveOneOut, leave_one_out

__all__ = [
    "Agreement",
    "Curves",
    "Interval",
    "LeaveOneOut",
    "Localization",
    "Paired",
    "Randomization",
    "agreement",
    "interval",
    "leave_one_out",
    "localization",
    "paired",
    "perturbation",
    "randomization",
]
