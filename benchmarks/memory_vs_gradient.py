"""Peak memory of an explanation and of the gradient: ``python -m benchmarks.memory_vs_gradient``.

Every number is measured in a process of its own. On the CPU it is the peak of the resident set
above what it was with the model alone, as Linux counts it, without PyTorch's own code; on CUDA that
of allocated memory. A tiny model is explained first, so that what Python imports does not count.
``held`` is what remains between calls, beyond the model: what an Explainer keeps, and what the
first capture in a process leaves behind.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks import peers, works
from benchmarks.measure import (
    Call,
    Table,
    Work,
    command,
    difference,
    folded,
    gradient_of,
    publish,
    relevance_call,
)

COLUMNS = (
    "model",
    "composite",
    "gradient, MiB",
    "lrpfx, MiB",
    "ratio",
    "held, MiB",
    "ratio beyond held",
    "with ledger, MiB",
    "map differs",
)
CONVOLUTIONAL = ("epsilon_plus", "epsilon_alpha2_beta1")
ATTENTION = ("attnlrp", "cplrp")
MODELS: dict[str, tuple[Callable[[str], Work], Sequence[str]]] = {
    "vgg16": (lambda device: works.image_work("vgg16", 1, device=device), CONVOLUTIONAL),
    "resnet50": (lambda device: works.image_work("resnet50", 2, device=device), CONVOLUTIONAL),
    "vit_b_16": (lambda device: works.image_work("vit_b_16", 1, device=device), ATTENTION),
    "llama": (lambda device: works.llama(1024, device=device), ATTENTION),
    "tiny": (lambda device: works.image_work("resnet18", 1, 32, device=device), CONVOLUTIONAL),
}
STATUS = Path("/proc/self/status")
#: glibc then gives every large tensor's memory back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


# In a process of its own -------------------------------------------------------------------------


def in_use(device: str, peak: bool = False) -> int:
    """Bytes in use now, or the most since ``forget``."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    rows = (line.split() for line in STATUS.read_text().splitlines())
    sizes = {key: int(rest[0]) * 1024 for key, *rest in rows if rest and rest[0].isdigit()}
    # Without the libraries' own code, of which more and more is read from disk.
    return sizes["VmHWM:" if peak else "VmRSS:"] - sizes["RssFile:"]


def forget(device: str) -> None:
    """Give back what is free, and begin to look for the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another libc
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(call: Call, device: str) -> tuple[int, Tensor]:
    """The most that is in use in the second of two calls, as the first may fill caches."""
    call()
    forget(device)
    found = call()
    return in_use(device, peak=True), found


def measure(model: str, what: str, device: str) -> dict[str, float]:
    """Bytes above those of the model alone.

    Args:
        model: A key of ``MODELS``.
        what: "gradient", or a composite's name.
        device: "cpu" or "cuda".
    """
    warnings.simplefilter("ignore")
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    lrpfx.explain(tiny, torch.ones(1, 3, 8, 8))
    work = MODELS[model][0](device)
    if what == "gradient":
        work.model = folded(work.model)
        forget(device)
        before = in_use(device)
        return {"peak": peak_of(gradient_of(work, work.model), device)[0] - before}
    forget(device)
    before = in_use(device)
    explainer = lrpfx.Explainer(work.model, work.inputs, peers.composite(what))
    peak, fast = peak_of(relevance_call(explainer, work), device)
    forget(device)
    held = in_use(device) - before
    plain_peak, plain = peak_of(relevance_call(explainer, work, ledger=True), device)
    return {
        "held": held,
        "peak": peak - before,
        "ledger": plain_peak - before,
        "differs": difference(fast, plain),
    }


def apart(model: str, what: str, device: str) -> dict[str, float]:
    """``measure`` in a process of its own."""
    arguments = [sys.executable, "-m", "benchmarks.memory_vs_gradient", "--one", model, what]
    done = subprocess.run(
        [*arguments, "--device", device],
        env={**os.environ, **MALLOC},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# The table ---------------------------------------------------------------------------------------


def table(models: Sequence[str], device: str = "cpu", repeats: int = 1) -> Table:
    """One row per model and composite; of several repeats the median."""
    made = Table("Peak memory above the model", COLUMNS)
    for model in models:
        base = median([apart(model, "gradient", device) for _ in range(repeats)])["peak"]
        for name in MODELS[model][1]:
            fast = median([apart(model, name, device) for _ in range(repeats)])
            if fast["differs"] > 1e-3:
                made.wrong.append(f"{model} under {name}: the map differs by {fast['differs']:.1e}")
            made.add(
                model,
                name,
                mebibytes(base),
                mebibytes(fast["peak"]),
                f"{fast['peak'] / max(base, 1):.2f}",
                mebibytes(fast["held"]),
                f"{(fast['peak'] - fast['held']) / max(base, 1):.2f}",
                mebibytes(fast["ledger"]),
                f"{fast['differs']:.0e}",
            )
    kind = (
        "resident set without the libraries' own code"
        if device == "cpu"
        else "memory allocated on CUDA"
    )
    made.notes.append(f"Peak of the {kind}; each number is from a process of its own.")
    made.notes.append(
        "Held is what an Explainer takes between calls, whatever the batch: graphs, records, and "
        "what the first capture in a process leaves behind."
    )
    return made


def median(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each entry."""
    return {key: sorted(f[key] for f in found)[len(found) // 2] for key in found[0]}


def mebibytes(n: float) -> str:
    """Bytes as MiB."""
    return f"{n / 2**20:.0f}"


def main() -> int:
    """Print the table; with --one measure one thing and print it as JSON."""
    parser = command("memory_vs_gradient", __doc__)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WHAT"), help="one measurement, JSON")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=1, help="processes for each number (1)")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.device)))
        return 0
    if options.device == "cpu" and not STATUS.exists():
        print("There is no /proc here to read the resident set from: skipped.")
        return 0
    models = [model for model in MODELS if model != "tiny" and options.only in model]
    made = table(models, options.device, options.repeats)
    return publish("memory_vs_gradient", made, options.write, options.device)


if __name__ == "__main__":
    sys.exit(main())
