"""A folder that a scan is kept in: a manifest, a shard for each part, the rows of all samples.

A file is there whole or not at all: it is written beside its place, flushed, and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrpfx.errors import InputError

#: Names of tables, and of each its columns, one entry per row.
Tables = Mapping[str, Mapping[str, NDArray[Any]]]
Columns = dict[str, NDArray[Any]]
MANIFEST = "manifest.json"
#: Rows of a row group.
_GROUP = 4096


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
        bounds: Where the data set is cut into parts; those of a scan that was begun hold.

    Attributes:
        bounds: As they are.

    Raises:
        InputError: The folder holds another scan, or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], facts: Mapping[str, Any], bounds: Sequence[int]
    ) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            new = {"facts": facts, "bounds": list(bounds), "complete": False}
            with told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(manifest, lambda file: file.write(_json(new)))
        self._manifest = read_manifest(self.folder)
        self.bounds: list[int] = self._manifest["bounds"]
        found, known = self._manifest["facts"], json.loads(_json(facts))
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

    @property
    def parts(self) -> range:
        """The parts of the data set."""
        return range(len(self.bounds) - 1)

    @property
    def missing(self) -> list[int]:
        """The parts that are not done."""
        return [part for part in self.parts if self.reached(part) < self.bounds[part + 1]]

    def reached(self, part: int) -> int:
        """Up to which item a part is done.

        Raises:
            InputError: Its file is damaged.
        """
        if not (self.shard(part).exists() and self.rows(part).exists()):
            return self.bounds[part]
        return int(self._facts(part)["reached"])

    def _facts(self, part: int) -> dict[str, str]:
        with sound(self.shard(part)):
            facts = parquet().parquet.read_schema(self.shard(part)).metadata
            return {name.decode(): value.decode() for name, value in facts.items()}

    def shard(self, part: int) -> Path:
        """The best samples among those of a part."""
        return self.folder / f"shard-{part:02}.parquet"

    def rows(self, part: int) -> Path:
        """A row for each sample of a part."""
        return self.folder / f"samples-{part:02}.parquet"

    def extend_rows(self, part: int, known: int, more: Columns) -> str:
        """Write the first rows that a part has, and more of them; a hash of the file."""
        pa, path = parquet(), self.rows(part)
        new = _table(more)

        def write(file: Any) -> None:
            options = {"use_dictionary": False, "write_page_checksum": True}
            with pa.parquet.ParquetWriter(file, new.schema, **options) as writer:
                left = new.slice(0, 0)
                for piece in (*_pieces(path, known), new):
                    left = pa.concat_tables([left, piece.cast(new.schema)])
                    while len(left) >= _GROUP:
                        writer.write_table(left.slice(0, _GROUP))
                        left = left.slice(_GROUP)
                writer.write_table(left)

        with told(self.folder):
            write_whole(path, write)
        return _hash(path)

    def finish(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the tables, and leave the shards out.

        Raises:
            InputError: The rows of a part are damaged, or the folder cannot be written.
        """
        for part in self.parts:
            with sound(self.rows(part)):
                if _hash(self.rows(part)) != self._facts(part)["rows"]:
                    raise ValueError("its bytes are not those that were written")
        pa = parquet()
        with told(self.folder):
            for name, columns in tables.items():
                write = functools.partial(pa.parquet.write_table, _table(columns))
                checked = functools.partial(write, write_page_checksum=True)
                write_whole(self.folder / f"{name}.parquet", checked)
            done = {**self._manifest, "complete": True}
            write_whole(self.folder / MANIFEST, lambda file: file.write(_json(done)))
            self.tidy()

    def tidy(self) -> None:
        """Leave out what a finished scan does not need, and what kills have left."""
        for spare in (*self.folder.glob("shard-*.parquet"), *self.folder.glob(".*.part")):
            with contextlib.suppress(OSError):  # of a folder that can only be read
                spare.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    Raises:
        InputError: It holds no scan.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {
            "facts": dict(found["facts"]),
            "bounds": [int(bound) for bound in found["bounds"]],
            "complete": bool(found["complete"]),
        }
    except Exception as error:  # whatever a missing or damaged file leads to
        raise InputError(
            f"{folder} holds no scan: {type(error).__name__}: {error}",
            fix="give the folder of lrpfx.concepts.scan(..., out=folder).",
        ) from error


def write_tables(path: str | os.PathLike[str], tables: Tables, facts: Mapping[str, Any]) -> None:
    """Several tables of numbers as one file: each column is the bytes of one cell."""
    pa, path = parquet(), Path(path)
    named = {f"{t}.{n}": values for t, columns in tables.items() for n, values in columns.items()}
    cells = {
        name: pa.array([values.tobytes()], pa.large_binary()) for name, values in named.items()
    }
    notes = {name: str(fact) for name, fact in facts.items()}
    types = json.dumps({name: values.dtype.str for name, values in named.items()})
    whole = pa.table(cells).replace_schema_metadata({**notes, "types": types, "sum": _sum(named)})
    options = dict(use_dictionary=False, compression="none", write_statistics=False)
    with told(path.parent):
        write_whole(path, lambda file: pa.parquet.write_table(whole, file, **options))


def read_tables(path: str | os.PathLike[str]) -> dict[str, Columns]:
    """What ``write_tables`` has written.

    Raises:
        InputError: The file is missing or damaged.
    """
    found: dict[str, Columns] = {}
    with sound(Path(path)):
        read = parquet().parquet.read_table(path, page_checksum_verification=True)
        notes = read.schema.metadata
        named = {
            name: np.frombuffer(read[name][0].as_buffer(), dtype=kind)
            for name, kind in json.loads(notes[b"types"]).items()
        }
        if notes[b"sum"].decode() != _sum(named):
            raise ValueError("its numbers are not those that were written")
    for column, values in named.items():
        table, _, name = column.partition(".")
        found.setdefault(table, {})[name] = values
    return found


def _sum(columns: Columns) -> str:
    """Pages have sums of their own, but not what says how they are read."""
    found = 0
    for name, values in columns.items():
        found = zlib.crc32(f"{name} {values.dtype} {values.shape}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(values).data, found)
    return str(found)


def read_columns(paths: Iterable[Path], names: Sequence[str]) -> Columns:
    """Columns of the tables in some files, one behind the other; words as their numbers.

    Raises:
        InputError: A file is missing or damaged.
    """
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for path in paths:
        with sound(path):
            pa = parquet()
            read = pa.parquet.read_table(path, columns=list(names), page_checksum_verification=True)
            for name in names:
                column = read[name].combine_chunks()
                if pa.types.is_dictionary(column.type):
                    column = column.indices
                if pa.types.is_fixed_size_list(column.type):
                    flat = column.flatten().to_numpy(zero_copy_only=False)
                    found[name].append(flat.reshape(len(column), -1))
                else:
                    found[name].append(column.to_numpy(zero_copy_only=False))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _hash(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**22):
            found.update(piece)
    return found.hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """Errors of the file system as those of the library."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {type(error).__name__}: {error}",
            fix="make room or give another folder; what was done is kept.",
        ) from error


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of writing a picture or a page as those of the library."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(
            f"{os.fspath(path)} cannot be written: {type(error).__name__}: {error}",
            fix="give a path in a folder that exists, with an ending that names a format.",
        ) from error


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Whatever a missing or damaged file leads to, as an error that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a missing or damaged file leads to
        raise InputError(
            f"{path} is damaged: {type(error).__name__}: {error}",
            fix="delete it, and scan again: only this part is done anew. If the scan was "
            "finished, delete the folder.",
        ) from error


def _pieces(path: Path, most: int | None) -> Iterator[Any]:
    """The first rows of a file, in pieces."""
    pa, left = parquet(), most
    if left == 0:
        return
    with sound(path):
        file = pa.parquet.ParquetFile(path, page_checksum_verification=True)
        for batch in file.iter_batches(_GROUP):
            piece = pa.Table.from_batches([batch if left is None else batch.slice(0, left)])
            yield piece
            left = None if left is None else left - len(piece)
            if left == 0:
                return


def _table(columns: Mapping[str, Any]) -> Any:
    """Numbers, vectors as rows of (N, C), and words as (numbers, names)."""
    pa = parquet()

    def column(values: Any) -> Any:
        if isinstance(values, tuple):
            numbers, names = values
            return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), list(names))
        if values.ndim == 2:
            return pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
            )
        return pa.array(values)

    return pa.table({name: column(values) for name, values in columns.items()})


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
