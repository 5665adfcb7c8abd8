"""Train, explain, evaluate, and write the page: ``python -m benchmarks.faithfulness --write``."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
from pathlib import Path

import torch

from benchmarks.faithfulness.measure import Outcome, measure
from benchmarks.faithfulness.page import write
from benchmarks.faithfulness.tasks import RECIPES
from benchmarks.measure import DOCS


def main() -> int:
    """Measure all tasks and seeds, as many at a time as there are jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--lxt", help="interpreter of an environment with LXT")
    parser.add_argument("--keep", type=Path, help="folder for results, from which it goes on")
    parser.add_argument("--write", action="store_true", help="write docs/faithfulness.md")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = []
        for seed, kind in itertools.product(range(options.seeds), options.only):
            kept = options.keep / f"{kind}-{seed}.pt" if options.keep else None
            if kept is not None and kept.exists():
                outcomes.append(torch.load(kept, weights_only=False))
                continue
            job = pool.submit(measure, kind, seed, options.samples, options.lxt)
            waiting.append((job, kept))
        for job, kept in waiting:
            outcomes.append(job.result())
            if kept is not None:
                torch.save(outcomes[-1], kept)
    order = {kind: [o for o in outcomes if o.kind == kind] for kind in options.only}
    write(order, DOCS if options.write else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
