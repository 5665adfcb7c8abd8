"""What every rule is: a frozen dataclass that hands relevance from an op's output to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # what is_grads_batched hands on
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lrpfx.errors import RuleError
from lrpfx.ops import HALVES, Call, Op, Site, widened

#: What a rule needs stabilised division by: a number (epsilon) or a callable ``z -> st(z)``, which
#: gets float16 and bfloat16 as float32.
StabilizerLike = float | Callable[[Tensor], Tensor]

#: Relevance that stops at a node, by cause; each tensor broadcasts to the node's output.
Absorbed = dict[str, Tensor]


@dataclass(frozen=True)
class Stabilizer:
    """Keeps a denominator away from zero: ``st(z) = z + eps * s(z)`` with ``s(0) = +1``.

    Args:
        epsilon: How far zero is moved, in units of ``z`` (or of its norm, see ``norm_scale``).
        clip: Instead of adding, let ``|st(z)|`` be at least epsilon.
        norm_scale: Multiply epsilon by the root mean square of ``z`` over ``dim``.
        dim: Dimensions of that mean; all but the first by default.

    Source:
        Bach et al. 2015, https://doi.org/10.1371/journal.pone.0130140, eq. 58; other
        than there, zero counts as positive.
    """

    epsilon: float = 1e-6
    clip: bool = False
    norm_scale: bool = False
    dim: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check epsilon >= 0."""
        check_number("Stabilizer", "epsilon", self.epsilon)

    def __call__(self, z: Tensor) -> Tensor:
        """Return st(z), shaped like ``z``."""
        epsilon = z.new_tensor(self.epsilon)
        if self.norm_scale:
            dim = tuple(range(1, z.ndim)) if self.dim is None else self.dim
            # A mean over no dimension would be one over all.
            squares = z.square().mean(dim=dim, keepdim=True) if dim else z.square()
            epsilon = epsilon * squares.sqrt()
        if self.clip:
            return torch.where(z >= 0, z.maximum(epsilon), z.minimum(-epsilon))
        return torch.where(z >= 0, z + epsilon, z - epsilon)


def check_number(owner: str, name: str, value: object, above: float = 0.0) -> None:
    """Raise RuleError unless ``value`` is a number of at least ``above``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value >= above:  # type: ignore[operator]  # also refuses NaN
        raise RuleError(
            f"{owner}: {name} must be a number >= {above:g}, got {value!r}.",
            fix="see the rule's docstring for what it means.",
        )


def check_stabilizer(owner: str, value: StabilizerLike) -> None:
    """Raise RuleError unless ``value`` can be used as a stabilizer."""
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise RuleError(
            f"{owner}: {value!r} is no stabilizer.",
            fix="give a number >= 0 or a callable z -> stabilized z, such as lrpfx.Stabilizer().",
        )


def is_zero(stabilizer: StabilizerLike) -> bool:
    """Whether nothing is added to the denominator."""
    return not callable(stabilizer) and stabilizer == 0


def divide(R: Tensor, z: Tensor, stabilizer: StabilizerLike) -> tuple[Tensor, Tensor]:
    """Return ``(R / st(z), st(z))``; where st(z) is exactly zero, the quotient is zero.

    That case needs epsilon = 0 (LRP-0) or a norm-scaled stabilizer on a row of zeros: there is
    nothing to share relevance by, so it is absorbed instead of becoming NaN.

    For float16 and bfloat16, st(z) and the quotient are computed in float32, where no epsilon is
    lost, and the quotient is rounded to the dtype of ``z``. It is zero where ``z`` is (there are
    no summands to share by, or rounding took them), and no larger than that dtype can hold; what
    stays for either reason is absorbed.
    """
    if z.dtype in HALVES:
        s, stable = divide(R.float(), z.float(), stabilizer)
        most = torch.finfo(z.dtype).max
        # Relevance that is infinite already stays so, and is reported.
        s = torch.where(R.isfinite(), s.clamp(-most, most), s).masked_fill(z == 0, 0.0)
        return s.to(z.dtype), stable
    if callable(stabilizer):
        stable = _called(stabilizer, z)
    elif stabilizer > 0:
        # Not torch.sign: the sign of zero must count as +1.
        stable = torch.where(z >= 0, z + stabilizer, z - stabilizer)
        return R / stable, stable
    else:
        stable = z
    empty = stable == 0
    # By where, in a third of the time that masked_fill takes.
    return torch.where(empty, 0.0, R / torch.where(empty, 1.0, stable)), stable


def _called(stabilizer: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """What the user's stabilizer makes of ``z``, if it is a tensor like it."""
    name = getattr(stabilizer, "__name__", type(stabilizer).__name__)
    fix = "a stabilizer takes a tensor and returns one of its shape and dtype, without zeros."
    version = z._version
    try:
        stable = stabilizer(z)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it is the user's, and may raise anything
        what = f"stabilizer {name} fails: {type(error).__name__}: {error}"
        raise RuleError(what, fix=fix) from error
    if not isinstance(stable, Tensor) or stable.shape != z.shape:
        form = tuple(stable.shape) if isinstance(stable, Tensor) else type(stable).__name__
        raise RuleError(f"stabilizer {name} makes {form} of {tuple(z.shape)}.", fix=fix)
    if stable.dtype != z.dtype:
        raise RuleError(f"stabilizer {name} makes {stable.dtype} of {z.dtype}.", fix=fix)
    if z._version != version:
        raise RuleError(f"stabilizer {name} writes into its argument.", fix="return a new tensor.")
    return stable


def finite(a: Tensor) -> Tensor:
    """``a`` with zeros for what is infinite: a masked score is, and gets nothing."""
    return a.masked_fill(a.isinf(), 0.0)


@dataclass(frozen=True)
class Carry:
    """What one node receives and hands on when relevance is computed fast.

    Args:
        takes: Whether a multiplier arrives at its output, and not relevance.
        gives: Per live input, whether a multiplier is handed to it.
        above: Whether nothing arrives where the output is not positive.
        cut: Whether the output is given with zeros there, as a ReLU makes them.
    """

    takes: bool
    gives: tuple[bool, ...]
    above: bool
    cut: bool = False


def share(m: Tensor, z: Tensor, stabilizer: StabilizerLike, taken: bool, sign: int = 0) -> Tensor:
    """``R / st(z)`` with R = z m if ``taken``, else R = m; without a derivative.

    Where nothing is added to the denominator and a multiplier is taken, ``z`` is not read.

    Args:
        m: What arrives.
        z: The denominator.
        stabilizer: See ``divide``.
        taken: Whether a multiplier arrives.
        sign: 1 or -1 for a denominator that has no other; 0 if it is not known.
    """
    if taken and is_zero(stabilizer):
        return m
    if taken and not callable(stabilizer):
        # z / st(z) = 1 / (1 + epsilon / |z|), which is 1 where z is infinite, as masked scores are.
        size = widened(z if sign > 0 else z.abs())
        return over(m, torch.div(size.new_tensor(stabilizer), size).add_(1)).to(z.dtype)
    if callable(stabilizer) or z.dtype in HALVES:
        return divide(widened(z) * m if taken else m, z, stabilizer)[0]
    if stabilizer == 0:
        return divide(m, z, stabilizer)[0]
    if sign:
        return m / (z + sign * stabilizer)
    # As ``divide`` has it, in less time: -0.0 counts as positive, too, and -0.0 + 0.0 is 0.0.
    return m / torch.copysign(z.new_tensor(stabilizer), z + 0.0).add_(z)


def can_hold(own: Tensor, other: Tensor) -> bool:
    """Whether what is computed of the two can take the memory of the first.

    Not of several targets at once, which share what does not depend on them; nor while the ops are
    written down, as compilers find such places themselves.
    """
    alike = own.dtype == other.dtype and own.shape == other.shape
    return alike and not is_legacy_batchedtensor(other) and get_proxy_mode() is None


def over(R: Tensor, d: Tensor) -> Tensor:
    """``R / d``, in the memory of ``d`` if it can be."""
    return torch.div(R, d, out=d) if can_hold(d, R) else R / d


def only_where(z: Tensor, R: Tensor) -> Tensor:
    """``R`` where ``z`` is not zero, else 0, also for NaN; in one pass."""
    kept: Tensor = torch.ops.aten.hardshrink_backward(R, z, 0)
    return kept


def times(s: Tensor, m: Tensor) -> Tensor:
    """``s * m``, in the memory of ``s`` if it can be."""
    return s.mul_(m) if can_hold(s, m) else s * m


@dataclass(frozen=True)
class Flow:
    """What a rule makes of the relevance ``R`` at one node.

    Args:
        relevance: One tensor per live input, shaped like it.
        absorbed: Called only when a ledger is kept; relevance that stops here, by cause.
    """

    relevance: tuple[Tensor, ...]
    absorbed: Callable[[], Absorbed] = field(default=dict)


def _definer(cls: type, name: str) -> int:
    """How far up among the bases of a class, itself first, what it calls ``name`` is defined."""
    return next((i for i, base in enumerate(cls.__mro__) if name in vars(base)), len(cls.__mro__))


@dataclass(frozen=True)
class Rule:
    """Base of all rules: an immutable value whose fields are the rule's parameters.

    A rule of your own is a frozen dataclass that overrides two methods: ``fits`` says which ops it
    is for, and ``propagate`` returns the relevance of their inputs, as a ``Flow``. For
    convolutions, linear layers and other ops that compute W x + b derive from ``AffineRule``
    instead, and override ``terms``. The other methods say how a rule is computed fast, and may be
    left alone.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fade(lrpfx.Rule):
        ...     share: float = 0.5
        ...     def fits(self, op):
        ...         return "" if op.family == "activation" else "Fade is for activations"
        ...     def propagate(self, call, x, z, R):
        ...         return lrpfx.Flow((self.share * R,))
        >>> lrpfx.explain(model, x, rules=[("*", Fade()), "epsilon_plus"])
    """

    #: Whether the rule reads the clean activations at the inputs / at the output of the node.
    reads_input: ClassVar[bool] = True
    reads_output: ClassVar[bool] = False

    #: By method that says the formula, what holds for this formula and no other: what it reads, and
    #: how it is computed fast.
    _of_formula: ClassVar[dict[str, tuple[str, ...]]] = {
        "propagate": (
            "reads_input",
            "reads",
            "accepts",
            "carries",
            "gradient_shares",
            "needs",
            "multiply",
            "relevance",
            "weigh",
            "multiplies_by_output",
        )
    }

    def __init_subclass__(cls, **options: Any) -> None:
        """As ``settle``, for what stands in the body of the class.

        Raises:
            RuleError: The class says anew how its base is computed fast, and not what.
        """
        super().__init_subclass__(**options)
        again = {"multiply", "relevance", "gradient_shares", "weigh"} & {*vars(cls)}
        if again and _definer(cls, "propagate") > 0:
            raise RuleError(
                f"{cls.__name__} overrides {' and '.join(sorted(again))}, by which is computed "
                "fast, without a ledger, what propagate says.",
                fix="override propagate instead (or terms, of an affine rule): it serves always.",
            )
        cls.settle()

    @classmethod
    def settle(cls) -> None:
        """Forget what holds for the formula of a base only, if the class has another formula.

        Again where the rule is laid on ops: methods may have been set after the class was made.
        """
        for formula, others in cls._of_formula.items():
            for name in others:
                if _definer(cls, name) > _definer(cls, formula):
                    first = [base for base in cls.__mro__ if name in vars(base)][-1]
                    setattr(cls, name, vars(first)[name])

    def fits(self, op: Op) -> str:
        """Return "" if the rule can be assigned to ``op``, else the reason why it cannot."""
        raise NotImplementedError

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """Hand the relevance ``R`` of the output to the live inputs.

        Args:
            call: The op at run time: its arguments and its affine map.
            x: Clean live inputs.
            z: Clean output, shape (N, ...); only meaningful if ``reads_output``.
            R: Relevance of the output, shaped like it (a tuple for ops with several outputs).
        """
        raise NotImplementedError

    def unmet(self, call: Call, x: Sequence[Tensor]) -> str:
        """What the rule takes for granted of its inputs, and is not so; "" if all is well.

        The formula is computed all the same; this is a warning, and a note in the report.

        Args:
            call: The op at run time.
            x: Clean live inputs.

        Raises:
            RuleError: A rule that is strict about it.
        """
        return ""

    def reads(self, site: Site) -> bool:
        """Whether ``propagate`` reads the inputs' values at this node."""
        return self.reads_input

    @property
    def by_sample(self) -> bool:
        """Whether a stabilizer takes the first dimension for that of the samples."""
        given = [getattr(self, f.name) for f in fields(self)]
        return any(isinstance(s, Stabilizer) and s.norm_scale and s.dim is None for s in given)

    # How relevance is computed fast, without ledger and derivatives: see ``carriers``.

    def accepts(self, site: Site) -> bool:
        """Whether the multiplier c with R = z c may arrive at the output in the place of R."""
        return True

    def carries(self, site: Site, taken: bool) -> bool:
        """Whether the rule can hand on multipliers, R_x = x c.

        Args:
            site: The op.
            taken: Whether a multiplier arrives at its output.
        """
        return False

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """Shares by which multipliers follow the gradient, c_x = share J'c; None if they do not."""
        return None

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """Whether ``multiply`` reads the values of inputs and output."""
        return True, True

    @property
    def multiplies_by_output(self) -> bool:
        """Whether ``multiply`` reads z only as a factor of the multiplier that arrives."""
        return False

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """The multiplier of each live input; ``m`` is c if ``carry.takes``, else R.

        Nothing here needs a derivative, so tensors of its own may be changed in place.
        """
        raise NotImplementedError

    def relevance(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """The relevance of each live input, where no multipliers are handed on."""
        return self.propagate(call, x, z, finite(z) * m if carry.takes else m).relevance

    def weigh(self, a: Tensor, c: Tensor) -> Tensor:
        """R_x = a c, where relevance is to be handed to an input."""
        return finite(a) * c

    def __str__(self) -> str:
        """Name and the parameters that differ from their defaults."""
        changed = [
            f"{f.name}={_short(getattr(self, f.name))}"
            for f in fields(self)
            if not _same(getattr(self, f.name), f.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})" if changed else type(self).__name__


@dataclass(frozen=True)
class Gradient(Rule):
    """Relevance follows the gradient: ``R_x = J'R`` with J the Jacobian at the clean input.

    The rule of everything that moves or selects values (reshape, cat, pad, max pooling: winner
    takes all), and of whatever a gradient-based composite leaves alone.
    """

    def fits(self, op: Op) -> str:
        """Every op has a gradient."""
        return ""

    def propagate(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, R: Tensor | tuple[Tensor, ...]
    ) -> Flow:
        """R_x = J'R."""
        relevance = call.pull_back(x, R)

        def absorbed() -> Absorbed:
            outputs = R if isinstance(R, tuple) else (R,)
            lost = sum_all(outputs) - sum_all(relevance)
            return {call.op.gradient_loss: lost}

        return Flow(relevance, absorbed)

    def reads(self, site: Site) -> bool:
        """A linear op has the same Jacobian everywhere: its gradient needs no activation kept."""
        return not site.op.linear

    def carries(self, site: Site, taken: bool) -> bool:
        """Where values are moved or picked, z c = J'(x c), so c follows the gradient, too."""
        return taken and site.op.family in ("move", "select") and not site.op.soft

    def gradient_shares(self, site: Site) -> tuple[float, ...] | None:
        """All, under the same condition."""
        return (1.0,) * len(site.live) if self.carries(site, True) else None

    def needs(self, site: Site, taken: bool) -> tuple[bool, bool]:
        """A linear op has the same Jacobian everywhere."""
        return not site.op.linear, False

    def multiply(
        self, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any, carry: Carry
    ) -> tuple[Tensor, ...]:
        """c_x = J'c."""
        return call.pull_back(x, m)


@dataclass(frozen=True)
class Stop(Rule):
    """The op's output counts as a constant: no relevance goes through it, and none is lost.

    What depends on the input through such nodes only is constant, too, so a matrix product of
    stopped attention weights with values is affine in the values. The plan is made with these
    nodes out of the way, so this rule never sees any relevance.

    Source: Ali et al. 2022 (arXiv 2202.07304), sect. 4.1 (attention weights as constants).
    """

    def fits(self, op: Op) -> str:
        """Every op can be made a constant."""
        return ""


def sum_all(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of all entries of all tensors, a float64 scalar.

    Summed in the tensors' own precision (float32 for halves): PyTorch's sums are pairwise, and
    summing float32 in float64 takes thirty times as long on a CPU.
    """
    totals = [
        t.detach().sum(dtype=torch.float32 if t.dtype in HALVES else None).double() for t in tensors
    ]
    return torch.stack(totals).sum() if totals else torch.zeros((), dtype=torch.float64)


def size_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the absolute values of all entries of all tensors, a float64 scalar."""
    norms = [
        torch.linalg.vector_norm(t.detach(), 1, dtype=torch.float32 if t.dtype in HALVES else None)
        for t in tensors
    ]
    return torch.stack([n.double() for n in norms]).sum() if norms else torch.zeros(())


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and value == default
