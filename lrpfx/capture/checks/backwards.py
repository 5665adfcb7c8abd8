"""A model's own backward against the gradient of its forward pass, where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lrpfx.capture.captured import Captured
from lrpfx.capture.checks.faithful import run_on
from lrpfx.capture.forms import Inputs, copies, flatten_inputs, is_explained, tensors_in
from lrpfx.capture.preserve import preserved
from lrpfx.errors import some

#: Relative, Euclidean norm; far above the round-off of a gradient.
_APART = 0.01


def backward_note(captured: Captured, module: fx.GraphModule, inputs: Inputs) -> str:
    """What is noted of a model whose backward is not the gradient of its forward, "" of others.

    The two are compared on the example inputs, for random cotangents.

    Args:
        captured: The model.
        module: Its graph.
        inputs: Example inputs.
    """
    if not captured.own_backwards:
        return ""
    leaves = flatten_inputs(inputs)[0]
    own, graph = _variables(leaves), _variables(leaves)
    try:
        with preserved(captured.model), torch.enable_grad():
            args, kwargs = pytree.tree_unflatten(own, captured.signature.spec)
            its = _pulled(tensors_in(captured.model(*args, **kwargs)), own)
            expected = _pulled(run_on(module, graph), graph)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the backward is the user's, and may raise anything
        its = expected = None
    what = "could not be compared with the gradient of its forward pass"
    if its is not None and expected is not None:
        if bool((its - expected).norm() <= _APART * expected.norm()):
            return ""
        what = "is not the gradient of its forward pass"
    return (
        f"the model has a backward of its own that {what}, and relevance follows the forward pass: "
        f"{'; '.join(some(list(captured.own_backwards), 3))}"
    )


def _variables(leaves: Sequence[Any]) -> list[Any]:
    given = copies(leaves)
    return [leaf.requires_grad_() if is_explained(leaf) else leaf for leaf in given]


def _pulled(outputs: Sequence[Tensor], leaves: Sequence[Any]) -> Tensor | None:
    """The gradient of the outputs' random sums; None where nothing has one."""
    outputs = [t for t in outputs if t.requires_grad]
    inputs = [leaf for leaf in leaves if is_explained(leaf)]
    if not outputs or not inputs:
        return None
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, inputs, ways, allow_unused=True)
    zeros = (torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))
    return torch.cat([g.detach().double().flatten() for g in zeros])
