"""CPU seconds of one `explain()` call by either way of capture: `python -m benchmarks.setup`.

Goals for a record, on one thread: three linear layers 0.08, ResNet-18 0.6, ResNet-50 1.2, BERT-base
1.5. Each is measured in the second call of a process: the first imports what it needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks.zoos import declare_missing_ops


def _linear() -> tuple[nn.Module, Any]:
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers), torch.randn(1, 8)


def _resnet(depth: int) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        return getattr(torchvision.models, f"resnet{depth}")(), torch.randn(1, 3, 224, 224)

    return make


def _bert() -> tuple[nn.Module, Any]:
    import transformers

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertForSequenceClassification(transformers.BertConfig())

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    return Logits(), torch.randint(0, 1000, (1, 32))


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], float]] = {
    "three linear layers": (_linear, 0.08),
    "ResNet-18": (_resnet(18), 0.6),
    "ResNet-50": (_resnet(50), 1.2),
    "BERT-base": (_bert, 1.5),
}


def cpu_seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main(names: list[str]) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    declare_missing_ops()
    model, x = _linear()
    for by in ("export", "record"):  # what is imported once
        lrpfx.explain(model.eval(), x, 0, capture=by)
    print("| model | export | record | goal |\n| --- | --- | --- | --- |")
    for name in names or MODELS:
        make, goal = MODELS[name]
        model, x = make()
        model.eval()
        costs = [
            cpu_seconds(lambda m=model, x=x, by=by: lrpfx.explain(m, x, 0, capture=by))
            for by in ("export", "record")
        ]
        print(f"| {name} | {costs[0]:.2f} | {costs[1]:.2f} | {goal} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
