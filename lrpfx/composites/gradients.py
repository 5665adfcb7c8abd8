"""Composites that are gradients but for what they do at activations."""

from __future__ import annotations

from lrpfx.composites.base import Entry, Named, base_map
from lrpfx.rules import (
    Gradient,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    StabilizerLike,
    ZeroParams,
    ZPlus,
)


class ExcitationBackprop(Named, name="excitation_backprop"):
    """ZPlus on convolutions and linear layers; activations keep their gradient.

    Args:
        stabilizer: Of every rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Zhang et al. 2016 (excitation backprop).
    """

    def __init__(self, stabilizer: StabilizerLike = 1e-6, zero_params: ZeroParams = None) -> None:
        rule = ZPlus(stabilizer, zero_params=zero_params)
        entries: list[Entry] = [("conv", rule), ("linear", rule), ("activation", Gradient())]
        super().__init__(entries + base_map(stabilizer, rule))


class GuidedBackprop(Named, name="guided_backprop"):
    """ReLUGuidedBackprop on ReLU; everything else keeps its gradient.

    Source: Springenberg et al. 2015.
    """

    def __init__(self) -> None:
        super().__init__([("relu", ReLUGuidedBackprop()), ("*", Gradient())])


class DeconvNet(Named, name="deconvnet"):
    """ReLUDeconvNet on ReLU; everything else keeps its gradient.

    Source: Zeiler and Fergus 2014.
    """

    def __init__(self) -> None:
        super().__init__([("relu", ReLUDeconvNet()), ("*", Gradient())])


class BetaSmooth(Named, name="beta_smooth"):
    """ReLUBetaSmooth on ReLU; everything else keeps its gradient.

    Args:
        beta: Sharpness of the smoothed ReLU.

    Source: Dombrowski et al. 2019.
    """

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__([("relu", ReLUBetaSmooth(beta)), ("*", Gradient())])
