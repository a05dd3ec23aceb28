"""The stored notebooks keep the house's rules, and all of them run on one of the `smoke` files."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from ctxlib.commands.plan import make_plan
from ctxlib.params import load_params
from ctxlib.results import EVIDENCE_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARTS = re.split("EVIDENCE =|CURES =", (ROOT / "Snakefile").read_text())
STORY, EVIDENCE, CURES = (re.findall(r'"(\d\d_\w+)":', part) for part in PARTS)
WITHOUT_VERDICTS = {name for name in EVIDENCE if name != "07_seeds"}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_the_snakefile_names_every_notebook():
    assert [*STORY, *EVIDENCE, *CURES] == [path.stem for path in NOTEBOOKS]


@each_notebook
def test_it_opens_with_its_question_and_its_parameters(path):
    first, second = nbformat.read(path, 4).cells[:2]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert second.metadata.tags == ["parameters"]
    experiment = "evidence" if path.stem in EVIDENCE else "cures" if path.stem in CURES else "miniature"
    assert second.source == f'params_file = "params/{experiment}.yaml"\noverrides = {{}}'


@each_notebook
def test_its_cells_are_short_and_plain(path):
    for cell in code_cells(path):
        code = [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(code) <= 20, cell.source
        assert not re.search(r"^\s*[!%]|sys\.path", cell.source, re.MULTILINE), cell.source
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, ast.Try) for node in nodes), cell.source
        assert not any(map(holds_another_comprehension, nodes)), cell.source


@each_notebook
def test_every_prediction_is_followed_by_its_verdict(path):
    """A cell that predicts, then one that prints "came true" or "failed" from the data, before the next prediction."""
    if path.stem in WITHOUT_VERDICTS:
        pytest.skip("its trials have not been run again since verdicts are printed")
    said = "".join(
        "P" * bool(re.search(r"\bPredict\b", cell.source))
        if cell.cell_type == "markdown"
        else "v" * ("results.verdict(" in cell.source)
        for cell in nbformat.read(path, 4).cells
    )
    assert re.fullmatch("(Pv+)*", said), said


def holds_another_comprehension(node: ast.AST) -> bool:
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return isinstance(node, kinds) and sum(isinstance(inner, kinds) for inner in ast.walk(node)) > 1


@each_notebook
def test_it_is_stored_without_outputs_and_runs_in_plain_papermill(path):
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None
    metadata = nbformat.read(path, 4).metadata
    assert metadata.kernelspec.name == "python3"
    assert metadata.kernelspec.language == "python"


@pytest.fixture(scope="module")
def reproduce(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")

    def call(experiment: str) -> Path:
        arguments = [
            "reproduce",
            "--params",
            f"params/{experiment}.yaml",
            "--set",
            f"outputs={outputs}",
            "--set",
            "threads=1",
        ]
        command = [sys.executable, "-m", "ctxlib", *arguments]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert finished.returncode == 0, finished.stderr
        return outputs / experiment

    return call


@pytest.fixture(scope="module")
def smoke(reproduce) -> Path:
    return reproduce("smoke")


@pytest.fixture(scope="module")
def evidence(reproduce) -> Path:
    return reproduce("smoke-evidence")


@pytest.fixture(scope="module")
def cures(reproduce) -> Path:
    return reproduce("smoke-cures")


@pytest.mark.notebooks
def test_every_code_cell_ran(smoke, evidence, cures):
    for path in NOTEBOOKS:
        folder = evidence if path.stem in EVIDENCE else cures if path.stem in CURES else smoke
        for cell in code_cells(folder / path.name):
            assert cell.execution_count is not None
            assert cell.metadata.papermill.status == "completed"
            assert not [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.notebooks
def test_progress_bars_leave_no_trace(smoke, evidence, cures):
    for folder in (smoke, evidence, cures):
        for path in folder.glob("*.ipynb"):
            stored = path.read_text()
            assert "jupyter.widget" not in stored and "%|" not in stored, path


@pytest.mark.notebooks
def test_tables_are_shown_with_twelve_rows_at_most(smoke, evidence, cures):
    for path in [*smoke.glob("*.ipynb"), *evidence.glob("*.ipynb"), *cures.glob("*.ipynb")]:
        shown = [output.get("data", {}) for cell in code_cells(path) for output in cell.outputs]
        for data in shown:
            assert data.get("text/html", "").count("<tr") <= 2 + 12, path  # with the header
            assert sum(line.startswith("|") for line in data.get("text/markdown", "").splitlines()) <= 2 + 12, path


@pytest.mark.notebooks
@pytest.mark.parametrize(("which", "names"), [("smoke", STORY), ("evidence", EVIDENCE), ("cures", CURES)])
def test_every_notebook_writes_tables_and_figures_with_their_provenance(request, which, names):
    folder = request.getfixturevalue(which)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["notebooks"]) == names
    for name, entry in manifest["notebooks"].items():
        suffixes = [Path(path).suffix for path in entry["outputs"]]
        assert suffixes.count(".png") == suffixes.count(".svg") > 0, name
        assert suffixes.count(".csv") >= suffixes.count(".md") > 0, name
        for path, digest in entry["outputs"].items():
            if (ROOT / path).is_file():
                assert hashlib.sha256((ROOT / path).read_bytes()).hexdigest() == digest, path
    for table in folder.glob("tables/*.md"):
        assert f"params {manifest['params_digest']}" in table.read_text().splitlines()[-1]


@pytest.mark.notebooks
def test_the_claims_have_a_row_each(smoke):
    claims = pd.read_csv(smoke / "tables" / "claims.csv")
    assert list(claims.columns) == ["claim", "value", "ci_low", "ci_high", "threshold", "holds", "n", "seed"]
    assert {claim[0] for claim in claims["claim"]} >= set("123456")
    assert (claims["ci_low"] <= claims["ci_high"]).all()
    above, below = claims["ci_low"] > claims["threshold"], claims["ci_high"] < claims["threshold"]
    falls = claims["claim"].str.match("[12] ")  # claimed to lie below; all others above
    assert (claims["holds"] == below.where(falls, above)).all()


@pytest.mark.notebooks
def test_all_evidence_is_in_one_tidy_table(evidence):
    table = pd.read_csv(evidence.with_name("smoke-evidence.csv"))
    assert list(table.columns) == EVIDENCE_COLUMNS
    assert sorted(set(table.question)) == EVIDENCE
    assert set(table.experiment) == {"smoke-evidence"}
    over_all = table[table.unit == "seeds"]
    assert set(over_all.question) == set(EVIDENCE) and (over_all.seed == "all").all()
    assert not table.drop(columns=["ci_low", "ci_high"]).isna().any().any()
    for name in EVIDENCE:
        last = code_cells(evidence / f"{name}.ipynb")[-1]
        assert re.search(r"\d\.\d\d.* seeds", last.outputs[0].text, re.DOTALL)  # the answer, with its numbers
    few = over_all[over_all.n < 5]
    assert len(few) and few[["ci_low", "ci_high"]].isna().all().all()


@pytest.mark.notebooks
@pytest.mark.parametrize("which", ["smoke", "evidence", "cures"])
def test_a_second_call_does_nothing(request, which, reproduce):
    folder = request.getfixturevalue(which)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    reproduce(folder.name)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.notebooks
def test_a_plan_after_a_rehearsal_knows_how_many_answers_will_be_written(smoke, tmp_path):
    """The smoke experiment as its own rehearsal: the answers planned are those that its notebooks wrote."""
    written = sum(len(path.read_text().splitlines()) for path in (smoke / "work" / "answers").glob("*.jsonl"))
    params = load_params(ROOT / "params" / "smoke.yaml", {"outputs": str(tmp_path)})
    rehearsal = tmp_path / "rehearsal-smoke"
    for name in ("answers", "scores"):
        shutil.copytree(smoke / "work" / name, rehearsal / "work" / name)
    content = params.model_dump(mode="json") | {"experiment": "rehearsal-smoke"}
    (rehearsal / "params.yaml").write_text(json.dumps(content))
    plan = make_plan(params)
    assert sum(step.rows for step in plan.steps if step.what == "answering") == pytest.approx(written)
    assert written > 0 and plan.times["conversations"] > 1  # 02 scores a part of them again, in other variants
