"""`verify` finds what differs and nothing else; `compare` pairs by question; the page about cures holds."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctxlib.commands.compare import compare
from ctxlib.commands.cures import try_cures
from ctxlib.commands.verify import report, verify
from ctxlib.metrics import bootstrap_interval
from ctxlib.paper.report import claims_page
from ctxlib.params import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "claim": "1 it reads",
    "value": 0.5,
    "ci_low": 0.4,
    "ci_high": 0.6,
    "threshold": 0.2,
    "holds": True,
    "n": 9,
    "seed": 0,
}


def claims(folder: Path, *rows: dict, name: str = "claims") -> Path:
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    pd.DataFrame([ROW | row for row in rows]).to_csv(folder / "tables" / f"{name}.csv", index=False)
    return folder


@pytest.mark.parametrize("experiment", ["miniature", "evidence"])
def test_the_committed_tables_agree_with_themselves(experiment):
    frame = verify(ROOT / "outputs" / experiment, ROOT / "outputs" / experiment, 0.0)
    assert len(frame) > 10 and frame.agrees.all()


@pytest.mark.parametrize(
    ("mine", "agrees", "why"),
    [
        ({"value": 0.58, "ci_low": 0.5, "ci_high": 0.66}, True, ""),  # within the committed interval
        ({"value": 0.615, "ci_low": 0.5, "ci_high": 0.7}, True, ""),  # within the tolerance of it
        ({"value": 0.63, "ci_low": 0.5, "ci_high": 0.7}, False, "by more than 0.02"),
        ({"ci_low": 0.1, "holds": False}, False, "verdict 'no', committed 'holds'"),
        ({"claim": "2 other"}, False, "missing in yours"),
    ],
)
def test_a_claim_agrees_by_its_verdict_and_its_value(tmp_path, mine, agrees, why):
    frame = verify(claims(tmp_path / "mine", mine), claims(tmp_path / "ours", {}))
    assert frame.agrees[0] == agrees and why in frame.why[0]
    assert len(frame) == 1 + ("claim" in mine)
    assert ("DIFFERS" in report(frame)) == (not agrees)


def test_over_seeds_the_verdict_is_that_of_the_interval(tmp_path):
    ours = claims(tmp_path / "ours", {"holds": None}, name="claims_over_seeds")
    mine = claims(tmp_path / "mine", {"holds": None, "threshold": 0.45}, name="claims_over_seeds")
    assert "committed" in verify(mine, ours).why[0]


def test_without_an_interval_the_value_is_within_the_tolerance(tmp_path):
    nothing = {"ci_low": np.nan, "ci_high": np.nan, "holds": np.nan}
    ours = claims(tmp_path / "ours", nothing)
    assert verify(claims(tmp_path / "a", nothing | {"value": 0.515}), ours).agrees.all()
    assert not verify(claims(tmp_path / "b", nothing | {"value": 0.53}), ours).agrees.any()


def test_the_exit_status_says_whether_all_claims_agree(tmp_path):
    ours, other = claims(tmp_path / "ours", {}), claims(tmp_path / "mine", {"value": 0.9, "ci_high": 0.95})
    for folder, status in ((ours, 0), (other, 1), (tmp_path, 2)):
        command = [sys.executable, "-m", "ctxlib", "verify", str(folder), str(ours)]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == status, finished.stderr
    assert finished.stderr.count("\n") == 1 and "first run" in finished.stderr


@pytest.mark.parametrize(("rows", "message"), [([{}, {}], "there twice"), (None, "no claims.csv")])
def test_a_folder_without_one_row_a_claim_is_refused(tmp_path, rows, message):
    folder = tmp_path / "mine" if rows is None else claims(tmp_path / "mine", *rows)
    with pytest.raises(InputError, match=message):
        verify(folder, claims(tmp_path / "ours", {}))


def test_the_page_of_claims_is_made_from_the_committed_tables():
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert page == claims_page(ROOT), "make it anew: python -m ctxlib.paper.report"
    table = pd.read_csv(ROOT / "outputs/evidence/tables/claims_over_seeds.csv")
    for row in table.itertuples():
        (line,) = (line for line in page.splitlines() if f"| {row.claim[2:]} " in line)
        lower, upper = re.search(r"\[([+-][\d.]+), ([+-][\d.]+)\]", line).groups()
        assert (float(lower), float(upper)) == (round(row.ci_low, 2), round(row.ci_high, 2))
        verdict = next(
            cell for cell in map(str.strip, line.split("|")) if cell in ("holds", "does not hold", "not decided")
        )
        assert (verdict == "holds") == (row.ci_low > row.threshold)
        assert (verdict == "does not hold") == (row.ci_high < row.threshold)


def answers(path: Path, values: dict[str, float], **more) -> Path:
    pd.DataFrame({"id": list(values), "value": list(values.values())}).assign(**more).to_csv(path, index=False)
    return path


def test_two_experiments_are_paired_by_question_whatever_their_order(tmp_path):
    a = answers(tmp_path / "a.csv", {"p": 1.0, "q": 0.0, "r": 1.0, "only": 1.0}, metric="recall")
    b = answers(tmp_path / "b.csv", {"r": 0.0, "p": 0.0, "q": 0.0}, metric="recall")
    table = compare(a, b, samples=200)
    low, high = bootstrap_interval([1.0, 0.0, 1.0], 200)
    assert table.iloc[0].to_dict() == pytest.approx(
        {"metric": "recall", "a": 2 / 3, "b": 0.0, "value": 2 / 3, "ci_low": low, "ci_high": high, "n": 3}
    )
    assert table.attrs["unpaired"] == 1


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [({"z": 1.0}, {}, "share no question"), ({"p": 1.0}, {"kind": "x"}, "different columns")],
)
def test_experiments_that_cannot_be_paired_are_refused(tmp_path, values, more, message):
    a, b = answers(tmp_path / "a.csv", {"p": 1.0}), answers(tmp_path / "b.csv", values, **more)
    with pytest.raises(InputError, match=message):
        compare(a, b)


def test_the_cure_of_the_page_has_twenty_lines_and_runs_as_it_says(tmp_path):
    page = (ROOT / "docs" / "cures.md").read_text(encoding="utf-8")
    code = page.split("<!-- example -->\n```python\n")[1].split("```")[0]
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(body) <= 20
    file = tmp_path / "mine.py"
    file.write_text(code, encoding="utf-8")
    (name,) = re.findall(r"--cure mine\.py:(\w+)", page)
    tiny = {
        "outputs": str(tmp_path), "threads": 1, "conversations.n": 24, "finetune.steps": 1, "finetune.batch_size": 4,
        "finetune.raw_text_share": 0.0, "cures.contexts": 2, "cures.long_tokens": 60, "needle.per_cell": 1,
        "instructions.n": 2,
    }  # fmt: skip
    told = try_cures(ROOT / "params" / "smoke-cures.yaml", [f"{file}:{name}"], overrides=tiny)
    assert re.search(r"question first: reading [+-]0?\d\.\d\d, price paid [+-]\d\.\d\d, 1 seed", told)
    assert {path.name.split("-")[0] for path in tmp_path.glob("smoke-cures/work/trials/*/cure-*")} == {"cure"}
    assert len(list(tmp_path.glob("smoke-cures/work/trials/*/model"))) == 2  # the loss differs: a training of its own


def test_cures_without_any_or_without_their_section_are_refused():
    with pytest.raises(InputError, match="none given"):
        try_cures(ROOT / "params" / "smoke-cures.yaml", [])
    with pytest.raises(InputError, match="cures: null"):
        try_cures(ROOT / "params" / "smoke-evidence.yaml", [])
