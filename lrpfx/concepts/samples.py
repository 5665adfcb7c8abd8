"""A data set -> batches of samples that know their number, label and content."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lrpfx.concepts.store import digest
from lrpfx.errors import InputError

#: Keys of a dict item that hold its label.
_LABELS = ("label", "labels", "target")


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Args:
        inputs: As the model takes them.
        labels: Shape (N,), or None.
        numbers: Of the samples.
        contents: A hash of each sample.
    """

    inputs: Any
    labels: Tensor | None
    numbers: NDArray[np.int64]
    contents: NDArray[np.int64]


class Samples:
    """A data set, read in order.

    Args:
        dataset: With ``len`` and numbered items; or an iterable one, with numbers for its items.
        ids: Of an iterable data set, the number of each item. Of one with numbered items, those to
            read.

    Raises:
        InputError: It is neither, or is empty.
    """

    def __init__(self, dataset: Any, ids: Sequence[int] | None) -> None:
        self.dataset = dataset
        self.numbered = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not self.numbered and (ids is None or not isinstance(dataset, Iterable)):
            raise InputError(
                "scan() takes a data set with len() and numbered items, or an iterable one with "
                "ids.",
                fix="give ids=range(n), the number of each item, or read the items into a list.",
            )
        self.ids = np.arange(len(dataset)) if ids is None else np.asarray(ids, dtype=np.int64)
        if len(self.ids) == 0 or len(np.unique(self.ids)) < len(self.ids) or self.ids.min() < 0:
            raise InputError(
                f"there are {len(self.ids)} samples with {len(np.unique(self.ids))} different "
                "numbers.",
                fix="give at least one sample, and each a number of its own from 0 on.",
            )
        self._stream: Iterator[Any] = iter(())
        self._next, self._begun = 0, False

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """A hash: of all samples where they are tensors, else of some and how many there are."""
        known = getattr(self.dataset, "_fingerprint", None)
        tensors: dict[str, Tensor] = {"ids": torch.from_numpy(self.ids)}
        if isinstance(known, str):
            return hashlib.sha256(f"{known} {digest(tensors)}".encode()).hexdigest()[:16]
        if type(self.dataset) is TensorDataset:
            tensors |= {str(i): t for i, t in enumerate(self.dataset.tensors)}
        elif isinstance(self.dataset, Tensor):
            tensors["0"] = self.dataset
        else:
            n = len(self)
            for i in sorted({0, n // 3, 2 * n // 3, n - 1}) if self.numbered else [0]:
                item = self._item(i) if self.numbered else self._peek()
                tensors |= {f"{i}.{j}": t for j, t in enumerate(_tensors(item))}
        return digest(tensors)

    def batches(self, first: int, end: int, size: int) -> Iterator[Batch]:
        """Those from one place to another."""
        if self.numbered:
            # The loader hands on what the data set raises, which says the sample.
            for rows in DataLoader(_Rows(self, first, end), size, collate_fn=list):
                yield self._batch(rows)
            return
        items = self._from(first)
        for start in range(first, end, size):
            some = range(start, min(start + size, end))
            yield self._batch([(int(self.ids[i]), self._read(items, i)) for i in some])

    def some(self, numbers: Sequence[int]) -> Batch:
        """Samples by number."""
        if not self.numbered:
            raise InputError(
                "samples of an iterable data set cannot be read by number.",
                fix="give dataset= as a list or dict from numbers to items.",
            )
        return self._batch([(n, self._at(n)) for n in numbers])

    def item(self, i: int) -> tuple[int, Any]:
        """Number and content of the i-th."""
        return int(self.ids[i]), self._item(i)

    def _item(self, i: int) -> Any:
        return self._at(int(self.ids[i]))

    def _at(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except Exception as error:  # the data set is the user's, and may raise anything
            raise _unreadable(number, error) from error

    def _from(self, first: int) -> Iterator[Any]:
        """The items of an iterable from one place on."""
        if not self._begun or self._next > first:
            self._stream, self._next, self._begun = iter(self.dataset), 0, True
        for i in range(self._next, first):
            self._read(self._stream, i)
        return self._stream

    def _peek(self) -> Any:
        """The first item of an iterable, which may be one that can be read only once."""
        stream = iter(self.dataset)
        first = self._read(stream, 0)
        if iter(self.dataset) is stream:
            self._stream, self._begun = itertools.chain([first], stream), True
        self._next = 0
        return first

    def _read(self, items: Iterator[Any], i: int) -> Any:
        number = int(self.ids[i])
        try:
            item = next(items)
        except StopIteration as error:
            raise InputError(
                f"the data set ended before sample {number}.",
                fix=f"there are {len(self)} ids: give as many as there are items.",
            ) from error
        except Exception as error:  # likewise
            raise _unreadable(number, error) from error
        self._next = i + 1
        return item

    def _batch(self, rows: Sequence[tuple[int, Any]]) -> Batch:
        pairs = [_parted(item) for _, item in rows]
        try:
            inputs = default_collate([inputs for inputs, _ in pairs])
        except Exception as error:  # whatever inputs that differ lead to
            raise InputError(
                f"samples {rows[0][0]} to {rows[-1][0]} cannot be put into one batch: {error}",
                fix="make their inputs tensors of the same shape, or scan with batch_size=1.",
            ) from error
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        labels = [label for _, label in pairs]
        if None in labels:
            none = [rows[i][0] for i, label in enumerate(labels) if label is None]
            if len(none) < len(labels):
                raise InputError(
                    f"sample {none[0]} has no label, and others have.", fix="give all, or none."
                )
            labels = []
        return Batch(
            inputs,
            torch.tensor(labels) if labels else None,
            np.array([number for number, _ in rows], dtype=np.int64),
            np.array([_content(item) for _, item in rows], dtype=np.int64),
        )


class _Rows(Dataset[tuple[int, Any]]):
    """Some items with their numbers."""

    def __init__(self, samples: Samples, first: int, end: int) -> None:
        self._samples, self._first, self._end = samples, first, end

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return self._samples.item(self._first + i)

    def __len__(self) -> int:
        return self._end - self._first


def label_of(item: Any) -> int | None:
    """The label of an item, if it has one."""
    return _parted(item)[1]


def _parted(item: Any) -> tuple[Any, int | None]:
    """Inputs and label of an item: a pair, a tuple that ends with a label, or a dict with one."""
    if isinstance(item, Mapping):
        key = next((k for k in _LABELS if k in item and _is_label(item[k])), None)
        rest = {k: v for k, v in item.items() if k != key}
        return rest, None if key is None else int(item[key])
    if isinstance(item, (tuple, list)):
        if len(item) > 1 and _is_label(item[-1]):
            inputs = item[0] if len(item) == 2 else tuple(item[:-1])
            return inputs, int(item[-1])
        return item[0] if len(item) == 1 else tuple(item), None
    return item, None


def _is_label(value: Any) -> bool:
    if isinstance(value, Tensor):
        counts = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        return counts and value.numel() == 1 and value.ndim < 2
    if isinstance(value, (np.ndarray, np.generic)):
        return value.size == 1 and value.ndim < 2 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, int) and not isinstance(value, bool)


def _tensors(item: Any) -> list[Tensor]:
    def tensor(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, (str, bytes)) or leaf is None:
            raw = leaf if isinstance(leaf, bytes) else str(leaf).encode()
            return torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)
        return torch.from_numpy(np.atleast_1d(np.asarray(leaf)).copy())

    leaves: list[Tensor] = tree_leaves(tree_map(tensor, item))
    return leaves


def _content(item: Any) -> int:
    """A hash of 63 bits."""
    found = hashlib.blake2b(digest_size=8)
    for leaf in _tensors(item):
        plain = leaf.detach().cpu().contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "big") >> 1


def _unreadable(number: int, error: Exception) -> InputError:
    return InputError(
        f"sample {number} of the data set cannot be read: {type(error).__name__}: {error}",
        fix="mend or leave out this sample, and scan again: what was done is kept.",
    )
