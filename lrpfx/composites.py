"""Composites: named rule sets. A composite is an ordered list of (selector, rule).

The first entry whose selector matches a node and whose rule fits it wins.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lrpfx import rules
from lrpfx.errors import RuleError
from lrpfx.neuralize import Offset
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

#: An op kind, a module class, a module-path glob, "*", or a predicate on the node's record; or
#: several of these, of which any may match.
Selector = str | type[nn.Module] | Callable[[Record], bool] | tuple[Any, ...]
Entry = tuple[Selector, Rule]
#: The names of the composites; ``NAMED`` has the same.
CompositeName = Literal[
    "auto",
    "epsilon_all",
    "attnlrp",
    "cplrp",
    "mambalrp",
    "epsilon_plus",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1_flat",
    "excitation_backprop",
    "guided_backprop",
    "deconvnet",
    "beta_smooth",
]
#: What stands for entries: pairs, a single one, a dict, or a rule for every op that it fits.
Entries = Iterable["Entry | Rule"] | Mapping[Any, Rule] | Entry | Rule


@dataclass(frozen=True)
class First:
    """Selects the first layers of the given kinds, in execution order.

    First are the nodes that the explained input reaches through no other conv or linear; a model
    with several inputs or parallel stems has several.

    Args:
        kinds: Op kinds; one may be given by itself.
    """

    kinds: tuple[str, ...] = ("conv", "linear")

    def __post_init__(self) -> None:
        """Take one kind for a tuple of it."""
        if isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", (self.kinds,))

    def __call__(self, node: Record) -> bool:
        """Whether the node is a first layer of one of the kinds."""
        return node.first and node.kind in self.kinds

    def __str__(self) -> str:
        return f"first {' or '.join(self.kinds)}"


@dataclass(frozen=True)
class Attending:
    """Selects the nodes of a kind, or family, that some attention stands before or behind.

    Attention is a softmax beside products of matrices.
    """

    kind: str

    def __call__(self, node: Record) -> bool:
        """Whether the node is of the kind, and attention on a way through it."""
        return node.attending and self.kind in (node.kind, node.family)

    def __str__(self) -> str:
        return f"{self.kind} beside attention"


def gates(node: Record) -> bool:
    """Selects the activations that gate a product, such as silu(a) in silu(a) * b."""
    return node.gate


def recurrent_gates(node: Record) -> bool:
    """Selects the gates of recurrent layers, PyTorch's own and those written by hand.

    They are sigmoids (or hard ones, or clamps from zero) by which a state or a signal is
    multiplied, and whose weights gate again, later on, what they have gated. Those of gated MLPs
    and of squeeze and excitation do not.
    """
    return node.recurrent


def patch_embeddings(node: Record) -> bool:
    """Selects first convolutions whose output enters attention as it is: those of a ViT's patches.

    Only linear layers read it, moved, normalised or shifted maybe; no activation, pooling or
    further convolution.
    """
    return node.first and node.tokenwise


def pointwise_convolutions(node: Record) -> bool:
    """Selects convolutions with a kernel of one that stand for linear layers of a transformer.

    There no wider convolution stands before or behind them, but for patch embeddings.
    """
    return node.tokenwise and not node.first


def input_scales(node: Record) -> bool:
    """Selects what shifts or scales an input by channel before its first layer.

    Such as ``(x - mean) / std``, ``x * 2 - 1``, ``x / 255``, or a batch norm.
    """
    return node.preparing


class Composite:
    """An ordered list of (selector, rule), which may be laid over another one.

    ``EpsilonPlusFlat() + [("layer4.*", Gamma())]`` are the entries of one's own, which come first,
    over those of the composite.

    Args:
        entries: Pairs of selector and rule; the first match wins. A dict, a single pair, or a rule
            for every op that it fits, stand for such a list.
        over: What the entries are laid over; None for the default. The named composites below are
            complete, and laid over nothing.

    Raises:
        RuleError: An entry is no pair of a selector and a rule.
    """

    def __init__(self, entries: Entries, over: Composite | None = None) -> None:
        self.entries = tuple(map(_entry, _listed(entries)))
        self.over = over

    #: What it is registered as, if it is.
    _registered = ""

    @property
    def name(self) -> str:
        """The name it can be given by, "rules" for a list of the user's own."""
        names = (name for name, cls in NAMED.items() if cls is type(self))
        return self._registered or next(names, "rules")

    def called(self, name: str) -> Composite:
        """The same under a name."""
        found = copy.copy(self)
        found._registered = name
        return found

    def __add__(self, entries: Entries) -> Composite:
        """The composite with entries of one's own, which come first."""
        return Composite([*_listed(entries), *self.entries], over=self.over)

    def __radd__(self, entries: Entries) -> Composite:
        """The same: entries of one's own come first, on whichever side they are written."""
        return self + entries

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}(["]
        lines += [f"    ({describe(selector)}, {rule})," for selector, rule in self.entries]
        return "\n".join([*lines, "])" if self.over is None else f"], over={self.over.name})"])


class Offered(tuple[Selector, Rule]):
    """An entry of a named composite: these are made for any model, and need not match anything."""


def describe(selector: Selector) -> str:
    """How reports and errors name a selector."""
    if isinstance(selector, tuple):
        return " or ".join(map(describe, selector))
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, (First, Attending)):
        return str(selector)
    return getattr(selector, "__name__", repr(selector))


def _listed(given: Any) -> list[Any]:
    """What stands for a list of entries, as one."""
    if isinstance(given, Composite):
        if isinstance(given, Named):
            name = type(given).__name__
            raise RuleError(
                f"{name} is complete, and cannot be laid over another composite.",
                fix=f"lay entries of your own over it: {name}() + [(selector, rule), ...].",
            )
        return list(given.entries)
    if isinstance(given, Mapping):
        return list(given.items())
    single = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Rule)
    if isinstance(given, Rule) or (single and not isinstance(given[0], Rule)):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise RuleError(f"{given!r} are no entries.", fix=_PAIRS)
    return list(given)


_PAIRS = 'give pairs such as ("conv", lrpfx.ZPlus()) or ("layer4.*", lrpfx.Epsilon()).'


def _entry(given: Any) -> Entry:
    """An entry, if it is one; a rule by itself is laid on every op that it fits."""
    if isinstance(given, Rule):
        return "*", given
    if isinstance(given, Composite):
        raise RuleError(
            f"{type(given).__name__} stands among entries.",
            fix="put last what entries are laid over, or add them to it: composite + [...].",
        )
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise RuleError(f"{given!r} is no (selector, rule) pair.", fix=_PAIRS)
    selector, rule = given
    several = isinstance(selector, (tuple, list))
    for one in selector if several else [selector]:
        if not isinstance(one, str) and not callable(one):
            raise RuleError(f"{one!r} is no selector.", fix=_PAIRS)
    if several and not selector:
        raise RuleError(f"no selector is given for {rule}.", fix=_PAIRS)
    if not isinstance(rule, Rule):
        raise RuleError(f"{rule!r} is no rule.", fix=_instead(selector, rule))
    if isinstance(given, Offered):
        return given
    return tuple(selector) if several else selector, rule


def _instead(selector: Selector, rule: Any) -> str:
    """How an entry is written that has a class, or a name, in the place of its rule."""
    name = rule.__name__ if isinstance(rule, type) and issubclass(rule, Rule) else str(rule)
    known = {n.lower(): n for n in rules.__all__ if isinstance(getattr(rules, n), type)}
    near = difflib.get_close_matches(name.lower().replace("_", ""), known, n=1, cutoff=0.8)
    if isinstance(rule, type) and issubclass(rule, Rule) or isinstance(rule, str) and near:
        shown = f"lrpfx.{known[near[0]]}" if near else name
        return f"an instance is needed: ({describe(selector)}, {shown}(...))."
    return _PAIRS


def base_map(stabilizer: StabilizerLike, affine: Rule) -> list[Entry]:
    """What all relevance composites share, for everything but conv and linear layers.

    Activations Pass; residual sums, average pooling, batch norm that could not be folded, constant
    factors and summands Norm; layer, group and instance norm Norm with their 1 / std as a
    constant; products of live tensors Uniform, matrix products Bilinear, softmax Taylor; moves
    and selections follow the gradient. Shifts and scales of an input before its first layer Pass:
    relevance of the normalised pixel is the pixel's. So do points of reference of ``neuralize``.

    Args:
        stabilizer: Of Norm.
        affine: Rule of affine ops with weights that nothing else is said of.
    """
    return [
        ("activation", Pass()),
        (input_scales, Pass()),
        (Offset, Pass()),
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

    def __init__(self, entries: Iterable[Entry]) -> None:
        super().__init__(map(Offered, entries))

    def __add__(self, entries: Entries) -> Composite:
        """Entries of one's own, laid over the composite."""
        return Composite(entries, over=self)


class Auto(Named):
    """The default: for each op the rule that is right for it where it stands.

    - Convolutions: ZPlus, as under EpsilonPlus. First convolutions that cut an image into patches
      for attention are linear layers of these, with Epsilon; so are pointwise ones of transformers.
    - Attention, and all linear layers, norms and sums on a way through it: as under AttnLRP, which
      adds nothing to a denominator.
    - Linear layers, norms and sums elsewhere: Epsilon and Norm, as under EpsilonPlus.
    - Gates of recurrent layers: constants, so that the signal takes all. Shared evenly between
      gate and signal, as other products are, relevance would grow with each step.

    A convolutional network is explained as under EpsilonPlus, a transformer as under AttnLRP, an
    MLP as under EpsilonAll.

    Args:
        epsilon: Of Epsilon, where there is no attention.
        stabilizer: Of every other rule, where there is no attention.
        attention: Of every rule where there is, but for convolutions.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

    Source: Kohlbrenner et al. 2020 (LRP-CMP); Achtibat et al. 2024 (arXiv 2402.05602); Arras et al.
    2017 (arXiv 1706.07206), sect. 3.1, and Arras et al. 2019 (arXiv 1909.12114), LRP-all.
    """

    def __init__(
        self,
        epsilon: StabilizerLike = 1e-6,
        stabilizer: StabilizerLike = 1e-6,
        attention: StabilizerLike = 0.0,
        zero_params: ZeroParams = None,
    ) -> None:
        conv = ZPlus(stabilizer, zero_params=zero_params)
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
        super().__init__([*own, *_conv_and_linear(conv, epsilon, stabilizer, zero_params)])

    @staticmethod
    def parts(nodes: Iterable[Record]) -> str:
        """What the composite comes to for these nodes, in the names of others."""
        conv = attention = recurrent = False
        for node in nodes:
            conv |= node.kind == "conv" and not node.tokenwise
            attention |= node.attending
            recurrent |= node.recurrent
        said = ["convolutions as epsilon_plus"] * conv + ["attention as attnlrp"] * attention
        said = said or ["no convolutions, as epsilon_all"]
        return "; ".join([*said, *["recurrent gates as constants"] * recurrent])


class EpsilonAll(Named):
    """Epsilon on every affine op and residual sum.

    Args:
        epsilon: Of every rule.
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.
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
        zero_params: Parameters ("bias", "weight" or both) that the rule takes as zero; the
            forward pass keeps them.

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


class MambaLRP(Named):
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


class EpsilonPlus(Named):
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
        super().__init__(_conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonAlpha2Beta1(Named):
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
        super().__init__(_conv_and_linear(conv, epsilon, stabilizer, zero_params))


class EpsilonGammaBox(Named):
    """ZBox on the first convolution, Gamma on the others, Epsilon on linear layers.

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
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([(First(("conv",)), box), *rest])


class EpsilonPlusFlat(Named):
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
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


class EpsilonAlpha2Beta1Flat(Named):
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
        rest = _conv_and_linear(conv, epsilon, stabilizer, zero_params)
        super().__init__([_flat_first(stabilizer, zero_params), *rest])


class ExcitationBackprop(Named):
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
    "auto": Auto,
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
