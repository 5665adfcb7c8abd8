"""A folder that a scan is kept in: a manifest, a shard for each part that is done, the tables.

A file is there whole or not at all: it is written beside its place, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrpfx.errors import InputError

#: Names of tables, and of each its columns, one entry per row.
Tables = Mapping[str, Mapping[str, NDArray[Any]]]
MANIFEST = "manifest.json"


def parquet() -> Any:
    """pyarrow and its Parquet module.

    Raises:
        InputError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            "scans are stored by pyarrow.", fix="pip install 'lrpfx[concepts]'."
        ) from error
    return pyarrow


class Store:
    """The folder of one scan.

    Args:
        folder: It is made if it is not there.
        facts: What makes this scan what it is; a folder of another is refused.

    Raises:
        InputError: The folder holds another scan, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists():
                _write(
                    manifest, lambda file: file.write(_json({"facts": facts, "complete": False}))
                )
        found = read_manifest(self.folder)["facts"]
        known = json.loads(_json(facts))
        if differing := [key for key in {**known, **found} if known.get(key) != found.get(key)]:
            raise InputError(
                f"{self.folder} holds another scan.",
                where=[
                    f"{key}: there {found.get(key)!r}, here {known.get(key)!r}" for key in differing
                ],
                fix="give another folder, or delete this one.",
            )

    @property
    def complete(self) -> bool:
        """Whether the tables are there."""
        return bool(read_manifest(self.folder)["complete"])

    def has(self, shard: int) -> bool:
        """Whether a part is done."""
        return self._shard(shard).exists()

    def write_shard(self, shard: int, tables: Tables) -> None:
        """Store what a part came to."""
        pa = parquet()
        columns = {
            f"{table}.{name}": pa.array([values.tolist()], pa.list_(_type(values)))
            for table, named in tables.items()
            for name, values in named.items()
        }
        with _told(self.folder):
            _write(self._shard(shard), lambda file: pa.parquet.write_table(pa.table(columns), file))

    def read_shard(self, shard: int) -> dict[str, dict[str, NDArray[Any]]]:
        """What a part came to.

        Raises:
            InputError: The file is damaged.
        """
        path = self._shard(shard)
        try:
            read = parquet().parquet.read_table(path)
            found: dict[str, dict[str, NDArray[Any]]] = {}
            for column in read.column_names:
                table, _, name = column.partition(".")
                (values,) = read[column].to_pylist()
                found.setdefault(table, {})[name] = np.array(values)
            return found
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file leads to
            raise InputError(
                f"{path} is damaged: {type(error).__name__}: {error}",
                fix="delete it, and scan again: only this part is done anew.",
            ) from error

    def finish(self, tables: Tables, shards: int) -> None:
        """Write the tables, and leave the parts out."""
        pa = parquet()
        with _told(self.folder):
            for name, columns in tables.items():
                arrays = {key: pa.array(v.tolist(), _type(v)) for key, v in columns.items()}
                write = functools.partial(pa.parquet.write_table, pa.table(arrays))
                _write(self.folder / f"{name}.parquet", write)
            facts = read_manifest(self.folder)["facts"]
            text = _json({"facts": facts, "complete": True})
            _write(self.folder / MANIFEST, lambda file: file.write(text))
            for shard in range(shards):
                self._shard(shard).unlink(missing_ok=True)

    def _shard(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:02}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    Raises:
        InputError: It holds no scan.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"facts": dict(found["facts"]), "complete": bool(found["complete"])}
    except Exception as error:  # whatever a missing or damaged file leads to
        raise InputError(
            f"{folder} holds no scan: {type(error).__name__}: {error}",
            fix="give the folder of lrpfx.concepts.scan(..., out=folder).",
        ) from error


def read_table(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """A table of a finished scan.

    Raises:
        InputError: The file is missing or damaged.
    """
    path = folder / f"{name}.parquet"
    try:
        read = parquet().parquet.read_table(path)
        return {column: np.array(read[column].to_pylist()) for column in read.column_names}
    except InputError:
        raise
    except Exception as error:  # whatever a missing or damaged file leads to
        raise InputError(
            f"{path} is damaged: {type(error).__name__}: {error}", fix="scan again."
        ) from error


def _type(values: NDArray[Any]) -> Any:
    """Of the rows of an array: numbers, words, or vectors."""
    pa = parquet()
    if values.ndim == 2:
        return pa.list_(pa.from_numpy_dtype(values.dtype))
    return pa.string() if values.dtype == object else pa.from_numpy_dtype(values.dtype)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {type(error).__name__}: {error}",
            fix="make room or give another folder; what was done is kept.",
        ) from error
