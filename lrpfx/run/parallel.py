"""A model whose gradients are shared by processes -> explanations whose gradients are, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lrpfx.capture import tensors_in
from lrpfx.explanation import Explanation


class _Call(nn.Module):
    """A call in the place of a model, with its parameters, buffers and modules."""

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules, self.training = model._modules, model.training
        self._call = call

    def forward(self) -> Any:
        return self._call()


def through(parallel: DistributedDataParallel, explain: Callable[[], Explanation]) -> Explanation:
    """An explanation made as if it were the forward pass of a distributed model.

    Gradients are averaged over processes for what goes through its forward pass only; without it
    each process would train by its own, and no error would tell.

    Args:
        parallel: The model as PyTorch wraps it.
        explain: Makes the explanation.
    """
    made: list[Explanation] = []

    def call() -> Any:
        made.append(explain())
        return made[0].relevance, tensors_in(made[0].output)  # what unused parameters are seen by

    model = parallel.module
    parallel._modules["module"] = _Call(model, call)
    try:
        relevance, _ = parallel()
    finally:
        parallel._modules["module"] = model
    return replace(made[0], relevance=relevance)
