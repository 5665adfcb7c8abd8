"""Composites: named rule sets. A composite is an ordered list of (selector, rule).

The first entry whose selector matches a node and whose rule fits it wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lrpfx.errors import RuleError
from lrpfx.ops import Record
from lrpfx.rules import (
    AlphaBeta,
    Bilinear,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Norm,
    Pass,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    Rule,
    StabilizerLike,
    Stop,
    Taylor,
    Uniform,
    ZBox,
    ZeroParams,
    ZPlus,
)

#: An op kind, a module class, a module-path glob, "*", or a predicate on the node's record.
Selector = str | type[nn.Module] | Callable[[Record], bool]
Entry = tuple[Selector, Rule]


@dataclass(frozen=True)
class First:
    """Selects the first layers of the given kinds, in execution order.

    First are the nodes that the explained input reaches through no other conv or linear; a model
    with several inputs or parallel stems has several.
    """

    kinds: tuple[str, ...]

    def __call__(self, node: Record) -> bool:
        """Whether the node is a first layer of one of the kinds."""
        return node.first and node.kind in self.kinds

    def __str__(self) -> str:
        return f"first {' or '.join(self.kinds)}"


def gates(node: Record) -> bool:
    """Selects the activations that gate a product, such as silu(a) in silu(a) * b."""
    return node.gate


class Composite:
    """An ordered list of (selector, rule).

    Given to ``rules=`` as it is, the entries are laid over the default composite; the named
    composites below are complete.

    Args:
        entries: Pairs of selector and rule; the first match wins.

    Raises:
        RuleError: An entry is no pair of a selector and a rule.
    """

    #: Whether every entry must match something; named composites are made for any model.
    strict = True

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        for entry in self.entries:
            _check_entry(entry)

    @property
    def name(self) -> str:
        """The composite's snake_case name, "rules" for a list of the user's own."""
        names = (name for name, cls in NAMED.items() if cls is type(self))
        return next(names, "rules")

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}(["]
        lines += [f"    ({describe(selector)}, {rule})," for selector, rule in self.entries]
        return "\n".join([*lines, "])"])


def describe(selector: Selector) -> str:
    """How reports and errors name a selector."""
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, First):
        return str(selector)
    return getattr(selector, "__name__", repr(selector))


def _check_entry(entry: Any) -> None:
    fix = 'give pairs such as ("conv", lrpfx.ZPlus()) or ("layer4.*", lrpfx.Epsilon()).'
    if not isinstance(entry, tuple) or len(entry) != 2:
        raise RuleError(f"{entry!r} is no (selector, rule) pair.", fix=fix)
    selector, rule = entry
    if not isinstance(rule, Rule):
        raise RuleError(f"{rule!r} is no rule (an instance is needed, not the class).", fix=fix)
    if not isinstance(selector, str) and not callable(selector):
        raise RuleError(f"{selector!r} is no selector.", fix=fix)


def base_map(stabilizer: StabilizerLike, affine: Rule) -> list[Entry]:
    """What all relevance composites share, for everything but conv and linear layers.

    Activations Pass; residual sums, average pooling, batch norm that could not be folded, constant
    factors and summands Norm; layer, group and instance norm Norm with their 1 / std as a
    constant; products of live tensors Uniform, matrix products Bilinear, softmax Taylor; moves
    and selections follow the gradient.

    Args:
        stabilizer: Of Norm.
        affine: Rule of affine ops with weights that nothing else is said of.
    """
    return [
        ("activation", Pass()),
        ("affine", Norm(stabilizer)),
        ("affine", affine),
        ("normalize", Norm(stabilizer)),
        ("product", Uniform()),
        ("matmul", Bilinear(stabilizer)),
        ("softmax", Taylor()),
        ("move", Gradient()),
        ("select", Gradient()),
    ]


class Named(Composite):
    """A complete rule set: it is laid over no other, and on any model."""

    strict = False


class EpsilonAll(Named):
    """Epsilon on every affine op and residual sum.

    Args:
        epsilon: Of every rule.
        zero_params: See AffineRule.
    """

    def __init__(self, epsilon: StabilizerLike = 1e-6, zero_params: ZeroParams = None) -> None:
        rule = Epsilon(epsilon, zero_params=zero_params)
        super().__init__([("conv", rule), ("linear", rule), *base_map(epsilon, rule)])


class AttnLRP(EpsilonAll):
    """AttnLRP: Epsilon, with softmax by its Taylor expansion and products shared evenly.

    The rules for attention, gates and norms are those that every composite has as its base.

    Args:
        epsilon: Of every rule. At 0, the limit that the paper's own implementation computes,
            multiplications and divisions by activations cancel: relevance needs no more memory
            than a gradient, and attention no weights (T, T), where no ledger is kept.
        zero_params: See AffineRule.

    Source: Achtibat et al. 2024 (arXiv 2402.05602), sect. 3 and appendix A.
    """

    def __init__(self, epsilon: StabilizerLike = 0.0, zero_params: ZeroParams = None) -> None:
        super().__init__(epsilon, zero_params)


class CPLRP(Named):
    """CP-LRP: as AttnLRP, but attention weights are constants.

    Args:
        epsilon: Of every rule; see AttnLRP.
        gate: "stop" also makes the gates of products constants (the other factor takes all),
            "uniform" shares products evenly. The literature has both, and they differ widely.
        zero_params: See AffineRule.

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


class MambaLRP(Named):
    """MambaLRP: as AttnLRP, but what a selective scan is steered by is a constant.

    The discretised A, B and C of a Mamba block are functions of the projection ``x_proj``, the
    name it has in every implementation; the gate's product is shared evenly.

    Args:
        epsilon: Of every rule; see AttnLRP.
        zero_params: See AffineRule.

    Source: Rezaei Jafari et al. 2024 (MambaLRP, arXiv 2406.07592), sect. 4.
    """

    def __init__(self, epsilon: StabilizerLike = 0.0, zero_params: ZeroParams = None) -> None:
        super().__init__([("*x_proj", Stop()), *EpsilonAll(epsilon, zero_params).entries])


class EpsilonPlus(Named):
    """ZPlus on convolutions, Epsilon on linear layers.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: See AffineRule.

    Source: Kohlbrenner et al. 2020 (LRP-CMP); Montavon et al. 2019, sect. 10.3.
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = ZPlus(stabilizer, zero_params=zero_params)
        super().__init__(_conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonAlpha2Beta1(Named):
    """AlphaBeta(2, 1) on convolutions, Epsilon on linear layers.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: See AffineRule.

    Source: Kohlbrenner et al. 2020 (LRP-CMP).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = AlphaBeta(2.0, 1.0, stabilizer, zero_params=zero_params)
        super().__init__(_conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonGammaBox(Named):
    """ZBox on the first convolution, Gamma on the others, Epsilon on linear layers.

    Args:
        low: Lowest possible input, a number or a tensor that broadcasts to the input.
        high: Highest possible input, likewise.
        epsilon: Of Epsilon.
        gamma: Of Gamma.
        stabilizer: Of every rule but Epsilon.
        zero_params: See AffineRule.

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
    ) -> None:
        box = ZBox(low, high, stabilizer, zero_params=zero_params)
        conv = Gamma(gamma, stabilizer, zero_params=zero_params)
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([(First(("conv",)), box), *rest])


class EpsilonPlusFlat(Named):
    """EpsilonPlus with Flat on the first convolution or linear layer.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: See AffineRule.

    Source: Kohlbrenner et al. 2020 (LRP-CMP with flat rule).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = ZPlus(stabilizer, zero_params=zero_params)
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


class EpsilonAlpha2Beta1Flat(Named):
    """EpsilonAlpha2Beta1 with Flat on the first convolution or linear layer.

    Args:
        epsilon: Of Epsilon.
        stabilizer: Of every other rule.
        zero_params: See AffineRule.

    Source: Kohlbrenner et al. 2020 (LRP-CMP with flat rule).
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = AlphaBeta(2.0, 1.0, stabilizer, zero_params=zero_params)
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


class ExcitationBackprop(Named):
    """ZPlus on convolutions and linear layers; activations keep their gradient.

    Args:
        stabilizer: Of every rule.
        zero_params: See AffineRule.

    Source: Zhang et al. 2016 (excitation backprop).
    """

    def __init__(self, stabilizer: StabilizerLike = 1e-6, zero_params: ZeroParams = None) -> None:
        rule = ZPlus(stabilizer, zero_params=zero_params)
        entries: list[Entry] = [("conv", rule), ("linear", rule), ("activation", Gradient())]
        super().__init__(entries + base_map(stabilizer, rule))


class GuidedBackprop(Named):
    """ReLUGuidedBackprop on ReLU; everything else keeps its gradient.

    Source: Springenberg et al. 2015.
    """

    def __init__(self) -> None:
        super().__init__([("relu", ReLUGuidedBackprop()), ("*", Gradient())])


class DeconvNet(Named):
    """ReLUDeconvNet on ReLU; everything else keeps its gradient.

    Source: Zeiler and Fergus 2014.
    """

    def __init__(self) -> None:
        super().__init__([("relu", ReLUDeconvNet()), ("*", Gradient())])


class BetaSmooth(Named):
    """ReLUBetaSmooth on ReLU; everything else keeps its gradient.

    Args:
        beta: Sharpness of the smoothed ReLU.

    Source: Dombrowski et al. 2019.
    """

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__([("relu", ReLUBetaSmooth(beta)), ("*", Gradient())])


def _conv_and_linear(
    conv: Rule, epsilon: StabilizerLike, stabilizer: StabilizerLike, zero_params: ZeroParams
) -> list[Entry]:
    linear = Epsilon(epsilon, zero_params=zero_params)
    return [("conv", conv), ("linear", linear), *base_map(stabilizer, linear)]


def _flat_first(stabilizer: StabilizerLike, zero_params: ZeroParams) -> Entry:
    return First(("conv", "linear")), Flat(stabilizer, zero_params=zero_params)


NAMED: dict[str, type[Composite]] = {
    "epsilon_all": EpsilonAll,
    "attnlrp": AttnLRP,
    "cplrp": CPLRP,
    "mambalrp": MambaLRP,
    "epsilon_plus": EpsilonPlus,
    "epsilon_alpha2_beta1": EpsilonAlpha2Beta1,
    "epsilon_gamma_box": EpsilonGammaBox,
    "epsilon_plus_flat": EpsilonPlusFlat,
    "epsilon_alpha2_beta1_flat": EpsilonAlpha2Beta1Flat,
    "excitation_backprop": ExcitationBackprop,
    "guided_backprop": GuidedBackprop,
    "deconvnet": DeconvNet,
    "beta_smooth": BetaSmooth,
}
