import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LOCK_LINES}


def test_the_lock_holds_plain_versions_and_nothing_of_this_machine():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in LOCK_LINES)
    assert len(LOCK) == len(LOCK_LINES)
    assert LOCK["torch"] == "2.13.0"


def test_the_lock_satisfies_pyproject():
    declared = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), str(requirement)


def test_the_lock_holds_everything_that_is_needed():
    declared = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    waiting, seen = [Requirement(text) for text in declared], set()
    while waiting:
        requirement = waiting.pop()
        for extra in requirement.extras or {""}:
            key = (canonicalize_name(requirement.name), extra)
            if key in seen:
                continue
            seen.add(key)
            inner = [Requirement(text) for text in requires(requirement.name) or []]
            waiting += [one for one in inner if one.marker is None or one.marker.evaluate({"extra": extra})]
    installers = {"setuptools", "pip", "wheel"}
    assert {name for name, _ in seen} - installers <= LOCK.keys()


def test_what_is_installed_is_what_is_locked():
    assert {name: Version(version(name)).public for name in LOCK} == LOCK


def test_conda_takes_its_versions_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip"
    assert by_pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])


def test_the_python_range_is_the_same_everywhere():
    lowest = PROJECT["requires-python"].removeprefix(">=")
    major, minor = lowest.split(".")
    makefile = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < ({major}, {minor})" in makefile
    assert set(re.findall(r"Python >= (\d+\.\d+)", makefile)) == {lowest}
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py{major}{minor}"


def test_every_import_is_declared():
    imported = set()
    for path in (*(ROOT / "ctxlib").rglob("*.py"), *(ROOT / "lm_eval_tasks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"ctxlib"}
    known = packages_distributions()
    needed = {canonicalize_name(known.get(name, [name])[0]) for name in foreign}
    optional = PROJECT["optional-dependencies"]
    declared = PROJECT["dependencies"] + optional["judge"] + optional["lm-eval"] + optional["site"]
    assert needed <= {canonicalize_name(Requirement(text).name) for text in declared}


def test_an_optional_package_is_imported_only_by_what_needs_it():
    optional = {Requirement(text).name for text in PROJECT["optional-dependencies"]["judge"]}
    at_import = "import sys, ctxlib.commands.cli, ctxlib.experiment, ctxlib.commands.mt_bench; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", at_import], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not optional & set(loaded.stdout.split())


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["title"].startswith("On the Loss of Context-awareness")
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Wang"
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
