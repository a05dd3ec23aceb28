import hashlib
import io
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ctxlib.files import file_digest
from ctxlib.metrics import Estimate
from ctxlib.params import InputError, Params, load_params
from ctxlib.results import EVIDENCE_COLUMNS, code_version, open_results

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def params(tmp_path) -> Params:
    return load_params(ROOT / "params" / "smoke.yaml", {"outputs": str(tmp_path / "outputs")})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(name: str, results) -> None:
    figure, axes = plt.subplots(layout="constrained")
    axes.plot([1, 2, 4])
    drawn = results.figure(figure, name, "A line")
    assert not figure.texts
    shown, metadata = drawn._repr_png_()
    assert shown == (results.folder / "figures" / f"{name}.png").read_bytes()
    assert metadata == {"alt": "A line", "width": mpl.image.imread(io.BytesIO(shown)).shape[1] * 2 // 3}
    assert repr(drawn) == "A line"
    plt.close(figure)


def test_a_table_comes_back_as_it_was(params):
    results = open_results(params, "01_test")
    frame = pd.DataFrame({"n": [1, 2], "value": [0.25, None], "text": ["a|b", "NA"], "holds": [True, False]})
    results.table(frame, "numbers", "Some numbers")
    pd.testing.assert_frame_equal(open_results(params, "02_test").read_table("numbers"), frame, check_dtype=False)


def test_names_that_look_like_numbers_come_back_as_text(params):
    results = open_results(params, "01_test")
    results.table(pd.DataFrame({"conversation": ["1", "007"], "id": ["2", "x"], "turn": [1, 2]}), "named", "Names")
    again = results.read_table("named")
    assert list(again["conversation"]) == ["1", "007"] and list(again["id"]) == ["2", "x"]
    assert list(again["turn"]) == [1, 2]


def test_csv_is_pure_and_markdown_tells_where_it_is_from(params):
    results = open_results(params, "01_test")
    results.table(pd.DataFrame({"value": [1 / 3], "text": ["<|user|>\nhi"]}), "t", "One third")
    tables = params.output_dir / "tables"
    assert (tables / "t.csv").read_text() == 'value,text\n0.333333,"<|user|>\nhi"\n'
    markdown = (tables / "t.md").read_text()
    assert markdown.startswith("# One third\n\n|")
    assert "0.3333 | <\\|user\\|> hi |" in markdown
    footer = markdown.splitlines()[-1]
    for fact in ("experiment smoke", f"params {params.digest}", f"code {code_version('01_test')}", "seed 0"):
        assert fact in footer


def test_a_long_table_is_whole_in_csv_and_short_in_markdown(params):
    results = open_results(params, "01_test")
    results.table(pd.DataFrame({"n": range(1200)}), "long", "Many rows")
    assert len(results.read_table("long")) == 1200
    lines = (params.output_dir / "tables" / "long.md").read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 500
    assert "The first 500 of 1,200 rows; all are in the CSV file." in lines


def test_two_runs_write_identical_bytes(tmp_path):
    digests = []
    for run in ("a", "b"):
        params = load_params(ROOT / "params" / "smoke.yaml", {"outputs": str(tmp_path / run)})
        results = open_results(params, "01_test")
        results.table(pd.DataFrame({"value": [0.1 + 0.2]}), "t", "A sum")
        draw("line", results)
        digests.append([sha256(path) for path in sorted(params.output_dir.glob("*/*.*"))])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4


def test_figures_carry_their_provenance(params):
    results = open_results(params, "01_test")
    with plt.rc_context({"svg.fonttype": "none"}):
        draw("line", results)
    svg = (params.output_dir / "figures" / "line.svg").read_text()
    assert results.provenance in svg
    assert "A line" in svg
    assert "<dc:date>" not in svg


def test_the_journal_holds_every_file_with_its_hash(params):
    results = open_results(params, "01_test")
    results.table(pd.DataFrame({"a": [1]}), "t", "T")
    draw("line", results)
    results.read_table("t")
    journal = json.loads((results.work / "journal" / "01_test.json").read_text())
    written = [
        params.output_dir / name for name in ("tables/t.csv", "tables/t.md", "figures/line.png", "figures/line.svg")
    ]
    assert journal["outputs"] == {path.as_posix(): sha256(path) for path in written}
    assert journal["inputs"] == {written[0].as_posix(): sha256(written[0])}


def test_a_table_is_shown_with_twelve_rows_at_most_and_a_link_to_all(params):
    results = open_results(params, "01_test")
    for rows, shown in ((1, 1), (12, 12), (13, 12), (1200, 12)):
        text = results.table(pd.DataFrame({"n": range(rows)}), "long", "Rows")._repr_markdown_()
        assert sum(line.startswith("|") for line in text.splitlines()) == 2 + shown
        assert ("[tables/long.csv](tables/long.csv)" in text) == (rows > 12)


def test_a_folded_table_shows_its_words_first_and_escapes_them(params):
    shown = open_results(params, "01_test").show(pd.DataFrame({"n": [1]}), "all", folded="the <paper>'s")
    text = shown._repr_markdown_()
    assert text.startswith("<details><summary>the &lt;paper&gt;&#x27;s</summary>\n\n") and text.endswith("</details>")
    assert repr(shown) in text and "<" not in repr(shown)


def test_claims_of_all_notebooks_appear_in_the_order_of_their_numbers(params):
    row = Estimate(0.5, 0.4, 0.6, 100)
    late, early = open_results(params, "04_late"), open_results(params, "01_early")
    late.claim("10 the last", row, 0.2)
    late.claim("5 the middle", row, 0.4)
    early.claim("1 the first", row._replace(value=0.1), 0.2)
    early.claim("1 the first", row._replace(value=0.7), 0.2)
    claims = early.read_table("claims")
    assert list(claims.columns) == ["claim", "value", "ci_low", "ci_high", "threshold", "holds", "n", "seed"]
    assert list(claims["claim"]) == ["1 the first", "5 the middle", "10 the last"]
    assert list(claims["value"]) == [0.7, 0.5, 0.5]
    assert list(claims["holds"]) == [True, False, True]
    rerun = open_results(params, "04_late")
    rerun.claim("9 the last, renamed", row, 0.2)
    assert list(rerun.read_table("claims")["claim"]) == ["1 the first", "9 the last, renamed"]


def test_a_claim_computes_whether_it_holds_from_its_interval(params):
    results, row = open_results(params, "01_test"), Estimate(-0.01, -0.02, 0.0, 100)
    assert results.claim("1 falls", row, -0.05, side="below").holds.item() is False
    assert results.claim("2 below 0.01", row, 0.01, side="below").holds.item() is True
    loss = results.claim("3 no worse by more than 0.03", row, margin=0.03)
    assert loss.holds.item() and loss.threshold.item() == -0.03
    assert not results.claim("4 no worse by more than 0.02", row, margin=0.02).holds.item()
    assert not results.claim("5 no interval", row._replace(ci_low=np.nan, ci_high=np.nan), 0).holds.item()
    for both in ({}, {"threshold": 0, "margin": 0.03}):
        with pytest.raises(InputError, match="either a threshold or a margin"):
            results.claim("6 neither", row, **both)


def test_evidence_of_all_notebooks_is_one_tidy_table_beside_the_experiments_folder(params):
    number = {"metric": "recall", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 9}
    runs = pd.DataFrame([{"condition": "vanilla, template", "seed": 3, **number}])
    means = pd.DataFrame([{"condition": "vanilla, template", **number, "n": 5}])
    for name in ("07_b", "06_a"):
        for _ in range(2):  # a notebook that runs again replaces its rows
            open_results(params, name).evidence(runs, means)
    open_results(params, "08_c").evidence(runs.assign(condition="vanilla"), means.iloc[:0], unit="turns")
    table = pd.read_csv(params.output_dir.parent / "smoke.csv", dtype=str)
    assert list(table.columns) == EVIDENCE_COLUMNS
    assert table[["question", "condition", "n", "unit", "seed", "experiment"]].to_numpy().tolist() == [
        ["06_a", "vanilla, template", "9", "questions", "3", "smoke"],
        ["06_a", "vanilla, template", "5", "seeds", "all", "smoke"],
        ["07_b", "vanilla, template", "9", "questions", "3", "smoke"],
        ["07_b", "vanilla, template", "5", "seeds", "all", "smoke"],
        ["08_c", "vanilla", "9", "turns", "3", "smoke"],
    ]
    readable = (params.output_dir / "tables" / "evidence.md").read_text()
    assert readable.count("| 0") >= 2 and "turns" not in readable


def test_a_table_that_is_not_there_says_what_to_run(params):
    with pytest.raises(InputError, match=r"tables/scores\.csv: no such table; first run"):
        open_results(params, "01_test").read_table("scores")


def test_a_folder_digest_sees_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = file_digest(tmp_path)
    (tmp_path / "a" / "x").write_text("2")
    second = file_digest(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, file_digest(tmp_path)}) == 3
    with pytest.raises(InputError, match="no such file or folder"):
        file_digest(tmp_path / "nothing")
