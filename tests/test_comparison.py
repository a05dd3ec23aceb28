"""Experiments made by hand, each cell of which is known, beside the paper's tables and its directions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctxlib import metrics, paper
from ctxlib.conversations import Conversation, Corpus, Message
from ctxlib.paper.seeds import FEWEST_SEEDS
from ctxlib.params import InputError, load_params

ROOT = Path(__file__).resolve().parents[1]
VANILLA, INDICATED = "vanilla", "indicator + [IND]"


def values(**columns) -> pd.DataFrame:
    """A frame as `metrics.summarise` gives it; `value` is there, the interval is 0.02 to either side, n is 400."""
    frame = pd.DataFrame(columns)
    return frame.assign(ci_low=frame["value"] - 0.02, ci_high=frame["value"] + 0.02, n=400)


def write(outputs: Path, params_file: str, tables: dict[str, pd.DataFrame], **overrides) -> Path:
    """An experiment's folder as `ctxlib run` leaves it, with these tables."""
    params = load_params(ROOT / "params" / params_file, {"outputs": str(outputs), **overrides})
    (params.output_dir / "tables").mkdir(parents=True)
    for name, frame in tables.items():
        frame.to_csv(params.output_dir / "tables" / f"{name}.csv", index=False)
    manifest = {"experiment": params.experiment, "params": params.model_dump(mode="json"), "notebooks": {}}
    (params.output_dir / "manifest.json").write_text(json.dumps(manifest))
    return params.output_dir


def evaluation(metric: str = "needle_recall") -> pd.DataFrame:
    return values(
        condition=[VANILLA, "indicator", INDICATED, VANILLA],
        template=["on", "on", "on", "off"],
        task="needle",
        metric=metric,
        value=[0.95, 0.5, 0.97, 0.1],
    )


def passages() -> pd.DataFrame:
    return values(
        condition=[VANILLA, INDICATED] * 3,
        template="on",
        dataset=["squad"] * 2 + ["quac"] * 2 + ["drop"] * 2,
        metric="containment",
        value=[0.58, 0.64, 0.15, 0.16, 0.30, 0.25],
    )


def cell(frame: pd.DataFrame, **where) -> pd.Series:
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


@pytest.fixture
def matching(tmp_path) -> Path:
    tables = {"evaluation": evaluation(), "passages": passages()}
    tables["fractions_over_beta"] = pd.DataFrame(
        {"layer": [14, 15], "threshold": 0.6, "fraction": [0.5, 0.12], "low": 0.11, "high": 0.13, "n": 300_000}
    )
    tables["dataset"] = pd.DataFrame(
        {"dataset": ["ShareGPT", "ours", "ours"], "metric": ["conversations", "conversations", "dropped: empty"]}
    ).assign(value=[93_645, 93_600, 500])
    return write(tmp_path, "tinyllama-sharegpt.yaml", tables)


def test_a_run_of_the_paper_stands_in_its_row_with_the_difference(matching):
    beside = paper.compare(paper.experiments(matching.parent))
    row = {"dataset": "ShareGPT", "model": "TinyLlama", "experiment": "tinyllama-sharegpt"}
    vanilla = cell(beside, table="3", condition=VANILLA, metric="nih", **row)
    assert (vanilla.paper, vanilla.ours, vanilla.n, vanilla.seed) == (0.9846, 0.95, 400, 42)
    assert vanilla.difference == pytest.approx(0.95 - 0.9846)
    assert (vanilla.ci_low, vanilla.ci_high) == pytest.approx((0.93, 0.97))
    squad = cell(beside, table="3", condition=INDICATED, metric="squad", **row)
    assert squad.difference == pytest.approx(0.64 - 0.6205)
    assert squad.note == "qa.variant standard"
    assert cell(beside, table="9", threshold=0.6, metric="squad", **row).difference == pytest.approx(0.64 - 0.6144)
    assert cell(beside, table="9", threshold=1.0, metric="drop", **row).difference == pytest.approx(0.30 - 0.2739)
    fraction = cell(beside, table="10", threshold=0.6, dataset="ShareGPT")
    assert (fraction.ours, fraction.difference) == pytest.approx((0.12, 0.02))
    data = cell(beside, table="2", metric="conversations", dataset="ShareGPT")
    assert (data.ours, data.difference) == (93_600, -45)
    assert data.note == "conversations.n None, models.seed_model ucla-cmllab/tinyllama-sft-vicuna-full"
    assert beside.paper.notna().sum() == len(paper.every_table())  # every cell once, measured or not
    assert beside.ours.notna().sum() == 2 + 6 + 6 + 1 + 1


def test_needles_counted_another_way_have_no_difference_and_the_note_says_so(tmp_path):
    write(tmp_path, "tinyllama-sharegpt.yaml", {"evaluation": evaluation("recalled")})
    rows = paper.ours_in(paper.compare(paper.experiments(tmp_path)), 3)
    assert list(rows.ours) == [0.95, 0.97] and list(rows.paper) == [0.9846, 0.9921]
    assert "difference" not in rows and rows.note.str.contains("all keywords").all()


def test_a_run_cut_short_says_in_what_it_departs_from_the_paper(tmp_path):
    write(
        tmp_path,
        "tinyllama-sharegpt.yaml",
        {"evaluation": evaluation()},
        **{"finetune.steps": 10, "finetune.epochs": None, "conversations.n": 100, "finetune.batch_size": 2},
    )
    (found,) = paper.experiments(tmp_path)
    told = ["conversations.n 100 (paper: None)", "finetune.steps 10 (paper: None)"]
    told += ["finetune.epochs None (paper: 1.0)", "batch 16 (paper: 128)"]
    assert paper.departures(found) == told
    assert set(paper.ours_in(paper.compare([found]), 3).note) == {"; ".join([*told, "needle.variant standard"])}


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*llama*-*.yaml")), ids=lambda path: path.stem)
def test_the_nine_params_files_depart_in_nothing(path, tmp_path):
    write(tmp_path, path.name, {})
    (found,) = paper.experiments(tmp_path)
    assert found.is_a_row and paper.departures(found) == []


def test_other_models_are_shown_below_the_papers_rows_without_a_difference(tmp_path):
    changed = values(task="qa", metric="containment", condition=[VANILLA, INDICATED], template="on", value=[0.5, 0.9])
    of_town = passages().assign(dataset="unknown").iloc[:2]
    write(tmp_path, "miniature.yaml", {"evaluation": pd.concat([evaluation(), changed]), "passages": of_town})
    found = paper.experiments(tmp_path)
    assert not found[0].is_a_row
    beside = paper.compare(found)
    ours = beside[beside.experiment == "miniature"]
    assert ours.paper.isna().all() and ours.difference.isna().all()
    assert set(ours.metric[ours.table == "3"]) == {"nih", "unknown", "passages"}
    of_table_3 = beside[beside.table == "3"]
    assert of_table_3.paper.notna().to_numpy().argmin() == 100  # below all of the paper's
    pairs = paper.pairs(beside)
    assert set(pairs.panel[pairs.side == "miniature"]) == {"NIH", "passages"}
    assert pairs.row[pairs.side == "paper"].nunique() == 9


def test_means_over_seeds_stand_in_tables_1_3_7_and_9_with_intervals_from_five_seeds_on(tmp_path):
    asked = ["pretrained, raw text", "vanilla, template", "vanilla, raw text", "vanilla, steered"]
    asked += ["indicator, template + [IND]", "indicator, template"]
    seeds = pd.concat(
        values(condition=asked, metric=metric, value=np.arange(6) / 10 + place / 100)
        for place, metric in enumerate(["NIH recall", "NIH recall, contradicting", "known facts"])
    ).assign(n=5)
    threshold = values(
        condition=["β = 0.4, [IND]", "β = 0.4, template", "vanilla, template", "top 10%, [IND]"],
        metric="passage QA",
        value=[0.1, 0.2, 0.3, 0.4],
    ).assign(n=3)
    write(tmp_path, "evidence.yaml", {"seeds": seeds, "threshold": threshold})
    beside = paper.compare(paper.experiments(tmp_path))
    ours = beside[beside.ours.notna()].set_index(["table", "condition", "metric"])
    told = {key: round(value, 4) for key, value in ours.ours.items()}
    assert told == {
        ("1", paper.IN_TEMPLATE, "nih (contradicting)"): 0.11,
        ("1", paper.STEERED, "nih (contradicting)"): 0.31,
        ("3", VANILLA, "nih"): 0.1,
        ("3", INDICATED, "nih"): 0.4,
        ("7", paper.PRETRAINED, "nih (contradicting)"): 0.01,
        ("7", paper.IN_TEMPLATE, "nih (contradicting)"): 0.11,
        ("7", paper.IN_RAW, "nih (contradicting)"): 0.21,
        ("9", INDICATED, "passages"): 0.1,
        ("9", VANILLA, "passages"): 0.3,
    }
    assert ours.difference.isna().all() and ours.seed.isna().all()
    assert list(ours.loc["9"].threshold) == [0.4, 1.0]
    assert set(paper.pairs(beside).row[paper.pairs(beside).side == "evidence"]) == {"evidence, 5 seeds"}
    assert FEWEST_SEEDS == metrics.FEWEST_SEEDS
    assert ours.loc["9"].ci_low.isna().all() and ours.loc[["1", "3", "7"]].ci_low.notna().all()
    assert ours.note.loc["1"].str.contains("mean over 5 seeds; steered with α = 0.03").all()


def test_an_experiment_of_which_little_ran_has_fewer_rows_and_nothing_else(matching):
    whole = paper.compare(paper.experiments(matching.parent))
    (matching / "tables" / "passages.csv").unlink()
    partial = paper.compare(paper.experiments(matching.parent))
    kept = partial.dropna(subset="ours")
    assert len(kept) == whole.ours.notna().sum() - 12
    for table in (matching / "tables").iterdir():
        table.unlink()
    found = paper.experiments(matching.parent)
    assert paper.compare(found).ours.isna().all()
    assert set(paper.directions(found).agrees) == {"not measured"}
    assert set(paper.recall_errors(found).side) == {"paper"}
    assert paper.gather(found, "scores").empty


def test_no_experiment_at_all_leaves_the_paper(tmp_path):
    assert paper.experiments(tmp_path) == paper.experiments(tmp_path / "nothing") == []
    beside = paper.compare([])
    assert len(beside) == len(paper.every_table()) and beside.ours.isna().all()
    assert set(paper.directions([]).agrees) == {"not measured"}
    assert set(paper.pairs(beside).side) == {"paper"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"experiment": "x"}', "params"),
        ('{"experiment": 1, "params": 2}', "Attr"),
    ],
)
def test_a_broken_manifest_is_named(matching, content, says):
    (matching / "manifest.json").write_text(content)
    with pytest.raises(
        InputError, match=rf"tinyllama-sharegpt/manifest\.json: not a manifest .*{says}.*run the experiment"
    ):
        paper.experiments(matching.parent)


def test_a_table_that_lacks_a_column_or_is_empty_is_named(matching):
    table = matching / "tables" / "passages.csv"
    passages().drop(columns="dataset").to_csv(table, index=False)
    with pytest.raises(InputError, match=r"passages\.csv: no column 'dataset'; run the notebook"):
        paper.experiments(matching.parent)
    table.write_text("")
    with pytest.raises(InputError, match=r"passages\.csv: not a table"):
        paper.experiments(matching.parent)


def test_a_setting_that_an_old_manifest_lacks_is_named(matching):
    manifest = json.loads((matching / "manifest.json").read_text())
    del manifest["params"]["scoring"]["layer"]
    (matching / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: params: no key 'scoring\.layer'; run the experiment again"):
        paper.compare(paper.experiments(matching.parent))


def test_the_unpaired_interval_is_newcombes():
    """56 of 70 against 48 of 80: 0.20, 95 % interval 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    from ctxlib.metrics import wilson_interval

    rows = [(side, "x", hits / n, *wilson_interval(hits, n), n) for side, hits, n in (("a", 56, 70), ("b", 48, 80))]
    frame = pd.DataFrame(rows, columns=["side", "by", "value", "ci_low", "ci_high", "n"])
    (row,) = paper.minus(frame, "side", "a", "b", ["by"]).itertuples()
    assert (row.value, row.ci_low, row.ci_high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert row.n == 70
    assert paper.minus(frame, "side", "a", "nobody", ["by"]).empty


@pytest.mark.parametrize(
    ("value", "key", "agrees"),
    [(0.1, "nih", "yes"), (-0.1, "nih", "no"), (0.01, "nih", "open"), (0.02, "nih", "open"), (0.02, "mt_bench", "yes"),
     (-0.1, "mt_bench", "no")],
)  # fmt: skip
def test_a_direction_agrees_only_where_the_interval_lies_on_one_side(tmp_path, value, key, agrees):
    task, metric = {"nih": ("needle", "recalled"), "mt_bench": ("instructions", "followed")}[key]
    change = values(
        task=task, metric=metric, template="on", after=INDICATED, before=[VANILLA, "indicator"], value=value
    )
    change.loc[1, "value"] = 9.0  # another comparison
    write(tmp_path, "miniature.yaml", {"evaluation_changes": change})
    row = cell(paper.directions(paper.experiments(tmp_path)), key=f"indicator_{key}")
    assert (row.agrees, row.value, row.interval) == (agrees, value, "paired")


def test_directions_of_the_template_of_steering_and_of_the_layers(tmp_path):
    conditions = [paper.PRETRAINED, paper.IN_TEMPLATE, paper.IN_RAW]
    recall = pd.concat(
        values(condition=conditions, kind="unknown", prefix=prefix, metric="recalled", value=told)
        for prefix, told in ((True, [1.0, 0.6, 0.61]), (False, [0.1, 0.2, 0.3]))
    )
    steering = values(
        steering_alpha=[1.0, 0.95, 0.1, 1.0], task=["text needles"] * 3 + ["known facts"], value=[0.5, 0.6, 0.9, 1]
    )
    cures = values(
        treatment=["steering α=0.95", "indicator SFT, [IND]"] * 2,
        heads=["mean over heads"] * 2 + ["retrieval head"] * 2,
        layer=3,
        value=[0.3, 0.1, 0.3, 0.1],
    )
    shift = values(
        condition=["retrieval head (paper)"] * 3,
        layer=[3, 3, 2],
        role=["user", "assistant", "user"],
        value=[-0.1, 0.1, 5],
    )
    pairs = [(a, b) for a in range(6) for b in range(6)]
    agreement = pd.DataFrame(pairs, columns=["layer", "other_layer"]).assign(
        variant="top 10 % (the paper's text)", n=50
    )
    agreement["disagreement"] = np.where(agreement.layer + agreement.other_layer == 5, 0.2, 0.8)
    tables = {
        "needle_recall": recall,
        "steering": steering,
        "steering_against_indicator": cures,
        "attention_shift": shift,
    }
    write(tmp_path, "miniature.yaml", tables | {"layer_agreement": agreement})
    rows = paper.directions(paper.experiments(tmp_path)).set_index("key")
    told = rows[rows.agrees != "not measured"]
    assert told.agrees.to_dict() == {
        "template_below_pretrained": "yes",
        "template_below_raw": "open",
        "steering_nih": "yes",
        "shift_user": "yes",
        "shift_assistant": "yes",
        "steering_over_sft": "yes",
        "sft_over_steering": "no",
        "middle_layers_agree": "no interval",
    }
    assert told.value["template_below_pretrained"] == pytest.approx(-0.4)
    assert told.value["steering_nih"] == pytest.approx(0.1)
    assert told.value["middle_layers_agree"] == pytest.approx(0.2 - (3 * 0.2 + 12 * 0.8) / 15)


def test_figure_2_is_the_complement_of_table_7_and_of_our_recall(tmp_path):
    recall = values(
        condition=[paper.IN_TEMPLATE] * 2, kind="unknown", prefix=[True, False], metric="recalled", value=[0.6, 0.1]
    )
    write(tmp_path, "miniature.yaml", {"needle_recall": recall})
    errors = paper.recall_errors(paper.experiments(tmp_path))
    theirs = errors[errors.side == "paper"].set_index(["model", "condition"])
    assert len(theirs) == 8 * 3
    mistral = theirs.loc[("mistral-v0.3", paper.IN_TEMPLATE)]
    assert mistral.value == pytest.approx(0.1529) and np.isnan(mistral.ci_low)
    llama = theirs.loc[("Llama-2-13b", paper.IN_RAW)]
    assert (llama.value, llama.ci_low, llama.ci_high) == pytest.approx((0.0387, 0.0323, 0.0451))
    (ours,) = errors[errors.side == "ours"].itertuples()
    assert (ours.model, ours.value, ours.ci_low, ours.ci_high) == (
        "miniature: unknown",
        *map(pytest.approx, (0.4, 0.38, 0.42)),
    )


def test_an_official_model_stands_in_its_row_of_table_7(tmp_path):
    recall = values(
        condition=[paper.IN_TEMPLATE] * 2, kind="text", prefix=[True, False], metric="needle_recall", value=[0.9, 0.8]
    )
    overrides = {"models.instruct": "google/gemma-2-9b-it", "models.pretrained": "google/gemma-2-9b"}
    write(tmp_path, "tinyllama-sharegpt.yaml", {"needle_recall": recall}, **overrides)
    beside = paper.compare(paper.experiments(tmp_path))
    row = {"table": "7", "model": "gemma-2-9b", "metric": "nih"}
    assert cell(beside, condition=paper.IN_TEMPLATE, **row).difference == pytest.approx(0.9 - 0.9803)
    assert cell(beside, condition=paper.WITHOUT_PREFIX, **row).difference == pytest.approx(0.8 - 0.9872)


def test_an_official_model_beside_another_models_base_stands_in_no_row(tmp_path):
    recall = values(condition=[paper.PRETRAINED], kind="text", prefix=[True], metric="needle_recall", value=[0.9])
    write(tmp_path, "tinyllama-sharegpt.yaml", {"needle_recall": recall}, **{"models.instruct": "google/gemma-2-9b-it"})
    (row,) = paper.ours_in(paper.compare(paper.experiments(tmp_path)), 7).itertuples()
    assert row.model == "google/gemma-2-9b-it" and not hasattr(row, "paper")


def test_two_experiments_in_one_row_are_both_there(matching):
    again = shutil.copytree(matching, matching.parent / "again")
    manifest = json.loads((again / "manifest.json").read_text()) | {"experiment": "again"}
    (again / "manifest.json").write_text(json.dumps(manifest))
    beside = paper.compare(paper.experiments(matching.parent))
    rows = beside[(beside.table == "3") & (beside.metric == "nih") & beside.ours.notna()]
    assert list(rows.experiment) == ["again", "tinyllama-sharegpt"] * 2
    assert paper.pairs(beside).query("side == 'paper' and panel == 'NIH'").shape[0] == 18


def test_a_corpus_is_counted_in_conversations_answers_and_tokens_of_their_texts(tokenizer):
    turns = [Message("user", "abc"), Message("assistant", "de"), Message("user", "f"), Message("assistant", "ghij")]
    short = [Message("system", "s"), Message("user", "é"), Message("assistant", "!"), Message("user", "unanswered")]
    dropped = pd.DataFrame({"reason": ["empty turn"], "n": [3]})
    corpus = Corpus((Conversation("1", tuple(turns)), Conversation("2", tuple(short))), dropped, "made")
    both = paper.dataset_counts(corpus, tokenizer)
    assert cell(both, dataset="ShareGPT", metric="instructions")["value"] == 331_722
    counts = both[both["dataset"] == "ours"].set_index("metric")["value"]
    byte_level = (len("abcdefghij") + len("sé!unanswered".encode())) / 2
    assert counts.to_dict() == {
        "tokens_per_conversation": byte_level,
        "conversations": 2,
        "instructions": 3,
        "dropped: empty turn": 3,
    }
    assert all(isinstance(value, int) for value in counts.iloc[1:])
    nothing = paper.dataset_counts(Corpus((), dropped, "made"), tokenizer)
    assert np.isnan(cell(nothing, dataset="ours", metric="tokens_per_conversation")["value"])
