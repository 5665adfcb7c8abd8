"""What an explanation costs, in gradients: ``python -m benchmarks.cost_vs_gradient``.

Each row times, in turns: the gradient; lrpfx without and with its ledger; the bare rewritten graph;
zennit under the same composite (convolutional networks); AttnLRP as modified gradients (Llama).
Relevance is compared in the same run with that of lrpfx's plain path, the ledger kept.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch.utils import _pytree as pytree

import lrpfx
from benchmarks import peers, works
from benchmarks.measure import (
    Call,
    Table,
    Work,
    command,
    difference,
    gradient,
    graph_call,
    interleaved,
    milliseconds,
    products,
    publish,
    quartiles,
    ratio,
    relevance_call,
    slowdown,
)
from benchmarks.modified_gradients import modified_gradient
from lrpfx.capture.forms import split_inputs
from lrpfx.run.backward import Run

#: What we want to reach, each with parameters frozen as the gradient's are.
GOALS = {
    "epsilon_all": 1.1,
    "epsilon_plus": 1.45,
    "epsilon_plus_flat": 1.45,
    "epsilon_alpha2_beta1": 1.95,
    "epsilon_gamma_box": 1.6,
    "attnlrp": 1.1,
    "cplrp": 1.1,
}
LIMITS = (
    "The gradient runs two convolutions per layer, forward and backward. Epsilon runs as many, "
    "z-plus and gamma three, alpha-beta four, and so does gamma where an output goes through no "
    "ReLU, as at the end of a residual block."
)
CONVOLUTIONAL = tuple(GOALS)[:5]
ATTENTION = tuple(GOALS)[5:]
#: A CPU that has no instructions for bfloat16 takes about forty times as long for it.
SLOW = 8
SETUP_GOAL = 3.0  # CPU seconds
CALL_GOAL = 0.03
COLUMNS = (
    "model",
    "composite",
    "gradient, ms",
    "lrpfx, ms",
    "ratio",
    "goal",
    "floor",
    "with ledger",
    "bare graph",
    "zennit",
    "modified gradient",
    "map differs",
)

Plan = Sequence[tuple[Callable[[], Work], Sequence[str]]]


def plan(only: str = "", halves: bool = True) -> Plan:
    """The models, made when it is their turn, each with the composites it is explained under.

    Args:
        only: Part of the name of those wanted.
        halves: Whether those in bfloat16 are among them.
    """
    models: dict[str, tuple[Callable[[], Work], Sequence[str]]] = {
        "vgg16": (lambda: works.image_work("vgg16", 1), CONVOLUTIONAL),
        "resnet50": (lambda: works.image_work("resnet50", 2), CONVOLUTIONAL),
    }
    for dtype in (torch.float32, torch.bfloat16)[: 2 if halves else 1]:
        make = functools.partial(works.image_work, "vit_b_16", 1, dtype=dtype)
        models[f"vit_b_16-{dtype}"] = (make, ATTENTION)
        for t in (128, 1024):
            make = functools.partial(works.llama, t, dtype=dtype)
            models[f"llama-{t}-{dtype}"] = (make, ATTENTION)
    return [entry for name, entry in models.items() if only in name]


def table(plan: Plan, budget: float) -> Table:
    """One row per model and composite."""
    made = Table("Cost of one explanation, in gradients", COLUMNS)
    for make, composites in plan:
        work = make()
        for name in composites:
            add_row(made, work, name, budget)
    made.notes.append(
        "Parameters are frozen, in the gradient and by `freeze=True`. Bare graph: forward and "
        "backward of `Explainer.graph_module`, the plain form. `map differs`: largest "
        "relative difference, from the same call with the ledger kept, of: lrpfx; bare graph; "
        "zennit, or modified gradients, these at epsilon 1e-12 as they have no stabilizer."
    )
    made.notes.append(
        f"{LIMITS} `floor`: the ratio if the convolutions and matrix products took the time that "
        "they take, and all else no more than in the gradient, by PyTorch's profiler."
    )
    return made


def add_row(made: Table, work: Work, name: str, budget: float) -> None:
    """Time everything that one composite can be compared with, and compare the maps."""
    explainer = lrpfx.Explainer(work.model, work.inputs, peers.composite(name), freeze=True)
    kept = explainer(work.inputs, work.score, ledger=True)
    calls = {
        "gradient": gradient(work),
        "lrpfx": relevance_call(explainer, work),
        "ledger": relevance_call(explainer, work, ledger=True),
        "graph": graph_call(explainer, work),
    }
    with ExitStack() as stack:
        if name in CONVOLUTIONAL and peers.zennit_installed():
            calls["zennit"] = stack.enter_context(peers.zennit_call(work, name, kept.seed))
        if name == "attnlrp" and work.explained == "inputs_embeds":
            calls["modified"] = modified_gradient(work)
        expected = work.of(kept.relevance)
        calls["gradient"]()
        label = f"{work.name} under {name}"
        differs = [
            made.check(f"{label}, {peer}", calls[peer](), expected) for peer in ("lrpfx", "graph")
        ]
        if "zennit" in calls:  # in float32 deep networks amplify that it folds in another order
            differs.append(f"{difference(calls['zennit'](), expected):.0e}")
        if "modified" in calls:  # which have no stabilizer
            bare = lrpfx.composites.AttnLRP(epsilon=1e-12)
            exact = work.of(
                lrpfx.explain(work.model, work.inputs, work.score, rules=bare).relevance
            )
            differs.append(made.check(f"{label}, modified", calls["modified"](), exact))
        # The two by themselves: what takes much memory slows down what comes after it.
        two = {peer: calls[peer] for peer in ("gradient", "lrpfx")}
        times = interleaved(two, budget)
        of = {"lrpfx": ratio(times["lrpfx"], times["gradient"])}
        added = products(two["lrpfx"]) - products(two["gradient"])
        of["floor"] = f"{1 + added / quartiles(times['gradient'])[1]:.2f}"
        del calls["lrpfx"]
        others = interleaved(calls, budget, least=2)
        of |= {peer: ratio(t, others["gradient"]) for peer, t in others.items()}
    made.add(
        work.name + ("" if work.x.dtype == torch.float32 else ", bf16"),
        name,
        milliseconds(times["gradient"]),
        milliseconds(times["lrpfx"]),
        of["lrpfx"],
        f"{GOALS[name]:.2f}",
        of["floor"],
        of["ledger"],
        of["graph"],
        of.get("zennit", ""),
        of.get("modified", ""),
        "; ".join(differs),
    )


def setup_seconds(work: Work, rules: str, repeats: int = 3) -> Iterator[float]:
    """CPU seconds of capture and rewrite, after a first one that imports what it needs.

    The graph is rewritten when it is first run, so from the first explanation a second is taken.
    """
    lrpfx.Explainer(work.model, work.inputs, rules)
    for _ in range(repeats):
        start = time.process_time()
        explainer = lrpfx.Explainer(work.model, work.inputs, rules)
        explainer(work.inputs, ledger=False)
        first = time.process_time()
        explainer(work.inputs, ledger=False)
        yield first - start - (time.process_time() - first)


def bare_call(explainer: lrpfx.Explainer, work: Work) -> Call:
    """What an explanation without a ledger runs, and nothing around it."""
    graph, _ = explainer._engine.graphs.for_calls((), fast=True)
    leaves = pytree.tree_leaves(split_inputs(work.inputs))

    def call() -> torch.Tensor:
        with torch.no_grad():
            run = Run(*graph(*leaves, None))
            output, seed = run.explained[0], torch.zeros_like(run.explained[0])
            seed[..., works.CLASS] = output[..., works.CLASS]
            return torch.autograd.grad(run.phantoms[0], run.starts[0], seed)[0]

    return call


def overhead(work: Work, rules: str, budget: float) -> str:
    """What a later call costs over the graph that it runs."""
    explainer = lrpfx.Explainer(work.model, work.inputs, rules, freeze=True)
    calls = {"bare": bare_call(explainer, work), "call": relevance_call(explainer, work)}
    found = difference(calls["call"](), calls["bare"]())
    if found > 1e-6:
        raise RuntimeError(f"{work.name}: the bare graph gives another map, by {found:.1e}")
    times = interleaved(calls, budget, least=10)
    low, middle, high = quartiles(
        [a / b for a, b in zip(times["call"], times["bare"], strict=True)]
    )
    return f"{work.name} {middle - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


def main() -> int:
    """Print the table, the time of setting up, and what a call adds to its graph."""
    options = command("cost_vs_gradient", __doc__).parse_args()
    warnings.simplefilter("ignore")
    slower = slowdown(torch.bfloat16)
    halves = slower < SLOW or bool(options.only)
    made = table(plan(options.only, halves), options.seconds)
    if not halves:
        made.notes.append(
            f"No rows in bf16: this CPU takes {slower:.0f} times as long for a product in it as in "
            "float32. `--only bfloat16` measures them in any case."
        )
    found = sorted(setup_seconds(works.image_work("resnet50", 2), "epsilon_plus"))
    made.notes.insert(
        0,
        f"Setting up an Explainer of ResNet-50, capture and rewrite: {found[1]:.1f} CPU seconds "
        f"({found[0]:.1f}-{found[-1]:.1f}); goal {SETUP_GOAL:.0f}.",
    )
    added = [
        overhead(works.image_work("resnet50", 2), "epsilon_plus", 4 * options.seconds),
        overhead(works.llama(128), "attnlrp", options.seconds),
    ]
    made.notes.insert(
        1, f"A later call over the graph that it runs: {', '.join(added)}; goal {CALL_GOAL:.0%}."
    )
    return publish("cost_vs_gradient", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
