"""A data set -> for each concept the samples that show it best, and what it speaks for."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lrpfx.concepts.bar import shown
from lrpfx.concepts.engines import in_processes, on_ray
from lrpfx.concepts.samples import Samples
from lrpfx.concepts.store import Store, parquet
from lrpfx.concepts.table import ConceptTable, load
from lrpfx.concepts.work import TargetRule, Work
from lrpfx.conditions import Concept
from lrpfx.errors import InputError
from lrpfx.explain import Explainer


def scan(
    explainer: Explainer,
    dataset: Any,
    *,
    layers: Sequence[str],
    out: str | os.PathLike[str],
    target: TargetRule = "label",
    k: int = 40,
    statistic: Literal["sum", "max"] = "sum",
    normalize: Literal["sample"] | None = "sample",
    activation: Literal["after", "before"] = "after",
    normalize_activation: Literal["sample"] | None = None,
    kinds: Mapping[str, Concept] | None = None,
    batch_size: int = 32,
    workers: int = 1,
    engine: Literal["ray"] | None = None,
    ids: Sequence[int] | None = None,
    progress: bool = True,
) -> ConceptTable:
    """Explain every sample, and keep what its concepts carried.

    For each concept the k samples are kept in which its relevance is largest (RelMax), and those in
    which its activation is (ActMax); over all, and for each class. What differs by round-off is a
    tie, and so are samples with the same content: the smaller number wins. So the samples are the
    same for any batch size and whoever does the work.

    Killed at any moment and called again, it goes on where it was. Under ``torchrun`` each process
    does its share of the samples, and the first puts them together.

    Args:
        explainer: Of the model.
        dataset: With ``len`` and numbered items: inputs, (inputs, label), or a dict with a "label".
            Inputs are a tensor, a tuple of tensors, or a dict. An iterable one needs ``ids``.
        layers: Places as in ``conditions=``.
        out: Folder for the result.
        target: What is explained of each sample: its label, the class that the model predicts (it
            then counts for this class), or a callable as in ``lrpfx.explain``.
        k: How many samples are kept for each concept.
        statistic: Relevance of a concept is summed over its positions, or that of the best one.
        normalize: "sample": relevance is divided by the sum of its absolute values over the
            layer's concepts, so that samples with large outputs do not win.
        activation: Read "after" the nonlinearity that follows a layer, or "before" it. A concept's
            is the largest over its positions; of a kind that has none, all that is the concept's.
        normalize_activation: The same for activation.
        kinds: By layer, the kind of concepts; channels elsewhere.
        batch_size: How many samples are explained at a time.
        workers: Processes on this machine, or actors of Ray.
        engine: "ray": by actors of Ray Data. The model and the data set are sent to them, and the
            folder must be one for all. It needs ``pip install 'lrpfx[ray]'``.
        ids: The number of each item of an iterable data set; of another, which items to read.
        progress: Whether to show a progress bar.

    Returns:
        The table, which ``lrpfx.concepts.load(out)`` reads again.

    Raises:
        InputError: The folder holds the scan of another model, data set or rule, or cannot be
            written; a sample cannot be read. What was done is kept.

    Source: Achtibat et al. 2023 (RelMax), https://doi.org/10.1038/s42256-023-00711-8, eq. 7.
    """
    parquet()  # before the work
    if workers < 1 or engine not in (None, "ray"):
        raise InputError(
            f"workers={workers!r}, engine={engine!r} are not known.",
            fix='give at least one worker, and engine=None or "ray".',
        )
    work = Work(
        explainer,
        Samples(dataset, ids),
        tuple(layers),
        target,
        k,
        statistic,
        normalize,
        activation,
        normalize_activation,
        dict(kinds or {}),
        batch_size,
    )
    store = Store(out, work.facts(), work.cut())
    if not store.complete:
        _do(work, store, workers, engine, progress)
    elif _place()[0] == 0:
        store.tidy()
    return load(out)


def _do(work: Work, store: Store, workers: int, engine: str | None, progress: bool) -> None:
    """What is missing: this process's share of it, and the tables."""
    rank, world = _place()
    share, bounds = store.parts[rank::world], store.bounds
    own = [part for part in share if store.reached(part) < bounds[part + 1]]
    size = sum(bounds[part + 1] - bounds[part] for part in share)
    done = sum(store.reached(part) - bounds[part] for part in share)
    with shown(size, done, progress and rank == 0) as tell:
        if world == 1 and own and engine == "ray":
            on_ray(work, store, workers, tell)
        elif world == 1 and workers > 1 and len(own) > 1:
            in_processes(work, store, workers, tell)
        else:
            for part in own:
                work.run(part, store, tell)
    if rank:
        while not store.complete:
            time.sleep(0.2)
        return
    while store.missing:
        time.sleep(0.2)
    store.finish(work.joined(store))


def _place() -> tuple[int, int]:
    """Which process of how many this is."""
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
