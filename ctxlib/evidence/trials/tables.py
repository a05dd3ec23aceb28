"""Tables over many trials: every trial at every seed, asked in every way."""

from collections.abc import Mapping, Sequence

import pandas as pd
from filelock import Timeout
from tqdm.auto import tqdm

from ctxlib import indicator
from ctxlib.evidence.trials.computing import answers, scores
from ctxlib.evidence.trials.definition import Asking, Trial
from ctxlib.evidence.trials.plan import Plan
from ctxlib.metrics import summarise
from ctxlib.params import Params

NAMES = {
    ("needle", "recalled"): "NIH recall",
    ("needle", "says_memory"): "NIH answered from memory",
    ("needle", "attention_to_user"): "attention to the user",
    ("needle", "attention_to_passage"): "attention to the passage",
    ("needle", "one_sentence"): "NIH answered in one sentence",
    ("qa", "containment"): "passage QA",
    ("qa", "one_sentence"): "passage QA answered in one sentence",
    ("facts", "containment"): "known facts",
    ("facts", "one_sentence"): "known facts answered in one sentence",
    ("instructions", "followed"): "instructions followed",
    ("code", "recalled"): "code recall",
    ("code", "says_memory"): "code answered from memory",
    ("code", "attention_to_user"): "code: attention to the user",
    ("code", "attention_to_passage"): "code: attention to the passage",
    ("arithmetic", "recalled"): "arithmetic recall",
    ("arithmetic", "attention_to_user"): "arithmetic: attention to the user",
    ("arithmetic", "attention_to_passage"): "arithmetic: attention to the passage",
}


def run(
    params: Params,
    trials: Mapping[str, Trial],
    asked: Mapping[str, Asking],
    seeds: Sequence[int],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Every trial at every seed, asked in every way; one row per question and metric.

    Columns: condition, seed, metric, id, value.

    A condition is the names of trial and asking, as in "vanilla, template". Metrics have their names in NAMES; recall
    is also given by the needles' kind, attention by layer and as the mean over all layers.

    The seed draws the conversations, the training's order and first weights, and the questions, so that all trials of
    one seed answer the same questions; a trial that names its own seed keeps it. A model trained without marks has no
    indicator and is not asked with one. Trials that another process is working on are taken last.
    """
    jobs = []
    for seed in seeds:
        for name, trial in trials.items():
            plan = Plan(params, trial.at_seed(seed))
            ways = {way: one for way, one in asked.items() if trial.has_indicator or not one.indicator}
            jobs += [(f"{name}, {way}", seed, plan, asking) for way, asking in ways.items()]
    found: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(jobs), desc="trials", disable=not progress) as bar:
        for timeout in (0, -1):
            for place, (condition, seed, plan, asking) in enumerate(jobs):
                if place in found:
                    continue
                try:
                    frame = answers(plan, asking, timeout=timeout)
                except Timeout:  # taken up again after all others
                    continue
                found[place] = named(frame).assign(condition=condition, seed=seed)
                bar.update()
    table = pd.concat([found[place] for place in range(len(jobs))], ignore_index=True)
    return table[["condition", "seed", "metric", "id", "value"]]


def by_run(table: pd.DataFrame, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The answers of `run` in numbers: condition, seed, metric, value, ci_low, ci_high, n; one row per run and metric.

    The intervals are over the questions of one run (`metrics.summarise`); those over runs: `metrics.over_seeds`.
    """
    runs = [
        summarise(part, ["condition", "seed", "name"], "value", samples=samples, seed=seed)
        for _, part in table.rename(columns={"metric": "name"}).groupby("name", sort=False)
    ]
    return pd.concat(runs, ignore_index=True).drop(columns="metric").rename(columns={"name": "metric"})


def by_marks(frame: pd.DataFrame, unmarked: str | None = None) -> pd.DataFrame:
    """The rows with the column `marks`: the condition without how it was asked (", [IND]" or ", template").

    With `unmarked` only the conditions asked with [IND], and that trial's in the template.
    """
    if unmarked is not None:
        frame = frame[frame.condition.str.endswith("[IND]") | (frame.condition == f"{unmarked}, template")]
    return frame.assign(marks=frame.condition.str.removesuffix(", [IND]").str.removesuffix(", template"))


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The measurements under the names of NAMES; recall also by kind, attention by layer and as the mean of layers."""
    names = pd.MultiIndex.from_frame(table[["family", "metric"]]).map(NAMES)
    table = table.assign(metric=names)
    recall, attention = table[table.metric == "NIH recall"], table[table.layer.notna()]
    over_layers = attention.groupby(["metric", "id"], sort=False, as_index=False)["value"].mean()
    parts = [
        table[table.layer.isna()],
        recall.assign(metric=recall.metric + ", " + recall.kind),
        attention.assign(metric=attention.metric + ", layer " + attention.layer.astype(str)),
        over_layers.assign(metric=over_layers.metric + ", mean over layers"),
    ]
    return pd.concat([part[["metric", "id", "value"]] for part in parts], ignore_index=True)


def scored_turns(params: Params, trials: Mapping[str, Trial], seeds: Sequence[int]) -> pd.DataFrame:
    """The scores of every trial's turns at every seed and layer, with what is known about the turns.

    Columns: condition (the trial's name), seed, layer, conversation, turn, kind, depends_on_context (the truth), score.
    """
    parts = []
    for seed in seeds:
        for name, trial in trials.items():
            plan = Plan(params, trial.at_seed(seed))
            known = indicator.turn_table(plan.corpus).drop(columns="score")
            found = scores(plan).merge(known, on=["conversation", "turn"])
            parts.append(found.assign(condition=name, seed=seed))
    columns = ["condition", "seed", "layer", "conversation", "turn", "kind", "depends_on_context", "score"]
    return pd.concat(parts, ignore_index=True)[columns]


def dosed(
    shares: Mapping[str, float], dose: float, *, ignoring: Sequence[str], reading: Sequence[str]
) -> dict[str, float]:
    """Shares of conversations of which the fraction `dose` ignores the user's text and the rest reads it.

    Within `ignoring` and within `reading`, kinds of `texts.CHAT_KINDS`, the proportions are those of `shares`.
    """
    sides = ((dose, ignoring), (1 - dose, reading))
    mixed = {kind: part * shares[kind] / sum(shares[k] for k in kinds) for part, kinds in sides for kind in kinds}
    return {kind: share for kind, share in mixed.items() if share}
