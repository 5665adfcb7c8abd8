"""The command line, run as a user does: files that are written, what is said, exit codes."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lrpfx
from lrpfx.command import main, sources
from lrpfx.command.sources import Pixels
from tests.test_explanation import PNG

NET = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

class Gap(Net):
    def forward(self, x):
        return super().forward(torch.atan2(x, x + 1) + x)

class Dead(Net):
    def forward(self, x):
        return self.head((self.conv(x) - 1000).relu().mean((2, 3)))

number = 3

def broken():
    raise ValueError("no such file")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A network, its weights, and three images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("net", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "beside.py").write_text("WIDTH = 4")
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        pixels = random.integers(0, 255, (12, 20, 3)).astype("uint8")
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    return tmp_path


def test_a_folder_of_images_is_explained_as_a_script_would(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers that are said and stored are those of the library's own calls."""
    torch.manual_seed(3)
    sys.path.insert(0, str(folder))
    model = runpy.run_path(str(folder / "net.py"))["Net"]().eval()
    torch.save({"state_dict": model.state_dict()}, "net.pt")
    line = (
        "explain --model net.py:Net --weights net.pt --image photos --size 8 --out maps --batch 2"
    )
    assert main([*line.split(), "--save", "stored", "--overlay", "--target", "1"]) == 0
    said = capsys.readouterr()
    assert "3 of 3 images" in said.err
    for name in "abc":
        assert (folder / "maps" / f"{name}.png").read_bytes()[:8] == PNG
    pixels = Pixels(8, 3, (0.0,) * 3, (1.0,) * 3)
    x = torch.stack([pixels.read(path) for path in sorted((folder / "photos").iterdir())])
    expected = lrpfx.explain(model, x, 1)
    stored = [lrpfx.Explanation.load(path) for path in sorted((folder / "stored").iterdir())]
    torch.testing.assert_close(torch.cat([e.relevance for e in stored]), expected.relevance)
    for value, row in zip(expected.output[:, 1].tolist(), said.out.splitlines(), strict=True):
        assert f"class 1: {value:.4g}" in row


def test_an_image_is_scaled_cut_and_normalized(folder: Path) -> None:
    pixels = Pixels(6, 3, (0.5, 0.25, 0.0), (0.5, 0.5, 2.0))
    image = pixels.read(folder / "photos" / "a.png")
    assert image.shape == (3, 6, 6) and 0 <= image.min() and image.max() <= 1
    normal = pixels.normalize(image[None])[0]
    torch.testing.assert_close(normal[0], (image[0] - 0.5) / 0.5)
    low, high = pixels.bounds()
    assert low.flatten().tolist() == [-1, -0.5, 0] and high.flatten().tolist() == [1, 1.5, 0.5]


def test_the_box_of_the_pixels_is_known(folder: Path) -> None:
    line = "explain --model net.py:Net --image photos/a.png --size 8 --out one.png"
    assert main([*line.split(), "--rules", "epsilon_gamma_box"]) == 0
    assert (folder / "one.png").exists()


def test_coverage_tells_by_its_exit_code(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main("coverage --model net.py:Net --shape 3,8,8".split()) == 0
    assert "4 of 4 live nodes have a rule" in capsys.readouterr().out
    assert main("coverage --model net.py:Gap --shape 3,8,8".split()) == 1
    assert "atan2" in capsys.readouterr().out


def test_report_writes_a_page(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    line = "report --model net.py:Net --image photos/a.png --size 8 --html page.html"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "ledger" in said and "leaks" in said and "wrote page.html" in said
    assert "<details" in (folder / "page.html").read_text()


WRONG = {
    "no model": ("explain --model resnet --image photos", "torchvision:resnet18"),
    "no file": ("explain --model no.py:Net --image photos", "cannot be imported"),
    "no name": ("explain --model net.py:Nt --image photos", "it has Net"),
    "no module": ("explain --model net.py:number --image photos", "int"),
    "fails": ("explain --model net.py:broken --image photos", "no such file"),
    "no weights": ("explain --model net.py:Net --weights no.pt --image photos", "no.pt"),
    "code for weights": ("explain --model net.py:Net --weights net.py --image photos", "net.py"),
    "no image": ("explain --model net.py:Net --image no.png", "no.png"),
    "no picture": ("explain --model net.py:Net --image net.py", "as an image"),
    "onto the image": ("explain --model net.py:Net --image photos --out photos", "overwrite"),
    "no rules": ("explain --model net.py:Net --image photos --rules epsilon", "epsilon"),
    "target": ("explain --model net.py:Net --image photos --target 7 --size 8", "out of range"),
    "one picture": ("explain --model net.py:Net --image photos --out maps.png", "--out maps."),
    "no page": ("report --model net.py:Net --shape 3,8,8 --html no/page.html", "no/page.html"),
    "default": ("coverage --model net.py:Net --weights default", "torchvision and timm"),
}


@pytest.mark.parametrize(("line", "word"), WRONG.values(), ids=WRONG)
def test_errors_have_the_librarys_form_and_exit_code_1(
    line: str, word: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 1
    said = capsys.readouterr().err
    assert "lrpfx: " in said and "  fix:   " in said and word in said


def test_weights_that_cannot_be_downloaded_end_in_words(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    zoo = SimpleNamespace(list_models=lambda: ["resnet18"], get_model=refused)
    monkeypatch.setattr(sources, "_library", lambda *_: zoo)
    line = "explain --model torchvision:resnet18 --weights default --image photos"
    assert main(line.split()) == 1
    said = capsys.readouterr().err
    assert "resnet18 cannot be made: OSError: no network" in said and "--weights none" in said


def test_notes_of_an_explanation_are_told_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "explain --model net.py:Dead --image photos --size 8 --batch 3 --out maps"
    assert main(line.split()) == 0
    assert capsys.readouterr().err.count("note: relevance is zero everywhere") == 1


def test_a_shape_that_is_none_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("coverage --model a:b --shape 3x8x8".split())
    assert "'3x8x8' is no shape; write sizes and commas" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", "explain", "coverage --model a:b --shape 3,x", "paint"])
def test_arguments_that_cannot_be_read_end_with_2(line: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2


def test_the_module_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lrpfx", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("lrpfx", run_name="__main__")
    assert caught.value.code == 0 and lrpfx.__version__ in capsys.readouterr().out
