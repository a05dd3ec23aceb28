"""Directions of our changes and the paper's: comparable even for models on which its values mean nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ctxlib.paper import printed
from ctxlib.paper.outputs import VALUES, Experiment, needle_rows, stack
from ctxlib.paper.printed import ALPHA, INDICATED, SQUAD_QUAC_DROP, VANILLA

CHANGES = ["key", "measured", "value", "ci_low", "ci_high", "n", "interval"]


def directions(found: Sequence[Experiment]) -> pd.DataFrame:
    """The paper's claims with our changes: key, where, claim, paper_says, paper, measured, value, …, agrees.

    `paper` counts the signs of its own numbers (`paper.changes`); value, ci_low, ci_high (95 %) and n are ours. The
    interval over questions is "paired" or, if the notebooks wrote no paired change, "unpaired" (`minus`), usually
    wider. `agrees`: "yes" or "no" if the whole interval lies on one side of zero (`metrics.holds`), "open" if it
    contains zero, "no interval", or "not measured".
    """
    signs = printed.changes().groupby("key").value.agg(_signs)
    ours = stack([changes(one).assign(experiment=one.name, seed=one.setting("seed")) for one in found], CHANGES)
    rows = printed.CLAIMS.merge(ours, on="key", how="left")
    rows["paper"] = rows.key.map(signs).fillna("no numbers printed")
    rows["agrees"] = [_agrees(*row) for row in zip(rows.paper_says, rows.value, rows.ci_low, rows.ci_high, strict=True)]
    first = [*printed.CLAIMS.columns, "paper", *CHANGES[1:], "agrees", "seed", "experiment"]
    return rows.reindex(columns=first).astype({"n": "Int64", "seed": "Int64"})


def _signs(values: pd.Series) -> str:
    counts = {"up": (values > 0).sum(), "down": (values < 0).sum(), "equal": (values == 0).sum()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) + f" of {len(values)}"


def _agrees(says: str, value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return "not measured"
    if pd.isna(low):
        return "no interval"
    from ctxlib.metrics import holds  # with scipy and scikit-learn, which `ctxlib score` does without

    side, other = ("below", "above") if says == "down" else ("above", "below")
    right = low >= 0 if says == "not down" else holds(low, high, 0, side)
    return "yes" if right else "no" if holds(low, high, 0, other) else "open"


def worded(rows: pd.DataFrame) -> pd.DataFrame:
    """The frame of `directions` for `figures.forest`: `claim` says whose change it is, `verdict` what it says of it."""
    verdicts = {"yes": "holds", "no": "does not hold", "open": "not decided"}
    said = rows.claim + " (" + rows.paper_says + "; paper: " + rows.paper + ")"
    ours = (" · " + rows.experiment + ", " + rows.measured).where(rows.agrees != "not measured", "")
    return rows.assign(claim=said + ours, verdict=rows.agrees.replace(verdicts))


def changes(experiment: Experiment) -> pd.DataFrame:
    """An experiment's changes behind `paper.CLAIMS`: columns CHANGES."""
    parts = [*_template(experiment), *_shifts(experiment), *_indicator(experiment), *_cures(experiment)]
    return stack([part.reindex(columns=CHANGES) for part in (*parts, *_layers(experiment))], CHANGES)


def minus(frame: pd.DataFrame, column: str, after: Any, before: Any, by: Sequence[str]) -> pd.DataFrame:
    """`by` …, value, ci_low, ci_high, n: the rows with `after` in a column minus those with `before`, unpaired.

    The interval combines those of the two values (in [-1, 1] for two rates) as if they were independent; answers to
    the same questions are not, and their paired interval is usually narrower. Reference: Newcombe 1998,
    method 10; Zou and Donner 2008 for any other mean.
    """
    sides = [frame[frame[column] == side].set_index(list(by))[list(VALUES)] for side in (after, before)]
    both = sides[0].join(sides[1], how="inner", suffixes=("", "_before")).astype(float)
    value = both.value - both.value_before
    return pd.DataFrame(
        {
            "value": value,
            "ci_low": value - np.hypot(both.value - both.ci_low, both.ci_high_before - both.value_before),
            "ci_high": value + np.hypot(both.ci_high - both.value, both.value_before - both.ci_low_before),
            "n": both[["n", "n_before"]].min(axis=1),
        }
    ).reset_index()


def _template(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame, _ = needle_rows(experiment.table("needle_recall"))
    frame = frame[frame.prefix.eq(True)]
    befores = {"template_below_pretrained": printed.PRETRAINED, "template_below_raw": printed.IN_RAW}
    for key, before in befores.items():
        change = minus(frame, "condition", printed.IN_TEMPLATE, before, ["kind"])
        yield change.assign(key=key, measured=change.kind.astype(str) + " needles", interval="unpaired")
    steering = experiment.table("steering")
    change = minus(steering[steering.task.astype(str).str.endswith(" needles")], "steering_alpha", ALPHA, 1.0, ["task"])
    yield change.assign(key="steering_nih", measured=change.task, interval="unpaired")


def _shifts(experiment: Experiment) -> Iterator[pd.DataFrame]:
    layer = experiment.setting("allocation.layer")
    frame = experiment.table("attention_shift").query("condition == 'retrieval head (paper)' and layer == @layer")
    for role in ("user", "assistant"):
        part = frame[frame.role == role]
        yield part.assign(key=f"shift_{role}", measured=f"layer {layer}", interval="paired")


def _indicator(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame = experiment.table("evaluation_changes")
    frame = frame.query("template == 'on' and after == @INDICATED and before == @VANILLA")
    passages = experiment.table("passages").query("template == 'on' and metric == 'containment'")
    by_dataset = [name for name in SQUAD_QUAC_DROP if name in set(passages.dataset)]
    needle = "needle_recall" if "needle_recall" in set(frame.metric) else "recalled"
    paired = {"nih": ("needle", needle), "mt_bench": ("instructions", "followed")}
    paired |= {} if by_dataset else {"passages": ("qa", "containment")}
    for name, (task, metric) in paired.items():
        part = frame[(frame.task == task) & (frame.metric == metric)]
        yield part.assign(key=f"indicator_{name}", measured=f"{task}, {metric}", interval="paired")
    for name in by_dataset:
        change = minus(passages[passages.dataset == name], "condition", INDICATED, VANILLA, ["dataset"])
        yield change.assign(key=f"indicator_{name}", measured="qa, containment", interval="unpaired")


def _cures(experiment: Experiment) -> Iterator[pd.DataFrame]:
    steering, sft = f"steering α={ALPHA:g}", "indicator SFT, [IND]"
    compared = {
        "steering_over_sft": ("mean over heads", steering, sft),
        "sft_over_steering": ("retrieval head", sft, steering),
    }
    for key, (heads, after, before) in compared.items():
        frame = experiment.table("steering_against_indicator")
        change = minus(frame[frame.heads == heads], "treatment", after, before, ["layer"])
        yield change.assign(key=key, measured="layer " + change.layer.astype(str), interval="unpaired")


def _layers(experiment: Experiment) -> Iterator[pd.DataFrame]:
    frame = experiment.table("layer_agreement")
    frame = frame[frame.variant.astype(str).str.startswith("top 10 %") & (frame.layer < frame.other_layer)]
    deepest = frame.other_layer.max()
    middle = frame[(frame.layer >= 0.3 * deepest) & (frame.other_layer <= 0.7 * deepest)]
    if len(middle):
        value = middle.disagreement.mean() - frame.disagreement.mean()
        of = f"layers {middle.layer.min()} to {middle.other_layer.max()} of 0 to {deepest}"
        yield pd.DataFrame([{"value": value, "n": frame.n.max()}]).assign(key="middle_layers_agree", measured=of)


def recall_errors(found: Sequence[Experiment]) -> pd.DataFrame:
    """Figure 2, the paper's and ours: side, model, condition, value, ci_low, ci_high, n; fractions in [0, 1].

    The paper's are 1 - table 7, with ± 1 standard deviation over its four prompts if it prints one; ours are 1 -
    recall with its 95 % interval. All with the response prefix.
    """
    shown = [printed.PRETRAINED, printed.IN_TEMPLATE, printed.IN_RAW]
    theirs = printed.table(7)
    theirs = theirs[theirs.condition.isin(shown)].assign(side="paper", ci_low=lambda rows: rows.value - rows.sd)
    theirs = theirs.assign(ci_high=theirs.value + theirs.sd, n=printed.NEEDLES)
    ours = []
    for one in found:
        frame, _ = needle_rows(one.table("needle_recall"))
        frame = frame[frame.prefix.eq(True)]
        ours.append(frame.assign(side="ours", model=f"{one.name}: " + frame.kind.astype(str)))
    columns = ["side", "model", "condition", *VALUES]
    recall = stack([theirs, *ours], columns)[columns]
    order = {name: place for place, name in enumerate(shown)}
    recall = recall.sort_values("condition", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    return recall.assign(value=1 - recall.value, ci_low=1 - recall.ci_high, ci_high=1 - recall.ci_low)
