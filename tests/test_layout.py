"""A folder is imported by its front, and what is public shows its public path."""

import ast
import re
from pathlib import Path
from typing import get_args

import lrpfx

PACKAGE = Path(lrpfx.__file__).parent
#: Folders that users import from.
USERS = {"adapters", "attributors", "composites", "concepts", "evaluate", "spray"}


def test_from_outside_a_folder_is_imported_by_its_front_only() -> None:
    past = []
    for file in PACKAGE.rglob("*.py"):
        folder = file.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            path = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if len(path) > 2 and path[0] == "lrpfx" and path[1] != folder:
                past.append(f"{file.relative_to(PACKAGE)}:{node.lineno} {node.module}")
    assert not past


def test_fronts_hand_on_no_more_than_others_take() -> None:
    taken: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        folder = file.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            path = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if len(path) == 2 and path[1] != folder:
                taken.setdefault(path[1], set()).update(name.name for name in node.names)
    for front in PACKAGE.glob("*/__init__.py"):
        if front.parent.name in USERS:
            continue
        (names,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(front.read_text()).body
            if isinstance(node, ast.Assign)
        )
        spare = set(names) - taken[front.parent.name]
        assert spare <= {"find", "kinds", "rows"}, (front, spare)  # read as lrpfx.ops.find


def test_public_objects_show_their_public_path() -> None:
    for name in lrpfx.__all__:
        found = getattr(lrpfx, name)
        assert getattr(found, "__module__", "lrpfx") == "lrpfx", name


def test_completion_shows_what_is_public_and_no_file_it_lives_in() -> None:
    assert set(dir(lrpfx)) == {*lrpfx.__all__, "spray", "__version__"}


def test_names_of_composites_are_known_to_type_checkers() -> None:
    assert set(get_args(lrpfx.composites.CompositeName)) == set(lrpfx.composites.NAMED)


def test_there_is_one_version_number() -> None:
    (cited,) = re.findall(r"^version: (.+)$", (PACKAGE.parent / "CITATION.cff").read_text(), re.M)
    assert cited == lrpfx.__version__
