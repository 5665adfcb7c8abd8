"""Scans: the best samples of each concept, whoever does the work, and after a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lrpfx
from lrpfx.concepts import ConceptTable, Neuron, load, scan
from lrpfx.concepts.accumulate import ALL, Accumulator
from tests.conditions.test_conditions import draw, fill

LAYERS = ["0", "3"]


def network(seed: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)]
    return fill(nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), seed)


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
    scores = brute_force(explainer, layer, by)
    labels = samples().tensors[1].numpy()
    for concept in range(scores.shape[1]):
        for target in (None, 1):
            among = [i for i in range(17) if target is None or labels[i] == target]
            wanted = sorted(among, key=lambda i: (-scores[i, concept], i))[:5]
            found = table.references(layer, concept, by=by, target=target)
            assert [r.sample for r in found] == wanted
            assert [r.label for r in found] == [labels[i] for i in wanted]
            np.testing.assert_allclose([r.score for r in found], scores[wanted, concept], rtol=1e-5)


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
        np.testing.assert_allclose([value for _, value in found], means[c][wanted], rtol=1e-5)
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


def test_merging_is_the_same_however_samples_are_parted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (90, 4)).astype(np.float64)  # many ties
    samples, labels = np.arange(90), np.arange(90) % 2
    places = np.zeros((90, 4), dtype=np.int64)

    def parted(order: list[np.ndarray]) -> Accumulator:
        whole = Accumulator(7, ("a",))
        for at in order:
            part = Accumulator(7, ("a",))
            # With round-off, as other batches have it.
            near = scores[at] * (1 + 1e-7 * rng.standard_normal((len(at), 4)))
            given = near, places[at], samples[at], labels[at], samples[at]
            part.update("a", "relevance", *given)
            part.save(tmp_path / "part.parquet")
            whole.merge(Accumulator.load(tmp_path / "part.parquet", 7, ("a",)))
        return whole

    whole = parted([np.arange(90)])
    turned = parted([np.arange(80, 90), np.arange(5, 6), np.arange(6, 80), np.arange(0, 5)])
    for key, best in whole.best.items():
        np.testing.assert_array_equal(best.samples, turned.best[key].samples)
    wanted = [sorted(range(90), key=lambda i: (-scores[i, c], i))[:7] for c in range(4)]
    np.testing.assert_array_equal(whole.best["a", "relevance", ALL].samples, wanted)
    sums = whole.sums["a", 1]
    assert sums.count == 45
    np.testing.assert_allclose(sums.relevance, scores[1::2].sum(0), rtol=1e-6)


def test_samples_of_the_same_content_are_ties_whatever_round_off_says() -> None:
    scores = np.array([[1.0], [2.0], [2.0 - 1e-4], [2.0 - 2e-4], [2.0 - 5e-5]])
    found = Accumulator(3, ("a",))
    rest: Any = np.zeros((5, 1), dtype=int), np.array([0, 7, 3, 5, 9]), np.zeros(5, dtype=int)
    found.update("a", "relevance", scores, *rest, np.array([1, 2, 2, 3, 2]))
    found.settle()
    best = found.best["a", "relevance", ALL]
    assert best.samples.tolist() == [[3, 7, 9]]
    assert best.scores.tolist() == [[2.0 - 1e-4] * 3]


def flipped(data: bytes) -> bytes:
    """With other bits in one byte of the first page."""
    return data[:60] + bytes([data[60] ^ 255]) + data[61:]


@pytest.mark.parametrize("name", ["shard-01.parquet", "samples-02.parquet"])
def test_damaged_files_are_named_and_done_anew(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path, name: str
) -> None:
    class Short(TensorDataset):
        stop = True

        def __getitem__(self, i: Any) -> Any:
            if self.stop and i == 14:
                raise ValueError("stop here")
            return super().__getitem__(i)

    data = Short(*samples().tensors)
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, out=tmp_path, progress=False)
    with pytest.raises(lrpfx.errors.InputError, match="sample 14"):
        scan(explainer, data, **options)
    with pytest.raises(lrpfx.errors.InputError, match="not finished"):
        load(tmp_path)
    data.stop = False
    whole = (tmp_path / name).read_bytes()
    for damaged in (b"PAR1 and then nothing", flipped(whole)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(lrpfx.errors.InputError, match=rf"{name} is damaged[\s\S]*delete it"):
            scan(explainer, data, **options)
    (tmp_path / name).unlink()
    scan(explainer, data, **options)
    assert tables_in(tmp_path) == tables_in(table.folder)


class Stream:
    """Samples in another order, which can be read from the front only."""

    def __init__(self, once: bool) -> None:
        self.items = self._items()
        self.once = once

    def _items(self) -> Any:
        return (samples()[i] for i in reversed(range(17)))

    def __iter__(self) -> Any:
        return self.items if self.once else self._items()


@pytest.mark.parametrize("once", [False, True])
def test_what_can_only_be_iterated_needs_numbers(
    table: ConceptTable, explainer: lrpfx.Explainer, tmp_path: Path, once: bool
) -> None:
    options: Any = dict(layers=LAYERS, k=5, batch_size=4, progress=False, out=tmp_path)
    with pytest.raises(lrpfx.errors.InputError, match="iterable one with ids"):
        scan(explainer, Stream(once), **options)
    if not once:
        with pytest.raises(lrpfx.errors.InputError, match="ended before sample 0"):
            ids = [20, *reversed(range(17))]
            scan(explainer, Stream(once), ids=ids, **{**options, "out": tmp_path / "a"})
    other = scan(explainer, Stream(once), ids=range(16, -1, -1), **options)
    for layer, concepts in (("0", 4), ("3", 3)):
        np.testing.assert_allclose(other.vectors(layer), table.vectors(layer), atol=1e-6)
        for concept in range(concepts):
            for by in ("relevance", "activation"):
                a, b = (t.references(layer, concept, by=by) for t in (table, other))  # type: ignore[arg-type]
                assert [(r.sample, r.label) for r in a] == [(r.sample, r.label) for r in b]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Any, y: Any) -> Any:
        return self.out(torch.relu(self.a(x) + self.b(y)))


def test_items_of_any_form_are_read(tmp_path: Path) -> None:
    """A pair with a pair, a dict with a label, three tensors: the same samples."""
    x, y, labels = draw(9, 4), draw(9, 3, seed=2), torch.arange(9) % 3
    model = fill(TwoInputs())
    positional = lrpfx.Explainer(model, (x, y))
    by_name = lrpfx.Explainer(model, {"x": x, "y": y})
    forms: Any = {
        "pairs": (positional, [((a, b), int(c)) for a, b, c in zip(x, y, labels, strict=True)]),
        "triples": (positional, TensorDataset(x, y, labels)),
        "dicts": (
            by_name,
            [{"x": a, "y": b, "label": c} for a, b, c in zip(x, y, labels, strict=True)],
        ),
    }
    options: Any = dict(layers=["a"], k=3, batch_size=4, progress=False)
    for name, (explainer, data) in forms.items():
        found = scan(explainer, data, out=tmp_path / name, **options)
        assert found.samples["label"].tolist() == labels.tolist()
        scores = explainer(
            {"x": x, "y": y} if name == "dicts" else (x, y), labels, layers=["a"]
        ).concepts("a")
        wanted = (scores / scores.abs().sum(1, keepdim=True)).nan_to_num()  # of some nothing
        np.testing.assert_allclose(found.vectors("a"), wanted, rtol=1e-5, atol=1e-7)
    alone = lrpfx.Explainer(fill(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))), x)
    items = [{"pixels": a, "labels": c} for a, c in zip(x, labels, strict=True)]
    scan(alone, items, out=tmp_path / "one", **{**options, "layers": ["0"]})


def test_what_is_explained_decides_the_class(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    """Of the predicted class, also where the label is another."""
    options: Any = dict(layers=["3"], k=17, batch_size=8, progress=False)
    found = scan(explainer, samples(), target="predicted", out=tmp_path, **options)
    predicted = found.samples["predicted"]
    assert (predicted != found.samples["label"]).any()
    for c in set(predicted.tolist()):
        listed = {r.sample for r in found.references("3", 0, target=c)}
        assert listed == set(np.flatnonzero(predicted == c).tolist())
    before = scan(
        explainer, samples(), activation="before", normalize_activation="sample",
        out=tmp_path / "b", **options,
    )  # fmt: skip
    e = explainer(samples().tensors[0], 0, layers=["3"])
    peaks = e.layers["3"].activation.flatten(2).amax(2)
    shares = peaks / peaks.abs().sum(1, keepdim=True)
    assert [r.sample for r in before.references("3", 1, by="activation")] == sorted(
        range(17), key=lambda i: (-shares[i, 1], i)
    )


def test_a_sample_that_is_not_finite_is_named(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    x, y = samples().tensors
    x = x.clone()
    x[6, 0, 3, 3] = float("nan")
    options: Any = dict(layers=["3"], k=3, batch_size=4, progress=False)
    with pytest.raises(lrpfx.errors.InputError, match="sample 6 cannot be explained"):
        scan(explainer, TensorDataset(x, y), out=tmp_path, **options)


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
    active = torch.relu(e.layers["3"].activation.flatten(1))
    for neuron in (0, 7):
        order = sorted(range(17), key=lambda i: (-active[i, neuron], i))[:3]
        found = neurons.references("3", neuron, by="activation")
        assert [r.sample for r in found] == order
    most = scan(
        explainer, samples(), statistic="max", normalize=None, out=tmp_path / "c", **options
    )
    best = most.references("3", 1)[0]
    own = e.layers["3"].relevance[:, 1].flatten(1)
    assert best.sample == int(own.amax(1).argmax()) and best.position == int(
        own[best.sample].argmax()
    )


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
