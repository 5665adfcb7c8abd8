"""What the benchmarks share: interleaved timing, the gradient they compare with, tables.

The machine's speed varies from minute to minute. So calls that are to be compared take turns in one
process, the ratio is taken round by round, and reported are its median and quartiles.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile

import lrpfx

Call = Callable[[], Any]
DOCS = Path(__file__).parent.parent / "docs"
#: Largest relative difference of two maps that counts as equal.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1}


# What is explained -------------------------------------------------------------------------------


@dataclass
class Work:
    """A model, one input of it, and the score to explain.

    Args:
        name: For the table.
        model: In evaluation mode.
        inputs: A tensor, or keyword arguments of which ``explained`` is a tensor.
        score: The model's output -> one number per sample, (N,).
        explained: Key of the explained tensor, where ``inputs`` is a dict.
    """

    name: str
    model: nn.Module
    inputs: Any
    score: Callable[[Any], Tensor]
    explained: str | None = None

    @property
    def x(self) -> Tensor:
        """The explained tensor."""
        return self.inputs if self.explained is None else self.inputs[self.explained]

    def run(self, model: nn.Module, x: Tensor) -> Any:
        """The output of ``model``, with ``x`` in the place of the explained tensor."""
        return model(x) if self.explained is None else model(**{**self.inputs, self.explained: x})

    def of(self, relevance: Any) -> Tensor:
        """The explained tensor's part of what an explanation returns."""
        return (relevance if self.explained is None else relevance[self.explained]).detach()


def folded(model: nn.Module) -> nn.Module:
    """A frozen copy in which each batch norm is folded into the convolution registered before it.

    That they also run in this order is up to the caller: ``gradient`` compares the outputs.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for (name, conv), (key, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm).requires_grad_(False))
                setattr(parent, key, nn.Identity())
    return model


def gradient(work: Work, compiled: bool = False) -> Call:
    """The yardstick: one forward and one backward to the input, nothing else."""
    model: Any = folded(work.model)
    exact = copy.deepcopy(work.model).double()  # deep networks amplify what float32 rounds
    with torch.no_grad():
        got, expected = (work.score(work.run(m, work.x.double())) for m in (folded(exact), exact))
    if difference(got[None], expected[None]) > TOLERANCE[torch.float64]:
        raise RuntimeError(f"{work.name}: with batch norm folded it is another function.")
    return gradient_of(work, torch.compile(model) if compiled else model)


def gradient_of(work: Work, model: nn.Module) -> Call:
    """One forward and one backward of ``model`` to the explained tensor."""

    def call() -> Tensor:
        x = work.x.detach().requires_grad_()
        return torch.autograd.grad(work.score(work.run(model, x)).sum(), x)[0]

    return call


def relevance_call(
    explainer: lrpfx.Explainer, work: Work, target: Any = None, *, ledger: bool = False
) -> Call:
    """One explanation's relevance; without ``ledger`` by the fast path."""
    target = work.score if target is None else target
    return lambda: work.of(explainer(work.inputs, target, ledger=ledger).relevance)


def graph_call(explainer: lrpfx.Explainer, work: Work) -> Call:
    """The rewritten graph without its Explainer: forward, and backward to the explained tensor."""
    graph: Any = explainer.graph_module

    def call() -> Tensor:
        x = work.x.detach().requires_grad_()
        score = work.score(_attributes(work.run(graph, x)))
        return torch.autograd.grad(score, x, score.detach())[0]

    return call


def _attributes(output: Any) -> Any:
    """A rewritten graph returns a dict where the model returns a dataclass."""
    return argparse.Namespace(**output) if isinstance(output, dict) else output


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest relative difference of a sample, in the Euclidean norm; NaN counts as infinite."""
    got, expected = got.double().flatten(1), expected.double().flatten(1)
    ratio = (got - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
    return float(ratio.nan_to_num(float("inf")).max())


# Time --------------------------------------------------------------------------------------------


def seconds(call: Call, device: str = "cpu") -> float:
    """Duration of one call.

    On CUDA by its own events. On one thread the CPU time of the process, which leaves out what
    else the machine was doing; on several by the clock.
    """
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 this CPU takes for a product in ``dtype``."""
    a = torch.ones(256, 256)
    b = a.to(dtype)
    times = interleaved({"single": lambda: a @ a, "own": lambda: b @ b}, 1, least=5, most=5)
    return quartiles(times["own"])[1] / quartiles(times["single"])[1]


def products(call: Call) -> float:
    """Seconds that one call spends in convolutions and matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    ops = [e for e in profiled.key_averages() if "conv" in e.key.lower() or "mm" in e.key]
    return float(sum(e.self_cpu_time_total for e in ops)) / 1e6


def interleaved(
    calls: dict[str, Call], budget: float, device: str = "cpu", least: int = 3, most: int = 50
) -> dict[str, list[float]]:
    """Seconds of each call in each round; the calls take turns, and who begins changes.

    Args:
        calls: By name; each has been called before, to compare its result.
        budget: Seconds after which no new round begins.
        device: "cpu" or "cuda".
        least: Rounds that are run in any case.
        most: Rounds after which it ends in any case.
    """
    order, found = list(calls), {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > budget:
            break
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            found[name].append(seconds(calls[name], device))
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def figures(value: float) -> str:
    """Three figures, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(times: Sequence[float]) -> str:
    """``median (lower quartile - upper quartile)`` in ms."""
    low, middle, high = (figures(1000 * value) for value in quartiles(times))
    return f"{middle} ({low}-{high})"


def ratio(times: Sequence[float], others: Sequence[float]) -> str:
    """``median (lower quartile - upper quartile)`` of the ratio, round by round."""
    low, middle, high = quartiles([a / b for a, b in zip(times, others, strict=True)])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


# Tables ------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A Markdown table with its notes, and what was found wrong while it was made."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Enter a row, and show it at once: benchmarks take minutes."""
        self.rows.append(cells)
        print(" | ".join(cells), flush=True)

    def check(self, what: str, got: Tensor, expected: Tensor) -> str:
        """The difference of two maps as a cell; one that is too large makes the run fail."""
        found = difference(got, expected)
        if found > TOLERANCE[expected.dtype]:
            self.wrong.append(f"{what}: the map differs by {found:.1e}")
        return f"{found:.0e}"

    def markdown(self) -> str:
        """The table as it stands in the documentation."""
        wrong = [f"**Wrong**: {line}" for line in self.wrong]
        table = [
            "| " + " | ".join(self.columns) + " |",
            "|" + " --- |" * len(self.columns),
            *("| " + " | ".join(cells) + " |" for cells in self.rows),
        ]
        return "\n".join([f"## {self.title}", "", *table, "", *_paragraphs(wrong + self.notes)])


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in (line, "")]


def environment(device: str = "cpu") -> str:
    """Versions and the machine."""
    versions = []
    for package in ("torch", "torchvision", "transformers", "zennit"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        timed = "1 thread, CPU time" if threads == 1 else f"{threads} threads, by the clock"
        where = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {timed}"
    return f"lrpfx {lrpfx.__version__}, {', '.join(versions)}; {where}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# From the command line ---------------------------------------------------------------------------


def command(script: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{script}", description=(description or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row (8)")
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--write", action="store_true", help="also into docs/performance.md")
    return parser


def publish(script: str, table: Table, write: bool, device: str = "cpu") -> int:
    """Print the table, put it into docs/performance.md if asked to, and return the exit status."""
    options = [option for option in sys.argv[1:] if option != "--write"]
    line = " ".join(["python -m", f"benchmarks.{script}", *options])
    table.notes.append(f"`{line}`; {environment(device)}")
    text = table.markdown()
    print("\n" + text)
    if write:
        write_section(DOCS / "performance.md", script, text)
    return 1 if table.wrong else 0


def write_section(path: Path, name: str, text: str) -> None:
    """Replace the section between the two marks of ``name``, or append one."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text() if path.exists() else HEAD
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2].strip() if found else ""
    section = f"{begin}\n{text.strip()}\n{end}"
    path.write_text(f"{before.rstrip()}\n\n{section}\n\n{after}".rstrip() + "\n")


HEAD = """# Performance

Made by `make bench`. Times are medians, ratios medians of the ratio round by round; in brackets the
quartiles. All models have random weights. What is compared takes turns in one process, by its CPU
time on one thread where a section does not say otherwise. A section names the command it is from.

The gradient is one forward and one backward to the input, of a frozen copy of the model with batch
norm folded, without compilation. Setting up an `Explainer` is not part of the time.
"""
