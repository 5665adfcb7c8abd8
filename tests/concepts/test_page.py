"""What people see of a scan: a figure, and a page that stands alone."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import lrpfx
from lrpfx.concepts import ConceptTable, Neuron, Reference, scan
from lrpfx.concepts.page import _strip
from lrpfx.concepts.views import View, Viewer
from tests.concepts.test_scan import LAYERS, network, samples

HOSTILE = "<script>alert('x')</script>\"&' </style><img src=http://example.org/a.png onerror=b>"


class Named(TensorDataset):
    classes = [HOSTILE, "one", "two"]
    samples = [(f"/folder/{HOSTILE}-{i}.png".replace("//", "/"), i % 3) for i in range(17)]


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    return lrpfx.Explainer(network(), samples().tensors[0][:2], "epsilon_plus")


@pytest.fixture(scope="module")
def data() -> Named:
    return Named(*samples().tensors)


@pytest.fixture(scope="module")
def table(
    explainer: lrpfx.Explainer, data: Named, tmp_path_factory: pytest.TempPathFactory
) -> ConceptTable:
    out = tmp_path_factory.mktemp("scan")
    return scan(explainer, data, layers=LAYERS, k=8, batch_size=4, out=out, progress=False)


@pytest.fixture(scope="module")
def page(table: ConceptTable, explainer: lrpfx.Explainer, data: Named) -> Path:
    path = table.folder.with_name("report.html")
    table.to_html(path, dataset=data, explainer=explainer, progress=False)
    return path


def test_maps_are_those_of_the_concept_and_the_class(
    table: ConceptTable, explainer: lrpfx.Explainer, data: Named
) -> None:
    pairs = [(c, table.references("3", c, k=2)[1]) for c in (2, 0, 1)]
    views = list(Viewer(explainer, data, "label", {}, batch_size=2).views("3", pairs))
    for (concept, reference), view in zip(pairs, views, strict=True):
        x = data.tensors[0][reference.sample][None]
        e = explainer(x, reference.label, conditions=[{"3": [concept]}])
        np.testing.assert_allclose(view.relevance, e.relevance[0, 0].sum(0), atol=1e-12)
        assert view.image is not None and view.image.shape == (8, 8, 3)


@pytest.mark.parametrize("crop", ["field", "relevance"])
def test_crops_hold_what_the_concept_saw(
    table: ConceptTable, explainer: lrpfx.Explainer, data: Named, crop: Any
) -> None:
    pairs = [(1, r) for r in table.references("0", 1)]
    whole = list(Viewer(explainer, data, "label", {}).views("0", pairs))
    cropped = list(Viewer(explainer, data, "label", {}, crop).views("0", pairs))
    for (_, reference), full, part in zip(pairs, whole, cropped, strict=True):
        assert full.relevance is not None and part.relevance is not None and part.image is not None
        assert part.relevance.shape == part.image.shape[:2]
        if crop == "field":
            row, column = divmod(reference.position, 6)
            wanted = full.relevance[row : row + 3, column : column + 3]
            np.testing.assert_array_equal(part.relevance, wanted)
        else:
            assert np.abs(part.relevance).sum() >= 0.7 * np.abs(full.relevance).sum()


def test_one_picture_holds_all_concepts(
    table: ConceptTable, explainer: lrpfx.Explainer, data: Named, tmp_path: Path
) -> None:
    figure = table.plot(
        "3", [0, 2], dataset=data, explainer=explainer, k=3, path=tmp_path / "grid.png"
    )
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert len(figure.axes) == 2 * 2 * 3
    with pytest.raises(lrpfx.errors.InputError, match=r"grid.odd cannot be written"):
        table.plot("3", [0], dataset=data, explainer=explainer, path=tmp_path / "grid.odd")


class Tags(HTMLParser):
    """All tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_escapes_names_and_loads_nothing(page: Path) -> None:
    text = page.read_text()
    found = Tags(text)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert not {"img", "link", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name == "src" or name.startswith("on")]
    assert all(value and value[0] == "#" for name, value in found.attributes if name == "href")
    styles = [value for name, value in found.attributes if name == "style" and "url" in str(value)]
    assert all(re.fullmatch(r"--t:\d+;--s:url\(data:image/webp[^()]+\)", str(s)) for s in styles)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in text and "default-src 'none'" in text


def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert links <= set(ids)
    assert {"c0-3", "c1-2", "k0", "k2", "l1", "classes"} <= links
    assert text.count("<li ") == 7 * 8 and text.count("--s:url(data:image/webp") == 7


def test_only_some_concepts_are_shown_if_so_asked(
    table: ConceptTable, explainer: lrpfx.Explainer, data: Named, tmp_path: Path
) -> None:
    table.to_html(
        tmp_path / "few.html", dataset=data, explainer=explainer, layers=["3"], most=1, k=2,
        by="activation", crop="field", target=1, class_names={1: "ONE"}, progress=False,
    )  # fmt: skip
    text = (tmp_path / "few.html").read_text()
    assert len(re.findall(r'<article id="c1-', text)) == 1 and 'id="c0' not in text
    assert (
        text.count("<span>ONE</span>") == 2 and 'class="pale"' in text and text.count("<li ") == 2
    )


def test_what_is_no_image_is_listed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    explainer, rows = lrpfx.Explainer(model.eval(), x), TensorDataset(x, torch.arange(6) % 2)
    table = scan(explainer, rows, layers=["0"], k=2, out=tmp_path / "scan", progress=False)
    table.to_html(tmp_path / "a.html", dataset=rows, explainer=explainer, progress=False)
    text = (tmp_path / "a.html").read_text()
    assert text.count("<li ") == 6 and "url(" not in text


def test_pictures_of_a_thousand_concepts_take_less_than_their_share() -> None:
    """Noise, which compresses worst, as 8 samples of each of 1,000 concepts: below 30 MB."""
    rng = np.random.default_rng(0)
    views = [
        View(
            Reference(i, 0.0, 0, 0), rng.random((64, 64, 3), np.float32), rng.normal(size=(64, 64))
        )
        for i in range(8)
    ]
    found = _strip(views, 64, 18_000)
    assert found is not None and len(found[0]) < 25_000
    assert found[1] >= 32


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(kinds={"3": Neuron()}), "other kinds of concepts: channels"),
        (dict(crop="middle"), "crop='middle' is not known"),
        (dict(path="/nowhere/at/all/a.html"), "cannot be written"),
    ],
)
def test_what_is_wrong_is_said(
    table: ConceptTable,
    explainer: lrpfx.Explainer,
    data: Named,
    tmp_path: Path,
    options: dict[str, Any],
    said: str,
) -> None:
    given = {"path": tmp_path / "a.html", "dataset": data, "explainer": explainer, **options}
    with pytest.raises(lrpfx.errors.InputError, match=said):
        table.to_html(progress=False, **given)


def test_a_browser_opens_the_page_without_an_error(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    shown = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
            "--dump-dom", f"{page.as_uri()}#c1-2",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count("<article") == 7 + 3 and "&lt;script&gt;" in shown.stdout
