"""A data set -> for each concept the samples that show it best, and what it speaks for."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lrpfx.concepts.accumulate import Accumulator
from lrpfx.concepts.store import Store, digest, parquet
from lrpfx.concepts.table import ConceptTable, load
from lrpfx.conditions import Channel, Concept
from lrpfx.errors import InputError
from lrpfx.explain import Explainer

#: Into how many parts a data set is cut at most; each is a file until all are done.
_SHARDS = 30

TargetRule = Literal["label", "predicted"] | Callable[[Any], Tensor]


def scan(
    explainer: Explainer,
    dataset: Dataset[Any],
    *,
    layers: Sequence[str],
    out: str | os.PathLike[str],
    target: TargetRule = "label",
    k: int = 40,
    statistic: Literal["sum", "max"] = "sum",
    normalize: Literal["sample"] | None = "sample",
    kinds: Mapping[str, Concept] | None = None,
    batch_size: int = 32,
    workers: int = 1,
    progress: bool = True,
) -> ConceptTable:
    """Explain every sample, and keep what its concepts carried.

    For each concept the k samples are kept in which its relevance is largest (RelMax), and those in
    which its activation is (ActMax); over all, and for each class. Scores are compared by their
    first four digits, so that round-off decides nothing; the smaller number wins a tie.

    Killed at any moment and called again, it goes on with the parts that are missing. Under
    ``torchrun`` each process does its share, and the first puts them together.

    Args:
        explainer: Of the model.
        dataset: With ``len`` and numbered items: inputs, or (inputs, label). Inputs are a tensor,
            a tuple of tensors, or a dict.
        layers: Places as in ``conditions=``.
        out: Folder for the result.
        target: What is explained of each sample: its label, the class that the model predicts, or
            a callable as in ``lrpfx.explain``.
        k: How many samples are kept for each concept.
        statistic: Relevance of a concept is summed over its positions, or that of the best one.
        normalize: "sample": relevance is divided by the sum of its absolute values over the
            layer's concepts, so that samples with large outputs do not win. Activation is not.
        kinds: By layer, the kind of concepts; channels elsewhere.
        batch_size: How many samples are explained at a time.
        workers: Processes on this machine.
        progress: Whether to show a progress bar.

    Returns:
        The table, which ``lrpfx.concepts.load(out)`` reads again.

    Raises:
        InputError: The folder holds the scan of another model, data set or rule, or cannot be
            written; a sample cannot be read. What was done is kept.

    Source: Achtibat et al. 2023 (RelMax), https://doi.org/10.1038/s42256-023-00711-8, eq. 7.
    """
    parquet()  # before the work
    work = _Work(
        explainer,
        dataset,
        tuple(layers),
        target,
        k,
        statistic,
        normalize,
        dict(kinds or {}),
        batch_size,
    )
    store = Store(out, work.facts())
    if store.complete:
        return load(out)
    rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    missing = [s for s in work.shards if s % world == rank and not store.has(s)]
    if workers > 1 and len(missing) > 1:
        _in_processes(work, store, missing, workers)
    else:
        for shard in _shown(missing, work, progress and rank == 0):
            store.write_shard(shard, work.run(shard))
    if rank:
        return _wait(out)
    while absent := [s for s in work.shards if not store.has(s)]:
        if world == 1:
            raise InputError(f"{len(absent)} part(s) of the scan failed.", fix="scan again.")
        time.sleep(0.2)
    store.finish(work.joined(store), len(work.shards))
    return load(out)


@dataclass
class _Work:
    explainer: Explainer
    dataset: Any
    layers: tuple[str, ...]
    target: TargetRule
    k: int
    statistic: str
    normalize: str | None
    kinds: dict[str, Concept]
    batch_size: int

    def __post_init__(self) -> None:
        try:
            self.size = len(self.dataset)
        except TypeError as error:
            raise InputError(
                "scan() takes a data set with len() and numbered items.",
                fix="read an iterable one into a list first.",
            ) from error
        if self.size == 0 or self.k < 1 or self.batch_size < 1 or not self.layers:
            raise InputError(
                f"nothing to scan: {self.size} samples, k={self.k}, batch_size={self.batch_size}, "
                f"layers={list(self.layers)}.",
                fix="give at least one of each.",
            )
        for name, value, known in (
            ("statistic", self.statistic, ("sum", "max")),
            ("normalize", self.normalize, ("sample", None)),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known.", fix=f"give one of {known}.")
        if not callable(self.target) and self.target not in ("label", "predicted"):
            raise InputError(
                f"target={self.target!r} is not known.",
                fix='give "label", "predicted", or a callable.',
            )
        batches = -(-self.size // self.batch_size)
        self.shards = range(min(_SHARDS, batches))
        # Whole batches, so that a sample is in the same batch whoever does the part.
        self.bounds = [batches * s // len(self.shards) for s in (*self.shards, len(self.shards))]

        #: Where the activation of each layer is read: behind its nonlinearity.
        self.active = {layer: self.explainer.places.behind(layer) for layer in self.layers}

    def facts(self) -> dict[str, Any]:
        """What makes the scan what it is."""
        model = self.explainer.model
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        rows = [(r.node, r.op, r.rule, list(map(str, r.shape))) for r in self.explainer.report.rows]
        name = self.target if isinstance(self.target, str) else _name(self.target)
        return {
            "model": type(model).__name__,
            "graph and rules": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
            "rules": self.explainer.report.rules,
            "parameters": digest(state),
            "data set": self._fingerprint(),
            "samples": self.size,
            "layers": list(self.layers),
            "kinds": {layer: repr(kind) for layer, kind in self.kinds.items()},
            "target": name,
            "k": self.k,
            "statistic": self.statistic,
            "normalize": self.normalize,
            "batch_size": self.batch_size,
            "torch": torch.__version__,
        }

    def _fingerprint(self) -> str:
        """Of the first, the last, and some samples between."""
        picked = sorted({0, self.size // 3, 2 * self.size // 3, self.size - 1})
        tensors: dict[str, Tensor] = {}
        for i in picked:
            for j, leaf in enumerate(torch.utils._pytree.tree_leaves(self._item(i))):
                value = leaf if isinstance(leaf, Tensor) else torch.tensor(np.asarray(leaf))
                tensors[f"{i}.{j}"] = value
        return digest(tensors)

    def _item(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except Exception as error:
            raise InputError(
                f"sample {i} of the data set cannot be read: {type(error).__name__}: {error}",
                fix="mend or leave out this sample, and scan again: what was done is kept.",
            ) from error

    def run(self, shard: int) -> dict[str, Mapping[str, NDArray[Any]]]:
        """Explain the samples of one part."""
        found = Accumulator(self.k)
        rows: dict[str, list[NDArray[Any]]] = {"sample": [], "label": [], "predicted": []}
        rows |= {f"vectors:{layer}": [] for layer in self.layers}
        first = self.bounds[shard] * self.batch_size
        end = min(self.bounds[shard + 1] * self.batch_size, self.size)
        readable: Any = Subset(_Told(self._item, self.size), range(first, end))
        start, asked = first, [*dict.fromkeys([*self.layers, *self.active.values()])]
        for batch in DataLoader(readable, self.batch_size):
            inputs, labels = _parted(batch)
            count = len(torch.utils._pytree.tree_leaves(inputs)[0])
            samples = np.arange(start, start + count)
            start += count
            classes = np.full(count, -1) if labels is None else labels.numpy().astype(np.int64)
            explanation = self.explainer(inputs, self._target(labels), layers=asked, ledger=False)
            rows["sample"].append(samples)
            rows["label"].append(classes)
            rows["predicted"].append(_predicted(explanation.output, count))
            for layer in self.layers:
                self._take(found, layer, explanation, samples, classes, rows)
        tables = dict(found.columns())
        tables["samples"] = {name: _stacked(parts) for name, parts in rows.items()}
        return tables

    def _target(self, labels: Tensor | None) -> Any:
        if self.target == "label":
            if labels is None:
                raise InputError(
                    'target="label" takes items (inputs, label).',
                    fix='give target="predicted", or labels.',
                )
            return labels
        return None if self.target == "predicted" else self.target

    def _take(
        self,
        found: Accumulator,
        layer: str,
        explanation: Any,
        samples: NDArray[np.int64],
        classes: NDArray[np.int64],
        rows: dict[str, list[NDArray[Any]]],
    ) -> None:
        calls = explanation.layers[layer]
        kind = self.kinds.get(layer, Channel())
        scores = explanation.concepts(layer, kind)
        placed = kind.at(calls.activation.shape, calls.channels)
        by_place = placed.positions(calls.relevance, calls.activation)
        if self.statistic == "max":
            if by_place is None:
                raise InputError(
                    f'{layer}: {kind} has no positions for statistic="max".', fix='give "sum".'
                )
            scores = by_place.amax(2)
        if self.normalize == "sample":
            total = scores.abs().sum(1, keepdim=True)
            scores = scores / torch.where(total == 0, 1, total)
        place = np.full(tuple(scores.shape), -1)
        found.update(
            layer,
            "relevance",
            scores.double().cpu().numpy(),
            place if by_place is None else by_place.argmax(2).cpu().numpy(),
            samples,
            classes,
        )
        behind = explanation.layers[self.active[layer]].activation
        active = placed.positions(behind, behind)
        if active is not None:
            most = active.max(2)
            values, at = most.values.double().cpu().numpy(), most.indices.cpu().numpy()
            found.update(layer, "activation", values, at, samples, classes)
        rows[f"vectors:{layer}"].append(scores.float().cpu().numpy())

    def joined(self, store: Store) -> dict[str, Mapping[str, NDArray[Any]]]:
        """All parts, in their order."""
        whole = Accumulator(self.k)
        samples: dict[str, list[NDArray[Any]]] = {}
        for shard in self.shards:
            tables = store.read_shard(shard)
            whole.merge(Accumulator.of_columns(self.k, tables))
            for name, column in tables["samples"].items():
                samples.setdefault(name, []).append(column)
        together = {name: np.concatenate(parts) for name, parts in samples.items()}
        return {**whole.columns(), "samples": together}


class _Told(Dataset[Any]):
    """A data set whose items say which of them fails."""

    def __init__(self, item: Callable[[int], Any], size: int) -> None:
        self._item, self._size = item, size

    def __getitem__(self, i: int) -> Any:
        return self._item(i)

    def __len__(self) -> int:
        return self._size


def _parted(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch."""
    if isinstance(batch, (list, tuple)):
        if len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim == 1:
            inputs, labels = batch
            if not labels.is_floating_point():
                return tuple(inputs) if isinstance(inputs, list) else inputs, labels
        return tuple(batch), None
    return batch, None


def _predicted(output: Any, count: int) -> NDArray[np.int64]:
    """The largest class of each sample; -1 where the output is none of (N, C)."""
    logits = next(
        (t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)), None
    )
    if logits is None or logits.ndim != 2:
        return np.full(count, -1)
    found: NDArray[np.int64] = logits.argmax(1).cpu().numpy()
    return found


def _stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _name(target: Callable[..., Any]) -> str:
    code = getattr(target, "__code__", None)
    body = (
        ""
        if code is None
        else hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()[:8]
    )
    return f"{getattr(target, '__name__', type(target).__name__)} {body}".strip()


def _shown(shards: Sequence[int], work: _Work, progress: bool) -> Iterator[int]:
    """The parts with a progress bar in samples."""
    if not progress:
        yield from shards
        return
    from tqdm import tqdm

    sizes = [
        min(work.bounds[s + 1] * work.batch_size, work.size) - work.bounds[s] * work.batch_size
        for s in shards
    ]
    with tqdm(total=work.size, initial=work.size - sum(sizes), unit=" samples") as bar:
        for shard, size in zip(shards, sizes, strict=True):
            yield shard
            bar.update(size)


def _in_processes(work: _Work, store: Store, shards: Sequence[int], workers: int) -> None:
    """Parts in processes of their own, which share the model as it is."""
    context = multiprocessing.get_context("fork")
    parts = [shards[w::workers] for w in range(workers)]
    errors = context.SimpleQueue()

    def run(own: Sequence[int]) -> None:
        # What a library's threads hold in the parent is held for good in a copy of it.
        torch.set_num_threads(1)
        try:
            for shard in own:
                store.write_shard(shard, work.run(shard))
        except Exception as error:
            errors.put(error if isinstance(error, InputError) else repr(error))

    running = [context.Process(target=run, args=(own,)) for own in parts if own]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if not errors.empty():
        error = errors.get()
        if isinstance(error, InputError):
            raise error
        raise InputError(f"a worker failed: {error}", fix="scan again with workers=1.")


def _wait(out: str | os.PathLike[str]) -> ConceptTable:
    """The table, once the first process has put it together."""
    while True:
        try:
            return load(out)
        except InputError as error:
            if "not finished" not in error.what:
                raise
            time.sleep(0.2)
