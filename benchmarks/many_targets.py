"""Many classes of one image: ``python -m benchmarks.many_targets``.

Several targets share the forward pass, and what a rule computes of it. Asked is how much one of 16
classes, and of all classes, costs beside an explanation by itself. If this version of lrpfx takes
only one target per sample, the targets are explained one after the other, and the table says so.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    "how",
    "one target, ms",
    "per target of many, ms",
    "ratio",
    "map differs",
)
#: Explained one after the other at most: the time per target does not depend on how many follow.
LOOPED = 16


def takes_many(explainer: lrpfx.Explainer, work: Work) -> bool:
    """Whether several targets per sample can be given."""
    try:
        found = explainer(work.inputs, target=[[0, 1]] * len(work.x))
    except lrpfx.errors.LrpError:
        return False
    return bool(work.of(found.relevance).shape == (2, *work.x.shape))


def many_call(
    explainer: lrpfx.Explainer, work: Work, classes: Sequence[int], target: Any, many: bool
) -> Callable[[], Tensor]:
    """Relevance (targets, N, ...), by one call or one after the other."""
    if many:
        return relevance_call(explainer, work, target)
    calls = [relevance_call(explainer, work, k) for k in classes]
    return lambda: torch.stack([call() for call in calls])


def table(makes: Sequence[Callable[[], Work]], composites: Sequence[str], budget: float) -> Table:
    """16 targets, then all classes."""
    made = Table("Many targets", COLUMNS)
    for make in makes:
        work = make()
        with torch.no_grad():
            size = work.run(work.model, work.x).shape[1]
        for name in composites:
            explainer = lrpfx.Explainer(work.model, work.inputs, peers.composite(name))
            many = takes_many(explainer, work)
            some = list(range(0, size, max(1, size // 16)))[:16]
            for classes, target in ((some, [some] * len(work.x)), (list(range(size)), "all")):
                add_row(made, work, name, explainer, classes, target, many, budget)
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
    many: bool,
    budget: float,
) -> None:
    """One target alone and many of them, in turns."""
    counted = classes if many else classes[:LOOPED]
    calls = {
        "one": relevance_call(explainer, work, classes[0]),
        "many": many_call(explainer, work, counted, target, many),
    }
    together = calls["many"]()
    ends = torch.cat([together[0], together[-1]])
    alone = [relevance_call(explainer, work, counted[i], ledger=True)() for i in (0, -1)]
    differs = made.check(f"{work.name}, {len(classes)} targets", ends, torch.cat(alone))
    calls["one"]()
    times = interleaved(calls, budget, most=20)
    each = [t / len(counted) for t in times["many"]]
    low, middle, high = quartiles([a / b for a, b in zip(each, times["one"], strict=True)])
    how = "one call" if many else f"a loop, {len(counted)} of them timed"
    made.add(
        work.name,
        name,
        str(len(classes)),
        how,
        milliseconds(times["one"]),
        milliseconds(each),
        f"{middle:.2f} ({low:.2f}-{high:.2f})",
        differs,
    )


def main() -> int:
    """Print the table."""
    options = command("many_targets", __doc__).parse_args()
    warnings.simplefilter("ignore")
    names = [name for name in ("resnet18", "vgg11") if options.only in name]
    makes = [functools.partial(works.image_work, name, 1, 128) for name in names]
    made = table(makes, ("epsilon_plus",), options.seconds)
    return publish("many_targets", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
