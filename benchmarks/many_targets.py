"""Many classes of one image: ``python -m benchmarks.many_targets``.

Several targets share the forward pass, and what a rule computes of it. Asked is how much one of 16
classes, and of all classes, costs beside an explanation by itself.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lrpfx
from benchmarks import peers, works
from benchmarks.measure import (
    Table,
    Work,
    command,
    interleaved,
    milliseconds,
    publish,
    quartiles,
    relevance_call,
)

COLUMNS = (
    "model",
    "composite",
    "targets",
    "one target, ms",
    "per target of many, ms",
    "ratio",
    "map differs",
)
#: The models, and whether all of their classes are explained, too.
MODELS = {"resnet18": True, "vgg11": False}


def table(
    makes: Sequence[tuple[Callable[[], Work], bool]], composites: Sequence[str], budget: float
) -> Table:
    """16 targets, then all classes where that is asked for."""
    made = Table("Many targets", COLUMNS)
    for make, every in makes:
        work = make()
        with torch.no_grad():
            size = work.run(work.model, work.x).shape[1]
        for name in composites:
            explainer = lrpfx.Explainer(work.model, work.inputs, peers.composite(name))
            some = list(range(0, size, max(1, size // 16)))[:16]
            add_row(made, work, name, explainer, some, [some] * len(work.x), budget)
            if every:
                add_row(made, work, name, explainer, list(range(size)), "all", budget)
    made.notes.append(
        "The map's difference is that of the first and the last target from the explanation of "
        "this target alone, the ledger kept."
    )
    return made


def add_row(
    made: Table,
    work: Work,
    name: str,
    explainer: lrpfx.Explainer,
    classes: Sequence[int],
    target: Any,
    budget: float,
) -> None:
    """One target alone and many of them, in turns."""
    calls = {
        "one": relevance_call(explainer, work, classes[0]),
        "many": relevance_call(explainer, work, target),
    }
    together = calls["many"]()
    ends = torch.cat([together[0], together[-1]])
    alone = [relevance_call(explainer, work, classes[i], ledger=True)() for i in (0, -1)]
    differs = made.check(f"{work.name}, {len(classes)} targets", ends, torch.cat(alone))
    calls["one"]()
    times = interleaved(calls, budget, least=2, most=20)
    each = [t / len(classes) for t in times["many"]]
    low, middle, high = quartiles([a / b for a, b in zip(each, times["one"], strict=True)])
    made.add(
        work.name,
        name,
        str(len(classes)),
        milliseconds(times["one"]),
        milliseconds(each),
        f"{middle:.2f} ({low:.2f}-{high:.2f})",
        differs,
    )


def main() -> int:
    """Print the table."""
    options = command("many_targets", __doc__).parse_args()
    warnings.simplefilter("ignore")
    makes = [
        (functools.partial(works.image_work, name, 1, 128), every)
        for name, every in MODELS.items()
        if options.only in name
    ]
    made = table(makes, ("epsilon_plus",), options.seconds)
    return publish("many_targets", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
