"""Parts of a data set -> the best samples of each concept in them, stored."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import CodeType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lrpfx.concepts.accumulate import BY, Accumulator
from lrpfx.concepts.samples import Batch, Samples
from lrpfx.concepts.store import Columns, Store, digest, read_columns
from lrpfx.conditions import Channel, Concept
from lrpfx.errors import InputError, LrpError, NonFiniteError
from lrpfx.explain import Explainer

#: Into how many parts a data set is cut at most: two files each, until all are done.
_PARTS = 16
#: How long, and how many bytes of rows, are kept in memory before they are stored.
_SECONDS, _BYTES = 60.0, 2**26

#: How many parts are put together at a time.
_TOGETHER = 8

TargetRule = Literal["label", "predicted"] | Callable[[Any], Tensor]
#: Is told how many samples were done.
Tell = Callable[[int], Any]


@dataclass
class Work:
    """What a scan does to each sample; see ``lrpfx.concepts.scan``."""

    explainer: Explainer
    samples: Samples
    layers: tuple[str, ...]
    target: TargetRule
    k: int
    statistic: str
    normalize: str | None
    active: str
    normalize_active: str | None
    kinds: dict[str, Concept]
    batch_size: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1 or not self.layers:
            raise InputError(
                f"nothing to scan: k={self.k}, batch_size={self.batch_size}, "
                f"layers={list(self.layers)}.",
                fix="give at least one of each.",
            )
        for name, value, known in (
            ("statistic", self.statistic, ("sum", "max")),
            ("normalize", self.normalize, ("sample", None)),
            ("activation", self.active, ("after", "before")),
            ("normalize_activation", self.normalize_active, ("sample", None)),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known.", fix=f"give one of {known}.")
        if not callable(self.target) and self.target not in ("label", "predicted"):
            raise InputError(
                f"target={self.target!r} is not known.",
                fix='give "label", "predicted", or a callable.',
            )
        places = self.explainer.places
        #: Where the activation of each layer is read.
        self.behind = {
            layer: places.behind(layer) if self.active == "after" else places.find(layer).name
            for layer in self.layers
        }
        model = self.explainer.model
        self.state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        floats = [t for t in self.state.values() if t.is_floating_point()]
        self.dtype = floats[0].dtype if floats else torch.float32
        self.device = next(iter(self.state.values())).device if self.state else torch.device("cpu")
        #: Round-off of scores, relative; see ``accumulate``.
        self.tie = min(32 * torch.finfo(self.dtype).eps, 2.0**-12)

    def facts(self) -> dict[str, Any]:
        """What makes the scan what it is."""
        rows = [(r.node, r.op, r.rule, list(map(str, r.shape))) for r in self.explainer.report.rows]
        return {
            "model": type(self.explainer.model).__name__,
            "graph and rules": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
            "rules": self.explainer.report.rules,
            "parameters": digest(self.state),
            "dtype": str(self.dtype).removeprefix("torch."),
            "data set": self.samples.fingerprint(),
            "samples": len(self.samples),
            "layers": list(self.layers),
            "kinds": {layer: repr(kind) for layer, kind in self.kinds.items()},
            "target": self.target if isinstance(self.target, str) else _name(self.target),
            "k": self.k,
            "statistic": self.statistic,
            "normalize": self.normalize,
            "activation": self.active,
            "normalize_activation": self.normalize_active,
            "torch": torch.__version__,
            "lrpfx": sys.modules["lrpfx"].__version__,
        }

    def cut(self) -> list[int]:
        """Where the data set is cut: in whole batches, so that each is the same whoever does it."""
        batches = -(-len(self.samples) // self.batch_size)
        parts = min(_PARTS, batches)
        cuts = [batches * part // parts * self.batch_size for part in range(parts)]
        return [*cuts, len(self.samples)]

    def __reduce__(self) -> Any:
        """Another process captures the model anew."""
        return Work, tuple(getattr(self, field.name) for field in fields(self))

    def run(self, part: int, store: Store, tell: Tell = lambda count: None) -> None:
        """Do what is left of a part; what was done before an error is stored."""
        first, end = store.bounds[part], store.bounds[part + 1]
        begun = reached = store.reached(part)
        found = Accumulator(self.k, self.layers, self.tie)
        if reached > first:
            found = Accumulator.load(store.shard(part), self.k, self.layers, self.tie)
        rows: list[Columns] = []
        stored = time.monotonic()

        def keep() -> None:
            nonlocal begun
            if rows:
                together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
                written = store.extend_rows(part, begun - first, together)
                found.save(store.shard(part), reached=reached, rows=written)
                rows.clear()
                begun = reached

        try:
            for batch in self.samples.batches(reached, end, self.batch_size):
                rows.append(self._take(found, batch))
                reached += len(batch.numbers)
                tell(len(batch.numbers))
                size = sum(column.nbytes for row in rows for column in row.values())
                if time.monotonic() - stored > _SECONDS or size > _BYTES:
                    keep()
                    stored = time.monotonic()
        finally:
            keep()

    def joined(self, store: Store) -> dict[str, dict[str, Any]]:
        """All parts, in their order."""
        whole = Accumulator(self.k, self.layers, self.tie)
        for first in store.parts[::_TOGETHER]:
            some = store.parts[first : first + _TOGETHER]
            whole.merge(
                *(Accumulator.load(store.shard(p), self.k, self.layers, self.tie) for p in some)
            )
        tables: dict[str, dict[str, Any]] = dict(whole.columns())
        references, classes = tables["references"], tables["classes"]
        named = read_columns(map(store.rows, store.parts), ["sample", "label"])
        order = np.argsort(named["sample"])
        at = np.searchsorted(named["sample"][order], references["sample"])
        references["label"] = named["label"][order][at]
        references["score"] = _falling(references["score"], references["rank"])
        references["by"] = references["by"], BY
        for table in (references, classes):
            table["layer"] = table["layer"], self.layers
        return tables

    def explain(self, batch: Batch, **options: Any) -> Any:
        """The explanation of a batch.

        Raises:
            InputError: Of a sample that cannot be explained, with its number.
        """
        inputs, target = as_given(self.explainer, batch), self._target(batch.labels)
        try:
            return self.explainer(inputs, target, ledger=False, **options)
        except NonFiniteError as error:
            raise InputError(
                f"sample {self._odd(inputs, batch)} cannot be explained: {error.what}",
                where=error.where,
                fix="mend or leave out this sample, and scan again: what was done is kept.",
            ) from error
        except LrpError as error:
            numbers = batch.numbers
            error.args = (f"samples {numbers[0]} to {numbers[-1]}: {error}",)
            raise

    def _odd(self, inputs: Any, batch: Batch) -> int:
        """The first sample with a value that is not finite."""
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                bad = ~leaf.flatten(1).isfinite().all(1)
                if bool(bad.any()):
                    return int(batch.numbers[int(bad.nonzero()[0])])
        return int(batch.numbers[0])

    def _take(self, found: Accumulator, batch: Batch) -> Columns:
        """Take in a batch, and make the rows of its samples."""
        count = len(batch.numbers)
        asked = [*dict.fromkeys([*self.layers, *self.behind.values()])]
        explanation = self.explain(batch, layers=asked)
        none = np.full(count, -1)
        labels = none if batch.labels is None else batch.labels.numpy().astype(np.int64)
        predicted = _predicted(explanation.output, count)
        classes = predicted if self.target == "predicted" else labels
        rows = {"sample": batch.numbers, "label": labels, "predicted": predicted}
        for layer in self.layers:
            scores, positions = self._relevance(layer, explanation)
            seen = batch.numbers, classes, batch.contents
            found.update(layer, "relevance", scores, positions, *seen)
            rows[f"vectors:{layer}"] = scores.astype(np.float32)
            found.update(layer, "activation", *self._activation(layer, explanation), *seen)
        return rows

    def _relevance(self, layer: str, explanation: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scores of each concept, and where they are highest."""
        at = explanation.layers[layer]
        kind = self.kinds.get(layer, Channel())
        each = kind.at(at.activation.shape, at.channels).positions(at.relevance, at.activation)
        if self.statistic == "sum":
            scores = explanation.concepts(layer, kind)
        elif each is None:
            raise InputError(
                f'{layer}: {kind} has no positions for statistic="max".', fix='give "sum".'
            )
        else:
            scores = each.amax(2)
        if self.normalize == "sample":
            scores = _shares(scores)
        places = np.full(tuple(scores.shape), -1) if each is None else _numbers(each.argmax(2))
        return _numbers(scores), places

    def _activation(self, layer: str, explanation: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """The largest of each concept over its positions, and where; all of it without those."""
        at, behind = explanation.layers[layer], explanation.layers[self.behind[layer]].activation
        kind = self.kinds.get(layer, Channel()).at(at.activation.shape, at.channels)
        each = kind.positions(behind, behind)
        if each is None:
            scores = kind.encode(behind, behind)
            places = torch.full(tuple(scores.shape), -1)
        else:
            scores, places = each.max(2)
        scores = _shares(scores) if self.normalize_active == "sample" else scores
        return _numbers(scores), _numbers(places)

    def _target(self, labels: Tensor | None) -> Any:
        if self.target == "label":
            if labels is None:
                raise InputError(
                    'target="label" takes items (inputs, label).',
                    fix='give target="predicted", or labels.',
                )
            return labels.to(self.device)
        return None if self.target == "predicted" else self.target


def as_given(explainer: Explainer, batch: Batch) -> Any:
    """The inputs of a batch as the model takes them, on its device."""
    model = explainer.model
    one = next(iter([*model.parameters(), *model.buffers()]), None)
    given = batch.inputs
    if one is not None:
        given = tree_map(lambda leaf: leaf.to(one.device), given)
    if isinstance(given, dict) and not explainer.keywords:
        values = tuple(given.values())
        return values[0] if len(values) == 1 else values
    return given


def _shares(scores: Tensor) -> Tensor:
    """Scores divided by their absolute sum over concepts."""
    total = scores.abs().sum(1, keepdim=True)
    return scores / torch.where(total == 0, 1, total)


def _numbers(values: Tensor) -> NDArray[Any]:
    values = values.detach().cpu()
    short = values.is_floating_point() and values.dtype not in (torch.float32, torch.float64)
    found: NDArray[Any] = (values.float() if short else values).numpy()
    return found


def _falling(scores: NDArray[Any], ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scores that do not rise from one rank to the next: ties have that of the first."""
    found = scores.astype(np.float64) + 0.0  # without negative zeros
    for rank in range(1, int(ranks.max(initial=0)) + 1):
        at = np.flatnonzero(ranks == rank)
        found[at] = np.minimum(found[at], found[at - 1])
    return found


def _predicted(output: Any, count: int) -> NDArray[np.int64]:
    """The largest class of each sample; -1 where the output is none of (N, C)."""
    logits = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
    if logits is None or logits.ndim != 2:
        return np.full(count, -1)
    found: NDArray[np.int64] = logits.argmax(1).cpu().numpy()
    return found


def _name(target: Callable[..., Any]) -> str:
    """What a callable is called, and a hash of what it does that is the same in any process."""
    name = getattr(target, "__name__", type(target).__name__)
    code = getattr(target, "__code__", None)
    cells = [cell.cell_contents for cell in getattr(target, "__closure__", None) or ()]
    known = [_plain(code), *map(_plain, cells)]
    return f"{name} {hashlib.sha256(repr(known).encode()).hexdigest()[:8]}"


def _plain(value: Any) -> Any:
    """Of code what it does, and of objects their type: neither has an address."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, *map(_plain, value.co_consts)
    if isinstance(value, (tuple, list)):
        return [*map(_plain, value)]
    return (
        value if isinstance(value, (int, float, str, bytes, type(None))) else type(value).__name__
    )
