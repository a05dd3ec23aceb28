import ast
import re
from pathlib import Path

import pytest

import ctxlib

PACKAGE = Path(__file__).resolve().parents[1] / "ctxlib"
ORDER = re.findall(r"^    (\w+)  ", ctxlib.__doc__, re.MULTILINE)  # the map
OF_ALL = [PACKAGE / "__init__.py", PACKAGE / "__main__.py"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path not in OF_ALL)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of ctxlib that a file imports, wherever in the file and in whichever form it does so."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "ctxlib":
            names = [f"ctxlib.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            names = []
        rooms |= {name.split(".")[1] for name in names if name.startswith("ctxlib.")}
    return rooms


def test_every_module_has_its_place_in_the_order():
    assert {room(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_those_before_it(path):
    place = ORDER.index(room(path))
    later = {name for name in imported_rooms(path) - {room(path)} if ORDER.index(name) > place}
    assert not later, f"{path.name} imports from rooms after its own: {sorted(later)}"
    assert path.parent != PACKAGE or room(path) not in imported_rooms(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_models_loads_models(path):
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert room(path) == "models" or "from_pretrained" not in names


def test_there_is_no_room_for_odds_and_ends():
    assert not [path for path in MODULES if path.stem in ("utils", "helpers", "common", "misc")]
