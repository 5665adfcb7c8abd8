"""lrpfx beside zennit: ``python -m benchmarks.vs_peers``.

Three of torchvision's models under the composites that both have: time in turns, and how far the
maps are apart. zennit gets a copy of the model with batch norm folded and the residual sums made
modules; its hooks are registered, and lrpfx's Explainer is set up, outside of the time.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence

import lrpfx
from benchmarks import peers, works
from benchmarks.measure import (
    Table,
    Work,
    command,
    interleaved,
    milliseconds,
    publish,
    ratio,
    relevance_call,
)

COMPOSITES = ("epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box")
COLUMNS = (
    "model",
    "composite",
    "zennit, ms",
    "lrpfx, ms",
    "lrpfx / zennit",
    "zennit's map differs",
)


def table(
    makes: Sequence[Callable[[], Work]], budget: float, composites: Sequence[str] = COMPOSITES
) -> Table:
    """One row per model and composite."""
    made = Table("Beside zennit", COLUMNS)
    for make in makes:
        work = make()
        for name in composites:
            explainer = lrpfx.Explainer(work.model, work.inputs, peers.composite(name))
            plain = explainer(work.inputs, work.score, ledger=True)
            expected = work.of(plain.relevance)
            ours = relevance_call(explainer, work)
            made.check(f"{work.name} under {name}, lrpfx", ours(), expected)
            with peers.zennit_call(work, name, plain.seed) as theirs:
                differs = made.check(f"{work.name} under {name}, zennit", theirs(), expected)
                times = interleaved({"zennit": theirs, "lrpfx": ours}, budget)
            made.add(
                work.name,
                name,
                milliseconds(times["zennit"]),
                milliseconds(times["lrpfx"]),
                ratio(times["lrpfx"], times["zennit"]),
                differs,
            )
    made.notes.append(
        "The difference is the largest relative one of a sample, in float32, from lrpfx with its "
        "ledger kept; that the two agree to 1e-9 in float64 is in "
        "`tests/rules/test_parity_zennit.py`."
    )
    return made


def main() -> int:
    """Print the table."""
    options = command("vs_peers", __doc__).parse_args()
    warnings.simplefilter("ignore")
    if not peers.zennit_installed():
        print("zennit is not installed: nothing to compare with.")
        return 0
    makes = [
        functools.partial(works.image_work, name, 1, side)
        for name, side in (("alexnet", 224), ("vgg11", 128), ("resnet18", 224))
        if options.only in name
    ]
    return publish("vs_peers", table(makes, options.seconds), options.write)


if __name__ == "__main__":
    sys.exit(main())
