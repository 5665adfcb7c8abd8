"""The rules: a class per rule, a file per kind of op."""

from lrpfx.rules.affine import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus
from lrpfx.rules.base import Flow, Gradient, Rule, Stabilizer, Stop
from lrpfx.rules.bilinear import Bilinear, Taylor, Uniform
from lrpfx.rules.pointwise import Pass, ReLUBetaSmooth, ReLUDeconvNet, ReLUGuidedBackprop

__all__ = [
    "AlphaBeta",
    "Bilinear",
    "Epsilon",
    "Flat",
    "Flow",
    "Gamma",
    "Gradient",
    "Norm",
    "Pass",
    "ReLUBetaSmooth",
    "ReLUDeconvNet",
    "ReLUGuidedBackprop",
    "Rule",
    "Stabilizer",
    "Stop",
    "Taylor",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
]
