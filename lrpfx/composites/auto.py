"""The default: for each op the rule that is right for it where it stands."""

from __future__ import annotations

from collections.abc import Iterable

from lrpfx.composites.base import Entry, Named, conv_and_linear
from lrpfx.composites.select import (
    Attending,
    input_scales,
    patch_embeddings,
    pointwise_convolutions,
    recurrent_gates,
)
from lrpfx.neuralize import Offset
from lrpfx.ops import Record
from lrpfx.rules import Bilinear, Epsilon, Gamma, Norm, Pass, StabilizerLike, Stop, ZeroParams


class Auto(Named, name="auto"):
    """The default: for each op the rule that is right for it where it stands.

    - Convolutions: Gamma, as under EpsilonGamma. First convolutions that cut an image into patches
      for attention are linear layers of these, with Epsilon; so are pointwise ones of transformers.
    - Attention, and all linear layers, norms and sums on a way through it: as under AttnLRP, which
      adds nothing to a denominator.
    - Linear layers, norms and sums elsewhere: Epsilon and Norm, as under EpsilonGamma.
    - Gates of recurrent layers: constants, so that the signal takes all. Shared evenly between
      gate and signal, as other products are, relevance would grow with each step.

    A convolutional network is explained as under EpsilonGamma, a transformer as under AttnLRP, an
    MLP as under EpsilonAll.

    Args:
        epsilon: Of Epsilon, where there is no attention.
        stabilizer: Of every other rule, where there is no attention.
        attention: Of every rule where there is, but for convolutions.
        gamma: Of Gamma. Why it is no ZPlus: its maps are more faithful on trained networks, and
            less is lost on the way through deep ones; see ``docs/faithfulness.md``.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Montavon et al. 2019, sect. 10.3 (LRP-gamma, epsilon by depth); Achtibat et al. 2024
    (arXiv 2402.05602); Arras et al. 2017 (arXiv 1706.07206), sect. 3.1, and Arras et al. 2019
    (arXiv 1909.12114), LRP-all.
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        attention: StabilizerLike = 0.0,
        gamma: float = 0.25,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = Gamma(gamma, stabilizer, zero_params=zero_params)
        exact = Epsilon(attention, zero_params=zero_params)
        own: list[Entry] = [
            (recurrent_gates, Stop()),
            (patch_embeddings, exact),
            (pointwise_convolutions, exact),
            ("conv", conv),
            (input_scales, Pass()),
            (Offset, Pass()),
            (Attending("linear"), exact),
            (Attending("affine"), Norm(attention)),
            (Attending("affine"), exact),
            (Attending("normalize"), Norm(attention)),
            (Attending("matmul"), Bilinear(attention)),
        ]
        super().__init__([*own, *conv_and_linear(conv, epsilon, stabilizer, zero_params)])

    @staticmethod
    def parts(nodes: Iterable[Record]) -> str:
        """What the composite comes to for these nodes, in the names of others."""
        conv = attention = recurrent = False
        for node in nodes:
            conv |= node.kind == "conv" and not node.tokenwise
            attention |= node.attending
            recurrent |= node.recurrent
        said = ["convolutions as epsilon_gamma"] * conv + ["attention as attnlrp"] * attention
        said = said or ["no convolutions, as epsilon_all"]
        return "; ".join([*said, *["recurrent gates as constants"] * recurrent])
