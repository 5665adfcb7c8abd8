"""A task -> what each method's explanations are worth on it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks.faithfulness.methods import Call, methods, quietly
from benchmarks.faithfulness.tasks import Task, make
from lrpfx.evaluate import localization, perturbation

#: In so many steps an input is erased.
STEPS = 16
#: Seconds of a method without set-up that is not called twice.
_LONG = 3.0


@dataclass
class Result:
    """Of one method on the samples of one task and seed; tensors are (N,).

    Args:
        library: Who computes it.
        name: What it is called there.
        ms: CPU milliseconds per sample, without set-up.
        refused: The error, where it cannot explain the network.
    """

    library: str
    name: str
    abpc: Tensor = field(default_factory=lambda: torch.zeros(0))
    pointing: Tensor | None = None
    mass: Tensor | None = None
    conserved: Tensor = field(default_factory=lambda: torch.zeros(0))
    curves: tuple[Tensor, Tensor] | None = None
    ms: float = 0.0
    refused: str = ""


@dataclass
class Outcome:
    """Of all methods on one task and seed."""

    name: str
    kind: str
    seed: int
    accuracy: float
    results: list[Result]


def measure(
    kind: str, seed: int, samples: int, lxt: str | None = None, quick: bool = False
) -> Outcome:
    """Train the network of a task, and evaluate all methods.

    Args:
        kind: Of the task.
        seed: Of its network and data.
        samples: How many are explained.
        lxt: The interpreter of an environment with LXT, None to leave it out.
        quick: Train next to nothing, and take few steps; for tests.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    task = make(kind, seed, samples, quick)
    print(f"{kind} {seed}: accuracy {task.accuracy:.3f}, {_since(begin)}", flush=True)
    with quietly():
        results = [_result(task, library, name, call) for library, name, call in methods(task)]
        if lxt is not None and kind in ("tokens", "vit"):
            results += list(_lxt(task, lxt))
    print(f"{kind} {seed}: {len(results)} methods, {_since(begin)}", flush=True)
    return Outcome(task.name, kind, seed, task.accuracy, results)


def _since(begin: float) -> str:
    return f"{time.perf_counter() - begin:.0f} s"


def _result(task: Task, library: str, name: str, call: Call) -> Result:
    try:
        begin = time.process_time()
        relevance = call()
        spent = time.process_time() - begin
        if library == "lrpfx" or spent < _LONG:  # without set-up
            begin = time.process_time()
            relevance = call()
            spent = time.process_time() - begin
    except Exception as error:  # whatever a library says of a network that it does not take
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return Result(library, name, refused=said)
    return evaluated(task, Result(library, name, ms=1000 * spent / len(task.x)), relevance)


def evaluated(task: Task, result: Result, relevance: Tensor) -> Result:
    """The result with all that is measured of its relevance."""
    relevance = relevance.detach()
    if not bool(relevance.isfinite().all()):
        result.refused = "its relevance is not finite"
        return result
    probability = nn.Sequential(task.model, nn.Softmax(1)).eval()
    curves = perturbation(
        probability,
        task.x,
        relevance,
        task.classes,
        STEPS,
        fill=task.fill,
        patch=task.patch,
        progress=False,
    )
    result.abpc = curves.abpc
    result.curves = curves.scores, curves.opposite
    if task.masks is not None:
        found = localization(relevance, task.masks)
        result.pointing, result.mass = found.pointing, found.mass
    with torch.no_grad():
        logits = task.model(task.x).gather(1, task.classes[:, None])[:, 0]
    result.conserved = relevance.flatten(1).sum(1) / logits
    return result


def _lxt(task: Task, interpreter: str) -> Iterator[Result]:
    """LXT's maps, computed by another interpreter."""
    inner = getattr(task.model, "llama", task.model)
    root = Path(lrpfx.__file__).parent.parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {"kind": task.kind, "state": inner.state_dict(), "x": task.x}
        torch.save({**given, "classes": task.classes}, folder / "task.pt")
        done = subprocess.run(
            [interpreter, "-W", "ignore", str(Path(__file__).with_name("lxt_maps.py")), name],
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it failed"]
            print(done.stderr[-2000:], file=sys.stderr)
            yield Result("LXT", "all", refused=said[0])
            return
        for method, (relevance, seconds) in torch.load(folder / "maps.pt").items():
            result = Result("LXT", method, ms=1000 * seconds / len(task.x))
            yield evaluated(task, result, relevance)
