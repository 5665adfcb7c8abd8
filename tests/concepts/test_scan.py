"""Scans: the best samples of each concept, whoever does the work, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lrpfx
from lrpfx.concepts import ConceptTable, Neuron, load, scan
from lrpfx.concepts.accumulate import ALL, Accumulator, rounded
from tests.conditions.test_conditions import draw, fill

LAYERS = ["0", "3"]


def network() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)]
    return fill(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)))


def samples(n: int = 17) -> TensorDataset:
    """With two samples that are the same, in other batches."""
    x = draw(n, 1, 8, 8)
    x[n - 1] = x[2]
    return TensorDataset(x, torch.arange(n) % 3)


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    return lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")


@pytest.fixture(scope="module")
def table(explainer: lrpfx.Explainer, tmp_path_factory: pytest.TempPathFactory) -> ConceptTable:
    out = tmp_path_factory.mktemp("scan")
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, progress=False)
    return scan(explainer, samples(), out=out, **options)


def brute_force(explainer: lrpfx.Explainer, layer: str, by: str) -> np.ndarray:
    """Scores of every sample, one by one: (N, C)."""
    rows = []
    after = {"0": "1", "3": "5"}[layer]
    for x, y in samples():
        e = explainer(x[None], int(y), layers=[layer, after])
        if by == "activation":
            rows.append(e.layers[after].activation.flatten(2).amax(2)[0])
        else:
            score = e.layers[layer].relevance.flatten(2).sum(2)[0]
            rows.append(score / score.abs().sum())
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("by", ["relevance", "activation"])
def test_references_are_those_of_brute_force(
    table: ConceptTable, explainer: lrpfx.Explainer, layer: str, by: Any
) -> None:
    scores = rounded(brute_force(explainer, layer, by))
    labels = samples().tensors[1].numpy()
    for concept in range(scores.shape[1]):
        for target in (None, 1):
            among = [i for i in range(17) if target is None or labels[i] == target]
            wanted = sorted(among, key=lambda i: (-scores[i, concept], i))[:5]
            found = table.references(layer, concept, by=by, target=target)
            assert [r.sample for r in found] == wanted
            assert [r.label for r in found] == [labels[i] for i in wanted]
            np.testing.assert_allclose([r.score for r in found], scores[wanted, concept])


def test_equal_samples_come_in_the_order_of_their_numbers(table: ConceptTable) -> None:
    for concept in range(4):
        found = [r.sample for r in table.references("0", concept, by="activation")]
        if 16 in found:
            assert found.index(16) == found.index(2) + 1


def test_classes_and_concepts_are_ranked_by_mean_relevance(
    table: ConceptTable, explainer: lrpfx.Explainer
) -> None:
    scores, labels = brute_force(explainer, "3", "relevance"), samples().tensors[1].numpy()
    means = np.stack([scores[labels == c].mean(0) for c in range(3)])
    for c in range(3):
        wanted = np.argsort(-means[c])[:2]
        found = table.top("3", target=c, k=2)
        assert [concept for concept, _ in found] == wanted.tolist()
        np.testing.assert_allclose([value for _, value in found], means[c][wanted])
    assert [c for c, _ in table.classes("3", 1)] == np.argsort(-means[:, 1]).tolist()
    assert [c for c, _ in table.top("3", sample=4)] == np.argsort(-scores[4]).tolist()
    np.testing.assert_allclose(table.vectors("3"), scores, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 16, 17, 40])
def test_any_batch_size_finds_the_same(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path, batch_size: int
) -> None:
    options: Any = dict(layers=LAYERS, k=5, batch_size=batch_size, progress=False)
    other = scan(explainer, samples(), out=tmp_path, **options)
    for layer, concepts in (("0", 4), ("3", 3)):
        for concept in range(concepts):
            for by in ("relevance", "activation"):
                a, b = (t.references(layer, concept, by=by) for t in (table, other))  # type: ignore[arg-type]
                assert [r.sample for r in a] == [r.sample for r in b]


def tables_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet")}


def test_two_processes_write_the_same_bytes_as_one(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, progress=False)
    scan(explainer, samples(), out=tmp_path, workers=2, **options)
    assert tables_in(tmp_path) == tables_in(table.folder)
    assert len(list(tmp_path.iterdir())) < 40


def test_what_was_done_is_not_done_again(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    class Broken(Dataset[Any]):
        def __init__(self) -> None:
            self.read: list[int] = []
            self.broken = True

        def __len__(self) -> int:
            return 17

        def __getitem__(self, i: int) -> Any:
            self.read.append(i)
            if self.broken and i == 9:
                raise OSError("no such picture")
            return samples()[i]

    data = Broken()
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, out=tmp_path, progress=False)
    with pytest.raises(lrpfx.errors.InputError, match="sample 9 .*no such picture"):
        scan(explainer, data, **options)
    data.broken = False
    data.read.clear()
    scan(explainer, data, **options)
    assert not {1, 2, 3, 4, 6} & set(data.read)  # 0, 5, 11 and 16 tell the data sets apart
    assert tables_in(tmp_path) == tables_in(table.folder)


SCRIPT = """
import sys, torch, lrpfx
from tests.concepts.test_scan import LAYERS, network, samples
from lrpfx.concepts import scan
explainer = lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")
print("ready", flush=True)
scan(explainer, samples(), layers=LAYERS, k=5, batch_size=4, out=sys.argv[1], progress=False)
"""


def test_killed_at_some_moment_it_goes_on(table: ConceptTable, tmp_path: Path) -> None:
    """Killed and started again, in other processes, until it is done: the same bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wait in (0.05, None):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if wait is None:
            assert process.wait() == 0
        else:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
    assert tables_in(tmp_path) == tables_in(table.folder)


def test_a_folder_of_another_scan_is_refused(
    table: ConceptTable, explainer: lrpfx.Explainer
) -> None:
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, progress=False, out=table.folder)
    with pytest.raises(lrpfx.errors.InputError, match=r"another scan[\s\S]*k: there 5, here 6"):
        scan(explainer, samples(), **{**options, "k": 6})
    with pytest.raises(lrpfx.errors.InputError, match=r"data set: there"):
        scan(explainer, TensorDataset(draw(17, 1, 8, 8, seed=8), samples().tensors[1]), **options)
    other = lrpfx.Explainer(fill(network(), 3), samples().tensors[0][:2], "epsilon_plus")
    with pytest.raises(lrpfx.errors.InputError, match=r"parameters: there"):
        scan(other, samples(), **options)
    assert scan(explainer, samples(), **options).facts == table.facts


def test_merging_is_the_same_however_samples_are_parted() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (30, 4)).astype(np.float64)  # many ties
    samples, labels = np.arange(30), np.arange(30) % 2
    places = np.zeros((30, 4), dtype=np.int64)

    def parted(order: list[np.ndarray]) -> Accumulator:
        parts = []
        for at in order:
            part = Accumulator(7)
            part.update("a", "relevance", scores[at], places[at], samples[at], labels[at])
            parts.append(part)
        whole = Accumulator(7)
        for part in parts:
            whole.merge(part)
        return whole

    whole = parted([np.arange(30)])
    turned = parted([np.arange(20, 30), np.array([], dtype=int), np.arange(0, 7), np.arange(7, 20)])
    for key, best in whole.best.items():
        np.testing.assert_array_equal(best.samples, turned.best[key].samples)
    wanted = [sorted(range(30), key=lambda i: (-scores[i, c], i))[:7] for c in range(4)]
    np.testing.assert_array_equal(whole.best["a", "relevance", ALL].samples, wanted)
    again = Accumulator.of_columns(7, whole.columns())
    np.testing.assert_array_equal(
        again.best["a", "relevance", 1].samples, whole.best["a", "relevance", 1].samples
    )


def test_damaged_parts_are_named(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    class Short(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            if i == 12:
                raise ValueError("stop here")
            return super().__getitem__(i)

    options: Any = dict(layers=["0"], k=2, batch_size=2, out=tmp_path, progress=False)
    with pytest.raises(lrpfx.errors.InputError, match="sample 12"):
        scan(explainer, Short(*samples().tensors), **options)
    with pytest.raises(lrpfx.errors.InputError, match="not finished"):
        load(tmp_path)
    (tmp_path / "shard-01.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(
        lrpfx.errors.InputError, match=r"shard-01.parquet is damaged[\s\S]*delete it"
    ):
        scan(explainer, samples(), **options)


def test_other_kinds_targets_and_data(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    x = samples().tensors[0]
    options: Any = dict(layers=["3"], k=3, batch_size=8, progress=False)
    of_images = scan(explainer, x, target="predicted", out=tmp_path / "a", **options)  # type: ignore[arg-type]
    assert of_images.samples["label"].tolist() == [-1] * 17
    predicted = explainer.model(x).argmax(1)
    assert of_images.samples["predicted"].tolist() == predicted.tolist()
    neurons = scan(
        explainer, samples(), kinds={"3": Neuron()}, out=tmp_path / "b", normalize=None, **options
    )
    e = explainer(x, samples().tensors[1], layers=["3"])
    wanted = e.layers["3"].relevance.flatten(1)
    np.testing.assert_allclose(neurons.vectors("3"), wanted, rtol=1e-5, atol=1e-7)
    most = scan(
        explainer, samples(), statistic="max", normalize=None, out=tmp_path / "c", **options
    )
    best = most.references("3", 1)[0]
    own = e.layers["3"].relevance[:, 1].flatten(1)
    assert best.sample == int(own.amax(1).argmax()) and best.position == int(
        own[best.sample].argmax()
    )


def test_it_draws_references_with_what_the_concept_saw(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path
) -> None:
    figures = table.plot(
        "3", [0, 2], dataset=samples(), explainer=explainer, k=3, path=tmp_path / "grid.png"
    )
    assert list(figures) == [0, 2]
    assert (tmp_path / "grid-2.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda t: t.references("9", 0), "'9' was not scanned"),
        (lambda t: t.references("0", 4), "no concept 4"),
        (lambda t: t.references("0", 0, k=6), "5 were kept"),
        (lambda t: t.references("0", 0, by="size"), "by='size'"),
        (lambda t: t.references("0", 0, target=8), "of class 8"),
        (lambda t: t.top("0", target=8), "no sample was of class 8"),
        (lambda t: t.top("0", sample=17), "no sample 17"),
        (lambda t: load(t.folder / "none"), "holds no scan"),
    ],
)
def test_what_is_wrong_is_said(table: ConceptTable, act: Any, said: str) -> None:
    with pytest.raises(lrpfx.errors.InputError, match=said):
        act(table)
