"""CPU seconds of one `explain()` call by either way of capture: `python -m benchmarks.setup`.

Goals for a record, which is what `explain()` makes, on one thread: three linear layers 0.08,
ResNet-18 0.6, ResNet-50 1.2, BERT-base 1.5, a Llama of 30 layers 5. Each is measured when another
model has been explained in the process, as the first call imports what it needs, and the least of
two calls is taken. `python -m benchmarks.setup record` leaves out the exports.
"""

from __future__ import annotations

import functools
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


def _llama() -> tuple[nn.Module, Any]:
    import transformers

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 4096}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            config = transformers.LlamaConfig(num_hidden_layers=30, **sizes, **heads)
            self.model = transformers.LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits[:, -1]

    return Logits(), torch.randint(0, 1000, (1, 32))


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], float]] = {
    "three linear layers": (_linear, 0.08),
    "ResNet-18": (_resnet(18), 0.6),
    "ResNet-50": (_resnet(50), 1.2),
    "BERT-base": (_bert, 1.5),
    "Llama, 30 layers": (_llama, 5),
}


def cpu_seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main(names: list[str]) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    declare_missing_ops()
    ways = ("record",) if "record" in names else ("export", "record")
    model, x = _linear()
    for by in ways:  # what is imported once
        lrpfx.explain(model.eval(), x, 0, capture=by)
    print(f"| model | {' | '.join(ways)} | goal |\n| --- | {'--- | ' * len(ways)}--- |")
    for name in [n for n in names if n in MODELS] or MODELS:
        make, goal = MODELS[name]
        model, x = make()
        model.eval()
        costs = []
        for by in ways:
            once = functools.partial(lrpfx.explain, model, x, 0, capture=by)
            costs.append(f"{min(cpu_seconds(once) for _ in range(2)):.2f}")
        print(f"| {name} | {' | '.join(costs)} | {goal} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
