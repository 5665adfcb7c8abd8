"""What a report tells of an explanation: leaks, comparison, groups, page, graph, coverage.

The golden files beside this one are written anew by

    LRPFX_GOLDEN=write pytest tests/report/test_report.py -k golden

and are then to be read before they are committed.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import lrpfx
from lrpfx import Explanation, errors
from lrpfx.report.report import Report, Row
from tests.conftest import Apply, assert_untouched
from tests.oracle.zoo import images, torchvision_model
from tests.report.golden.model import Gap, Net, fill, samples
from tests.test_errors import check_form
from tests.test_explanation import REPORTS, SCRIPT, TAG, hostile

pytestmark = pytest.mark.usefixtures("each_front")

GOLDEN = Path(__file__).parent / "golden"


def explained(rules: Any = "epsilon_plus", model: nn.Module | None = None) -> Explanation:
    return lrpfx.explain(model or fill(Net()), samples(), [1, 0], rules=rules)


@pytest.fixture(scope="module")
def plus() -> Report:
    return explained().report


@pytest.fixture(scope="module")
def epsilon() -> Report:
    return explained("epsilon_all").report


@pytest.fixture(scope="module")
def cut(plus: Report) -> Report:
    """As of an explanation that kept no ledger."""
    return replace(plus, rows=tuple(without_relevance(row) for row in plus.rows))


def without_relevance(row: Row) -> Row:
    return replace(row, relevance_in=None, relevance_out=None, absorbed={})


@pytest.fixture(scope="module")
def bad() -> Report:
    """Names that would do harm in a page, a graph or a table."""
    report = lrpfx.explain(hostile(), torch.ones(2, 3), 0).report
    names = [SCRIPT, 'a"b\\ `x` **b** #35;', "]; end\n&lt;"]
    rows = [
        replace(row, op=name, rule=name, why=name, source=f"{name}:3   {name}", folded=(name,))
        for row, name in zip(report.rows, names, strict=True)
    ]
    return replace(report, rows=tuple(rows), rules=SCRIPT, target=TAG, notes=(SCRIPT,))


def narrow(text: str) -> bool:
    return all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("columns", [None, 80])
def test_nothing_of_a_table_is_cut_off(
    plus: Report, columns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too long for its column goes on below it, in a terminal of any width."""
    if columns is not None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))
    deep = "model.encoder.layers.11.attention.self.query_projection"
    rows = [replace(row, module=deep, why=f"kind linear: {deep}") for row in plus.rows]
    text = str(replace(plus, rows=tuple(rows)))
    assert all(len(line) <= (columns or 120) for line in text.splitlines()) and "…" not in text
    ruler = next(line for line in text.splitlines() if line.startswith("---"))
    starts = [0, *(i + 2 for i, c in enumerate(ruler) if ruler[i : i + 2] == "  ")]
    row = text.split(ruler)[1].strip("\n").splitlines()
    at = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    for column, whole in ((0, deep), (3, deep)):
        said = "".join(line[at[column]].strip() for line in row)
        assert said.count(whole) == len(rows)


# -- leaks ----------------------------------------------------------------------------------------


def test_leaks_are_sorted_and_sum_to_what_was_absorbed(plus: Report) -> None:
    leaks = plus.leaks(None)
    sizes = [abs(leak.absorbed) for leak in leaks.entries]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 5
    lost = plus.started - plus.reached
    assert sum(leak.absorbed for leak in leaks.entries) == pytest.approx(lost, rel=1e-12)
    assert leaks.rest == pytest.approx(0, abs=1e-12) and leaks.others == 0
    few = plus.leaks(3)
    assert few.entries == leaks.entries[:3] and few.others == len(sizes) - 3
    assert few.rest == pytest.approx(sum(leak.absorbed for leak in leaks.entries[3:]), rel=1e-9)


def test_leaks_name_cause_and_share() -> None:
    biased = Apply(lambda m, x: m.fc(x), fc=nn.Linear(2, 1)).double()
    with torch.no_grad():
        biased.fc.weight.fill_(1.0)
        biased.fc.bias.fill_(6.0)
    report = lrpfx.explain(biased, torch.ones(1, 2, dtype=torch.float64), 0).report
    first = report.leaks().entries[0]
    assert (first.row.module, first.cause) == ("fc", "bias")
    assert first.absorbed == pytest.approx(6, rel=1e-6)
    assert first.share == pytest.approx(6 / 8, rel=1e-6)
    for text in (repr(report.leaks()), report.leaks()._repr_html_()):
        assert "bias" in text and "75.0%" in text


def test_leaks_name_the_source_line(plus: Report) -> None:
    assert "model.py:16   y" in repr(plus.leaks(None))


def test_leaks_of_a_seed_that_sums_to_zero(plus: Report) -> None:
    leaks = replace(plus, started=0.0).leaks()
    assert {leak.share for leak in leaks.entries} == {None} and "%" not in repr(leaks)


# -- comparison -----------------------------------------------------------------------------------


def test_a_report_equals_itself(plus: Report) -> None:
    found = plus.compare(plus)
    assert found.equal and not found.differing and found.most is None
    assert [pair.a for pair in found.pairs] == [pair.b for pair in found.pairs] == [*plus.rows]
    assert "nothing differs" in repr(found) and "nothing differs" in found._repr_html_()


def test_first_difference_is_the_one_nearest_to_the_output(plus: Report, epsilon: Report) -> None:
    """Relevance arrives there as it does in the other report, and leaves otherwise."""
    found = plus.compare(epsilon)
    expected = next(
        (a, b)
        for a, b in zip(reversed(plus.rows), reversed(epsilon.rows), strict=True)
        if a.rule != b.rule
    )
    first = found.first_rule
    assert (first.a, first.b) == expected and first == found.first_relevance
    assert (first.row.module, first.row.op) == ("block.conv2@1", "conv2d")
    assert first.a.relevance_in == pytest.approx(first.b.relevance_in, rel=1e-9)
    assert first.a.relevance_out != pytest.approx(first.b.relevance_out, rel=1e-3)
    assert "first part, from the output, at block.conv2@1 conv2d" in repr(found)
    assert found.most.gap == max(pair.gap for pair in found.pairs)


def test_one_changed_rule_is_one_difference(plus: Report) -> None:
    """Only the rule differs: for a first layer no relevance beside its own depends on it."""
    other = explained([("stem", lrpfx.Gamma(0.5)), "epsilon_plus"]).report
    found = plus.compare(other)
    assert [pair.row.module for pair in found.differing] == ["stem"]
    assert (found.first_rule.a.rule, found.first_rule.b.rule) == ("ZPlus", "Gamma(gamma=0.5)")


def test_tolerance_is_relative_to_the_largest(plus: Report) -> None:
    most = max(abs(v) for row in plus.rows for v in (row.relevance_in, row.relevance_out))
    rows = [replace(plus.rows[0], relevance_in=plus.rows[0].relevance_in + 1e-3 * most)]
    other = replace(plus, rows=(*rows, *plus.rows[1:]))
    assert not plus.compare(other).equal and not plus.compare(other, tolerance=9e-4).equal
    assert plus.compare(other, tolerance=2e-3).equal


def test_nodes_of_one_report_only(plus: Report) -> None:
    """A missing node shifts no other one."""
    found = plus.compare(replace(plus, rows=plus.rows[:2] + plus.rows[3:]))
    alone = [pair for pair in found.pairs if pair.b is None]
    assert [pair.a for pair in alone] == [plus.rows[2]] and len(found.pairs) == len(plus.rows)
    assert all(pair.a is pair.b for pair in found.pairs if pair.b)
    back = replace(plus, rows=plus.rows[1:]).compare(plus)
    assert [pair.b for pair in back.pairs if pair.a is None] == [plus.rows[0]]
    assert "not there" in repr(back)


def test_another_model_is_aligned_by_op_and_shape(plus: Report) -> None:
    """Inside a wrapper every path is another; with other classes the last shape is another."""
    wrapped = explained(model=Apply(lambda m, x: m.inner(x), inner=fill(Net()))).report
    assert {row.module.partition(".")[0] for row in wrapped.rows} == {"inner"}
    found = plus.compare(wrapped)
    assert found.equal and len(found.pairs) == len(plus.rows)
    net = Net()
    net.head[2] = nn.Linear(4, 5)
    wider = Apply(lambda m, x: m.inner(x), inner=fill(net))
    for other in (net, wider):
        assert len(plus.compare(explained(model=fill(other)).report).pairs) == len(plus.rows)


def test_plans_are_compared_by_rules_alone(plus: Report, cut: Report) -> None:
    plan = lrpfx.Explainer(fill(Net()), samples(), "epsilon_all").report
    for other in (plan, cut):
        found = plus.compare(other)
        assert found.threshold is None and found.most is None
        assert "relevance is not compared" in repr(found) and "R in" not in repr(found)
    assert plus.compare(plan).first_rule.row.module == "block.conv2@1"
    assert plus.compare(cut).equal


# -- groups ---------------------------------------------------------------------------------------


def test_groups_are_the_modules_of_a_depth(plus: Report) -> None:
    groups = plus.summarize().groups
    paths = [".".join(group.path) for group in groups]
    assert paths == ["stem", "", "block", "", "head"]
    assert [row for group in groups for row in group.rows] == [*plus.rows]
    deep = plus.summarize(2).groups
    assert len(deep) > len(groups)
    assert {".".join(group.path) for group in deep} >= {"block.conv1", "head.0", "stem"}
    assert len(plus.summarize(0).groups) == 1


@pytest.mark.parametrize("depth", range(4))
def test_groups_hand_relevance_to_each_other(plus: Report, depth: int) -> None:
    """Where no node is read both in and outside of its group, what one hands on another gets."""
    groups = plus.summarize(depth).groups
    assert groups[-1].relevance_in == pytest.approx(plus.started, rel=1e-9)
    assert sum(group.absorbed for group in groups) == pytest.approx(sum(plus.absorbed.values()))
    if depth <= 1:
        assert groups[0].relevance_out == pytest.approx(plus.reached, rel=1e-9)
        for before, after in zip(groups, groups[1:], strict=False):
            assert before.relevance_in == pytest.approx(after.relevance_out, rel=1e-9)


def test_hundreds_of_rows_become_a_few_lines() -> None:
    rows = [
        Row(f"n{i}", f"layers.{i // 20}.part{i % 20}", "linear", "linear", "Epsilon", "", ("N",))
        for i in range(500)
    ]
    report = Report(tuple(rows), "epsilon_all", 0)
    assert len(repr(report.summarize(2)).splitlines()) < 35
    assert "layers.24" in repr(report.summarize(2)) and "20 Epsilon" in repr(report.summarize(2))
    assert "500" in repr(report.summarize())


# -- without a ledger -----------------------------------------------------------------------------


def test_what_is_not_known_is_not_shown_as_zero(cut: Report) -> None:
    for ask in (cut.leaks, cut.needs_ledger, lambda: cut.absorbed):
        with pytest.raises(errors.InputError, match="ledger=True") as caught:
            ask()
        check_form(caught.value)
    for text in (repr(cut), cut._repr_html_(), repr(cut.summarize()), cut.to_html()):
        assert "ledger=True" in text and "R in</th><th>R out" not in text
        assert f"{cut.started:.6g}" in text and "absorbed 0" not in text
    assert "R in" not in repr(cut) and "R in" not in repr(cut.summarize())
    assert cut.unaccounted is None and "absorbed" not in cut.to_dot()
    stored = json.loads(json.dumps(cut.to_dict()))["ledger"]
    assert stored["absorbed"] is stored["unaccounted"] is None
    assert stored["started"] == cut.started


@pytest.mark.parametrize("wrong", ["x", 1.5, -1])
def test_numbers_of_what_is_shown_are_checked(plus: Report, wrong: Any) -> None:
    for ask in (plus.leaks, plus.summarize):
        with pytest.raises(errors.InputError, match=re.escape(repr(wrong))) as caught:
            ask(wrong)
        check_form(caught.value)


def test_a_plan_has_no_leaks() -> None:
    with pytest.raises(errors.InputError, match="explanation") as caught:
        lrpfx.Explainer(fill(Net()), samples()).report.leaks()
    check_form(caught.value)


# -- the page -------------------------------------------------------------------------------------

TAGS = "html head meta title style body h1 h2 p pre br details summary b small span i code".split()
TAGS += "table tr th td div".split()


class Page(HTMLParser):
    """Fails unless every tag is known, closed in order, and asks for nothing from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in TAGS, tag
        assert {name for name, _ in attrs} <= {"lang", "charset", "open", "class", "style", "title"}
        assert "url" not in dict(attrs).get("style", "")
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_a_tree_of_modules(plus: Report) -> None:
    page = Page(plus.to_html())
    names = {part for row in plus.rows for part in row.path}
    assert names <= {*page.text}
    leaks = len(plus.leaks().entries) + 1
    assert page.tags.count("tr") == leaks + len(plus.rows)
    assert all(row.place in page.text for row in plus.rows)


def test_page_is_written(plus: Report, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert path.with_suffix(".html") == path and plus.to_html(path) == path.read_text("utf-8")
    assert plus.to_html(str(path)) == plus.to_html()


def test_page_escapes_names(bad: Report) -> None:
    text = bad.to_html()
    page = Page(text)
    assert "<script" not in text and SCRIPT in page.text
    assert any(TAG in shown for shown in page.text)
    for view in (bad.leaks(), bad.summarize(2), bad.compare(replace(bad, rows=bad.rows[1:]))):
        assert "<script" not in view._repr_html_()
        Page(view._repr_html_())


# -- the graph ------------------------------------------------------------------------------------

DOT_NODE = re.compile(r'  (n\d+) \[label="((?:[^"\\]|\\.)*)", fillcolor="#[0-9a-f]{6}"\];')
DOT_EDGE = re.compile(r"  (n\d+) -> (n\d+);")
MERMAID_NODE = re.compile(r'  (n\d+)\["((?:[\w .,:=+()…-]|<br/>|#\d+;)*)"\]')
MERMAID_STYLE = re.compile(r"  style (n\d+) fill:#[0-9a-f]{6},stroke:#555,color:#000")
MERMAID_EDGE = re.compile(r"  (n\d+) --> (n\d+)")


def plain_dot(label: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], label)


def plain_mermaid(label: str) -> str:
    return re.sub(r"#(\d+);", lambda m: chr(int(m[1])), label.replace("<br/>", "\n"))


def read_graph(text: str) -> tuple[dict[str, str], set[tuple[str, str]]]:
    """Nodes with their labels, and edges, of a text in either language; fails on other lines."""
    lines = text.splitlines()
    dot = lines[0] == "digraph lrpfx {"
    if dot:
        assert lines.pop() == "}" and lines.pop(1).startswith("  node [")
    else:
        assert lines[0] == "flowchart TD"
    node, edge = (DOT_NODE, DOT_EDGE) if dot else (MERMAID_NODE, MERMAID_EDGE)
    nodes: dict[str, str] = {}
    edges: set[tuple[str, str]] = set()
    for line in lines[1:]:
        if found := node.fullmatch(line):
            assert found[1] not in nodes
            nodes[found[1]] = (plain_dot if dot else plain_mermaid)(found[2])
        elif found := edge.fullmatch(line):
            edges.add((found[1], found[2]))
        else:
            styled = MERMAID_STYLE.fullmatch(line)
            assert styled and styled[1] in nodes, line
    return nodes, edges


LANGUAGES = pytest.mark.parametrize("draw", [Report.to_dot, Report.to_mermaid])


@LANGUAGES
def test_graph_has_every_row_and_edge(plus: Report, draw: Callable[[Report], str]) -> None:
    nodes, edges = read_graph(draw(plus))
    assert len(nodes) == len(plus.rows) + 1  # the input is no row
    keys = dict(zip(["x", *(row.node for row in plus.rows)], nodes, strict=True))
    assert nodes[keys["x"]] == "x"
    for row in plus.rows:
        assert nodes[keys[row.node]].startswith(f"{row.label}\n{row.op}: {row.rule}\nR ")
    assert edges == {(keys[name], keys[row.node]) for row in plus.rows for name in row.inputs}
    assert {key for edge in edges for key in edge} == {*nodes}


@LANGUAGES
def test_graph_escapes_names(bad: Report, draw: Callable[[Report], str]) -> None:
    labels = "\n".join(read_graph(draw(bad))[0].values())
    for row in bad.rows:
        assert " ".join(row.op.split()) in labels and row.module in labels


def test_colours_tell_rules_apart(plus: Report) -> None:
    fills = re.findall(r"fillcolor=\"(.*)\"", plus.to_dot())[1:]
    pairs = {(row.rule.partition("(")[0], fill) for row, fill in zip(plus.rows, fills, strict=True)}
    assert len(pairs) == len({rule for rule, _ in pairs}) == len({fill for _, fill in pairs}) > 3


def test_rows_name_what_their_relevance_goes_to() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = m.a(x).split(2, dim=1)
        return m.b(torch.cat([a + y, b.tanh()], 1)) * m.a(x).detach()

    model = Apply(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    rows = lrpfx.explain(model, (torch.ones(2, 4), torch.ones(2, 2)), 0).report.rows
    named = {row.node: row.inputs for row in rows}
    assert named == {
        "linear": ("args_0",),
        "split": ("linear",),  # and not the getitem between it and its readers
        "add": ("split", "args_1"),
        "tanh": ("split",),
        "cat": ("add", "tanh"),
        "linear_1": ("cat",),
        "mul": ("linear_1",),  # the other factor is detached
    }


def test_relevance_of_tokens_goes_to_their_embedding() -> None:
    model = Apply(
        lambda m, ids: m.fc(m.table(ids)).sum(1), table=nn.Embedding(5, 3), fc=nn.Linear(3, 2)
    )
    report = lrpfx.explain(model, torch.tensor([[1, 4, 2]]), 0).report
    assert report.rows[0].inputs == ("embedding",)
    assert "embedding" in read_graph(report.to_dot())[0].values()


# -- any report -----------------------------------------------------------------------------------


@given(one=REPORTS, other=REPORTS)
def test_every_view_of_any_report(one: Report, other: Report) -> None:
    views = [one.compare(other), one.summarize(), one.summarize(3)]
    if one.has_ledger:
        views.append(one.leaks())
    for view in views:
        assert narrow(repr(view)), repr(view)
        Page(view._repr_html_())
    Page(one.to_html())
    names = {row.node for row in one.rows}
    for text in (one.to_dot(), one.to_mermaid()):
        assert len(read_graph(text)[0]) == len(names)


def test_views_fit_and_say_the_same_in_html(plus: Report, epsilon: Report) -> None:
    for view in (plus.leaks(), plus.compare(epsilon), plus.summarize(2)):
        page = Page(view._repr_html_())
        assert narrow(repr(view))
        assert page.tags.count("tr") == 1 + len(view.table().cells) > 3


# -- coverage -------------------------------------------------------------------------------------


def test_coverage_of_a_complete_model_is_the_plan() -> None:
    model = fill(Net())
    with assert_untouched(model):
        found = lrpfx.coverage(model, samples(), "epsilon_plus")
    assert found == lrpfx.Explainer(model, samples(), "epsilon_plus").report
    assert found.unsupported == () and found.ruled == 1.0
    assert f"{len(found.rows)} of {len(found.rows)} live nodes" in repr(found)
    assert "conv 5" in repr(found) and "linear 2" in repr(found)


def test_coverage_lists_every_unknown_op() -> None:
    model = fill(Gap())
    with assert_untouched(model):
        found = lrpfx.coverage(model, samples())
    with pytest.raises(errors.UnsupportedOpError) as caught:
        lrpfx.Explainer(model, samples())
    missing = found.unsupported
    assert [row.op for row in missing] == ["matrix_exp", "pinverse"]
    assert len(caught.value.where) == len(missing)
    for row, place in zip(missing, caught.value.where, strict=True):
        assert row.why in place and row.source in place
        assert "model.py:" in row.source and f".{row.op}(" in row.source
        assert " ".join(row.place.split()) in " ".join(repr(found).split())
    ruled = len(found.rows) - 2
    assert found.ruled == pytest.approx(ruled / len(found.rows))
    assert f"{ruled} of {len(found.rows)} live nodes" in repr(found)
    assert found.to_dict()["coverage"]["ruled_nodes"] == ruled
    assert "register_op" in repr(found) and "no rule" in repr(found.summarize())
    # What lies before and behind is ruled as in the model without the gap.
    whole = lrpfx.coverage(fill(Net()), samples())
    rules = {row.module: row.rule for row in whole.rows if row.kind in ("conv", "linear")}
    for row in found.rows:
        if row.kind in ("conv", "linear"):
            assert row.rule == rules[row.module]
    Page(found.to_html())
    nodes, edges = read_graph(found.to_dot())
    assert len(nodes) == len(found.rows) + 1 == len(edges)  # one skip connection


def test_coverage_names_calls_and_live_arguments() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.part(torch.fmod(m.part(x), m.fc(x).exp() + 1))

    part = Apply(lambda m, x: x.pinverse().mT)
    found = lrpfx.coverage(Apply(forward, part=part, fc=nn.Linear(3, 3)), torch.ones(2, 3))
    assert [row.module for row in found.unsupported] == ["part", "", "part@1"]
    assert "with live self and other" in found.unsupported[1].why
    assert "pinverse 2, fmod 1" in repr(found)


def test_coverage_still_refuses_what_has_another_fault() -> None:
    with pytest.raises(errors.InputError):
        lrpfx.coverage(fill(Net()), samples()[:, :, :3])
    with pytest.raises(errors.SelectorError):
        lrpfx.coverage(fill(Gap()), samples(), [("no such layer", lrpfx.Epsilon())])


def test_source_lines_lie_in_the_model_also_beside_torch() -> None:
    """torchvision's folder begins with the name of torch's."""
    report = lrpfx.Explainer(torchvision_model("squeezenet1_1"), images(1, 3, 64, 64)).report
    assert all("squeezenet.py" in row.source for row in report.rows)


# -- files ----------------------------------------------------------------------------------------


def test_a_stored_report_tells_the_same(tmp_path: Path) -> None:
    explanation = explained()
    explanation.save(tmp_path / "e.npz")
    made, loaded = explanation.report, Explanation.load(tmp_path / "e.npz").report
    assert loaded == made and any(row.inputs for row in loaded.rows)
    assert made.compare(loaded, tolerance=0.0).equal
    assert repr(made.leaks()) == repr(loaded.leaks())
    assert made.to_html() == loaded.to_html() and made.to_dot() == loaded.to_dot()


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    explanation = explained()
    explanation.save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as file:
        arrays = {name: file[name] for name in file.files}
    tree = json.loads(str(arrays["__tree__"]))
    for row in tree["report"]["rows"]:
        del row["inputs"]
    np.savez(tmp_path / "old.npz", **{**arrays, "__tree__": np.array(json.dumps(tree))})
    rows = Explanation.load(tmp_path / "old.npz").report.rows
    assert rows == tuple(replace(row, inputs=()) for row in explanation.report.rows)


def rounded(report: Report) -> Report:
    """The report without round-off, and with source files named from here."""

    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 9) + 0.0  # no -0.0

    rows = [
        replace(
            row,
            relevance_in=short(row.relevance_in),
            relevance_out=short(row.relevance_out),
            absorbed={cause: short(value) for cause, value in row.absorbed.items() if short(value)},
            source=row.source.replace(f"{GOLDEN}{os.sep}", ""),
        )
        for row in report.rows
    ]
    return replace(report, rows=tuple(rows))


def views() -> Iterator[tuple[str, Callable[[], str]]]:
    def plus() -> Report:
        return rounded(explained().report)

    def alpha_beta() -> Report:
        return rounded(explained("epsilon_alpha2_beta1").report)

    yield "report.txt", lambda: repr(plus())
    yield "leaks.txt", lambda: repr(plus().leaks())
    yield "compare.txt", lambda: repr(plus().compare(alpha_beta()))
    yield "summary.txt", lambda: repr(plus().summarize())
    yield "coverage.txt", lambda: repr(rounded(lrpfx.coverage(fill(Gap()), samples())))
    yield "report.html", lambda: plus().to_html()
    yield "report.dot", lambda: plus().to_dot()
    yield "report.mmd", lambda: plus().to_mermaid()


VIEWS = dict(views())


@pytest.mark.parametrize("name", VIEWS)
def test_golden(name: str) -> None:
    # What is unaccounted for is round-off, and differs between machines.
    text = re.sub(r"unaccounted [-+.e0-9]+", "unaccounted 0", VIEWS[name]().strip()) + "\n"
    path = GOLDEN / name
    if os.environ.get("LRPFX_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# -- what edges carry -----------------------------------------------------------------------------


def test_the_plan_says_what_edges_carry_without_a_ledger() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    x = torch.ones(1, 1, 6, 6)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    edges = {row.node: row.edge for row in explainer.report.rows}
    assert list(edges.values()) == ["R / a"] * 5 + ["R"]
    assert "edge" in repr(explainer.report) and "R / a" in explainer.report.to_html()
    booked = explainer(x, 0).report
    assert "R / a" not in repr(booked) and "R / a" not in booked.to_html()
    assert "R / a" in repr(explainer(x, 0, ledger=False).report)
    # Below convolutions whose input may be negative, z-plus gives no multiplier.
    signed = lrpfx.Explainer(nn.Sequential(model[0], model[2]), x, "epsilon_plus").report
    assert [row.edge for row in signed.rows] == ["R", "R"]
