"""What compilation adds: ``python -m benchmarks.compiled``, in a quarter of an hour.

Everything on, which is ``Explainer(..., freeze=True).compile()`` and images in channels_last,
beside the same Explainer as it is, both in gradients of the eager model in its usual layout.
Relevance is compared in the same run with that of the same Explainer with its ledger. Compilation
needs a C++ compiler; ``--backend eager`` shows what leaving out autograd gives by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch

import lrpfx
from benchmarks import peers, works
from benchmarks.cost_vs_gradient import LIMITS
from benchmarks.measure import (
    Table,
    Work,
    command,
    gradient,
    interleaved,
    milliseconds,
    publish,
    ratio,
    relevance_call,
)

COLUMNS = (
    "model",
    "composite",
    "gradient, ms",
    "lrpfx",
    "channels_last",
    "everything on",
    "goal",
    "first call, s",
    "map differs",
)
GOAL = 1.2
IMAGES = ("epsilon_all", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box")
#: How each is made, and under which composites it is explained.
MODELS: dict[str, tuple[Callable[[], Work], Sequence[str]]] = {
    "vgg16": (lambda: works.image_work("vgg16", 1), IMAGES),
    "resnet50": (lambda: works.image_work("resnet50", 2), IMAGES),
    "vit_b_16": (lambda: works.image_work("vit_b_16", 1), ("attnlrp",)),
    "llama-128": (lambda: works.llama(128), ("attnlrp",)),
    "llama-1024": (lambda: works.llama(1024), ("attnlrp",)),
}


def channels_last(work: Work) -> Work:
    """The same with images and weights in channels_last; tokens as they are."""
    if work.x.ndim != 4:
        return work
    model, layout = work.model.to(memory_format=torch.channels_last), torch.channels_last
    return dataclasses.replace(
        work, model=model, inputs=work.inputs.contiguous(memory_format=layout)
    )


def table(
    models: Sequence[tuple[Callable[[], Work], Sequence[str]]], budget: float, backend: str
) -> Table:
    """One row per model and composite."""
    made = Table("Compiled", COLUMNS)
    for make, composites in models:
        for name in composites:
            torch.compiler.reset()
            try:
                add_row(made, make(), name, budget, backend)
            except lrpfx.errors.CompileError as error:  # the other rows are shown all the same
                made.wrong.append(f"{name}: {error.what}")
    made.notes.append(
        "lrpfx: `freeze=True`, no ledger. channels_last: the same, with images and weights in this "
        "layout (the gradient stays in the usual one). Everything on: this, by `compile()`. First "
        "call: seconds of the clock of the one explanation that compiles, several times as many "
        "where PyTorch's cache of compiled kernels is empty."
    )
    made.notes.append(LIMITS)
    return made


def add_row(made: Table, work: Work, name: str, budget: float, backend: str) -> None:
    """Time an Explainer as it is, in the other layout, and compiled."""
    rules = peers.composite(name)
    plain = lrpfx.Explainer(work.model, work.inputs, rules, freeze=True)
    calls = {"gradient": gradient(work), "lrpfx": relevance_call(plain, work)}
    twin = channels_last(dataclasses.replace(work, model=copy.deepcopy(work.model)))
    if twin.inputs is not work.inputs:
        calls["layout"] = relevance_call(
            lrpfx.Explainer(twin.model, twin.inputs, rules, freeze=True), twin
        )
    fast = lrpfx.Explainer(twin.model, twin.inputs, rules, freeze=True).compile(backend=backend)
    # Of the same layout: kernels of another round otherwise, which deep networks amplify.
    expected = relevance_call(fast, twin, ledger=True)()
    calls["compiled"] = relevance_call(fast, twin)
    start = time.perf_counter()
    calls["compiled"]()
    first = time.perf_counter() - start
    label = f"{work.name} under {name}, compiled"
    differs = made.check(label, calls["compiled"](), expected)
    for call in calls.values():
        call()
    times = interleaved(calls, budget)
    of = {key: ratio(t, times["gradient"]) for key, t in times.items()}
    made.add(
        work.name,
        name,
        milliseconds(times["gradient"]),
        of["lrpfx"],
        of.get("layout", ""),
        of["compiled"],
        f"{GOAL:.2f}",
        f"{first:.0f}",
        differs,
    )


def main() -> int:
    """Print the table."""
    parser = command("compiled", __doc__)
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    models = [entry for name, entry in MODELS.items() if options.only in name]
    made = table(models, options.seconds, options.backend)
    return publish("compiled", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
