"""A ledger on demand: computed when the report is asked for its sums, by the plain form."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from lrpfx.rules import Epsilon, Gamma
from lrpfx.run import books
from tests.oracle.zoo import randomize


def network() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten()
    return randomize(nn.Sequential(*layers, nn.Linear(12, 3)).double().eval())


def images() -> Tensor:
    return torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.manual_seed(0))


@pytest.fixture(scope="module")
def explainer() -> lrpfx.Explainer:
    return lrpfx.Explainer(network(), images())


def no_ledger() -> Any:
    return mock.patch.object(books, "Ledger", side_effect=AssertionError("it was booked"))


def sums(report: lrpfx.Report) -> list[float | None]:
    flows = [(row.relevance_in, row.relevance_out, *row.absorbed.values()) for row in report.rows]
    return [value for flow in flows for value in flow]


def test_the_default_call_is_the_fast_one_and_its_report_has_the_sums(
    explainer: lrpfx.Explainer,
) -> None:
    x = images()
    default, at_once, never = (explainer(x, 1, ledger=ledger) for ledger in (None, True, False))
    torch.testing.assert_close(default.relevance, never.relevance, rtol=0, atol=0)
    assert default.report.pending and not at_once.report.pending and not never.report.pending
    assert default.report.has_ledger and not never.report.has_ledger
    assert sums(default.report) == pytest.approx(sums(at_once.report), rel=1e-10, abs=1e-12)
    assert not default.report.pending
    assert default.report.absorbed == pytest.approx(at_once.report.absorbed, rel=1e-9)
    assert abs(default.report.unaccounted) < 1e-10


def test_what_needs_no_sums_costs_no_second_run(explainer: lrpfx.Explainer) -> None:
    with no_ledger():
        e = explainer(images(), 1)
        report = e.report
        assert (report.notes, report.target) == ((), "class 1, one-hot times output")
        assert report.started == pytest.approx(e.seed.sum().item()) and report.has_ledger
        assert report.reached == pytest.approx(e.relevance.sum().item())
        assert "on demand" in repr(e) and "on demand" in e._repr_html_()
        assert e.absorbed.shape == (2,) and e.plot() is not None


@pytest.mark.parametrize(
    "ask", [repr, lambda r: r.rows, lambda r: r.to_dict(), lambda r: r.leaks()]
)
def test_sums_are_computed_once_whoever_asks(explainer: lrpfx.Explainer, ask: Callable) -> None:
    report = explainer(images(), 1).report
    ask(report)
    with no_ledger():
        assert "absorbed" in repr(report) and ask(report) is not None


def test_threads_that_ask_at_once_share_the_sums(explainer: lrpfx.Explainer) -> None:
    report = explainer(images(), 1).report
    found: list[Any] = []
    with mock.patch.object(books, "Ledger", wraps=books.Ledger) as made:
        threads = [threading.Thread(target=lambda: found.append(report.rows)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert made.call_count == 1 and all(rows is found[0] for rows in found) and len(found) == 4


# -- what has changed since -----------------------------------------------------------------------


def step(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.1)


def replaced(model: nn.Module, x: Tensor) -> None:
    model[0].weight = nn.Parameter(model[0].weight * 1.1)


def uncounted(model: nn.Module, x: Tensor) -> None:
    model[0].weight.data = model[0].weight.data * 1.1


def written(model: nn.Module, x: Tensor) -> None:
    x[0] = 1.0


@pytest.mark.parametrize("change", [step, replaced, uncounted, written])
def test_a_change_since_is_an_error_that_says_so(change: Callable, tmp_path: Path) -> None:
    model, x = network(), images()
    explainer = lrpfx.Explainer(model, x)
    e, booked = explainer(x, 1), explainer(x, 1)
    rows = booked.report.rows
    change(model, x)
    with pytest.raises(errors.InputError, match="changed since the explanation") as caught:
        _ = e.report.rows
    assert "ledger=True" in caught.value.fix and caught.value.where
    assert booked.report.rows is rows
    # Tensors can still be stored; a note says why the sums are not there.
    e.save(tmp_path / "e.npz")
    loaded = lrpfx.Explanation.load(tmp_path / "e.npz").report
    assert "changed since" in loaded.notes[-1] and not loaded.has_ledger
    assert "changed since" in pickle.loads(pickle.dumps(e)).report.notes[-1]


def test_relevance_that_the_user_writes_into_is_no_difference(explainer: lrpfx.Explainer) -> None:
    e = explainer(images(), 1)
    e.relevance.abs_()
    with mock.patch("warnings.warn", side_effect=AssertionError):
        assert e.report.absorbed


def test_a_fast_form_that_is_wrong_is_found_when_the_sums_are_asked_for() -> None:
    right = Gamma.multiply

    def wrong(*given: Any) -> Any:
        return tuple(1.5 * c for c in right(*given))

    rules = [("2", Gamma(1.0))]
    with mock.patch.object(Gamma, "multiply", wrong):
        e = lrpfx.explain(network(), images(), 1, rules=rules)
        with pytest.warns(UserWarning, match=r"differs by 5.0e-01 .* behind 2: conv2d") as caught:
            _ = e.report.rows
    assert "Gamma(gamma=1)" in str(caught[0].message)
    exact = lrpfx.explain(network(), images(), 1, rules=rules, ledger=True).report
    assert sums(e.report) == pytest.approx(sums(exact))


def test_maps_that_round_off_takes_far_apart_are_no_error() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    rules = lrpfx.composites.EpsilonAll(1e-9)
    with mock.patch("warnings.warn", side_effect=AssertionError):
        assert lrpfx.explain(model, x, 1, rules=rules).report.rows


# -- copies, files, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_have_the_sums(explainer: lrpfx.Explainer, copied: Callable) -> None:
    e = explainer(images(), 1)
    again = copied(e)
    assert not again.report.pending and again.report == e.report


def test_what_is_stored_has_the_sums(explainer: lrpfx.Explainer, tmp_path: Path) -> None:
    e = explainer(images(), 1)
    e.save(tmp_path / "e.npz")
    assert lrpfx.Explanation.load(tmp_path / "e.npz").report == e.report


def test_the_model_is_kept_until_the_sums_are_there_and_no_longer() -> None:
    model, x = network(), images()
    pending, booked = lrpfx.explain(model, x, 1), lrpfx.explain(model, x, 1)
    never = lrpfx.explain(model, x, 1, ledger=False)
    alive = weakref.ref(model)
    del model
    assert booked.report.absorbed
    gc.collect()
    assert alive() is not None and pending.report.rows
    gc.collect()
    assert alive() is None and never.report.rows


# -- how the explanation was made -----------------------------------------------------------------


def test_the_sums_are_those_under_the_autocast_of_the_call() -> None:
    model, x = network().float(), images().float()
    explainer = lrpfx.Explainer(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        e, at_once = explainer(x, 1), explainer(x, 1, ledger=True)
    assert sums(e.report) == sums(at_once.report)
    e = explainer(x, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        booked_inside = sums(e.report)
    assert booked_inside == sums(explainer(x, 1, ledger=True).report)


def test_where_derivatives_are_wanted_it_is_booked_at_once(explainer: lrpfx.Explainer) -> None:
    e = explainer(images().requires_grad_(), 1, create_graph=True)
    assert not e.report.pending and e.report.has_ledger and e.relevance.requires_grad
    several = explainer(images(), "all").report
    assert not several.pending and not several.has_ledger


@pytest.mark.parametrize("how", ["frozen", "compiled", "inference"])
def test_however_it_was_made_the_sums_are_the_same(how: str, explainer: lrpfx.Explainer) -> None:
    model, x = network(), images()
    other = lrpfx.Explainer(model, x, freeze=how == "frozen")
    if how == "compiled":
        other.compile(backend="eager")
        other(x, 1)
    with torch.inference_mode(how == "inference"):
        e = other(x.clone(), 1)
    assert sums(e.report) == pytest.approx(sums(explainer(x, 1, ledger=True).report), rel=1e-9)


def test_layers_and_token_ids_are_booked_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.GELU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(20, 3)).double().eval()
    ids = torch.tensor([[1, 2, 1, 6], [0, 3, 3, 5]])
    explainer = lrpfx.Explainer(model, ids, rules=[("linear", Epsilon(0.1))])
    e, at_once = explainer(ids, 1, layers=["1"]), explainer(ids, 1, ledger=True)
    assert sums(e.report) == pytest.approx(sums(at_once.report), rel=1e-9)
    assert e.layers["1"].relevance.shape == (2, 4, 5)
