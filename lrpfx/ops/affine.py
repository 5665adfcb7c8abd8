"""The affine map of a node, z = W x + b: its transpose, and its parts by sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

Signal = tuple[Tensor, ...]

#: Channels of an input whose parts are laid beside each other.
_FEW = 4
#: Dtypes too short for denominators: in float16 1e-9 is zero, and the square of 256 infinite.
HALVES = (torch.float16, torch.bfloat16)


def widened(t: Tensor) -> Tensor:
    """``t``, in float32 if its own dtype is too short for denominators."""
    return t.float() if t.dtype in HALVES else t


@dataclass(frozen=True)
class AffineMap:
    """z = W x + b for one node, with x the tuple of its live inputs.

    Args:
        forward: ``(x, weight, bias) -> W x + b``; linear in x for fixed weight and in the weight
            for fixed x. ``bias`` may be None, and then the map is W x.
        backward: ``(s, weight, x) -> W's`` per live input; of x only the shapes count. None: the
            transpose is taken by autograd from ``forward``.
        weight: W in the op's own layout, None for ops without weights.
        change: What is made of it when it is first needed; None for W itself.
        bias: b in the op's own layout, None if there is none.
        bias_shape: Shape that makes ``bias`` broadcast to z, None where it does already.
        coefficients_one: The map of an op without weights with all its coefficients set to one
            (what Flat means there), None where the map itself serves.
        flat: Makes the map with every weight one, where there is a cheaper way than by the weights.
        channels: Dimension of the channels in x, and of what reads them in W, where maps can be
            laid ``beside`` each other.
        kept: Where what is derived from constant parameters is kept, by name; None if they may
            change.
        made: The changed weights, once they have been needed.
    """

    forward: Callable[[Signal, Any, Tensor | None], Tensor]
    backward: Callable[[Tensor, Any, Signal], Signal] | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    bias_shape: tuple[int, ...] | None = None
    coefficients_one: Callable[[Signal], Tensor] | None = None
    flat: Callable[[], AffineMap] | None = None
    change: Callable[[Tensor], Tensor] | None = None
    channels: int | None = None
    kept: dict[str, Any] | None = None
    made: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Signal, bias: Tensor | None = None) -> Tensor:
        """W x, plus ``bias`` (in the op's own layout) if one is given."""
        return self.forward(x, self.matrix, bias)

    def T(self, s: Tensor, x: Signal) -> Signal:
        """W's, one tensor per live input; of ``x`` only shapes, dtypes and devices count."""
        weight = self.matrix
        if self.backward is not None:
            return self.backward(s, weight, x)
        zeros = tuple(t.new_zeros(()).expand(t.shape) for t in x)
        return pull_back(lambda *t: self.forward(t, weight, None), zeros, s)

    def spread(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` in a shape that broadcasts to z."""
        if bias is None or self.bias_shape is None:
            return bias
        return bias.reshape(self.bias_shape)

    def with_weight(self, change: Callable[[Tensor], Tensor], name: str) -> AffineMap:
        """The map with ``change(W)`` for W; by its name it may be kept."""
        if self.weight is None:
            raise TypeError("this op has no weights")  # Rule.fits keeps rules from coming here
        found: AffineMap = self._keep(
            name, lambda: replace(self, weight=self.matrix, change=change, kept=None, made=[])
        )
        return found

    def bias_part(self, change: Callable[[Tensor], Tensor], name: str) -> Tensor | None:
        """``change(b)``, None without a bias; by its name it may be kept."""
        bias = self.bias
        if bias is None:
            return None
        found: Tensor = self._keep(f"bias {name}", lambda: change(bias))
        return found

    def without(self, names: Sequence[str]) -> AffineMap:
        """The map with the parameters of these names ("weight", "bias") taken as zero."""
        found: AffineMap = self._keep(f"without {sorted(names)}", lambda: self._without(names))
        return found

    def _without(self, names: Sequence[str]) -> AffineMap:
        kept: dict[str, Any] | None = None if self.kept is None else {}
        found = replace(self, bias=None, kept=kept) if "bias" in names else self
        if "weight" in names and self.weight is not None:
            zero = found.with_weight(torch.zeros_like, "zeros")
            return replace(zero, flat=lambda: zero)  # nor do they count as ones
        return found

    def _keep(self, name: str, make: Callable[[], Any]) -> Any:
        if self.kept is None:
            return make()
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    @property
    def matrix(self) -> Any:
        """The weights as the op takes them, changed if they are to be."""
        if self.change is None or self.weight is None:
            return self.weight
        if not self.made:
            self.made.append(self.change(self.weight))
        return self.made[0]

    @property
    def pos(self) -> AffineMap:
        """Wp x with Wp = max(W, 0)."""
        return self.with_weight(positive, "pos")

    @property
    def neg(self) -> AffineMap:
        """Wn x with Wn = min(W, 0)."""
        return self.with_weight(negative, "neg")

    @property
    def square(self) -> AffineMap:
        """W^2 x."""
        return self.with_weight(torch.square, "square")

    @property
    def ones(self) -> AffineMap:
        """The map with every weight one."""
        if self.flat is not None:
            return self.flat()
        if self.weight is not None:
            return self.with_weight(torch.ones_like, "ones")
        if self.coefficients_one is not None:
            one = self.coefficients_one
            return AffineMap(lambda x, weight, bias: one(x))
        return self


def pull_back(run: Callable[..., Any], x: Signal, s: Tensor | tuple[Tensor, ...]) -> Signal:
    """J's per input, J the Jacobian at ``x``; with a graph of its own if autograd is on.

    Integer outputs have none. In less than half the time that ``torch.func.vjp`` takes, which is
    what serves inside of transforms such as ``vmap``.
    """
    if maybe_current_level() is not None or torch.compiler.is_dynamo_compiling():
        return _pull_back_transformed(run, x, s)
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as one tensor may be several inputs.
        at = [
            t.view_as(t) if wanted and t.requires_grad else t.detach().requires_grad_() for t in x
        ]
        out = run(*at)
    outputs = [o for o in ((out,) if isinstance(out, Tensor) else out) if o.is_floating_point()]
    seeds = s if isinstance(s, tuple) else (s,)
    pairs = [(o, r) for o, r in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(t) for t in x)
    live, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(live, at, weights, create_graph=wanted, materialize_grads=True)


def _pull_back_transformed(
    run: Callable[..., Any], x: Signal, s: Tensor | tuple[Tensor, ...]
) -> Signal:
    def outputs(*at: Tensor) -> tuple[Tensor, ...]:
        out = run(*at)
        every = (out,) if isinstance(out, Tensor) else out
        return tuple(o for o in every if o.is_floating_point())

    back = torch.func.vjp(outputs, *x)[1]
    pulled: Signal = back(s if isinstance(s, tuple) else (s,))
    return pulled


Part = tuple[Signal, AffineMap]


def beside(parts: Sequence[Part]) -> list[Part]:
    """``W1 x1 + W2 x2`` -> ``[W1 W2] [x1, x2]``, one convolution in the place of several.

    Only of few channels, as a first layer has: there it takes hardly longer than one of them.
    """
    ((first, *_), f), dim = parts[0], parts[0][1].channels
    if len(parts) == 1 or dim is None or first.shape[dim] > _FEW:
        return list(parts)
    x = torch.cat([t for (t,), _ in parts], dim)
    weight = torch.cat([W.matrix for _, W in parts], dim)
    return [((x,), replace(f, weight=weight, change=None, kept=None))]


def positive(t: Tensor) -> Tensor:
    """p(t) = max(t, 0), with derivative 0 at 0."""
    return t.relu()


def negative(t: Tensor) -> Tensor:
    """n(t) = min(t, 0), with derivative 1 at 0: p(t) + n(t) = t holds for the derivatives too."""
    return t.clamp_max(0)
