"""The benchmarks run at toy sizes, and see a map that is wrong. No number is looked at."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    compiled,
    cost_vs_gradient,
    coverage,
    default_call,
    exported,
    gpu,
    many_targets,
    measure,
    memory_vs_gradient,
    scaling,
    scan,
    vs_peers,
    works,
)
from benchmarks.measure import Table, Work

BUDGET = 0.01


def small_image() -> Work:
    return scaling.residual(1, batch=2, width=4, side=8)


def small_llama(dtype: torch.dtype = torch.float32) -> Work:
    return works.llama(8, layers=1, hidden=16, vocabulary=20, dtype=dtype)


def resnet() -> Work:
    return works.image_work("resnet18", 1, 32)


def assert_complete(table: Table, rows: int) -> None:
    assert not table.wrong
    assert len(table.rows) == rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert len(table.markdown().splitlines()) > rows + 3


def test_cost_vs_gradient() -> None:
    plan = [(small_image, ("epsilon_gamma_box",)), (small_llama, ("attnlrp",))]
    table = cost_vs_gradient.table(plan, BUDGET)
    assert_complete(table, 2)
    zennit, modified = (table.columns.index(name) for name in ("zennit", "modified gradient"))
    assert table.rows[0][zennit] and table.rows[1][modified]
    assert next(cost_vs_gradient.setup_seconds(small_image(), "epsilon_plus", 1)) > 0
    work = small_image()
    assert work.name in cost_vs_gradient.overhead(work, "epsilon_all", BUDGET)


def test_cost_of_a_model_in_bfloat16() -> None:
    plan = [(lambda: small_llama(torch.bfloat16), ("attnlrp",))]
    assert_complete(cost_vs_gradient.table(plan, BUDGET), 1)


def test_default_call() -> None:
    plan = [(small_image, ("epsilon_plus", ""))]
    assert_complete(default_call.table(plan, BUDGET), 2)


def test_vs_peers() -> None:
    assert_complete(vs_peers.table([resnet], BUDGET, ("epsilon_plus",)), 1)


def test_many_targets() -> None:
    makes = [(small_image, True), (small_image, False)]
    assert_complete(many_targets.table(makes, ("epsilon_plus",), BUDGET), 3)


@pytest.mark.nightly
def test_compiled() -> None:
    models = [(small_image, ("epsilon_plus",)), (small_llama, ("attnlrp",))]
    assert_complete(compiled.table(models, BUDGET, "eager"), 2)


def test_scaling(tmp_path: Path) -> None:
    series = [
        scaling.Series("blocks", "epsilon_plus", (1, 2), lambda n: scaling.residual(n, 1, 4, 8)),
        scaling.Series("tokens", "attnlrp", (8,), lambda t: works.llama(t, 1, 16)),
    ]
    table, points = scaling.table(series, BUDGET)
    assert_complete(table, 3)
    scaling.draw(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_memory_vs_gradient() -> None:
    gradient = memory_vs_gradient.measure("tiny", "gradient", "cpu")
    explained = memory_vs_gradient.measure("tiny", "epsilon_plus", "cpu")
    assert set(gradient) == {"peak"}
    assert set(explained) == {"held", "peak", "ledger", "differs"}
    assert explained["differs"] < 1e-3


def test_gpu_on_the_cpu() -> None:
    image = {"image": (lambda device, dtype: small_image(), ("epsilon_plus",))}
    assert_complete(gpu.table(image, BUDGET, ("fp32", "tf32"), ("eager",), "cpu"), 2)


def test_a_failure_on_the_gpu_is_a_row_and_makes_the_run_fail() -> None:
    def of_dtype(device: str, dtype: torch.dtype) -> Work:
        work = small_image()
        work.inputs = work.inputs.double()  # which the model does not take
        return work

    table = gpu.table({"image": (of_dtype, ("epsilon_plus",))}, BUDGET, ("fp32",), device="cpu")
    assert len(table.rows) == len(table.wrong) == 1
    assert len(table.rows[0]) == len(table.columns)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_the_gpu_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_wrong_map_is_seen() -> None:
    table, x = Table("", ("map",)), torch.ones(2, 3)
    table.check("the same", x, x)
    assert not table.wrong
    table.check("one sample off", x * torch.tensor([[1.0], [1.01]]), x)
    table.check("not a number", x * float("nan"), x)
    assert len(table.wrong) == 2 and measure.publish("none", table, write=False) == 1


def test_a_folded_model_that_is_another_function_is_refused() -> None:
    class Swapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x)).flatten(1)

    model = Swapped()
    torch.nn.init.normal_(model.norm.bias)
    work = Work("", model.eval(), torch.randn(1, 3, 8, 8), works.score_of_class)
    with pytest.raises(RuntimeError, match="another function"):
        measure.gradient(work)


def test_a_section_is_replaced_and_others_are_kept(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    for name, text in (("a", "one"), ("b", "two"), ("a", "three")):
        measure.write_section(page, name, text)
    assert page.read_text().startswith("# Performance")
    assert page.read_text().endswith("<!-- a -->\nthree\n<!-- end of a -->\n\n" + SECOND)


SECOND = "<!-- b -->\ntwo\n<!-- end of b -->\n"


# The page of coverage -----------------------------------------------------------------------------


def test_rows_of_the_page_are_read_as_they_were_written() -> None:
    """Rows may be renewed one by one; the others stay as they are."""
    rows = [
        coverage.Row("a (b)", "yes", "yes", "1e-7", "2e-8", "batch 1e-16", "yes", "12", "0.5"),
        coverage.Row("c", "yes", "no", agreed="no", seconds="1.0", reason="no rule for <x> | y"),
    ]
    page = coverage.replace_section("", "torchvision", coverage.section("torchvision", rows))
    assert list(coverage.rows_of(page, "torchvision").values()) == rows
    again = list(coverage.rows_of(page, "torchvision").values())
    same = coverage.replace_section(page, "torchvision", coverage.section("torchvision", again))
    assert same == page


@pytest.mark.nightly
def test_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SIDE", 32)
    whole = scan.merging
    monkeypatch.setattr(scan, "merging", lambda: whole(2, 20, 5))
    assert_complete(scan.table((40,), rounds=1), 1)


def test_rows_of_models_that_are_measured_one_by_one_stay_in_the_table() -> None:
    def made(**rows: str) -> Table:
        table = Table("Exported", exported.COLUMNS)
        for name, cell in rows.items():
            table.add(name, *[cell] * (len(exported.COLUMNS) - 1))
        return table

    page = f"<!-- exported -->\n{made(vgg11='1', alexnet='1').markdown()}\n<!-- end of exported -->"
    found = made(vgg11="2", resnet18="2")
    exported.with_earlier(found, page)
    assert [row[:2] for row in found.rows] == [["alexnet", "1"], ["vgg11", "2"], ["resnet18", "2"]]
    fresh = made(vgg11="2")
    exported.with_earlier(fresh, page.replace("file, MB", "size"))  # other columns
    assert [row[0] for row in fresh.rows] == ["vgg11"]
