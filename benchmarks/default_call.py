"""What a call costs as users make it, in gradients: ``python -m benchmarks.default_call``.

Parameters are live, so batch norms are folded anew by each call. The default call books nothing;
the report does, by the plain form, when it is first read.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

import lrpfx
from benchmarks import works
from benchmarks.measure import (
    Table,
    Work,
    command,
    gradient,
    interleaved,
    milliseconds,
    publish,
    ratio,
)

COLUMNS = (
    "model",
    "rules",
    "gradient, ms",
    "default",
    "ledger=False",
    "ledger=True",
    "default, report read",
    "first call",
    "map differs",
)
#: A model, made when it is its turn, and the rules it is explained under; "" for the default.
Plan = Sequence[tuple[Callable[[], Work], Sequence[str]]]
PLAN: dict[str, tuple[Callable[[], Work], Sequence[str]]] = {
    "resnet50": (
        lambda: works.image_work("resnet50", 1),
        ("epsilon_plus", "epsilon_alpha2_beta1", ""),
    ),
    "resnet18": (lambda: works.image_work("resnet18", 1), ("epsilon_plus", "")),
    "vit_b_16": (lambda: works.image_work("vit_b_16", 1), ("",)),
    "llama": (lambda: works.llama(128), ("",)),
}


def table(plan: Plan, budget: float) -> Table:
    """One row per model and rules."""
    made = Table("The default call, in gradients", COLUMNS)
    for make, rules in plan:
        work = make()
        for name in rules:
            add_row(made, work, name, budget)
    made.notes.append(
        "`first call`: as `ledger=False`, with what its edges carry measured for the alarm, in the "
        "first call of an Explainer only. Largest relative difference of the default's map from "
        "that of `ledger=True`."
    )
    return made


def add_row(made: Table, work: Work, rules: str, budget: float) -> None:
    """Time the ways to call an Explainer."""
    explainer = lrpfx.Explainer(work.model, work.inputs, rules or None)

    def explained(**options: bool) -> lrpfx.Explanation:
        return explainer(work.inputs, work.score, **options)

    def first() -> lrpfx.Explanation:
        explainer._engine.alarm.forget()
        return explained(ledger=False)

    kept, fast = explained(ledger=True), explained()
    label = f"{work.name} under {rules or 'the default'}"
    differs = made.check(label, work.of(fast.relevance), work.of(kept.relevance))
    calls = {
        "gradient": gradient(work),
        "default": explained,
        "never": lambda: explained(ledger=False),
        "booked": lambda: explained(ledger=True),
        "read": lambda: explained().report.rows,
        "first": first,
    }
    for call in calls.values():
        call()
    times = interleaved(calls, budget)
    others = (ratio(times[n], times["gradient"]) for n in list(calls)[1:])
    row = work.name, rules or "default", milliseconds(times["gradient"]), *others, differs
    made.add(*row)


def main() -> int:
    """Print the table."""
    options = command("default_call", __doc__).parse_args()
    warnings.simplefilter("ignore")
    plan = [entry for name, entry in PLAN.items() if options.only in name]
    made = table(plan, options.seconds)
    made.notes.append(f"Load of the machine meanwhile: {os.getloadavg()[1]:.0f}.")
    return publish("default_call", made, options.write)


if __name__ == "__main__":
    sys.exit(main())
