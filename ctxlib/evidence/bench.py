"""The bench: every cure at every seed, on questions whose truth is known, with its price.

Trainings are trials, computed once (`evidence.trials`); so are the answers of a cure, under a hash of its settings, of
the code of its `answer` and of the questions.
"""

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from ctxlib import cures, experiment, metrics
from ctxlib.conversations import Question
from ctxlib.cures import Cure, key
from ctxlib.evidence.trials import VANILLA, Plan, Trial, tuned
from ctxlib.files import digest, write
from ctxlib.generate import Around
from ctxlib.miniature import texts
from ctxlib.miniature.town import is_fact_sentence
from ctxlib.models import Subject
from ctxlib.params import InputError, Params

VERSION = 1  # raise it with a change of code after which an answer would come out otherwise
KINDS = ("gold", "contradicting", "irrelevant", "no_passage", "long_haystack", "instructions")
MEASURES = {
    "recall": "recalled",
    "from memory": "says_memory",
    "instructions": "followed",
    "format": "one_sentence",
    "tokens": "tokens",
    "seconds": "seconds",
}
UNITS = {"tokens": metrics.UNBOUNDED, "seconds": metrics.UNBOUNDED, "training seconds": metrics.UNBOUNDED}
READING = (("contradicting", "recall"), ("long_haystack", "recall"))  # what a cure is for
PRICE = (("no_passage", "recall"), ("irrelevant", "recall"), ("instructions", "instructions"))  # what it may cost
NONE = Cure()


def standard(params: Params) -> tuple[list[Cure], list[Cure]]:
    """The cures of notebook 15: those whose model notebook 07 has, and those with a training of their own."""
    threshold, strongest = params.scoring.threshold, min(params.steering.alphas)
    of_07 = [
        NONE,
        cures.SystemPrompt("Tell me the words that this says."),  # words that the miniature knows
        cures.QuoteFirst(),
        cures.Steering(strongest),
        cures.TargetShare(),
        cures.ContextAwareDecoding(),
        cures.WiseFT(),
        cures.Indicator("score", name="[IND], scored marks"),
    ]
    trained = [
        cures.Indicator("oracle", name="[IND], true marks"),
        cures.Indicator("random", name="[IND], random marks"),
        cures.Rehearsal(),
        cures.DropContradicting(),
        cures.WeightByScore(threshold),
        cures.KeepToBase(threshold),
        cures.SelfDistilled(),
    ]
    return of_07, trained


def load_cure(place: str) -> Cure:
    """The cure `Name` of the Python file in "path.py:Name"; the file is run, so it must be one that you trust.

    Raises InputError if there is no such file or no such class without required settings.
    """
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise InputError(f"cure {place!r}: no such file; give path.py:Name")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, Cure) or (isinstance(found, type) and issubclass(found, Cure))):
        raise InputError(f"cure {place!r}: {file} has no subclass of ctxlib.cures.Cure named {name!r}; check the name")
    try:
        return found if isinstance(found, Cure) else found()
    except TypeError as error:
        raise InputError(f"cure {place!r}: {error}; give every setting a default") from None


def trial(cure: Cure, seed: int) -> Trial:
    """The fine-tuning run that a cure needs; cures that train alike share it. The vanilla model scores its turns."""
    return Trial(cure.changes, marks=cure.marks, seed_model=VANILLA, cure=cure).at_seed(seed)


def questions(params: Params) -> dict[str, list[Question]]:
    """By kind: known facts under four contexts, contradicting needles in long haystacks, instructions."""
    town, section = experiment.town(params), params.cures
    asked = {kind: [] for kind in KINDS}
    for question in texts.context_questions(town, section.contexts, params.seed):
        asked[question.kind].append(question)
    asked["long_haystack"] = texts.needles(
        town, [section.long_tokens], params.needle.depths, params.needle.per_cell, params.seed, ["contradicting"]
    )
    asked["instructions"] = experiment.instruction_questions(params)
    return asked


def run(params: Params, chosen: Sequence[Cure], seeds: Sequence[int], *, progress: bool = True) -> pd.DataFrame:
    """Every cure at every seed: one row per question and metric, with cure, seed, kind, metric, id, value.

    Metrics are MEASURES. `recall`: the answer has what the passage says, or without a relevant passage what the model
    knows by heart; `from memory`: it has what memory says; `format`: it is one sentence that states one thing;
    `tokens`: read and written by the model for a question, all prompts, steps and padding; `seconds`: of the processor,
    for a question. The training's processor time, `training seconds`, has an empty kind and id, and is missing if the
    training was interrupted or done elsewhere.

    Raises InputError for two cures of one name, and for an `answer` that leaves out questions.
    """
    names = [cure.name for cure in chosen]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"cures: {min(repeated)!r} names two of them; give each its own name")
    jobs = [(cure, seed) for seed in seeds for cure in chosen]
    bar = tqdm(jobs, desc="cures", disable=not progress)
    return pd.concat([_of_cure(params, cure, seed) for cure, seed in bar], ignore_index=True)


def by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over questions: cure, seed, kind, metric, value; and `reading` and `price paid`, of the kind "all".

    `reading`: mean recall over READING. `price paid`: what the mean over PRICE is lower than without a cure, in the
    same seed; negative if it is higher.
    """
    means = rows.groupby(["cure", "seed", "kind", "metric"], sort=False, as_index=False)["value"].mean()
    wide = means.pivot(index=["cure", "seed"], columns=["kind", "metric"], values="value")
    kept = wide[list(PRICE)].mean(axis=1)
    reference = kept.xs(NONE.name, level="cure").reindex(kept.index.get_level_values("seed")).to_numpy()
    whole = pd.DataFrame({"reading": wide[list(READING)].mean(axis=1), "price paid": reference - kept})
    whole = whole.melt(ignore_index=False, var_name="metric").reset_index().assign(kind="all")
    return pd.concat([means, whole[means.columns]], ignore_index=True)


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Each cure beside no cure: kind, metric, cure, value (mean over seeds), change, ci_low, ci_high, p_value, holm, n.

    runs: of `by_seed`. The change is paired by seed, its interval and test are `over_seeds`' of the differences; `holm`
    is the p value adjusted over all cures of the kind and metric. With fewer than five seeds there is no interval.
    """
    paired = runs.merge(
        runs[runs.cure == NONE.name].drop(columns="cure"), on=["seed", "kind", "metric"], suffixes=("", "_none")
    )
    paired = paired.assign(value=paired.value - paired.value_none, level=paired.value)
    within = {metric: UNITS.get(metric, metrics.CHANGE) for metric in paired.metric.unique()}
    by = ["kind", "metric", "cure"]
    levels = paired.groupby(by, sort=False)["level"].mean()
    table = metrics.over_seeds(paired, by, within=within).rename(columns={"value": "change"})
    table.loc[table.n < metrics.FEWEST_SEEDS, "p_value"] = float("nan")
    groups = table[table.cure != NONE.name].groupby(["kind", "metric"], sort=False)["p_value"]
    table["holm"] = groups.transform(metrics.holm)
    table.insert(3, "value", levels.reindex(pd.MultiIndex.from_frame(table[by])).to_numpy())
    return table


def _of_cure(params: Params, cure: Cure, seed: int) -> pd.DataFrame:
    plan = Plan(params, trial(cure, seed))
    its, asked = plan.params, questions(plan.params)
    known = {
        "version": VERSION,
        "cure": key(cure, "answer"),
        "questions": [[q.id, [m.content for m in q.messages], *q.answers] for kind in asked.values() for q in kind],
        "limits": [its.needle.max_new_tokens, its.qa.max_new_tokens, its.instructions.max_new_tokens],
        "batch_size": its.models.batch_size,
    }
    file = plan.folder / f"cure-{digest(known)}.parquet"
    if not file.exists():
        subject = tuned(plan, merged=not cure.over_adapter)
        found = pd.concat([_answers(its, cure, subject, kind, of_kind) for kind, of_kind in asked.items()])
        write(file, found.to_parquet(index=False))
    rows = pd.read_parquet(file)
    if (cost := plan.cost()) is not None:
        more = {"kind": "", "metric": "training seconds", "id": "", "value": cost}
        rows = pd.concat([rows, pd.DataFrame([more])])
    return rows.assign(cure=cure.name, seed=seed)[["cure", "seed", "kind", "metric", "id", "value"]]


def _answers(params: Params, cure: Cure, subject: Subject, kind: str, asked: list[Question]) -> pd.DataFrame:
    def ask(
        subject: Subject,
        questions: Sequence[Question],
        *,
        indicator: bool = False,
        steering_alpha: float | None = None,
        around: Around | None = None,
    ) -> pd.DataFrame:
        how: dict[str, Any] = {"steering_alpha": steering_alpha, "around": around}
        how["indicator"] = params.models.indicator if indicator else None
        return experiment.ask(
            params, subject, questions, condition="", template=True, cached=False, progress=False, **how
        )

    started = time.process_time()
    with _tokens_counted(subject.model) as counted:
        told = cure.answer(subject, asked, ask)
    seconds = time.process_time() - started
    if list(told["id"]) != [question.id for question in asked]:
        raise InputError(f"cure {cure.name!r}: its answer gave other questions than it was asked; keep their order")
    told = told.assign(one_sentence=told.answer.map(is_fact_sentence).astype(float))
    told = told.assign(tokens=counted["tokens"] / len(asked), seconds=seconds / len(asked))
    measures = {metric: column for metric, column in MEASURES.items() if told[column].notna().any()}
    if kind == "instructions":
        measures.pop("format", None)
    if kind not in ("contradicting", "long_haystack"):
        measures.pop("from memory", None)
    parts = [told[["id"]].assign(kind=kind, metric=name, value=told[column]) for name, column in measures.items()]
    return pd.concat(parts).dropna(subset="value")


@contextmanager
def _tokens_counted(model: torch.nn.Module) -> Iterator[Mapping[str, int]]:
    """`tokens`: how many the decoder is given in the block, padding included."""
    counted = {"tokens": 0}

    def count(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        counted["tokens"] += 0 if ids is None else ids.numel()

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()
