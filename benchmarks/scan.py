"""What does a scan cost beside the explanations themselves?

The same batches are explained without a scan, explained with the relevance of the scanned layers,
and scanned; from the largest number of samples on one sees whether memory grows. The peer is
zennit-crp's FeatureVisualization (RelMax and ActMax) on the same model, layers and samples, where
it is installed.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lrpfx
from benchmarks.measure import Table, command, publish, quartiles, ratio, seconds
from benchmarks.works import image_work
from lrpfx.concepts import scan
from lrpfx.concepts.accumulate import Accumulator

LAYERS = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2")
BATCH, SIDE, CLASSES = 32, 64, 10
RULES = "epsilon_plus"


def samples(n: int) -> TensorDataset:
    """Noise, in ten classes."""
    drawn = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 3, SIDE, SIDE, generator=drawn), torch.arange(n) % CLASSES)


def table(sizes: Sequence[int] = (256, 1024), rounds: int = 3) -> Table:
    """Seconds for so many samples, of each way to go through them."""
    columns = [
        "samples",
        "explanations",
        "with layers",
        "scan",
        "scan / explanations",
        "zennit-crp",
    ]
    found = Table("A scan of a data set", columns)
    model = image_work("resnet18", 1, SIDE).model
    model.fc = nn.Linear(512, CLASSES)
    explainer = lrpfx.Explainer(model, samples(2).tensors[0], RULES)
    for n in sizes:
        data = samples(n)
        ways: dict[str, Callable[[], Any]] = {
            "explanations": lambda data=data: explained(explainer, data, ()),
            "with layers": lambda data=data: explained(explainer, data, LAYERS),
            "scan": lambda data=data: scanned(explainer, data),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(seconds(way))
        cells = [f"{quartiles(times[name])[1]:.2f} s" for name in ways]
        cells.append(ratio(times["scan"], times["explanations"]))
        peer = peer_of(model) if n == sizes[0] else None  # which takes long
        took = None if peer is None else seconds(functools.partial(peer, data))
        found.add(str(n), *cells, "" if took is None else f"{took:.1f} s")
    check(found, explainer, samples(40))
    found.notes.append(merging())
    found.notes.append(
        f"ResNet-18, {SIDE} x {SIDE} pixels, {len(LAYERS)} layers with 960 channels, {CLASSES} "
        f"classes, batches of {BATCH}, `{RULES}`; k = 40 by relevance and by activation, over all "
        "and by class. Explanations: `ledger=False`."
    )
    return found


def explained(explainer: lrpfx.Explainer, data: TensorDataset, layers: Sequence[str]) -> None:
    """Batch after batch."""
    for x, y in zip(data.tensors[0].split(BATCH), data.tensors[1].split(BATCH), strict=True):
        explainer(x, y, layers=layers, ledger=False)


def scanned(explainer: lrpfx.Explainer, data: TensorDataset) -> Any:
    """Into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        table = scan(explainer, data, layers=LAYERS, out=folder, batch_size=BATCH, progress=False)
        return [[table.references(layer, c) for c in range(4)] for layer in LAYERS]


def check(found: Table, explainer: lrpfx.Explainer, data: TensorDataset) -> None:
    """References are those of all scores, sorted."""
    whole = explainer(*data.tensors, layers=LAYERS, ledger=False)
    for layer, references in zip(LAYERS, scanned(explainer, data), strict=True):
        scores = whole.concepts(layer)
        scores = scores / scores.abs().sum(1, keepdim=True)
        for c, own in enumerate(references):
            best = scores[:, c].sort(descending=True).values
            got = torch.tensor([[r.score for r in own]])
            found.check(f"scores at {layer}", got.float(), best[None, : len(own)])


def merging(parts: int = 64, concepts: int = 4000, k: int = 40) -> str:
    """Seconds to read and put together what many processes have found."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{part}.parquet" for part in range(parts)]
        for part, path in enumerate(paths):
            own = Accumulator(k, ("a",))
            numbers = np.arange(100) + 100 * part
            places = np.zeros((100, concepts), dtype=np.int32)
            for by in ("relevance", "activation"):
                scores = rng.random((100, concepts), dtype=np.float32)
                own.update("a", by, scores, places, numbers, numbers % 2, numbers)  # type: ignore[arg-type]
            own.save(path)
        start = time.process_time()
        whole = Accumulator(k, ("a",))
        for first in range(0, parts, 8):
            whole.merge(*(Accumulator.load(path, k, ("a",)) for path in paths[first : first + 8]))
        took = time.process_time() - start
    return (
        f"{parts} shards of {concepts} concepts in 2 classes, k = {k}, by relevance and by "
        f"activation, are read and merged in {took:.1f} s of CPU time."
    )


def peer_of(model: nn.Module) -> Callable[[TensorDataset], None] | None:
    """The same by zennit-crp, where it is installed."""
    try:
        from crp.attribution import CondAttribution
        from crp.concepts import ChannelConcept
        from crp.visualization import FeatureVisualization
        from zennit.composites import EpsilonPlus
        from zennit.torchvision import ResNetCanonizer
    except ImportError:
        return None

    def run(data: TensorDataset) -> None:
        with tempfile.TemporaryDirectory() as folder:
            concepts = {layer: ChannelConcept() for layer in LAYERS}

            def prepared(x: Tensor) -> Tensor:
                return x

            peer = FeatureVisualization(
                CondAttribution(model), _Pairs(data), concepts, preprocess_fn=prepared, path=folder
            )
            composite = EpsilonPlus(canonizers=[ResNetCanonizer()])
            peer.run(composite, 0, len(data), BATCH, 100)

    return run


class _Pairs(torch.utils.data.Dataset[Any]):
    """Labels as the peer takes them."""

    def __init__(self, data: TensorDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Any:
        x, y = self._data[i]
        return x, int(y)


def main() -> int:
    options = command("scan", __doc__).parse_args()
    return publish("scan", table(), options.write)


if __name__ == "__main__":
    sys.exit(main())
