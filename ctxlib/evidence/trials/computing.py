"""The results of a plan: scores, marks, the tuned model and its answers. Each is computed once and then read."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ctxlib import allocation, experiment, indicator, models, roles
from ctxlib.conversations import Corpus, Message, Question
from ctxlib.cures import Material, overrides
from ctxlib.evidence.trials.definition import Asking, Trial
from ctxlib.evidence.trials.plan import Plan
from ctxlib.files import digest, to_json, write
from ctxlib.finetune import export_merged, finetune
from ctxlib.miniature.domains import DOMAINS
from ctxlib.miniature.town import is_fact_sentence
from ctxlib.models import Subject
from ctxlib.params import InputError, Params
from ctxlib.scoring import at_layer, score_corpus

MEASURES = {
    "needle": ("recalled", "says_memory", "one_sentence"),
    "qa": ("containment", "one_sentence"),
    "facts": ("containment", "one_sentence"),
    "instructions": ("followed",),
    "code": ("recalled", "says_memory"),
    "arithmetic": ("recalled",),
}
LOOKED_AT = ("needle", *DOMAINS)  # families whose attention is recorded
MEASURED_COLUMNS = ["family", "kind", "id", "metric", "layer", "value"]


def answers(plan: Plan, asking: Asking, *, timeout: int | float = -1) -> pd.DataFrame:
    """Answers and attention of the trial's model: one row per question and metric, with MEASURED_COLUMNS.

    Metrics, in [0, 1]: those of MEASURES, by family (`one_sentence`: the whole answer is one sentence that states one
    thing about one person, and so it ended by itself); and `attention_to_user` and `attention_to_passage` of the
    families LOOKED_AT, by layer: shares of the first response token's attention, mean over heads, without the template
    (as in `allocation.renormalise`), for `allocation.prompts` questions of each, unless steered.

    Raises InputError for an indicator that the model does not have; filelock's Timeout if another process works on the
    same trial for longer than `timeout` seconds (-1: no limit).
    """
    if asking.indicator and not plan.trial.has_indicator:
        raise InputError("a trial without marks has no indicator to be asked with; give it marks")
    its, folder = plan.params, plan.folder
    questions = [replace(one, messages=_closed(one.messages, asking.closing)) for one in _questions(its, asking)]
    asked = {
        "measures": MEASURES,
        "questions": [[q.id, q.messages[-1].content, q.response_prefix, *q.answers] for q in questions],
        "asking": {name: how for name, how in asdict(asking).items() if name != "questions"},  # they are listed above
        "limits": [its.needle.max_new_tokens, its.qa.max_new_tokens, its.instructions.max_new_tokens],
        "batch_size": its.models.batch_size,
        "variants": [its.needle.variant, its.qa.variant, its.steering.variant],
        "allocation": its.allocation.model_dump(mode="json"),
    }
    file = folder / f"answers-{digest(asked)}.parquet"
    if not file.exists():
        with _locked(folder, timeout):
            if not file.exists():
                frame = _ask(its, tuned(plan), questions, asking)
                write(file, frame.to_parquet(index=False))
    return pd.read_parquet(file)


def tuned(plan: Plan, *, merged: bool = True) -> Subject:
    """The trial's model and its tokenizer, which has the indicator if there were marks; trained first if need be.

    Adapters are merged into their base, except over 4-bit weights, because they were trained on the rounded weights;
    and not if `merged` is False.
    """
    its, trained = plan.params, plan.trial.trained
    path = train(plan) if trained else _start(plan)
    quantisation = models.trained_over(path) or its.models.quantisation
    model = models.load_model(path, dtype=its.models.dtype, quantisation=quantisation, attention=its.models.attention)
    if isinstance(model, PeftModel) and merged and not quantisation:
        model = model.merge_and_unload()
    return Subject(plan.key, model, models.load_tokenizer(path) if trained else _tokenizer(plan), plan.key)


def train(plan: Plan) -> Path:
    """The folder of the trial's adapter (or whole model), fine-tuned first if need be; interrupted training resumes."""
    its, trial, folder = plan.params, plan.trial, plan.folder
    with _locked(folder):
        if not (folder / "model").exists():
            write(folder / "trial.json", to_json(plan.description))
            resumed, started = any(folder.glob("model.training-*")), time.process_time()
            finetune(
                _start(plan),
                _tokenizer(plan),
                marked(plan).conversations,
                its.finetune,
                out_dir=folder / "model",
                raw_texts=experiment.raw_texts(its),
                indicator=its.models.indicator if trial.marks else None,
                max_length=its.conversations.max_length,
                attention=its.models.attention,
                seed=its.seed,
                freeze_indicator=trial.freeze_indicator,
                turn_loss=trial.cure.turn_loss if trial.cure and overrides(trial.cure, "turn_loss") else None,
                progress=False,
            )
            if not resumed:  # else it would be the time of the last part alone
                write(folder / "cost.json", to_json({"cpu_seconds": round(time.process_time() - started, 1)}))
    return folder / "model"


def marked(plan: Plan) -> Corpus:
    """The conversations that the trial is trained on, with their marks, the trial's closing and its cure."""
    corpus = _with_marks(plan)
    if plan.trial.cure:
        corpus = plan.trial.cure.corpus(_material(plan, corpus))
    closed = (replace(one, messages=_closed(one.messages, plan.trial.closing)) for one in corpus.conversations)
    return replace(corpus, conversations=tuple(closed))


def scores(plan: Plan) -> pd.DataFrame:
    """Scores of the trial's turns at every layer, by its seed model: the columns of `score_corpus`."""
    its, folder = plan.params, plan.scores_folder
    file = folder / "scores.parquet"
    if not file.exists():
        with _locked(folder):
            if not file.exists():
                scorer, length = tuned(plan.scorer), its.conversations.max_length
                frame = score_corpus(
                    scorer.model, scorer.tokenizer, plan.corpus, its.scoring, max_length=length, progress=False
                )
                write(file, frame.to_parquet(index=False))
    return pd.read_parquet(file)


def _closed(messages: Sequence[Message], closing: str | None) -> tuple[Message, ...]:
    """The messages, the user's with another end."""
    if closing is None:
        return tuple(messages)
    return tuple(
        replace(one, content=one.content.rstrip(".?!") + closing) if one.role == "user" else one for one in messages
    )


def _with_marks(plan: Plan) -> Corpus:
    its, trial, corpus = plan.params, plan.trial, plan.corpus
    if trial.marks is None:
        return corpus
    if trial.marks == "oracle":
        return indicator.mark_oracle(corpus)
    found, layer, threshold = scores(plan), its.scoring.layer, its.scoring.threshold
    if trial.marked_share is not None:
        threshold = indicator.threshold_for_fraction(found, trial.marked_share, layer=layer)
    if trial.marks == "random":
        return indicator.mark_random(corpus, int((at_layer(found, layer).score > threshold).sum()), its.seed)
    return indicator.mark(corpus, found, threshold, layer=layer, variant=its.finetune.variant)


def _material(plan: Plan, corpus: Corpus) -> Material:
    scored = replace(plan, trial=replace(plan.trial, marks="score", cure=None))
    untrained = replace(plan, trial=Trial({"seed": plan.params.seed}, trained=False))
    return Material(corpus, lambda: _with_marks(scored), lambda: tuned(untrained))


def _ask(its: Params, subject: Subject, questions: Sequence[Question], asking: Asking) -> pd.DataFrame:
    scored = experiment.ask(
        its,
        subject,
        questions,
        condition="",
        template=asking.template,
        indicator=its.models.indicator if asking.indicator else None,
        steering_alpha=asking.steering_alpha,
        cached=False,
        progress=False,
    )
    scored["one_sentence"] = scored.answer.map(is_fact_sentence).astype(float)
    parts = [
        part.assign(metric=metric, layer=pd.NA, value=part[metric])
        for family, part in scored.groupby("family", sort=False)
        for metric in MEASURES[family]
    ]
    if asking.steering_alpha is None:
        for family in dict.fromkeys(question.family for question in questions if question.family in LOOKED_AT):
            asked = [question for question in questions if question.family == family]
            parts.append(_attention(its, subject, experiment.spread(asked, its.allocation.prompts), asking))
    frame = pd.concat([part[MEASURED_COLUMNS].astype({"layer": "Int64"}) for part in parts], ignore_index=True)
    return frame.dropna(subset="value").reset_index(drop=True)


def _attention(its: Params, subject: Subject, questions: Sequence[Question], asking: Asking) -> pd.DataFrame:
    maps = experiment.prompts(
        subject.tokenizer,
        questions,
        template=asking.template,
        first_response_token=its.allocation.first_response_token,
        indicator=its.models.indicator if asking.indicator else None,
    )
    frame = allocation.attention_allocation(
        subject.model,
        maps,
        groups=[roles.question_groups(one, question.messages) for one, question in zip(maps, questions, strict=True)],
        batch_size=its.models.batch_size,
        pad_token_id=subject.tokenizer.pad_token_id,
    )
    shares = allocation.mean_over_heads(allocation.renormalise(frame)).pivot(
        index=["example", "layer"], columns="role", values="attention_allocation"
    )
    by_metric = pd.DataFrame(
        {"attention_to_user": shares.passage + shares.question, "attention_to_passage": shares.passage}
    )
    rows = by_metric.melt(var_name="metric", ignore_index=False).reset_index()
    known = [(question.family, question.kind, question.id) for question in questions]
    return rows.merge(pd.DataFrame(known, columns=MEASURED_COLUMNS[:3]), left_on="example", right_index=True)


def _questions(its: Params, asking: Asking) -> list[Question]:
    if asking.questions == "domains":
        return experiment.domain_questions(its)
    return [
        *experiment.needles(its, experiment.tokenizer(its)),
        *experiment.passage_questions(its),
        *experiment.fact_questions(its),
        *experiment.instruction_questions(its),
    ]


def _start(plan: Plan) -> str | Path:
    """The whole model that the training starts from; the adapter of a trial before it is merged into its base."""
    base = plan.base
    if base is None:
        return experiment.model_path(plan.params, "pretrained")
    path = train(base) if base.trial.trained else _start(base)
    if not models.is_adapter(path):
        return path
    merged = path.with_name("merged")
    with _locked(path.parent):
        if not merged.exists():
            export_merged(path, merged)
    return merged


def _tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer that the training starts with."""
    return models.load_tokenizer(_start(plan)) if plan.base else experiment.tokenizer(plan.params)


def _locked(folder: Path, timeout: int | float = -1) -> AbstractContextManager:
    """One process at a time; the process that has the lock may take it again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_suffix(".lock"), is_singleton=True).acquire(timeout=timeout)
