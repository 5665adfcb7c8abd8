"""Saved explanations: files that are damaged, or of somebody else, do no harm."""

import functools
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrpfx
from lrpfx import errors
from tests.oracle.models import MODELS, NIGHTLY, end, fuzzing, row_pair

RAN: list[str] = []


class Payload:
    """Unpickling it is noticed."""

    def __reduce__(self) -> Any:
        return note, ("code of a file",)


def note(what: str) -> None:
    RAN.append(what)


@functools.cache
def explained() -> lrpfx.Explanation:
    return lrpfx.explain(MODELS["two inputs"][0], row_pair(), 1, layers=["fc"])


def saved(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "explanation.npz"
    explained().save(path)
    with np.load(path) as stored:
        return path, dict(stored)


def assert_refused(path: Path) -> None:
    RAN.clear()
    with pytest.raises(errors.InputError, match="holds no explanation"):
        lrpfx.Explanation.load(path)
    assert not RAN, "code of the file was run"


def test_the_payload_would_run() -> None:
    RAN.clear()
    pickle.loads(pickle.dumps(Payload()))
    assert RAN


@pytest.mark.parametrize("member", ["relevance.a", "__tree__", "extra"])
def test_pickled_members_are_refused(tmp_path: Path, member: str) -> None:
    path, arrays = saved(tmp_path)
    assert member == "extra" or member in arrays
    arrays[member] = np.array([Payload()], dtype=object)
    np.savez(path, **arrays)
    assert_refused(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps(Payload()), id="pickle"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"PK\x03\x04" + bytes(50), id="broken zip"),
        pytest.param(lambda: b"\x93NUMPY\x01\x00" + bytes(50), id="broken npy"),
        pytest.param(lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.", id="pickle by hand"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Callable[[], bytes]) -> None:
    path = tmp_path / "explanation.npz"
    path.write_bytes(content())
    assert_refused(path)


def test_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "explanation.npz"
    torch.save({"relevance": Payload()}, path)
    assert_refused(path)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '{"tree": {}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "no such", "dtype": "float32"}}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "seed", "dtype": "load"}}, "report": {}}',
        '{"tree": {"relevance": {"tensor": "seed", "dtype": "__builtins__"}}, "report": {}}',
        '{"tree": {"relevance": {"call": "os.system", "dtype": "float32"}}, "report": {}}',
        '{"tree": {"relevance": ' + '{"list": [' * 5000 + "]}" * 5000 + '}, "report": {}}',
    ],
    ids=lambda t: t[:30],
)
def test_trees_that_are_none_are_refused(tmp_path: Path, tree: str) -> None:
    path, arrays = saved(tmp_path)
    np.savez(path, **{**arrays, "__tree__": np.array(tree)})
    assert_refused(path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t["tree"].update(surprise={"value": 1}), id="unknown field"),
        pytest.param(lambda t: t["tree"].pop("relevance"), id="missing field"),
        pytest.param(lambda t: t["tree"].update(__class__={"value": 1}), id="class"),
        pytest.param(lambda t: t["report"].update(rows=[{"shape": 3}]), id="row"),
        pytest.param(lambda t: t["report"].update(rows=3), id="rows"),
        pytest.param(lambda t: t.update(report=None), id="no report"),
        pytest.param(lambda t: t["tree"].update(layers={"value": 3}), id="layers"),
        pytest.param(lambda t: t["tree"].update(layers={"dict": [["a"]]}), id="layer"),
    ],
)
def test_changed_trees_are_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path, arrays = saved(tmp_path)
    tree = json.loads(str(arrays["__tree__"]))
    change(tree)
    np.savez(path, **{**arrays, "__tree__": np.array(json.dumps(tree))})
    assert_refused(path)


def test_headers_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    """A member of some bytes whose header claims 80 terabytes."""
    path, _ = saved(tmp_path)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    header += b" " * (118 - 1 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("extra.npy", b"\x93NUMPY\x01\x00v\x00" + header + bytes(64))
    assert_refused(path)


def test_names_are_names_and_not_paths(tmp_path: Path) -> None:
    """Nothing is written, wherever a member's name points."""
    path, arrays = saved(tmp_path)
    outside = tmp_path / "outside"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../outside", b"text")
        archive.writestr(str(outside), b"text")
    end(lambda: lrpfx.Explanation.load(path))
    assert not outside.exists() and [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(fuzzing, max_examples=10_000 if NIGHTLY else 100)
@given(st.data())
def test_damaged_files_end_in_a_result_or_its_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path, _ = saved(tmp_path_factory.getbasetemp())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    end(lambda: lrpfx.Explanation.load(path))
