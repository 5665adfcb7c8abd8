"""The table of faithfulness: the best comes first whoever it is, and masks are where shapes are."""

from pathlib import Path

import pytest
import torch

from benchmarks.faithfulness import page
from benchmarks.faithfulness.measure import Outcome, Result, measure
from benchmarks.faithfulness.tasks import SYMBOLS, pairs, shapes, stripes
from lrpfx.evaluate import localization


def _result(library: str, name: str, gain: float, n: int = 30) -> Result:
    noise = torch.randn(n)
    abpc, ones = gain + 0.1 * noise, torch.ones(n)
    curves = torch.rand(n, 5), torch.rand(n, 5)
    return Result(library, name, abpc, ones, 0.5 * ones, ones, curves, 1.0)


def _outcome(seed: int) -> Outcome:
    results = [
        _result("lrpfx", "default (rules=None)", 0.2),
        _result("zennit", "EpsilonPlus", 0.5),
        _result("none", "random", 0.0),
        Result("captum", "LRP", refused="TypeError: no rule"),
    ]
    return Outcome("plain CNN", "cnn", seed, 0.9, results)


def test_the_best_comes_first_whoever_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write({"cnn": [_outcome(0), _outcome(1)]}, tmp_path)
    text = (tmp_path / "faithfulness.md").read_text()
    summary, section = text.split("## In short")[1].split("## Plain CNN")
    assert "| plain CNN | zennit EpsilonPlus |" in summary
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "**zennit EpsilonPlus**",
        "lrpfx default (rules=None)",
        "random",
    ]
    assert "captum LRP: `TypeError: no rule`" in text and "from 2 draw(s) of" in text
    for name in ("faithfulness.png", "faithfulness_curves.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_what_the_best_is_not_better_than_is_as_good() -> None:
    best = page.Line("a", "best", [_result("a", "best", 0.5)])
    assert page.as_good(page.Line("b", "same", [_result("b", "same", 0.5)]), best)
    assert not page.as_good(page.Line("b", "less", [_result("b", "less", 0.2)]), best)


def test_masks_are_where_the_shapes_are() -> None:
    for made in (shapes, stripes):
        x, y, masks = made(torch.Generator().manual_seed(0), True)
        assert masks is not None and set(y.tolist()) == {0, 1, 2, 3}
        again, _, _ = made(torch.Generator().manual_seed(0), True)
        assert torch.equal(x, again)
        local = (x[:, 0] - torch.nn.functional.avg_pool2d(x, 5, 1, 2)[:, 0]).abs()
        level = local if made is stripes else x[:, 0]
        assert float(level[masks].mean()) > 1.5 * float(level[~masks].mean())


def test_the_token_that_is_copied_is_in_the_mask() -> None:
    ids, wanted, mask = pairs(torch.Generator().manual_seed(0), True)
    assert mask is not None
    copied = ids[mask]
    assert torch.equal(copied % SYMBOLS + SYMBOLS**2, wanted)
    assert torch.equal(copied // SYMBOLS + SYMBOLS**2, ids[:, -1])
    assert float(localization(mask.double(), mask).pointing.mean()) == 1.0


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["cnn", "tokens"])
def test_every_method_is_measured_on_a_network(kind: str) -> None:
    pytest.importorskip("captum", reason="make faithfulness installs it")
    outcome = measure(kind, 0, 8, quick=True)
    good = [r for r in outcome.results if not r.refused]
    assert {"lrpfx", "captum", "gradients", "none"} <= {r.library for r in good}
    assert all(r.abpc.shape == (8,) for r in good)
