"""Composites for convolutional networks."""

from __future__ import annotations

from torch import Tensor

from lrpfx.composites.base import Entry, Named, conv_and_linear
from lrpfx.composites.select import First
from lrpfx.rules import AlphaBeta, Flat, Gamma, StabilizerLike, ZBox, ZeroParams, ZPlus


class EpsilonPlus(Named, name="epsilon_plus"):
    """ZPlus on convolutions, Epsilon on linear layers.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Kohlbrenner et al. 2020 (LRP-CMP); Montavon et al. 2019, sect. 10.3.
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = ZPlus(stabilizer, zero_params=zero_params)
        super().__init__(conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonAlpha2Beta1(Named, name="epsilon_alpha2_beta1"):
    """AlphaBeta(2, 1) on convolutions, Epsilon on linear layers.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Kohlbrenner et al. 2020 (LRP-CMP).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = AlphaBeta(2.0, 1.0, stabilizer, zero_params=zero_params)
        super().__init__(conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonGamma(Named, name="epsilon_gamma"):
    """Gamma on convolutions, Epsilon on linear layers.

    Args:
        epsilon: Of Epsilon.
        gamma: Of Gamma.
        stabilizer: Of every rule but Epsilon.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Montavon et al. 2019, sect. 10.3 (LRP-gamma, epsilon by depth).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        gamma: float = 0.25,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = Gamma(gamma, stabilizer, zero_params=zero_params)
        super().__init__(conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonGammaBox(Named, name="epsilon_gamma_box"):
    """EpsilonGamma with ZBox on the first convolution.

    Args:
        low: Lowest possible input, a number or a tensor that broadcasts to the input.
        high: Highest possible input, likewise.
        epsilon: Of Epsilon.
        gamma: Of Gamma.
        stabilizer: Of every rule but Epsilon.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.
        strict: See ZBox.

    Source: Montavon et al. 2019, sect. 10.3 (LRP-gamma, epsilon, z^B by depth).
    """

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        epsilon: StabilizerLike = 1e-6,
        gamma: float = 0.25,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
        strict: bool = False,
    ) -> None:
        box = ZBox(low, high, stabilizer, zero_params=zero_params, strict=strict)
        conv = Gamma(gamma, stabilizer, zero_params=zero_params)
        rest = conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([(First(("conv",)), box), *rest])


class EpsilonPlusFlat(Named, name="epsilon_plus_flat"):
    """EpsilonPlus with Flat on the first convolution or linear layer.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Kohlbrenner et al. 2020 (LRP-CMP with flat rule).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = ZPlus(stabilizer, zero_params=zero_params)
        rest = conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


class EpsilonAlpha2Beta1Flat(Named, name="epsilon_alpha2_beta1_flat"):
    """EpsilonAlpha2Beta1 with Flat on the first convolution or linear layer.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Kohlbrenner et al. 2020 (LRP-CMP with flat rule).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = AlphaBeta(2.0, 1.0, stabilizer, zero_params=zero_params)
        rest = conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


def _flat_first(stabilizer: StabilizerLike, zero_params: ZeroParams) -> Entry:
    return First(("conv", "linear")), Flat(stabilizer, zero_params=zero_params)
