"""Who does a scan does not matter: one process, several, torchrun, Ray; nor who is killed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import lrpfx
from lrpfx.concepts import ConceptTable, scan
from tests.concepts.test_scan import LAYERS, network, samples, tables_in

OPTIONS: Any = dict(layers=LAYERS, k=5, batch_size=2, progress=False)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
SCRIPT = """
import sys, torch, lrpfx
from tests.concepts.test_engines import OPTIONS, Items
from tests.concepts.test_scan import network, samples
from lrpfx.concepts import scan
torch.distributed.init_process_group("gloo")
explainer = lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")
scan(explainer, Items(), out=sys.argv[1], **OPTIONS)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    return lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")


@pytest.fixture(scope="module")
def table(explainer: lrpfx.Explainer, tmp_path_factory: pytest.TempPathFactory) -> ConceptTable:
    out = tmp_path_factory.mktemp("scan")
    return scan(explainer, Items(), out=out, **OPTIONS)


class Items(Dataset[Any]):
    """The samples, each after a pause; there are some that cannot be read."""

    def __init__(self, stops: tuple[int, ...] = (), pause: float = 0, size: int = 17) -> None:
        self.stops, self.pause, self.data = stops, pause, samples(size)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        time.sleep(self.pause)
        self.read.append(i)
        if i in self.stops:
            raise OSError("no such picture")
        return self.data[i]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def started(explainer: lrpfx.Explainer, out: Path, workers: int = 1, pause: float = 0.03) -> Any:
    """A scan in a process of its own, which takes about a second, or 17 pauses."""
    options = {**OPTIONS, "workers": workers}
    of_ours = multiprocessing.get_context("fork").Process(
        target=scan, args=(explainer, Items(pause=pause)), kwargs={**options, "out": out}
    )
    of_ours.start()
    return of_ours


def kill_at_random(explainer: lrpfx.Explainer, out: Path, kills: int) -> None:
    """Scan in other processes, all of which are killed, and then in this one."""
    drawn = random.Random(kills)
    for k in range(kills):
        process = started(explainer, out, 1 + k % 2)
        time.sleep(drawn.uniform(0.0, 0.4))
        process.kill()
        process.join()
        assert len(list(out.glob("*"))) < 40
    scan(explainer, Items(), out=out, **OPTIONS)


def test_killed_at_random_moments_it_goes_on(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    kill_at_random(explainer, tmp_path, 3)
    assert everything_in(tmp_path) == everything_in(table.folder)


@pytest.mark.nightly
def test_twenty_kills_leave_no_trace(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    kill_at_random(explainer, tmp_path, 20)
    assert everything_in(tmp_path) == everything_in(table.folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_keeps_what_was_done(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path, workers: int
) -> None:
    process = started(explainer, tmp_path, workers, pause=0.3)  # also on a busy machine
    while not list(tmp_path.glob("shard-*")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode != 0
    done = len(list(tmp_path.glob("shard-*")))
    data = Items()
    scan(explainer, data, out=tmp_path, **OPTIONS)
    assert 0 < done < 9 and len(data.read) < 17 + 4
    assert everything_in(tmp_path) == everything_in(table.folder)


@pytest.mark.nightly  # a dozen seconds of starting processes
def test_torchrun_writes_the_same_bytes(table: ConceptTable, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    told = subprocess.run(
        [*run, str(script), str(tmp_path / "scan")], env=ENVIRONMENT, capture_output=True
    )
    assert told.returncode == 0, told.stderr.decode()[-2000:]
    assert everything_in(tmp_path / "scan") == everything_in(table.folder)


def test_two_processes_write_the_same_bytes(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    scan(explainer, Items(), out=tmp_path, workers=2, **OPTIONS)
    assert everything_in(tmp_path) == everything_in(table.folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_before_an_item_that_raises_nothing_is_lost(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path, workers: int
) -> None:
    options = {**OPTIONS, "batch_size": 1}
    whole = scan(explainer, Items(), out=tmp_path / "whole", **options)
    data = Items(stops=(13,))
    with pytest.raises(lrpfx.errors.InputError, match="sample 13 .*OSError: no such picture"):
        scan(explainer, data, out=tmp_path / "a", workers=workers, **options)
    data.stops, data.read = (), []
    scan(explainer, data, out=tmp_path / "a", **options)
    assert not {1, 2, 3, 4, 6, 7, 8, 9, 10} & set(data.read)  # others tell the data sets apart
    assert tables_in(tmp_path / "a") == tables_in(whole.folder)


def test_a_part_goes_on_in_its_middle(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    """The second of 16 parts has samples 2, 3 and 4, of which the last cannot be read."""
    options = {**OPTIONS, "batch_size": 1}
    whole = scan(explainer, Items(size=40), out=tmp_path / "whole", **options)
    data = Items(stops=(4,), size=40)
    with pytest.raises(lrpfx.errors.InputError, match="sample 4 "):
        scan(explainer, data, out=tmp_path / "a", **options)
    assert len(list((tmp_path / "a").glob("shard-*"))) == 2
    data.stops, data.read = (), []
    scan(explainer, data, out=tmp_path / "a", **options)
    assert {2, 3}.isdisjoint(data.read) and data.read.count(4) == 1
    assert everything_in(tmp_path / "a") == everything_in(whole.folder)


def test_ray_writes_the_same_bytes(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'lrpfx[ray]'")
    pytest.importorskip("ray.data")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}},
    )
    try:
        scan(explainer, Items(), out=tmp_path / "a", workers=2, engine="ray", **OPTIONS)
        assert everything_in(tmp_path / "a") == everything_in(table.folder)
        with pytest.raises(lrpfx.errors.InputError, match="sample 13 .*no such picture"):
            broken = Items(stops=(13,))
            scan(explainer, broken, out=tmp_path / "b", workers=2, engine="ray", **OPTIONS)
    finally:
        ray.shutdown()


def test_without_ray_it_is_said_what_to_install(
    explainer: lrpfx.Explainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(lrpfx.errors.InputError, match=r"needs Ray[\s\S]*lrpfx\[ray\]"):
        scan(explainer, Items(), out=tmp_path, engine="ray", **OPTIONS)
