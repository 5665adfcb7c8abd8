"""Disks that are full, folders that cannot be written: nothing is lost that was done."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import lrpfx
from lrpfx.concepts import load, scan
from tests.concepts.test_scan import LAYERS, network, samples, tables_in

OPTIONS: Any = dict(layers=LAYERS, k=5, batch_size=2, progress=False)


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    return lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in memory, which only root can make."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_full_disk_loses_nothing_that_was_done(
    explainer: lrpfx.Explainer, tmp_path: Path, workers: int
) -> None:
    whole = scan(explainer, samples(), out=tmp_path / "whole", **OPTIONS)
    with mounted(tmp_path / "disk", "size=112k"):
        out = tmp_path / "disk" / "scan"
        out.mkdir()
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(b"\0" * (112 - 56) * 1024)
        with pytest.raises(lrpfx.errors.InputError, match=r"scan cannot be written: .*No space"):
            scan(explainer, samples(), out=out, workers=workers, **OPTIONS)
        done = {p: p.read_bytes() for p in out.glob("shard-*")}
        assert 0 < len(done) < 9 and not list(out.glob(".*"))
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=2m", str(tmp_path / "disk")], check=True)

        scan(explainer, samples(), out=out, **OPTIONS)
        assert tables_in(out) == tables_in(whole.folder)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root")
def test_a_read_only_folder_is_an_error_or_is_read(
    explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=2m"):
        scan(explainer, samples(), out=tmp_path / "disk" / "a", **OPTIONS)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(lrpfx.errors.InputError, match=r"b cannot be written: .*Read-only"):
            scan(explainer, samples(), out=tmp_path / "disk" / "b", **OPTIONS)
        again = scan(explainer, samples(), out=tmp_path / "disk" / "a", **OPTIONS)
        assert again.references("3", 1) == load(tmp_path / "disk" / "a").references("3", 1)


def test_a_file_in_the_place_of_the_folder_is_an_error(
    explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(lrpfx.errors.InputError, match="cannot be written"):
        scan(explainer, samples(), out=tmp_path / "file", **OPTIONS)


def test_memory_does_not_grow_with_classes_that_have_no_samples(
    explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    """Classes 0 and 100,000: two lists of each concept beside that of all, and no more."""
    x, y = samples().tensors
    far = TensorDataset(x, torch.where(y == 0, 0, 100_000))
    found = scan(explainer, far, target="predicted", out=tmp_path / "a", **OPTIONS)
    assert set(found.targets) <= {0, 1, 2}
    table = scan(explainer, far, target=lambda out: out[:, 1], out=tmp_path / "b", **OPTIONS)
    assert table.targets == [0, 100_000]
    assert len(list((tmp_path / "b").iterdir())) < 40
    assert (tmp_path / "b" / "references.parquet").stat().st_size < 20_000
