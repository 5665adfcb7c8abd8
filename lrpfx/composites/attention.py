"""Composites for networks of linear layers, attention, gates and scans."""

from __future__ import annotations

from typing import Literal

from lrpfx.composites.base import Entry, Named, base_map
from lrpfx.composites.select import gates
from lrpfx.errors import RuleError
from lrpfx.rules import Epsilon, StabilizerLike, Stop, ZeroParams


class EpsilonAll(Named, name="epsilon_all"):
    """Epsilon on every affine op and residual sum.

    Args:
        epsilon: Of every rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.
    """

    def __init__(self, epsilon: StabilizerLike = 1e-6, zero_params: ZeroParams = None) -> None:
        rule = Epsilon(epsilon, zero_params=zero_params)
        super().__init__([("conv", rule), ("linear", rule), *base_map(epsilon, rule)])


class AttnLRP(EpsilonAll, name="attnlrp"):
    """AttnLRP: Epsilon, with softmax by its Taylor expansion and products shared evenly.

    The rules for attention, gates and norms are those that every composite has as its base.

    Args:
        epsilon: Of every rule. At 0, the limit that the paper's own implementation computes,
            multiplications and divisions by activations cancel: relevance needs no more memory
            than a gradient, and attention no weights (T, T), where no ledger is kept.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Achtibat et al. 2024 (arXiv 2402.05602), sect. 3 and appendix A.
    """

    def __init__(self, epsilon: StabilizerLike = 0.0, zero_params: ZeroParams = None) -> None:
        super().__init__(epsilon, zero_params)


class CPLRP(Named, name="cplrp"):
    """CP-LRP: as AttnLRP, but attention weights are constants.

    Args:
        epsilon: Of every rule; see AttnLRP.
        gate: "stop" also makes the gates of products constants (the other factor takes all),
            "uniform" shares products evenly. The literature has both, and they differ widely.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Ali et al. 2022 (arXiv 2202.07304), sect. 4.
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 0.0,
        gate: Literal["stop", "uniform"] = "stop",
        zero_params: ZeroParams = None,
    ) -> None:
        if gate not in ("stop", "uniform"):
            raise RuleError(f"CPLRP: gate={gate!r}.", fix="give 'stop' or 'uniform'.")
        constant: list[Entry] = [("softmax", Stop())]
        if gate == "stop":
            constant.append((gates, Stop()))
        super().__init__([*constant, *EpsilonAll(epsilon, zero_params).entries])


class MambaLRP(Named, name="mambalrp"):
    """MambaLRP: as AttnLRP, but what a selective scan is steered by is a constant.

    The discretised A, B and C of a Mamba block are functions of the projection ``x_proj``, the
    name it has in every implementation; the gate's product is shared evenly.

    Args:
        epsilon: Of every rule; see AttnLRP.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Rezaei Jafari et al. 2024 (MambaLRP, arXiv 2406.07592), sect. 4.
    """

    def __init__(self, epsilon: StabilizerLike = 0.0, zero_params: ZeroParams = None) -> None:
        super().__init__([("*x_proj", Stop()), *EpsilonAll(epsilon, zero_params).entries])
