"""What is transcribed of the paper, held against what its numbers must be and against one another.

The oracles are arithmetic: counts out of 2,800 keywords, 1,000 questions or 80 ratings, and cells printed twice.
"""

import re
from pathlib import Path

import pandas as pd
import pytest

from ctxlib import paper
from ctxlib.params import load_params

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT.parent / "shared" / "paper" / "facts.md"
ALL = paper.every_table()
SECTIONS = {"1": "5.1", "2": "3.1", "3": "5.2", "7": "5.3", "9": "5.4", "10": "5.7"}  # of the collected facts
SIZES = {"1": 6 + 2 * 4, "2": 3 * 3, "3": 20 * 5, "7": 8 * 4, "9": 4 * 4, "10": 3 * 4}


def cell(number, **where):
    frame = paper.table(number)
    for key, value in where.items():
        frame = frame[frame[key] == value]
    (value,) = frame["value"]
    return value


def multiples(values: pd.Series, count: int) -> pd.Series:
    return (values * count - (values * count).round()).abs() < 1e-6


def test_every_table_is_whole_and_has_one_shape():
    assert ALL.groupby("table").size().to_dict() == SIZES
    assert list(ALL.columns) == [
        "table",
        "dataset",
        "model",
        "condition",
        "threshold",
        "metric",
        "value",
        "sd",
        "printed",
    ]
    assert not ALL.duplicated(paper.KEYS).any()
    assert ALL["value"].notna().all()
    assert sorted(ALL.loc[ALL["sd"].notna(), "model"].unique()) == [
        "Llama-2-13b",
        "Llama-2-7b",
        "Llama-3-8b",
        "gemma-2-9b",
    ]
    assert ALL["sd"].notna().sum() == 4 * 3 + 4


def test_rates_are_fractions_and_ratings_are_ratings():
    rates = ALL[ALL["metric"].isin(["nih", "squad", "quac", "drop", "fraction"])]
    assert rates["value"].between(0, 1).all() and (rates["value"] > 0.03).all()
    assert ALL.loc[ALL["metric"] == "mt_bench", "value"].between(3, 9).all()
    assert cell(3, dataset="ShareGPT", model="TinyLlama", condition="vanilla", metric="squad") == 0.5973


def test_every_needle_value_is_a_count_of_2800_keywords():
    counted = ALL[(ALL["metric"] == "nih") & ALL["sd"].isna()]
    assert len(counted) == 6 + 20 + 16
    assert counted["printed"].map(paper.keywords_found).notna().all()


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("0.3378", (946, "cut")),
        ("0.9404", (2633, "rounded")),
        ("86.89", (2433, "either")),
        ("0.8264*", (2314, "either")),
        ("1.0*", (2800, "either")),
        ("100", (2800, "either")),
        ("0.3377", None),
        ("0.9405", None),
    ],
)
def test_a_count_of_keywords_is_found_by_trying_all_of_them(printed, found):
    assert paper.keywords_found(printed) == found
    number = float(printed.rstrip("*"))
    percent, digits = number > 1, len(printed.rstrip("*").partition(".")[2])
    shares = {k: k / 2800 * (100 if percent else 1) for k in range(2801)}
    near = [k for k, share in shares.items() if -(10**-digits) / 2 - 1e-12 < share - number < 10**-digits - 1e-12]
    assert bool(near) == (found is not None)
    assert found is None or found[0] in near


def test_quac_counts_1000_questions_and_mt_bench_80_ratings():
    assert multiples(ALL.loc[ALL["metric"] == "quac", "value"], 1000).all()
    ratings = ALL.loc[ALL["metric"] == "mt_bench", "value"]
    assert len(ratings) == 24 and multiples(ratings, 80).all()
    assert not multiples(ratings, 40).all()


def test_tables_2_and_10_are_what_their_readers_expect():
    counts = paper.table_2().set_index("dataset")
    assert list(counts.loc["ShareGPT"]) == [1567.68, 93_645, 331_722]
    wizard = counts.loc["WizardLM-70K"]  # one instruction a conversation
    assert wizard["conversations"] == wizard["instructions"] == 57_523
    assert (counts["instructions"] >= counts["conversations"]).all()
    fractions = paper.table_10().pivot(index="dataset", columns="threshold", values="fraction")
    assert list(fractions.columns) == [0.5, 0.6, 0.7, 0.8]
    assert (fractions.diff(axis=1).iloc[:, 1:] < 0).all(axis=None)  # more is over a lower threshold
    assert set(fractions.index) == set(counts.index)


def test_what_tables_3_and_9_print_twice_differs_where_the_paper_differs():
    both = paper.table_9_against_3().set_index(["condition", "metric"])["difference"]
    expected = {
        ("vanilla", "squad"): 0.5918 - 0.5973,
        ("vanilla", "quac"): 0.113 - 0.155,
        ("vanilla", "drop"): 0,
        ("vanilla", "mt_bench"): 0,
        ("indicator + [IND]", "squad"): 0.6144 - 0.6205,
        ("indicator + [IND]", "quac"): 0.129 - 0.174,
        ("indicator + [IND]", "drop"): 0,
        ("indicator + [IND]", "mt_bench"): 3.825 - 3.7375,
    }
    assert both.to_dict() == pytest.approx(expected)


def test_tables_1_and_3_and_7_agree_on_the_official_llama_2():
    seven = {"model": "Llama-2-7b"}
    for metric in ("quac", "drop"):
        once = cell(1, model="Llama-2-7b-chat", condition=paper.IN_TEMPLATE, metric=metric)
        assert once == cell(3, model="Llama-2-7b-chat", metric=metric)
    assert cell(7, **seven, condition=paper.IN_TEMPLATE) == cell(
        1, model="Llama-2-7b-chat", metric="nih", condition=paper.IN_TEMPLATE
    )
    assert cell(7, **seven, condition=paper.WITHOUT_PREFIX) != cell(3, model="Llama-2-7b-chat", metric="nih")


def test_the_papers_own_changes_have_the_signs_that_are_known_of_them():
    change = {key: part.set_index(["dataset", "model"])["value"] for key, part in paper.changes().groupby("key")}
    assert {key: (part > 0).sum() for key, part in change.items()} == {
        "template_below_pretrained": 2,
        "template_below_raw": 0,
        "steering_nih": 2,
        "steering_quac": 2,
        "indicator_nih": 6,
        "indicator_squad": 9,
        "indicator_quac": 8,
        "indicator_passages": 17,
        "indicator_drop": 5,
        "indicator_mt_bench": 6,
    }
    assert change["indicator_mt_bench"].min() == pytest.approx(5.7375 - 6.4875)
    assert change["indicator_nih"]["UltraChat-200K", "Llama-2-7b"] == pytest.approx(-0.0125)
    assert change["indicator_quac"]["ShareGPT", "Llama-3-8b"] == pytest.approx(-0.003)
    assert set(change) <= set(paper.CLAIMS["key"])


def test_the_inconsistencies_are_computed_from_the_numbers():
    notes = paper.inconsistencies()
    found = " ".join(notes["numbers"])
    for number in ("-0.0125", "-0.7500", "128K", "0.8264*", "0.9894 to 0.9917", "0.9207 and 0.915", "0.3378"):
        assert number in found
    assert not notes["numbers"].str.contains("nan|None").any()
    named = {number for cells in notes["tables"] for number in cells.split(", ")}
    assert named <= set(SIZES)


def test_the_params_files_of_the_nine_runs_are_the_rows_of_table_3_with_its_settings():
    runs = [load_params(path) for path in sorted((ROOT / "params").glob("*llama*-*.yaml"))]
    rows = paper.table(3).query("condition == 'vanilla'")
    named = {(paper.BASES[run.models.pretrained], paper.DATASETS[run.conversations.source]) for run in runs}
    assert named == set(zip(rows["model"], rows["dataset"], strict=True)) and len(runs) == 9


def test_the_matrix_names_every_table_and_figure_once_and_who_measured_it():
    found = paper.experiments(ROOT / "outputs")
    rows = paper.matrix(found).set_index("paper")
    numbers = {"Table": [], "Figure": []}
    for name in rows.index:
        kind, first, *more = re.findall(r"[A-Z][a-z]+?(?=s? )|\d+", name)
        last = int(more[-1]) if more else int(first)
        numbers[kind] += range(int(first), last + 1)
    assert numbers == {"Table": list(range(1, 11)), "Figure": list(range(1, 10))}
    assert "miniature" in rows.measured_here["Table 7"] and "needs a GPU" in rows.on_its_models["Table 7"]
    assert set(paper.matrix([]).measured_here) == {"-", "not yet"}
    of_the_paper = {"models.pretrained": next(iter(paper.BASES)), "conversations.source": next(iter(paper.DATASETS))}
    one = paper.Experiment(ROOT, "mine", of_the_paper, {"steering": pd.DataFrame({"value": [1.0]})})
    measured = paper.matrix([one]).set_index("paper")
    assert measured.loc["Table 1", ["measured_here", "on_its_models"]].tolist() == ["mine", "mine"]
    assert measured.measured_here["Table 7"] == "not yet"


def test_the_official_models_are_those_of_table_7():
    assert sorted(paper.OFFICIAL.values()) == sorted(paper.as_printed(7)["model"])


@pytest.mark.skipif(not FACTS.is_file(), reason="the collected facts of the paper do not lie beside the project")
@pytest.mark.parametrize("number", SECTIONS)
def test_every_cell_stands_where_the_collected_facts_have_it(number):
    text = FACTS.read_text(encoding="utf-8").replace("+-", "±").split(f"\n### {SECTIONS[number]} ")[1]
    rows = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    cells = [cell.strip().removesuffix(" (vanilla)") for cell in rows.replace("\n", "").split("|")]
    printed = paper.as_printed(number).to_numpy().ravel()
    number_like = re.compile(r"[\d.,]+\*?(±[\d.]+)?")
    assert [cell for cell in printed if number_like.fullmatch(cell)] == [c for c in cells if number_like.fullmatch(c)]
