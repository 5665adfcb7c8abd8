"""The rules: a class per rule, a file per kind of op."""

from lrpfx.rules.affine import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus
from lrpfx.rules.base import (
    Absorbed,
    Carry,
    Flow,
    Gradient,
    Rule,
    Stabilizer,
    StabilizerLike,
    Stop,
    finite,
    share,
    size_of,
    sum_all,
)
from lrpfx.rules.bilinear import Bilinear, Taylor, Uniform
from lrpfx.rules.pointwise import (
    Pass,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    ReLURule,
)
from lrpfx.rules.pools import SmoothPool, TakeMost
from lrpfx.rules.signed import Sign
from lrpfx.rules.terms import AffineRule, Input, Term, ZeroParams

__all__ = [
    "Absorbed",
    "AffineRule",
    "AlphaBeta",
    "Bilinear",
    "Carry",
    "Epsilon",
    "Flat",
    "Flow",
    "Gamma",
    "Gradient",
    "Input",
    "Norm",
    "Pass",
    "ReLUBetaSmooth",
    "ReLUDeconvNet",
    "ReLUGuidedBackprop",
    "ReLURule",
    "Rule",
    "Sign",
    "SmoothPool",
    "Stabilizer",
    "StabilizerLike",
    "Stop",
    "TakeMost",
    "Taylor",
    "Term",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "ZeroParams",
    "finite",
    "share",
    "size_of",
    "sum_all",
]
