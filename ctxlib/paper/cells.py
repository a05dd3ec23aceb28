"""Ours in the cells of the paper's tables."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ctxlib.conversations import Corpus
from ctxlib.paper import printed
from ctxlib.paper.outputs import VALUES, Experiment, needle_rows, stack
from ctxlib.paper.printed import ALPHA, INDICATED, SQUAD_QUAC_DROP, VANILLA
from ctxlib.paper.seeds import over_seeds

OURS = [*printed.KEYS, "ours", "ci_low", "ci_high", "n", "same", "note"]
BESIDE = [*printed.KEYS, "paper", "ours", "difference", "ci_low", "ci_high", "n", "seed", "experiment", "note"]
_ALL_KEYWORDS = "a needle counts when all keywords are said, in the paper by the share of them"


def departures(experiment: Experiment) -> list[str]:
    """Settings of a run in the paper's row (`Experiment.is_a_row`) that are not the paper's (`paper.settings`)."""
    theirs = printed.settings(experiment.base, experiment.dataset)
    batch = experiment.setting("finetune.batch_size") * experiment.setting("finetune.gradient_accumulation")
    ours = {key: batch if key == "batch" else experiment.setting(key) for key in theirs}
    return [f"{key} {ours[key]} (paper: {theirs[key]})" for key in theirs if ours[key] != theirs[key]]


def measured(experiment: Experiment) -> pd.DataFrame:
    """What an experiment measured, under the keys of `paper.tables`: OURS, plus seed and experiment.

    `same`: whether it is the paper's quantity, so that the difference is meaningful; `note` what else differs, or
    why not. Rates are fractions in [0, 1], the intervals those of the tables (95 %). Means over seeds (`over_seeds`)
    are nobody's row: `n` counts seeds there, and `seed` is blank.
    """
    parts = [*_steering(experiment), *_dataset(experiment), *_main(experiment), *_official(experiment)]
    one_seed = stack([*parts, *_fractions(experiment)], OURS).assign(seed=experiment.setting("seed"))
    several = stack([rows.assign(same=False, seed=pd.NA) for rows in over_seeds(experiment)], [*OURS, "seed"])
    rows = stack([one_seed, several], [*OURS, "seed"])
    return rows.reindex(columns=[*OURS, "seed"]).assign(experiment=experiment.name)


def compare(found: Sequence[Experiment]) -> pd.DataFrame:
    """Every cell of the paper's tables with ours: columns BESIDE.

    `difference` is ours - paper and blank where the two are not the same quantity. Below the cells of a table stands
    what our other experiments measured in its place, with `paper` blank.
    """
    theirs = printed.every_table().rename(columns={"value": "paper"})[[*printed.KEYS, "paper"]]
    ours = stack([measured(one) for one in found], [*OURS, "seed", "experiment"])
    ours = ours.astype({"table": str, "threshold": float, "ours": float, "same": bool})
    in_a_row = ours.merge(theirs, on=printed.KEYS, how="left").paper.notna().to_numpy()
    rows = stack([theirs.merge(ours, on=printed.KEYS, how="left"), ours[~in_a_row]], BESIDE)
    order = {number: place for place, number in enumerate(theirs.table.unique())}
    rows = rows.sort_values("table", key=lambda numbers: numbers.map(order), kind="stable", ignore_index=True)
    rows["difference"] = (rows.ours - rows.paper).where(rows.same.eq(True)).round(6)
    return rows.reindex(columns=BESIDE).astype({"n": "Int64", "seed": "Int64"})


def ours_in(beside: pd.DataFrame, number: int) -> pd.DataFrame:
    """The rows of `compare` for one table that we measured, without columns that are empty there."""
    rows = beside[(beside.table == str(number)) & beside.ours.notna()].drop(columns="table")
    return rows.loc[:, [column for column in rows if rows[column].notna().any() and (rows[column] != "").any()]]


def pairs(beside: pd.DataFrame) -> pd.DataFrame:
    """Table 3 of `compare` as pairs, vanilla and [IND]: panel, row, side, condition, value, ci_low, ci_high, n.

    `side` is "paper" or the experiment. A run of ours in the paper's row shares it; our other experiments have rows
    and, for what the paper did not ask, panels of their own.
    """
    panels = {"nih": "NIH", "squad": "SQuAD", "quac": "QuAC", "drop": "DROP", "mt_bench": "MT-Bench (rating)"}
    panels |= {"passages": "passages", "instructions": "instructions"}
    rows = beside[
        (beside.table == "3") & beside.condition.isin([VANILLA, INDICATED]) & beside.metric.isin(panels.keys())
    ]
    rows = rows.assign(row=rows.dataset + " · " + rows.model)
    theirs = rows[rows.paper.notna()].drop_duplicates(printed.KEYS)
    theirs = theirs.assign(side="paper", value=theirs.paper, ci_low=np.nan, ci_high=np.nan, n=pd.NA)
    ours = rows[rows.ours.notna()]
    named_so = ours.experiment.where(ours.seed.notna(), ours.experiment + ", " + ours.n.astype(str) + " seeds")
    own_row = ours.row.where(ours.paper.notna(), named_so)
    named = [theirs, ours.assign(side=ours.experiment, value=ours.ours, row=own_row)]
    shown = stack(named, []).assign(panel=lambda frame: frame.metric.map(panels))
    order = {name: place for place, name in enumerate(panels.values())}
    shown = shown.sort_values("panel", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return shown[["panel", "row", "side", "condition", *VALUES]]


def _rows(part: pd.DataFrame, number: int, same: bool, note: str = "", **keys: Any) -> pd.DataFrame:
    frame = part.rename(columns={"value": "ours"}).reindex(columns=["ours", "ci_low", "ci_high", "n"])
    return frame.assign(**{"table": str(number), "threshold": np.nan, **keys, "same": same, "note": note})


def _of_kind(kinds: pd.Series) -> pd.Series:
    """The metric of needles by their kind; a text's are of one kind, which needs no name."""
    return ("nih (" + kinds.astype(str) + ")").replace("nih (text)", "nih")


def _official_model(experiment: Experiment) -> str:
    before, after = experiment.setting("models.pretrained"), experiment.setting("models.instruct")
    return printed.OFFICIAL.get((before, after), after)


def _steering(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame = experiment.table("steering")
    frame = frame[frame.task.astype(str).str.endswith(" needles")]
    model = _official_model(experiment)
    model = f"{model}-chat" if model in printed.OFFICIAL.values() else model
    for alpha, condition in ((1.0, printed.IN_TEMPLATE), (ALPHA, printed.STEERED)):
        part = frame[frame.steering_alpha == alpha]
        metric = _of_kind(part.task.str.removesuffix(" needles"))
        note = f"no response prefix; {_ALL_KEYWORDS}"
        yield _rows(part, 1, False, note, dataset="", model=model, condition=condition, metric=metric)


def _official(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame, same = needle_rows(experiment.table("needle_recall"))
    note = "one prompt; the paper's: mean of four, where it has a spread" if same else _ALL_KEYWORDS
    prefix = frame.prefix.eq(True)
    condition = frame.condition.where(prefix, printed.WITHOUT_PREFIX)
    shown = prefix | (frame.condition == printed.IN_TEMPLATE)
    model = _official_model(experiment)
    same = same and model in printed.OFFICIAL.values()
    keys = {"dataset": "", "model": model, "condition": condition, "metric": _of_kind(frame.kind)}
    yield _rows(frame, 7, same, note, **keys)[shown]


def _dataset(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame = experiment.table("dataset")
    frame = frame[(frame.dataset == "ours") & ~frame.metric.astype(str).str.startswith("dropped")]
    same = experiment.dataset in printed.DATASETS.values()
    settings = ("conversations.n", "models.seed_model")
    note = ", ".join(f"{key} {experiment.setting(key)}" for key in settings) if same else ""
    yield _rows(frame, 2, same, note, dataset=experiment.dataset, model="", condition="", metric=frame.metric)


def _main(experiment: Experiment) -> Iterator[pd.DataFrame]:
    """Tables 3 and 9: what the two fine-tuned models answer in the template."""
    row = {"dataset": experiment.dataset, "model": experiment.base}
    differ = departures(experiment) if experiment.is_a_row else []
    asked = experiment.table("evaluation").query("template == 'on' and condition in [@VANILLA, @INDICATED]")
    needles, keywords = needle_rows(asked[asked.task == "needle"])
    same = experiment.is_a_row
    variant = [f"needle.variant {experiment.setting('needle.variant')}"] if same else []
    note = "; ".join([*differ, *variant, *([] if keywords else [_ALL_KEYWORDS])])
    yield _rows(needles, 3, same and keywords, note, **row, condition=needles.condition, metric="nih")
    passages = experiment.table("passages")
    passages = passages.query("template == 'on' and metric == 'containment' and condition in [@VANILLA, @INDICATED]")
    parts = {metric: passages[passages.dataset == metric] for metric in passages.dataset.unique()}
    if not set(parts) & set(SQUAD_QUAC_DROP):
        parts["passages"] = asked[(asked.task == "qa") & (asked.metric == "containment")]
    parts["instructions"] = asked[(asked.task == "instructions") & (asked.metric == "followed")]
    variant = [f"qa.variant {experiment.setting('qa.variant')}"] if same else []
    for metric, part in parts.items():
        known = same and metric in SQUAD_QUAC_DROP
        keys = {**row, "condition": part.condition, "metric": metric}
        yield _rows(part, 3, known, "; ".join([*differ, *variant]) if known else "", **keys)
        beta = part.condition.map({VANILLA: 1.0, INDICATED: experiment.setting("scoring.threshold")})
        others = [text for text in differ if not text.startswith("scoring.threshold")]
        yield _rows(part, 9, known, "; ".join([*others, *variant]) if known else "", **keys, threshold=beta)


def _fractions(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame = experiment.table("fractions_over_beta")
    frame = frame[frame.layer == experiment.setting("scoring.layer")]
    frame = frame.rename(columns={"fraction": "value", "low": "ci_low", "high": "ci_high"})
    same = experiment.dataset in printed.DATASETS.values()
    settings = ("scoring.layer", "scoring.head_reduction", "models.seed_model", "conversations.n")
    note = ", ".join(f"{key} {experiment.setting(key)}" for key in settings) if same else ""
    keys = {"dataset": experiment.dataset, "model": "", "condition": "", "threshold": frame.threshold}
    yield _rows(frame, 10, same, note, **keys, metric="fraction")


def dataset_counts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Table 2 of the paper and of a corpus, with what was dropped on the way: dataset ("ours"), metric, value.

    conversations; instructions (user messages with an answer); tokens_per_conversation (mean, of the texts alone; NaN
    where there are none); of ours also `dropped: <reason>` (rows or turns). Counts are ints, the mean is a float.
    """
    texts = [[message.content for message in one.messages] for one in corpus.conversations]
    lengths = [sum(map(len, tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"])) for each in texts]
    answers = sum(message.role == "assistant" for one in corpus.conversations for message in one.messages)
    ours = {"tokens_per_conversation": float(np.mean(lengths)) if lengths else np.nan}
    ours |= {"conversations": len(lengths), "instructions": answers}
    ours |= {f"dropped: {row.reason}": int(row.n) for row in corpus.dropped.itertuples()}
    sides = printed.table_2().astype(object).set_index("dataset").to_dict("index") | {"ours": ours}
    rows = [(dataset, metric, value) for dataset, counts in sides.items() for metric, value in counts.items()]
    return pd.DataFrame(rows, columns=["dataset", "metric", "value"], dtype=object)
