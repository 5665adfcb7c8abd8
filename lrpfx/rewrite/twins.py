"""One node -> its twin: the one autograd.Function, and what it does with relevance.

The clean activations flow through the original nodes. A twin's forward returns a phantom, a tensor
of the activation's shape without memory of its own that is never read; its backward applies the
node's rule to the relevance that arrives, using the clean activations saved as inputs. So
relevance is the ordinary gradient of the phantom stream, and its own derivatives are exact: they
run through the clean stream, which carries the true gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from lrpfx.errors import ExportError, RuleError
from lrpfx.ops import Call, Site, is_floating
from lrpfx.rewrite.ledger import Ledger
from lrpfx.rules import Rule

#: Shape, dtype and device of a phantom.
Form = tuple[torch.Size, torch.dtype, torch.device]


class Arrival(NamedTuple):
    """What a step is given in the backward pass.

    Args:
        R: What arrives at the outputs that have any relevance.
        z: The clean output, if the step reads it.
        values: What the step was called with beside output and phantoms.
        forms: Of the phantoms that entered.
        ledger: Where a twin books what it has done, if one is kept.
    """

    R: tuple[Tensor, ...]
    z: Tensor
    values: tuple[Any, ...]
    forms: Sequence[Form]
    ledger: Ledger | None


class _Relevance(torch.autograd.Function):
    """Forward: phantoms shaped like the clean output. Backward: the rule.

    Everything that backward reads is an input of the Function. Saving its own output, or a value
    computed inside forward, would cut off the relevance's own derivatives without a word.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, ledger: Ledger | None, clean: Any, *rest: Any) -> Any:
        phantoms, values = rest[: step.arity], rest[step.arity :]
        ctx.step, ctx.ledger = step, ledger
        ctx.forms = [(p.shape, p.dtype, p.device) for p in phantoms]
        ctx.is_tensor = [isinstance(v, Tensor) for v in values]
        ctx.statics = [None if isinstance(v, Tensor) else v for v in values]
        tensors = [v for v in values if isinstance(v, Tensor)]
        ctx.save_for_backward(clean if step.reads_output else None, *tensors)
        if isinstance(clean, Tensor):
            return step.phantom(clean)
        return tuple(step.phantom(t) if is_floating(t) else None for t in clean)

    @staticmethod
    def backward(ctx: Any, *relevance: Any) -> Any:
        z, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        values = tuple(
            next(saved) if is_tensor else static
            for is_tensor, static in zip(ctx.is_tensor, ctx.statics, strict=True)
        )
        R = tuple(r for r in relevance if r is not None)
        passed = ctx.step.propagate(Arrival(R, z, values, ctx.forms, ctx.ledger))
        return None, None, None, *passed, *(None for _ in values)


class _Transformed(_Relevance):
    """The same inside of transforms such as ``vmap``, which want forward and context apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(step: Step, ledger: Ledger | None, *rest: Any) -> Any:  # type: ignore[override]
        return _Relevance.forward(_Unread(), step, ledger, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Relevance.forward(ctx, *inputs)


class _Unread:
    """A context that nobody reads."""

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing."""


def phantom(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype and device that take no memory."""
    return like.new_zeros(()).expand(like.shape)


def begin(clean: Tensor) -> Tensor:
    """A phantom that is a leaf: what becomes its gradient is the relevance of ``clean``."""
    return phantom(clean.detach()).requires_grad_()


@dataclass(frozen=True, eq=False)  # fx hashes it, and fields of rules need not be hashable
class Step:
    """The target of a node of the phantom stream: a frozen callable, one step of the backward pass.

    Called as ``step(clean, *phantoms, *values, ledger=...)`` with a clean output, the phantoms that
    enter, and what else ``propagate`` reads.

    Args:
        name: For the generated code.
        arity: Number of phantoms.
        reads_output: Whether ``propagate`` reads the clean output.
    """

    name: str
    arity: int
    reads_output: bool

    def __post_init__(self) -> None:
        """Name the callable for fx, which writes it into the generated code."""
        object.__setattr__(self, "__name__", f"relevance_of_{self.name}")

    def __call__(self, clean: Any, *rest: Any, ledger: Ledger | None = None) -> Any:
        """Phantoms of the outputs."""
        # The clean stream may run without autograd; the phantom stream never does.
        with torch.enable_grad():
            return self._apply(ledger, clean, *rest)

    def _apply(self, ledger: Ledger | None, clean: Any, *rest: Any) -> Any:
        function = _Relevance if maybe_current_level() is None else _Transformed
        # PyTorch gives apply no types.
        return function.apply(self, ledger, clean, *rest)  # type: ignore[no-untyped-call]

    def phantom(self, clean: Tensor) -> Tensor:
        """What stands for an output in the phantom stream."""
        return phantom(clean)

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """What the phantoms that entered get."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        raise TypeError(
            "a rewritten graph cannot be pickled: the rules would be lost on loading. "
            "Save the model, and make the Explainer again from it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self


@dataclass(frozen=True, eq=False)
class Join(Step):
    """Where the two streams meet, at an output: its value, with relevance as its gradient."""

    def __call__(self, clean: Any, *rest: Any, ledger: Ledger | None = None) -> Any:
        """The output; in the caller's grad mode, so that no_grad gives plain tensors.

        Raises:
            ExportError: It is traced into a file, which would have no backward pass.
        """
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            raise ExportError(
                "a rewritten graph is traced into a file: that would hold the forward pass alone, "
                "as relevance is the graph's backward pass.",
                fix="lrpfx.export(explainer, path, x) writes output and relevance.",
            )
        return self._apply(ledger, clean, *rest)

    def phantom(self, clean: Tensor) -> Tensor:
        """The output itself."""
        return clean.clone()

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """R."""
        return given.R


@dataclass(frozen=True, eq=False)
class Twin(Step):
    """Beside a node: carries its rule.

    The values it is called with are those of the slots of its Site, None for what is not read.

    Args:
        rule: The node's rule.
        site: How to run the op again.
        reads_input: Whether the rule reads the live inputs' values.
        place: The node, for errors.
    """

    rule: Rule
    site: Site
    reads_input: bool
    place: str

    def live_inputs(self, values: Sequence[Any], forms: Sequence[Form]) -> tuple[Tensor, ...]:
        """The clean live inputs; of those that the rule does not read only the shapes count."""
        if self.reads_input:
            return tuple(values[i] for i in self.site.live)
        return tuple(
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in forms
        )

    def received(self, R: tuple[Tensor, ...]) -> Any:
        """What arrives as the rule takes it: a tuple only from ops with several outputs."""
        return R[0] if len(R) == 1 and not self.site.several_outputs else R

    def propagate(self, given: Arrival) -> tuple[Tensor, ...]:
        """What the live inputs get."""
        try:
            return self.hand_on(given)
        except RuleError as error:  # the rule does not know where it is
            raise RuleError(error.what, where=[self.place], fix=error.fix) from error

    def hand_on(self, given: Arrival) -> tuple[Tensor, ...]:
        """Relevance of the live inputs from the relevance of the output."""
        call = Call(self.site, given.values)
        x = self.live_inputs(given.values, given.forms)
        flow = self.rule.propagate(call, x, given.z, self.received(given.R))
        if given.ledger is not None:
            given.ledger.book(self.name, given.R, flow)
        return flow.relevance
