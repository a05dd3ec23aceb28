"""The README tells what the committed results say, and every file that it links to is there."""

import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml

from ctxlib import experiment, finetune

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))


def test_what_the_paper_says_and_what_is_found_is_the_committed_table():
    block = README.split("<!-- paper says -->")[1].split("<!-- /paper says -->")[0].strip()
    committed = (ROOT / "outputs/evidence/tables/paper_says.md").read_text(encoding="utf-8")
    assert block == "\n".join(line for line in committed.splitlines() if line.startswith("|"))


def test_the_numbers_of_its_first_lines_are_means_over_seeds():
    """Every percentage before the first figure is one of the committed finding, rounded."""
    finding = pd.read_csv(ROOT / "outputs/evidence/tables/the_finding.csv")
    told = re.findall(r"(\d+) %", README.split("![")[0])
    assert len(told) >= 4 and set(told) <= {f"{value:.0%}".rstrip("%") for value in finding["value"]}


def test_the_table_of_evidence_says_what_evidence_csv_says():
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    block = page.split("<!-- evidence -->")[1].split("<!-- /evidence -->")[0].strip()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
    evidence = pd.read_csv(ROOT / "outputs" / "evidence.csv")
    evidence = evidence.set_index([evidence.question.str[:2], "condition", "metric"]).sort_index()
    for notebook, condition, metric, value, seeds in told:
        rows = evidence.loc[[(re.search(r"\d\d", notebook).group(), condition, metric)]]
        row, runs = rows[rows.unit == "seeds"].squeeze(), rows[rows.unit != "seeds"].value
        expected = f"{row.value:.2f}"
        if row.n >= 5:
            expected += f" [{row.ci_low:.2f}, {row.ci_high:.2f}]"
        elif len(runs) == row.n:
            assert pd.isna(row.ci_low)
            expected += f" ({', '.join(f'{run:.2f}' for run in runs)})"
        assert value == expected, (notebook, condition, metric)
        assert int(seeds) == row.n
    assert {notebook[1:3] for notebook, *_ in told} == set(evidence.index.get_level_values(0))


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *map(str, DOCS)])
def test_every_link_into_the_repository_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_commands_it_tells_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = re.findall(r"\bmake (\w+)", README)
    assert {"reproduce", "test"} <= set(told) <= set(targets)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_the_seed_model_that_is_trained_by_hand_is_the_vanilla_model_of_notebook_03(tmp_path, monkeypatch):
    content = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    content["outputs"] = str(tmp_path)
    content["finetune"] |= {"steps": 1, "batch_size": 2}
    (tmp_path / "seed.yaml").write_text(yaml.safe_dump(content))
    code = next(block for block in README.split("```python\n") if "tinyllama-sharegpt.yaml" in block).split("```")[0]
    exec(code.replace("params/tinyllama-sharegpt.yaml", str(tmp_path / "seed.yaml")), {})
    cells = (cell for cell in nbformat.read(ROOT / "notebooks" / "03_indicator_sft.ipynb", 4).cells)
    loop = next(cell.source for cell in cells if "finetune.finetune(" in cell.source)
    call = loop[loop.index("finetune.finetune(") : loop.index("\n    )\n") + 7]
    monkeypatch.setattr("ctxlib.finetune.training.load_model", None)  # it is not trained again
    params = experiment.load_params(tmp_path / "seed.yaml")
    results = SimpleNamespace(work=params.output_dir / "work")
    names = {"params": params, "results": results, "name": "vanilla", "token": None}
    names |= {"data": experiment.conversations(params), "tokenizer": experiment.tokenizer(params)}
    names |= {"raw_texts": experiment.raw_texts(params)}
    assert len(eval(call, {"experiment": experiment, "finetune": finetune, **names})) == 1


@pytest.mark.parametrize("table", ["marked_by_kind", "needle_recall"])
def test_the_page_on_real_models_shows_the_committed_tables(table):
    page = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
    block = page.split(f"<!-- {table} -->")[1].split(f"<!-- /{table} -->")[0].strip()
    committed = (ROOT / "outputs" / "smollm2-cpu" / "tables" / f"{table}.md").read_text(encoding="utf-8")
    assert block == "\n".join(line for line in committed.splitlines() if line.startswith("|"))
