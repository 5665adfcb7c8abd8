"""What is handed on of strategies: a page, and files that ViRelAy opens."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lrpfx
from lrpfx.spray import SpectralRelevance, Strategies, to_virelay
from tests.spray.test_cluster import planted

HOSTILE = "</title><script>alert('x')</script>&\""
#: An interpreter with ViRelAy, which `make virelay` makes: its packages fit no other environment.
VIRELAY = os.environ.get("LRPFX_VIRELAY", ".venv-virelay/bin/python")


@pytest.fixture(scope="module")
def found() -> SpectralRelevance:
    return SpectralRelevance().fit(planted()[0])


@pytest.fixture(scope="module")
def strategies(found: SpectralRelevance) -> Strategies:
    _, labels = planted()
    return found.summary(labels, torch.where(labels == 2, 7, labels))


def test_the_page_shows_each_cluster_and_loads_nothing(
    strategies: Strategies, tmp_path: Path
) -> None:
    maps, _ = planted()
    strategies.to_html(
        tmp_path / "a.html", maps=maps, images=maps.abs(), placed=torch.rand(62, 2), k=4,
        names=[f"{HOSTILE}{i}" for i in range(62)], title=HOSTILE,
    )  # fmt: skip
    text = (tmp_path / "a.html").read_text()
    assert "<script" not in text and text.count("</title>") == 1 + 62
    assert text.count("<circle") == 62 and text.count("<section") == 3
    assert text.count("<li ") == 3 * 5 and text.count("--r:2;--s:url(data:image/webp") == 3
    rows = re.findall(r"</a></td><td>(\d+)</td><td>(.*?)</td><td>(.*?)</td>", text)
    assert rows == [("30", "100%", "100%"), ("20", "100%", "100%"), ("12", "100%", "0%")]
    strategies.to_html(tmp_path / "b.html")
    assert (tmp_path / "b.html").read_text().count("<li ") == 3


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(maps=torch.ones(4, 5, 5)), r"maps are \(4, 5, 5\), and 62 samples"),
        (dict(images=torch.ones(62, 5, 5)), "images are"),
        (dict(path="/nowhere/a.html"), "cannot be written"),
    ],
)
def test_what_is_wrong_of_a_page_is_said(
    strategies: Strategies, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(lrpfx.errors.InputError, match=said):
        strategies.to_html(**{"path": tmp_path / "a.html", **options})


@pytest.fixture(scope="module")
def project(found: SpectralRelevance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py", reason="h5py is not installed: pip install 'lrpfx[virelay]'")
    maps, labels = planted()
    images = torch.rand(70, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    relevance = torch.cat([torch.zeros(8, 2, 20, 24), maps])
    truth = torch.cat([torch.full((8,), 3), torch.zeros(62, dtype=torch.long)])
    logits = torch.eye(4)[truth]
    return to_virelay(
        tmp_path_factory.mktemp("virelay"),
        relevance,
        truth,
        logits,
        {0: (range(8, 70), found)},
        images=images,
        class_names=["nought", "one", "two", HOSTILE],
    )


def test_files_for_virelay_hold_maps_and_clusters(project: Path, found: SpectralRelevance) -> None:
    import h5py

    with h5py.File(project.with_name("attributions.h5")) as file:
        assert file["attribution"].shape == (70, 2, 20, 24) and file["attribution"].dtype == "f4"
        assert file["label"][:9].tolist() == [3] * 8 + [0]
        assert file["prediction"].shape == (70, 4)
    with h5py.File(project.with_name("analysis.h5")) as file:
        assert list(file) == ["0"]
        assert file["0/index"][:].tolist() == list(range(8, 70))
        assert file["0/cluster/kmeans-3"][:].tolist() == found.labels_.tolist()
        np.testing.assert_allclose(file["0/embedding/spectral"], found.embedding_, atol=1e-6)
        assert len(file["0/embedding/spectral"].attrs["eigenvalue"]) == len(found.eigenvalues_)


def test_what_virelay_itself_reads_is_what_was_written(
    project: Path, found: SpectralRelevance
) -> None:
    if not Path(VIRELAY).exists():
        pytest.skip("there is no environment with ViRelAy: make virelay")
    script = Path(__file__).with_name("read_by_virelay.py")
    read = subprocess.run(
        [VIRELAY, str(script), str(project)], capture_output=True, text=True, timeout=120
    )
    assert read.returncode == 0, read.stderr
    told = json.loads(read.stdout)
    assert told["categories"] == [["0", "nought"]]
    assert told["clusters"] == found.labels_.tolist()
    assert told["indices"] == list(range(8, 70))
    assert told["embeddings"] == ["spectral", "tsne"] and told["eigenvalues"] == 11
    assert told["label"] == "nought" and told["last"] == HOSTILE
    assert told["attribution"] == [20, 24, 2] and told["sample"] == [20, 24, 3]
    assert told["heatmap"] == [20, 24, 3]


def test_what_does_not_belong_together_is_said(found: SpectralRelevance, tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed: pip install 'lrpfx[virelay]'")
    maps, labels = planted()
    with pytest.raises(lrpfx.errors.InputError, match="do not belong together"):
        to_virelay(tmp_path, maps, labels, labels[:3], {}, images=maps)
    with pytest.raises(lrpfx.errors.InputError, match="category 0 has 3 samples, and 62 maps"):
        to_virelay(tmp_path, maps, labels, labels, {0: ([1, 2, 3], found)}, images=maps)
