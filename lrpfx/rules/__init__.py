"""The rules: a class per rule, a file per kind of op."""

from lrpfx.rules.affine import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus
from lrpfx.rules.base import Flow, Gradient, Rule, Stabilizer
from lrpfx.rules.bilinear import Uniform
from lrpfx.rules.pointwise import Pass, ReLUBetaSmooth, ReLUDeconvNet, ReLUGuidedBackprop

__all__ = [
    "AlphaBeta",
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
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
]
