"""The cost in gradients on CUDA: ``python -m benchmarks.gpu``.

In fp32, tf32 and bf16, eager and compiled, timed by CUDA's events. Compiled are the folded model by
torch.compile on one side and ``Explainer.compile()`` on the other. Relevance is compared in the
same run with that of lrpfx's plain path, with the ledger. Without CUDA nothing is done.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import lrpfx
from benchmarks import peers, works
from benchmarks.cost_vs_gradient import GOALS
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
    "precision",
    "mode",
    "gradient, ms",
    "lrpfx, ms",
    "ratio",
    "goal",
    "with ledger",
    "peak memory ratio",
    "map differs",
)
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eager", "compile")
Make = Callable[[str, Any], Work]
IMAGES = ("epsilon_all", "epsilon_plus", "epsilon_alpha2_beta1")
ATTENTION = ("attnlrp", "cplrp")
LARGE = dict(layers=16, hidden=2048, heads=32, vocabulary=32000)  # about 0.9e9 parameters
#: Made on the device, with random weights: name -> how, and under which composites.
MODELS: dict[str, tuple[Make, Sequence[str]]] = {
    "vgg16": (lambda d, t: works.image_work("vgg16", 16, device=d, dtype=t), IMAGES),
    "resnet50": (lambda d, t: works.image_work("resnet50", 16, device=d, dtype=t), IMAGES),
    "vit_b_16": (lambda d, t: works.image_work("vit_b_16", 16, device=d, dtype=t), ATTENTION),
    "vit_l_16": (lambda d, t: works.image_work("vit_l_16", 16, device=d, dtype=t), ATTENTION),
    "llama-2048": (lambda d, t: works.llama(2048, **LARGE, device=d, dtype=t), ATTENTION),
    "llama-8192": (lambda d, t: works.llama(8192, **LARGE, device=d, dtype=t), ATTENTION),
}


def table(
    models: dict[str, tuple[Make, Sequence[str]]],
    budget: float,
    precisions: Sequence[str] = tuple(PRECISIONS),
    modes: Sequence[str] = MODES,
    device: str = "cuda",
) -> Table:
    """One row per model, precision, composite and mode."""
    made = Table("On CUDA", COLUMNS)
    for make, composites in models.values():
        for precision in precisions:
            with tf32(precision == "tf32"):
                work = make(device, PRECISIONS[precision])
                for rules in composites:
                    add_rows(made, work, rules, precision, modes, budget)
            del work
            if device == "cuda":
                torch.cuda.empty_cache()
    made.notes.append(
        "Peak memory ratio: most that is allocated during the call, above what was before it, of "
        "lrpfx over that of the gradient. Goal: as in the table for the CPU."
    )
    return made


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products of float32 may be computed in tf32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def add_rows(
    made: Table, work: Work, rules: str, precision: str, modes: Sequence[str], budget: float
) -> None:
    """Eager and compiled; what fails is a row that says how, and makes the run fail."""
    start = [work.name, rules, precision]
    try:
        composite = peers.composite(rules)
        explainer = lrpfx.Explainer(work.model, work.inputs, composite, freeze=True)
        expected = relevance_call(explainer, work, ledger=True)()
    except (lrpfx.errors.LrpError, RuntimeError) as error:
        add_failure(made, [*start, "set-up"], error)
        return
    for mode in modes:
        try:
            made.add(*start, mode, *cells(made, work, explainer, expected, rules, mode, budget))
        except Exception as error:  # torch.compile fails in many ways
            add_failure(made, [*start, mode], error)
        torch.compiler.reset()


def cells(
    made: Table,
    work: Work,
    explainer: lrpfx.Explainer,
    expected: torch.Tensor,
    rules: str,
    mode: str,
    budget: float,
) -> list[str]:
    """The numbers of one row."""
    compiled, device = mode == "compile", work.x.device.type
    calls = {"gradient": gradient(work, compiled)}
    calls["lrpfx"] = relevance_call(explainer, work)
    if compiled:
        explainer.compile()
        calls["lrpfx"]()  # compiles
    else:
        calls["ledger"] = relevance_call(explainer, work, ledger=True)
    differs = made.check(f"{work.name} under {rules}, {mode}", calls["lrpfx"](), expected)
    calls["gradient"]()
    times = interleaved(calls, budget, device)
    of = {name: ratio(t, times["gradient"]) for name, t in times.items()}
    memory = ""
    if device == "cuda":
        most = {name: allocated(call) for name, call in calls.items()}
        memory = f"{most['lrpfx'] / max(most['gradient'], 1):.2f}"
    return [
        milliseconds(times["gradient"]),
        milliseconds(times["lrpfx"]),
        of["lrpfx"],
        f"{GOALS[rules]:.1f}",
        of.get("ledger", ""),
        memory,
        differs,
    ]


def allocated(call: Callable[[], Any]) -> int:
    """The most that one call allocates, in bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def add_failure(made: Table, start: list[str], error: Exception) -> None:
    """A row that says what went wrong."""
    said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}".replace("|", "/")
    made.add(*start, said, *[""] * (len(COLUMNS) - len(start) - 1))
    made.wrong.append(f"{', '.join(start)}: {said}")


def main() -> int:
    """Print the table."""
    parser = command("gpu", __doc__)
    parser.add_argument("--precision", nargs="+", default=[*PRECISIONS], choices=[*PRECISIONS])
    parser.add_argument("--mode", nargs="+", default=[*MODES], choices=MODES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("CUDA is not available here: skipped.")
        return 0
    warnings.simplefilter("ignore")
    models = {name: entry for name, entry in MODELS.items() if options.only in name}
    made = table(models, options.seconds, options.precision, options.mode)
    return publish("gpu", made, options.write, "cuda")


if __name__ == "__main__":
    sys.exit(main())
