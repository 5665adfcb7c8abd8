"""CPU seconds of one `explain()` call by either way of capture: `python -m benchmarks.setup`.

Goals for a record, which is what `explain()` makes, on one thread: three linear layers 0.08,
ResNet-18 0.6, ResNet-50 1.2, BERT-base 1.5, a Llama of 30 layers 5. Each is measured when another
model has been explained in the process, as the first call imports what it needs, and the least of
three calls is taken. Beside them is one gradient of the model, measured in between, so that the
table can be read on any machine. `python -m benchmarks.setup record` leaves out the exports.

`python -m benchmarks.setup scaling` is what the stages take for Llamas of more and more layers, in
milliseconds per layer: these stay the same where the work is linear in the number of nodes.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks.zoos import declare_missing_ops
from lrpfx.canonize import canonize
from lrpfx.capture import By, capture
from lrpfx.plan import annotate
from lrpfx.prepare import prepare
from lrpfx.rewrite import instrument


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


def _llama(layers: int = 30, width: int = 576) -> tuple[nn.Module, Any]:
    import transformers

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "vocab_size": 4096}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            config = transformers.LlamaConfig(num_hidden_layers=layers, **sizes, **heads)
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


def gradient(model: nn.Module, x: Tensor) -> None:
    """One forward and backward pass, to the input where that is floating, and the parameters."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    model(x)[0, 0].backward()
    model.zero_grad()


def costs(names: list[str], ways: tuple[By, ...]) -> None:
    """Print a row for each model."""
    model, x = _linear()
    for by in ways:  # what is imported once
        lrpfx.explain(model.eval(), x, 0, capture=by)
    heads = ["model", "gradient", *ways, "goal", "record in gradients"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name in names or MODELS:
        make, goal = MODELS[name]
        model, x = make()
        model.eval()
        works: dict[str, Callable[[], Any]] = {"gradient": functools.partial(gradient, model, x)}
        for by in ways:
            works[by] = functools.partial(lrpfx.explain, model, x, 0, capture=by)
        found = {work: float("inf") for work in works}
        for _ in range(3):  # in turns, as machines are not the same for long
            for work, run in works.items():
                found[work] = min(found[work], cpu_seconds(run))
        shown = [
            f"{seconds:.3f}" if seconds < 0.1 else f"{seconds:.2f}" for seconds in found.values()
        ]
        times = found["record"] / found["gradient"]
        print(f"| {name} | {' | '.join(shown)} | {goal} | {times:.1f} |", flush=True)


def scaling(layers: Sequence[int] = (5, 10, 20, 40)) -> None:
    """Print what each stage takes for a layer, for models of more and more layers."""
    stages = ("record", "canonize", "annotate", "instrument", "explain()")
    print(f"| layers | nodes | {' | '.join(stages)} |\n|{' --- |' * (len(stages) + 2)}")
    for number in layers:
        model, x = _llama(number, width=18)
        model.eval()
        found = dict.fromkeys(stages, float("inf"))
        for _ in range(4):  # the first imports
            works, nodes = _stages(model, x)
            for stage in stages:
                found[stage] = min(found[stage], cpu_seconds(works[stage]))
        shown = (f"{1000 * seconds / number:.1f}" for seconds in found.values())
        print(f"| {number} | {nodes} | {' | '.join(shown)} |", flush=True)


def _stages(model: nn.Module, x: Tensor) -> tuple[dict[str, Callable[[], Any]], int]:
    """The stages by themselves, and the number of nodes of the canonical graph."""
    prepared = prepare(model, x, None, by="record")
    module, starts, program = (
        prepared.module,
        prepared.starts,
        capture(model, x, by="record").program,
    )
    of_graph = module, prepared.plan.assignments, prepared.live, list(starts)
    works = {
        "record": functools.partial(capture, model, x, by="record"),
        "canonize": functools.partial(canonize, program),
        "annotate": functools.partial(annotate, module.graph, starts, prepared.captured.prefix),
        "instrument": functools.partial(instrument, *of_graph, fast=True),
        "explain()": functools.partial(lrpfx.explain, model, x, 0),
    }
    return works, len(module.graph.nodes)


def main(names: list[str]) -> None:
    """Print the table that is asked for."""
    torch.set_num_threads(1)
    declare_missing_ops()
    if "scaling" in names:
        scaling()
        return
    ways: tuple[By, ...] = ("record",) if "record" in names else ("export", "record")
    costs([name for name in names if name in MODELS], ways)


if __name__ == "__main__":
    main(sys.argv[1:])
