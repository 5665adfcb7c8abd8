"""An op as the rules see it: its row of the op table, its place in the graph, its call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from lrpfx.ops.affine import AffineMap, pull_back
from lrpfx.ops.maps import Builder
from lrpfx.ops.own import OWN
from lrpfx.ops.pools import Candidates, Pool

#: The families, and the rule that they get where nothing else is said.
FAMILIES = {
    "affine": "z = W x + b (Norm or Epsilon)",
    "normalize": "layer norm and the like, affine with the divisor as a constant (Norm)",
    "product": "elementwise product of live tensors (Uniform)",
    "matmul": "matrix product of two live tensors (Bilinear)",
    "softmax": "softmax (Taylor)",
    "activation": "elementwise nonlinearity of one input (Pass)",
    "move": "values are moved, repeated or dropped (relevance follows)",
    "select": "values are picked by their size (relevance follows the picked ones)",
    "constant": "piecewise constant or detached: relevance ends here",
}

#: ``(arguments by name, whether every live input is >= 0) -> whether the output is >= 0``
Sign = Callable[[dict[str, Any], bool], bool]


def never(args: dict[str, Any], inputs: bool) -> bool:
    """The output may be negative."""
    return False


def always(args: dict[str, Any], inputs: bool) -> bool:
    """The output is >= 0 for every input."""
    return True


def inherited(args: dict[str, Any], inputs: bool) -> bool:
    """The output is >= 0 where the inputs are."""
    return inputs


@dataclass(frozen=True)
class Op:
    """One row of the table: an ATen overload with one pattern of live arguments.

    Args:
        kind: What selectors call it: "conv", "linear", "relu", "sum" ...
        family: One of FAMILIES.
        live: The patterns it answers to, each the exact set of live argument names.
        affine: Builds the affine map (families "affine" and "normalize").
        weighted: Whether that map has weights to split by sign.
        nonneg: When the output is proven non-negative.
        vanishes: Whether this is an activation with f(0) = 0 and a finite slope there.
        pool: Of an op that picks by size, what it picks from, if that can be listed.
    """

    kind: str
    family: str
    live: tuple[frozenset[str], ...]
    affine: Builder | None = None
    weighted: bool = False
    nonneg: Sign = never
    vanishes: bool = False
    pool: Pool | None = None

    @property
    def keeps_shape(self) -> bool:
        """Whether the op has one live input and an output of its shape."""
        return self.family == "activation" or self.kind in ("batch_norm", "scale", "shift")

    @property
    def linear(self) -> bool:
        """Whether the Jacobian does not depend on the live inputs."""
        return self.family in ("move", "affine")

    @property
    def soft(self) -> bool:
        """Whether values are not just picked, but added up in proportion to their exponentials."""
        return self.kind == "logsumexp"

    @property
    def gradient_loss(self) -> str:
        """What the ledger calls relevance that the rule Gradient does not hand on."""
        return "constant" if self.family == "move" or self.soft else "gradient"


@dataclass(frozen=True)
class Slot:
    """Stands in a call's arguments for the i-th run-time value."""

    index: int


def fill(template: Any, values: Sequence[Any]) -> Any:
    """The template with the values in the place of its slots."""
    return map_aggregate(template, lambda a: values[a.index] if isinstance(a, Slot) else a)


@dataclass(frozen=True)
class Site:
    """One node as the rules see it before it runs: static arguments, and slots for the rest.

    Args:
        op: The row of the table.
        target: The ATen overload.
        arguments: By schema name; run-time values are Slots.
        live: Indices of the slots that are live, in argument order.
        live_names: Names of the live arguments, in schema order.
        nonneg: Whether every live input is proven non-negative.
        several_outputs: Whether the op returns a tuple.
        factors: Of a product, how many factors each live input is the product of.
        scores: Whether a softmax reads what it computes, which may be masked by -infinity.
        padding: How many of the outermost values of the one live input are zeros that it was padded
            with, as ``F.pad`` has it: (last dimension's first, last, the one before's first, ...).
            Slots for sizes that vary.
    """

    op: Op
    target: Any
    arguments: dict[str, Any]
    live: tuple[int, ...]
    live_names: tuple[str, ...]
    nonneg: bool
    several_outputs: bool
    factors: tuple[int, ...] = ()
    scores: bool = False
    padding: tuple[Any, ...] = ()

    @property
    def vanishes(self) -> bool:
        """Whether this is an activation with f(0) = 0 and a finite slope there."""
        if isinstance(self.target, Composed):
            return self.target.vanishes
        return self.op.vanishes


@dataclass(frozen=True)
class Call:
    """A Site at run time.

    Args:
        site: The op.
        values: Of its slots.
        memory: Where the map of constant weights is kept between calls; None if they may change.
    """

    site: Site
    values: tuple[Any, ...]
    memory: list[AffineMap] | None = None

    @property
    def op(self) -> Op:
        """The row of the table."""
        return self.site.op

    @property
    def nonneg(self) -> bool:
        """Whether every live input is proven non-negative."""
        return self.site.nonneg

    @property
    def padding(self) -> tuple[int, ...]:
        """As the Site has it, with the sizes of this call."""
        return tuple(max(n, 0) for n in fill(self.site.padding, self.values))

    def _arguments(self, x: Sequence[Tensor]) -> dict[str, Any]:
        values = list(self.values)
        for index, value in zip(self.site.live, x, strict=True):
            values[index] = value
        return dict(fill(self.site.arguments, values))

    def argument(self, name: str) -> Any:
        """A static argument of the op."""
        return self.site.arguments[name]

    def run(self, *x: Tensor) -> Any:
        """The op on other live inputs."""
        return self.site.target(**self._arguments(x))

    def affine(self, x: Sequence[Tensor]) -> AffineMap:
        """The affine map of the op; of ``x`` only shapes, dtypes and devices count."""
        if self.memory:
            return self.memory[0]
        assert self.op.affine is not None
        found = self.op.affine(self._arguments(x), self.site.live_names, self.run)
        if self.memory is not None and self.op.weighted:  # the same map, whatever x is
            found = replace(found, kept={})
            self.memory.append(found)
        return found

    def candidates(self, *x: Tensor) -> Candidates:
        """What each output is picked from, of an op with a pool; a move of the live inputs."""
        assert self.op.pool is not None
        return self.op.pool.candidates(self._arguments(x))

    @property
    def sign(self) -> int:
        """1 for an op that picks the largest, -1 for one that picks the smallest."""
        return self.op.pool.sign if self.op.pool else 1

    def pull_back(self, x: Sequence[Tensor], R: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """J'R per live input, J the Jacobian at ``x``; integer outputs have no relevance."""
        return pull_back(self.run, tuple(x), R)


@dataclass(frozen=True, eq=False)
class Composed:
    """An activation or a softmax written out of primitives, as one op of its one varying input.

    Args:
        body: Takes x and then the constants.
        core: Name of its last nonlinearity.
        vanishes: Whether it is known to be 0 at 0, with a finite slope.
        family: "activation" or "softmax".
    """

    body: fx.GraphModule
    core: str
    vanishes: bool = False
    family: str = "activation"

    def __post_init__(self) -> None:
        """Name the callable for fx, which writes it into the generated code."""
        object.__setattr__(self, "__name__", f"composed_{self.core}")

    def __call__(self, x: Tensor, constants: Sequence[Tensor] = ()) -> Tensor:
        """The function of x."""
        value: Tensor = self.body(x, *constants)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Composed:
        return self


@dataclass(frozen=True, eq=False)
class Paired:
    """An op of complex numbers as one of real ones, with their two parts along a last dimension.

    Args:
        target: The op itself.
        given: Names of the arguments that are pairs.
        returns: Whether its outputs are complex, and so come as pairs.
        apart: Whether the op is run on real and imaginary parts by themselves, as PyTorch has no
            derivative of some on complex numbers.
    """

    target: Any
    given: frozenset[str]
    returns: bool
    apart: bool = False

    def __post_init__(self) -> None:
        """Name the callable for fx, which writes it into the generated code."""
        object.__setattr__(self, "__name__", f"paired_{self.target.__name__.replace('.', '_')}")

    def __call__(_, /, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, an argument may be "self"
        """The op on complex numbers made of pairs, and pairs of what it returns."""
        named = dict(zip(argument_names(_.target), args, strict=False)) | kwargs
        if _.apart:
            parts = ({k: _part(v, k in _.given, i) for k, v in named.items()} for i in (0, 1))
            return torch.stack([_.target(**part) for part in parts], -1)
        out = _.target(**{k: _joined(v) if k in _.given else _dense(v) for k, v in named.items()})
        if not _.returns:
            return out
        if isinstance(out, Tensor):
            return torch.view_as_real(out.resolve_conj())
        return tuple(torch.view_as_real(t.resolve_conj()) for t in out)

    def __str__(self) -> str:
        return str(self.target)

    def __deepcopy__(self, memo: dict[int, Any]) -> Paired:
        return self


def _part(value: Any, pair: bool, index: int) -> Any:
    """The real (0) or the imaginary part (1) of a pair or a complex constant."""
    if pair:
        return value[..., index]
    if not isinstance(value, Tensor) or not value.is_complex():
        return value
    return value.imag if index else value.real


def _dense(value: Any) -> Any:
    """A tensor as it may be read by strides, which a short-time Fourier transform does."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _joined(value: Any) -> Any:
    """Complex numbers of pairs; constants among them are complex already."""
    if not isinstance(value, Tensor):
        return [_joined(v) for v in value]
    return value if value.is_complex() else torch.complex(value[..., 0], value[..., 1])


def is_op(target: Any) -> bool:
    """Whether the target of a graph's node is an op that can have a row in the table."""
    return isinstance(target, (torch._ops.OpOverload, Composed, Paired)) or target in OWN


def argument_names(target: Any) -> list[str]:
    """Names of the arguments of an op."""
    if isinstance(target, Composed):
        return ["x", "constants"]
    if isinstance(target, Paired):
        return argument_names(target.target)
    if target in OWN:
        return OWN[target]
    return [argument.name for argument in target._schema.arguments]
