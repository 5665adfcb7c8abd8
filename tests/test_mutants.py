"""The list of planted faults; that each is seen is shown by ``make mutants``."""

from pathlib import Path

import pytest

from tests import mutants

ROOT = Path(__file__).parent.parent


def test_the_list_stands_in_the_guide() -> None:
    assert mutants.table() in (ROOT / "CONTRIBUTING.md").read_text()


def test_a_fault_without_a_place_is_an_error() -> None:
    lost = mutants.MUTANTS[0]._replace(old="this stands nowhere")
    with pytest.raises(SystemExit, match="stands 0 times"):
        mutants.planted(lost, ROOT)
