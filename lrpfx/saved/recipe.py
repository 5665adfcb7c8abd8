"""What an Explainer was made of, so that it can be made again: graphs are not kept, but rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.capture import Inputs, Signature, TensorForm, copies, flatten_inputs
from lrpfx.plan import RulesLike

#: So many samples of a batch that may vary are kept.
_SAMPLES = 2
#: The arguments of an Explainer beside model, inputs and rules.
OPTIONS = ("dynamic", "freeze", "wrt", "capture")


@dataclass(frozen=True)
class Recipe:
    """The arguments that make an Explainer.

    Args:
        model: The model.
        inputs: Example inputs.
        rules: See ``lrpfx.explain``.
        options: Further arguments of ``lrpfx.Explainer``.
        training: Whether each module was in training mode, by its path.
        compiled: Options of ``compile()``, None if it has not been called.
        pipeline: What turns texts and images into inputs of the model, if it came in a pipeline.
    """

    model: nn.Module
    inputs: Inputs
    rules: RulesLike
    options: Mapping[str, Any]
    training: Mapping[str, bool] = field(default_factory=dict)
    compiled: Mapping[str, Any] | None = None
    pipeline: Any = None

    @contextmanager
    def in_its_mode(self) -> Iterator[None]:
        """The model as it was when it was captured: in training mode, or not."""
        modules = dict(self.model.named_modules())
        before = [(module, module.training) for module in modules.values()]
        for path, training in self.training.items():
            if path in modules:
                modules[path].training = training
        try:
            yield
        finally:
            for module, training in before:
                module.training = training


def example_of(inputs: Inputs, signature: Signature) -> Inputs:
    """Copies of the inputs, of a batch that may vary the first samples, structured as they are."""
    leaves, spec = flatten_inputs(inputs)
    few = [
        leaf[:_SAMPLES] if isinstance(form, TensorForm) and form.shape[:1] == ("N",) else leaf
        for leaf, form in zip(leaves, signature.leaves, strict=True)
    ]
    args, kwargs = pytree.tree_unflatten(copies(few), spec)
    if isinstance(inputs, Tensor):
        (tensor,) = args
        return tensor  # type: ignore[no-any-return]
    return kwargs if isinstance(inputs, Mapping) else tuple(args)
