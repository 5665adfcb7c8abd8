"""What an explanation shows and stores: repr, report, HTML, picture, file."""

import base64
import io
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lrpfx
from lrpfx import Explanation, errors
from lrpfx.report.report import Report, Row
from tests.conftest import Apply
from tests.oracle.networks import ConvNet
from tests.test_errors import check_form

PNG = b"\x89PNG\r\n\x1a\n"

#: A module's name and a function's name that would do harm in a page.
TAG, SCRIPT = "<b>&amp;</b>", '<script>alert("1")</script>'


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Output:
    logits: Tensor
    extra: Any = None


def hostile() -> nn.Module:
    """Modules whose names are no identifiers."""
    inner = nn.Sequential()
    inner.add_module(TAG, nn.Linear(3, 4))
    inner.add_module("a b/c-d", nn.ReLU())
    model = nn.Sequential()
    model.add_module("<table>", inner)
    model.add_module("head", nn.Linear(4, 2))
    return model.eval()


def mask_and_two(m: Any, x: Tensor, y: Tensor, mask: Tensor, scale: float) -> Output:
    return Output(m.a(x) * mask + m.a(y) * scale, {"x": [x, None, "text"]})


@pytest.fixture(scope="module")
def images() -> Explanation:
    """(2, 1, 4, 4), with layers, one of them folded, another called once."""
    torch.manual_seed(0)
    return lrpfx.explain(ConvNet(), draw(2, 1, 4, 4), [2, 0], layers=["conv", "norm", "act"])


@pytest.fixture(scope="module")
def several() -> Explanation:
    """A dict of two explained tensors, an integer tensor, a number; a dataclass as output."""
    torch.manual_seed(0)
    model = Apply(mask_and_two, a=nn.Linear(3, 2))
    inputs = {"x": draw(2, 3), "y": draw(2, 3, seed=4), "mask": torch.eye(2).long(), "scale": 2.0}
    return lrpfx.explain(model, inputs, lambda out: out.logits[:, 0])


@pytest.fixture(scope="module")
def named_badly() -> Explanation:
    def target(out: Tensor) -> Tensor:
        return out[:, 0]

    target.__name__ = SCRIPT
    torch.manual_seed(0)
    return lrpfx.explain(hostile(), draw(2, 3), target, layers=["*"])


@pytest.fixture(scope="module")
def table() -> Explanation:
    torch.manual_seed(0)
    return lrpfx.explain(nn.Linear(3, 2), draw(2, 3))


EXPLANATIONS = ["images", "several", "named_badly", "table"]


@pytest.fixture(params=EXPLANATIONS)
def explanation(request: pytest.FixtureRequest) -> Explanation:
    return request.getfixturevalue(request.param)


# -- text -----------------------------------------------------------------------------------------


def test_repr_is_short(explanation: Explanation) -> None:
    """One line without tensors, that says what was explained by what rules, and the balance."""
    text = repr(explanation)
    assert "\n" not in text and len(text) <= 400 and "tensor(" not in text
    report = explanation.report
    assert report.target in text and report.rules in text
    assert f"{report.started:.6g}" in text and f"{report.reached:.6g}" in text


def test_what_is_noted_shows_wherever_an_explanation_does() -> None:
    """A blank picture without a word is taken for a result."""
    dead = Apply(lambda m, x: m.b((m.a(x) - 100).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    e = lrpfx.explain(dead, draw(2, 3), 1)
    assert "zero everywhere" in e.report.notes[0] and repr(e).endswith("1 note)")
    assert f"note: {e.report.notes[0]}" in " ".join(Page(e._repr_html_()).text)
    assert "note" not in repr(lrpfx.explain(nn.Linear(3, 2), draw(2, 3), 1))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.InputError, match=r"there is no file nowhere\.npz") as caught:
        Explanation.load("nowhere.npz")
    check_form(caught.value)


def test_repr_names_shapes(images: Explanation, several: Explanation) -> None:
    assert "float32[2, 1, 4, 4]" in repr(images)
    assert repr(several).count("float32[2, 3]") == 2


def test_repr_does_not_grow_with_the_input() -> None:
    small = lrpfx.explain(nn.Linear(3, 2), draw(1, 3), 1)
    large = lrpfx.explain(nn.Linear(3, 2), draw(500, 3), 1)
    assert abs(len(repr(large)) - len(repr(small))) < 30


def test_report_lists_every_node(explanation: Explanation) -> None:
    lines = repr(explanation.report).splitlines()
    assert all(len(line) <= 120 for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("---"))
    rows = lines[start + 1 :]
    assert len(rows) == len(explanation.report.rows) > 0
    for line, row in zip(rows, explanation.report.rows, strict=True):
        assert row.module[-20:] in line and row.op in line and row.rule[:14] in line
        assert f"{row.relevance_in:.3g}" in line and f"{row.relevance_out:.3g}" in line


def test_report_of_the_conv_net(images: Explanation) -> None:
    rows = {row.module: row for row in images.report.rows if row.module}
    assert [*rows] == ["conv", "act", "classifier"]
    assert rows["conv"].folded == ("norm",) and "conv+norm" in repr(images.report)
    assert rows["conv"].shape == (2, 2, 4, 4) and rows["classifier"].shape == (2, 3)
    assert "networks.py" in rows["conv"].source and "self.conv(x)" in rows["conv"].source
    # relu, as module and as function; flatten
    assert [row.op for row in images.report.rows] == "conv2d relu relu flatten linear".split()


def test_report_balances(explanation: Explanation) -> None:
    """What starts is what arrives and what is absorbed, node by node and in all."""
    report = explanation.report
    worth = max(abs(report.started), abs(report.reached), 1.0)
    assert abs(report.unaccounted) < 1e-5 * worth
    for row in report.rows:
        rest = row.relevance_in - row.relevance_out - sum(row.absorbed.values())
        assert abs(rest) < 1e-5 * worth, row
    reached = [r for r in pytree.tree_leaves(explanation.relevance) if isinstance(r, Tensor)]
    assert report.reached == pytest.approx(sum(r.sum().item() for r in reached), rel=1e-5)
    assert report.started == pytest.approx(explanation.seed.sum().item(), rel=1e-5)
    absorbed = sum(report.absorbed.values())
    assert absorbed == pytest.approx(explanation.absorbed.sum().item(), abs=1e-4 * worth)


def test_report_before_an_explanation() -> None:
    """The plan alone: no numbers yet, and no columns for them."""
    report = lrpfx.Explainer(ConvNet(), draw(2, 1, 4, 4)).report
    assert report.started is None and report.unaccounted is None and report.target == ""
    text = repr(report)
    assert "R in" not in text and "conv+norm" in text and "None" not in text
    assert report.to_dict()["ledger"] is None


WORDS = st.text(
    st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"], max_codepoint=0x2FF), max_size=60
) | st.integers(0, 60).map("x".__mul__)
NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True)
ROWS = st.builds(
    Row,
    node=WORDS,
    module=WORDS,
    op=WORDS,
    kind=WORDS,
    rule=WORDS,
    why=WORDS,
    shape=st.lists(st.integers(0, 10**6) | st.just("N"), max_size=6).map(tuple),
    folded=st.lists(WORDS, max_size=2).map(tuple),
    relevance_in=NUMBERS,
    relevance_out=NUMBERS,
    absorbed=st.dictionaries(WORDS, st.floats(), max_size=2),
)
REPORTS = st.builds(
    Report,
    rows=st.lists(ROWS, max_size=4).map(tuple),
    rules=WORDS,
    constant_nodes=st.integers(0, 1000),
    notes=st.lists(st.text("ab ", max_size=300), max_size=2).map(tuple),
    target=st.text("ab ", max_size=300),
    started=NUMBERS,
    reached=NUMBERS,
)

LONG, TINY = "layers.encoder." * 4, -1.23456e-05
WIDEST = Report(
    rows=(Row(*[LONG] * 6, (10**5,) * 5, (LONG,), LONG, TINY, TINY, {LONG: TINY}),),
    rules=LONG,
    constant_nodes=10**6,
    notes=(LONG * 4,),
    target=LONG * 4,
    started=TINY,
    reached=TINY,
)


@given(report=REPORTS)
@example(report=WIDEST)
def test_no_report_is_wider_than_a_terminal(report: Report) -> None:
    """Whatever names, rules, shapes and numbers it has to show; long ones go on below."""
    lines = repr(report).splitlines()
    assert all(len(line) <= 120 for line in lines), max(lines, key=len)
    table = next(i for i, line in enumerate(lines) if set(line) == {"-", " "} or "---" in line)
    assert len(lines) - table - 1 >= len(report.rows)


@given(report=REPORTS)
def test_every_report_is_plain_data(report: Report) -> None:
    assert json.loads(json.dumps(report.to_dict())).keys() == report.to_dict().keys()
    assert len(report.to_dict()["rows"]) == len(report.rows)


def test_report_as_dict(explanation: Explanation) -> None:
    """Strict JSON, so without NaN, and numbers as numbers."""
    report = explanation.report
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored == report.to_dict()
    assert stored["ledger"]["started"] == report.started
    assert [row["node"] for row in stored["rows"]] == [row.node for row in report.rows]
    live = stored["coverage"]
    assert live["live_nodes"] == live["ruled_nodes"] == len(report.rows)


# -- HTML -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags and the text of a page, as a browser reads them; no attribute can act."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.pictures: list[bytes] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        for name, value in attrs:
            if (tag, name) == ("img", "src"):
                kind, _, data = value.partition(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(base64.b64decode(data))
            else:
                assert name in ("class", "style", "title"), f"<{tag} {attrs}>"
        self.tags.append(tag)
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


REPORT_TAGS = {"p", "b", "br", "div", "style", "table", "tr", "th", "td"}
SHOWN_TAGS = REPORT_TAGS | {"img", "code", "small", "span", "details", "summary"}


def test_html_escapes_names(named_badly: Explanation) -> None:
    page = Page(named_badly._repr_html_())
    assert set(page.tags) <= SHOWN_TAGS and not page.open
    # The names are there all the same: in the rows, and as the target's name.
    assert f"<table>.{TAG}" in page.text
    assert any(SCRIPT in text and "callable" in text for text in page.text)


def test_html_has_the_facts_and_a_row_per_node_folded_away(explanation: Explanation) -> None:
    page = Page(explanation._repr_html_())
    assert page.tags.count("tr") == 1 + len(explanation.report.rows)
    assert page.tags.count("td") == len(explanation.report.rows) * page.tags.count("th")
    text = "".join(page.text)
    assert explanation.report.rules in text and explanation.report.target in text
    assert f"sums to {explanation.report.reached:.4g} of {explanation.report.started:.4g}" in text
    assert page.tags.index("details") < page.tags.index("table")


def test_html_has_a_picture_of_each_explained_input(
    images: Explanation, several: Explanation, table: Explanation
) -> None:
    for e, pictures in ((images, 1), (several, 2), (table, 1)):
        page = Page(e._repr_html_())
        assert [picture[:8] for picture in page.pictures] == [PNG] * pictures
        assert "details" not in page.tags[: page.tags.index("img")]


def test_html_says_why_there_is_no_picture(table: Explanation) -> None:
    strange = replace(table, relevance=draw(2, 3, 4, 5, 6, 7), inputs=draw(2, 3, 4, 5, 6, 7))
    page = Page(strange._repr_html_())
    assert not page.pictures and any("no picture" in text for text in page.text)


def test_layers_are_shown_in_a_line_each(images: Explanation) -> None:
    lines = repr(images.layers).splitlines()
    assert [line.split(":")[0] for line in lines] == ["conv", "norm", "act"]
    for line, calls in zip(lines, images.layers.values(), strict=True):
        assert "[2, 2, 4, 4]" in line and f"{calls.relevance.sum().item():.4g}" in line
        assert repr(calls) == repr(calls[0]) and repr(calls) in line


def test_a_long_report_is_shown_in_part_and_printed_whole(table: Explanation) -> None:
    row = table.report.rows[0]
    report = replace(table.report, rows=(row,) * 100)
    assert "40 more rows" in repr(report)
    assert len(str(report).splitlines()) == len(repr(report).splitlines()) - 1 + 40


@given(report=REPORTS)
def test_html_of_any_report(report: Report) -> None:
    page = Page(report._repr_html_())
    assert set(page.tags) <= REPORT_TAGS and not page.open


# -- files ----------------------------------------------------------------------------------------


def assert_equal(found: Any, expected: Any) -> None:
    """The same containers with the same tensors, bit by bit."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and found.dtype == expected.dtype
        assert torch.equal(found, expected.detach())
    elif isinstance(expected, dict):
        assert isinstance(found, dict) and [*found] == [*expected]
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    else:
        assert found == expected and type(found) is type(expected)


def round_trip(explanation: Explanation, path: Path) -> Explanation:
    explanation.save(path)
    return Explanation.load(path)


def test_loads_what_was_saved(explanation: Explanation, tmp_path: Path) -> None:
    loaded = round_trip(explanation, tmp_path / "e.npz")
    for name in ("relevance", "target", "seed", "absorbed", "inputs"):
        assert_equal(getattr(loaded, name), getattr(explanation, name))
    assert type(loaded.relevance) is type(explanation.relevance)
    assert loaded.report == explanation.report
    assert repr(loaded) == repr(explanation) and loaded._repr_html_() == explanation._repr_html_()
    assert [*loaded.layers] == [*explanation.layers]
    for path, calls in explanation.layers.items():
        assert_equal(loaded.layers[path].relevance, calls.relevance)
        assert_equal(loaded.layers[path][0].activation, calls[0].activation)
    again = round_trip(loaded, tmp_path / "again.npz")
    assert again.report == loaded.report
    assert_equal(again.relevance, loaded.relevance)


def test_output_is_saved_as_its_tensors(
    images: Explanation, several: Explanation, tmp_path: Path
) -> None:
    """Also that of a dataclass, which is no container that the file format knows."""
    assert_equal(round_trip(images, tmp_path / "e.npz").output, images.output)
    loaded = round_trip(several, tmp_path / "e.npz").output
    tensors = [leaf for leaf in pytree.tree_leaves(loaded) if isinstance(leaf, Tensor)]
    assert_equal(tensors, [several.output.logits, several.output.extra["x"][0]])


STRUCTURES = {
    "tuple": (draw(2), None),
    "tuple of one": (draw(2),),
    "empty tuple": (),
    "dict": {"x": draw(2), "mask": None},
    "nested": {"a": (draw(2), [draw(3), {"b": draw(1)}]), "c": None},
    # Both would be called a.b if names were joined by dots.
    "dots in keys": {"a": {"b": draw(2)}, "a.b": draw(3)},
    "slashes in keys": {"/etc/x": draw(2), "../y": draw(3)},
    "numbers as names": {"0": draw(2), "1": [draw(1), draw(2)]},
    "names of the format": {"tensor": draw(2), "dict": [draw(1)], "value": {"tensor": draw(3)}},
    "bfloat16": draw(5).bfloat16() / 3,
    "float16": draw(5).half(),
    "float64": draw(5).double(),
    "no dimensions": torch.tensor(1.5),
    "no entries": torch.zeros(0, 3),
    "not contiguous": draw(3, 4).t(),
    "requires grad": draw(3).requires_grad_(),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
}


@pytest.mark.parametrize("relevance", STRUCTURES.values(), ids=STRUCTURES)
def test_structures_survive(table: Explanation, relevance: Any, tmp_path: Path) -> None:
    loaded = round_trip(replace(table, relevance=relevance), tmp_path / "e.npz").relevance
    assert pytree.tree_structure(loaded) == pytree.tree_structure(relevance)
    pairs = zip(pytree.tree_leaves(loaded), pytree.tree_leaves(relevance), strict=True)
    for found, expected in pairs:
        if expected is None:
            assert found is None
        else:
            assert found.dtype == expected.dtype and found.shape == expected.shape
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0, equal_nan=True)


CONSTANTS = {
    "integers": torch.arange(3),
    "mask": torch.tensor([True, False]),
    "number": 2.5,
    "text": "a",
    "none": None,
    "flag": True,
}


@pytest.mark.parametrize("constant", CONSTANTS.values(), ids=CONSTANTS)
def test_constant_inputs_survive(table: Explanation, constant: Any, tmp_path: Path) -> None:
    saved = replace(table, inputs={"x": draw(2, 3), "constant": constant})
    assert_equal(round_trip(saved, tmp_path / "e.npz").inputs, saved.inputs)


def test_several_calls_of_a_layer_survive(tmp_path: Path) -> None:
    model = Apply(lambda m, x: m.act(m.fc(m.act(x))), fc=nn.Linear(3, 3), act=nn.ReLU())
    explanation = lrpfx.explain(model, draw(2, 3), layers=["*"])
    loaded = round_trip(explanation, tmp_path / "e.npz")
    assert len(loaded.layers["act"]) == 2 and len(loaded.layers["fc"]) == 1
    for found, expected in zip(loaded.layers["act"], explanation.layers["act"], strict=True):
        assert_equal(found.relevance, expected.relevance)
        assert_equal(found.activation, expected.activation)


def test_file_holds_no_code(images: Explanation, tmp_path: Path) -> None:
    images.save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert all(array.dtype != object for array in arrays.values())
    assert np.array_equal(arrays["relevance"], images.relevance.numpy())


def test_an_ending_is_taken_as_it_is_and_found_where_there_is_none(
    table: Explanation, tmp_path: Path
) -> None:
    for path in (tmp_path / "no-ending", str(tmp_path / "text.npz"), tmp_path / "other.bin"):
        table.save(path)
        assert_equal(Explanation.load(path).relevance, table.relevance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no-ending.npz", "other.bin", "text.npz"]
    (tmp_path / "no-ending.npz").rename(tmp_path / "bare")  # as version 0.1.0 wrote it
    assert_equal(Explanation.load(tmp_path / "bare").relevance, table.relevance)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tree(value: Any, **arrays: Any) -> bytes:
    return npz(__tree__=np.array(value if isinstance(value, str) else json.dumps(value)), **arrays)


class Bomb:
    """Goes off where a file is unpickled."""

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise AssertionError("the file was unpickled")


def _edited(good: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    """A good file with something edited in the description of its content."""
    with np.load(io.BytesIO(good)) as file:
        arrays = {name: file[name] for name in file.files}
    described = json.loads(str(arrays.pop("__tree__")))
    edit(described)
    return tree(described, **arrays)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    # what the file holds, made from the bytes of a good one
    "nothing": lambda good: b"",
    "text": lambda good: b"hello",
    "zip's first bytes": lambda good: b"PK\x03\x04",
    "half a file": lambda good: good[: len(good) // 2],
    "all but the end": lambda good: good[:-10],
    "wrong byte": lambda good: good[:70] + bytes([good[70] ^ 255]) + good[71:],
    "pickle": lambda good: pickle.dumps(Bomb()),
    "array": lambda good: npy(np.zeros(3)),
    "array of objects": lambda good: npy(np.array([Bomb()])),
    "other arrays": lambda good: npz(weights=np.zeros(3)),
    "objects": lambda good: npz(__tree__=np.array([Bomb()])),
    "objects beside": lambda good: tree(
        {"tree": {"relevance": {"tensor": "a", "dtype": "float32"}}}, a=np.array([Bomb()])
    ),
    "numbers for the tree": lambda good: npz(__tree__=np.zeros(3)),
    "no JSON": lambda good: tree("{"),
    "JSON list": lambda good: tree("[]"),
    "JSON null": lambda good: tree("null"),
    "empty tree": lambda good: tree({}),
    "tree without a report": lambda good: _edited(good, lambda d: d.pop("report")),
    "tree without relevance": lambda good: _edited(good, lambda d: d["tree"].pop("relevance")),
    "tree without layers": lambda good: _edited(good, lambda d: d["tree"].pop("layers")),
    "unknown field": lambda good: _edited(good, lambda d: d["tree"].update(more={"value": 1})),
    "unknown array": lambda good: _edited(
        good, lambda d: d["tree"].update(seed={"tensor": "gone", "dtype": "float32"})
    ),
    "unknown node": lambda good: _edited(good, lambda d: d["tree"].update(seed={"code": "1"})),
    "unknown dtype": lambda good: _edited(
        good, lambda d: d["tree"]["seed"].update(dtype="float31")
    ),
    # an attribute of torch, but no dtype
    "function for a dtype": lambda good: _edited(
        good, lambda d: d["tree"]["seed"].update(dtype="load")
    ),
    "report of a list": lambda good: _edited(good, lambda d: d.update(report=[])),
    "row with a new field": lambda good: _edited(
        good, lambda d: d["report"]["rows"][0].update(new=1)
    ),
}


@pytest.mark.parametrize("make", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_told(
    table: Explanation, make: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "garbage.npz"
    table.save(path)
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(errors.LrpError, match=r"garbage\.npz") as caught:
        Explanation.load(path)
    assert type(caught.value) is errors.InputError
    check_form(caught.value)


@pytest.mark.parametrize("name", ["missing.npz", "."], ids=["missing", "folder"])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InputError) as caught:
        Explanation.load(tmp_path / name)
    check_form(caught.value)


def test_differentiable_relevance_is_saved(tmp_path: Path) -> None:
    x = draw(2, 3).requires_grad_()
    explanation = lrpfx.explain(nn.Linear(3, 2), x, create_graph=True, layers=["*"][:0])
    loaded = round_trip(explanation, tmp_path / "e.npz")
    assert_equal(loaded.relevance, explanation.relevance)
    assert not loaded.relevance.requires_grad
