"""README and pages: snippets run, reports are as shown, and what is named is there."""

import dataclasses
import doctest
import pkgutil
import re
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import sklearn.cluster
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.command.main import _EXAMPLES, _parser
from lrpfx.ops import table
from lrpfx.plan import resolve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.S | re.M)


@dataclass
class Output:
    logits: Tensor


class Language(nn.Module):
    """Called as language models of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Output:
        assert not use_cache
        kept = self.embed(input_ids) * attention_mask[..., None]
        return Output(self.head(kept + kept.mean(1, keepdim=True)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0][:, -1])


def images(**names: nn.Module) -> dict[str, Any]:
    """A convolutional network, of the modules that the page names, and two images."""
    layers = names or {"0": nn.Conv2d(1, 4, 3, padding=1), "1": nn.ReLU()}
    body, x = nn.Sequential(OrderedDict(layers)), torch.rand(2, 1, 8, 8)
    top = {"flat": nn.Flatten(), "head": nn.Linear(body(x)[0].numel(), 10)}
    model = nn.Sequential(OrderedDict([*layers.items(), *top.items()])).eval()
    return {"model": model, "x": x, "torch": torch, "F": F, "lrpfx": lrpfx}


def readme() -> dict[str, Any]:
    names = images()
    x, model = names["x"], names["model"]
    return names | {
        "loader": [(x, torch.tensor([1, 2])), (x[:1], torch.tensor([3]))],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "language_model": Language().eval(),
        "ids": torch.tensor([[1, 2, 3]]),
        "mask": torch.ones(1, 3, dtype=torch.long),
        "token": 4,
        "tokenizer": ["<s>", *"abcdefgh"],
        "classifier": nn.Linear(12, 3).eval(),
        "rows": torch.rand(2, 12),
        "names": [f"column {i}" for i in range(12)],
        "recurrent": Recurrent().eval(),
        "series": torch.rand(2, 4, 2),
        "segmenter": nn.Conv2d(1, 3, 3, padding=1).eval(),
    }


def api() -> dict[str, Any]:
    second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    return images(block1=nn.Conv2d(1, 4, 3, padding=1), block2=second)


def concepts() -> dict[str, Any]:
    convolutions: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    convolutions += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return images(features=nn.Sequential(*convolutions))


def audit() -> dict[str, Any]:
    names = concepts()
    x, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    data = torch.utils.data.TensorDataset(x, labels)
    return names | {"dataset": data, "x": x, "labels": labels, "predictions": labels}


def howto() -> dict[str, Any]:
    pooled = {"0": nn.Conv2d(1, 4, 3, padding=1), "1": nn.ReLU(), "2": nn.MaxPool2d(2)}
    names = images(**pooled, layer4=nn.Conv2d(4, 4, 1))
    return names | {"centroids": torch.randn(3, 4), "points": torch.randn(5, 4)}


def gallery() -> dict[str, Any]:
    methods, tokens = ["attnlrp", "cplrp"], ["a", "b", "c"]
    named = {"methods": methods, "tokens": tokens, "values": torch.rand(2, 3)}
    drawn = {"volume": torch.rand(1, 1, 6, 5, 5), "curves": torch.rand(4, 9)}
    return named | drawn | {"maps": torch.rand(4, 1, 5, 5), "lrpfx": lrpfx}


class Words(nn.Module):
    """Two classes of sentences, by the sum of what words are worth."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).mean(1))


def evaluate() -> dict[str, Any]:
    names = images()
    x = names["x"] = torch.rand(6, 1, 8, 8)
    masks = torch.zeros(6, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    return names | {
        "masks": masks,
        "words": Words().eval(),
        "ids": torch.randint(9, (3, 5)),
        "explanation_of_images": lrpfx.explain(names["model"], x, target=3),
    }


SETUP: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "supported.md": readme,
    "api.md": api,
    "audit.md": audit,
    "concepts.md": concepts,
    "gallery.md": gallery,
    "howto.md": howto,
    "evaluate.md": evaluate,
    "rules.md": evaluate,
    "own_rule.md": lambda: {**images(), "x": torch.rand(2, 1, 8, 8)},
}


#: What is in blocks that take seconds, which `make nightly` runs.
SLOW = "onnxruntime"
SNIPPETS = [
    pytest.param(page, slow, id=f"{page.stem}, {SLOW}" if slow else page.stem,
                 marks=[pytest.mark.nightly] if slow else [])
    for page in PAGES
    for slow in (False, True)
    if any((SLOW in block) >= slow for _, block in BLOCK.findall(page.read_text("utf-8")))
]  # fmt: skip


@pytest.mark.parametrize(("page", "slow"), SNIPPETS)
def test_every_snippet_runs(
    page: Path, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From top to bottom; what is imported on the page stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))  # a page may register an op ...
    monkeypatch.setattr(resolve, "_OWN", {})  # ... or a composite
    matplotlib.use("agg")
    torch.manual_seed(0)
    names = SETUP.get(page.name, images)()
    for indent, block in BLOCK.findall(page.read_text("utf-8")):
        if SLOW in block and not slow:
            continue
        code = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))
        exec(compile(code, str(page), "exec"), names)


def docstrings() -> dict[str, str]:
    """Those with examples, by the name of what they are of."""
    found: dict[str, str] = {"lrpfx": lrpfx.__doc__ or ""}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "lrpfx"]:
        for name, one in vars(module).items():
            if getattr(one, "__module__", None) == module.__name__ and isinstance(
                one, (type, FunctionType)
            ):
                found[name] = one.__doc__ or ""
    return {name: text for name, text in found.items() if ">>>" in text}


@pytest.mark.parametrize("name", sorted(docstrings()))
def test_every_example_of_a_docstring_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    monkeypatch.setattr(resolve, "_OWN", {})
    matplotlib.use("agg")
    torch.manual_seed(0)
    running = SimpleNamespace(default=torch.ops.aten.special_bessel_j0.default)
    ops = SimpleNamespace(my_ops=SimpleNamespace(running_total=running))
    names = images(layer4=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    names |= {"dataclasses": dataclasses, "register_op": lrpfx.register_op, "sklearn": sklearn}
    names["points"] = np.random.default_rng(0).random((40, 3), dtype=np.float32)
    if name == "register_op":
        names["torch"] = SimpleNamespace(ops=ops)
    for example in doctest.DocTestParser().get_examples(docstrings()[name]):
        exec(example.source, names)


def test_every_command_line_on_a_page_is_one() -> None:
    lines = [line.strip() for page in PAGES for line in page.read_text("utf-8").splitlines()]
    lines += _EXAMPLES.splitlines()
    calls = [line.split() for line in map(str.strip, lines) if re.match(r"lrpfx \w+ --", line)]
    assert len(calls) >= 8
    for call in calls:
        asked = _parser().parse_args(call[1:])
        assert asked.model and asked.run


#: The one that is quick; `make docs` runs all.
QUICK = "segmentation"


@pytest.mark.parametrize(
    "tutorial",
    [pytest.param(p, id=p.stem, marks=[] if p.stem == QUICK else pytest.mark.nightly)
     for p in TUTORIALS],
)  # fmt: skip
def test_every_tutorial_runs(
    tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    runpy.run_path(str(tutorial), run_name="__main__")
    assert not list(tmp_path.iterdir())


def test_the_report_that_is_shown_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    block, shown = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", text, re.S).groups()
    exec(block, {})
    number = re.compile(r"(stabilizer|unaccounted) [-\d.e+]+")  # round-off
    assert number.sub(r"\1", capsys.readouterr().out) == number.sub(r"\1", shown)


@pytest.mark.parametrize("page", [*PAGES, *TUTORIALS], ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    links += re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:lrpfx|tests|docs|examples|benchmarks)/[\w/.]+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_site_has_every_page_and_names_what_is_there() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("nav:")[2]
    pages = [*PAGES[1:], *TUTORIALS]
    named = re.findall(r": ([\w/]+\.(?:md|py))$", nav, re.M)
    assert set(named) == {str(p.relative_to(ROOT / "docs")) for p in pages}
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.M):
        pkgutil.resolve_name(name)


def test_links_of_a_tutorial_lead_to_pages() -> None:
    """It is a notebook to mkdocs, which leaves links to sources there as they are."""
    follow = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_content"]
    link = '<a class="x" href="{}">y</a>'
    for source, there in {
        "../concepts.md": "../concepts.html",
        "../api.md#targets": "../api.html#targets",
        "llm.py": "llm.html",
        "https://host/a.md": "https://host/a.md",
        "#above": "#above",
    }.items():
        for at, expected in (("tutorials/images.py", there), ("index.md", source)):
            page = SimpleNamespace(file=SimpleNamespace(src_uri=at))
            assert follow(link.format(source), page=page) == link.format(expected)


def test_colours_mean_the_same_for_a_negative_output() -> None:
    """README: red raises the output also where it is negative; from a seed of 1 they swap."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)
    ).eval()
    x = torch.randn(1, 6)
    for k in (0, 1):
        value = model(x)[0, k].item()
        relevance = lrpfx.explain(model, x, k, rules="epsilon_all").relevance
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf)[0, k], leaf)
        torch.testing.assert_close(relevance, gradient * x, rtol=1e-3, atol=1e-5)
        one = lrpfx.explain(model, x, torch.eye(2)[[k]], rules="epsilon_all").relevance
        torch.testing.assert_close(one * value, relevance, rtol=1e-3, atol=1e-5)
