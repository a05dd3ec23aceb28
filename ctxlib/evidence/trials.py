"""Trials: one fine-tuning of the miniature on one made corpus, and what the tuned model then answers and looks at.

A trial is a value. What comes of it lies in `work/trials/<key>`, under a hash of everything that can change it, and is
computed once: by whichever notebook, in whichever process asks first. Code is not in that hash but for `VERSION`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import transformers
from filelock import FileLock, Timeout
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxlib import allocation, experiment, indicator, models, roles
from ctxlib.conversations import Corpus, Message, Question
from ctxlib.files import digest, write
from ctxlib.finetune import export_merged, finetune
from ctxlib.metrics import summarise
from ctxlib.miniature.domains import DOMAINS
from ctxlib.miniature.town import is_fact_sentence
from ctxlib.params import InputError, Params
from ctxlib.results import to_json
from ctxlib.scoring import at_layer, corpus_hash, score_corpus

VERSION = 1  # raise it with a change of code after which a trial would come out otherwise
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
MEASURES = {
    "needle": ("recalled", "says_memory", "one_sentence"),
    "qa": ("containment", "one_sentence"),
    "facts": ("containment", "one_sentence"),
    "instructions": ("followed",),
    "code": ("recalled", "says_memory"),
    "arithmetic": ("recalled",),
}
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
LOOKED_AT = ("needle", *DOMAINS)  # families whose attention is recorded
COLUMNS = ["family", "kind", "id", "metric", "layer", "value"]
Marks = Literal["score", "oracle", "random"]


@dataclass(frozen=True)
class Trial:
    """A fine-tuning: what is changed of the experiment's parameters, and which turns are marked.

    changes: parameters in dotted form, such as `{"seed": 3, "finetune.steps": 600, "scoring.layer": 2}`. Without a
        seed it has that of the trial it belongs to, or of `run`.
    marks: none; by `score`, over `scoring.threshold` or, if given, the `marked_share` with the highest scores; the
        `oracle`'s, which are the truth; or at `random`, as many as the score would mark.
    seed_model: the trial whose model scores the turns; none: the model `models.seed_model`.
    base: the trial whose model is trained further; none: the model `models.pretrained`.
    trained: False for the base as it is.
    closing: what the user's texts end with in training instead of their own full stop, question or exclamation mark,
        such as "." or nothing; none: as they are. Turns are scored and marked before, on the texts as they are.
    freeze_indicator: whether the indicator's row stays at the mean of the embeddings, as in `finetune`.
    data_seed_offset: is added to the seed where conversations are drawn: other ones, asked the same, as for a second
        stage after `base`.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    marks: Marks | None = None
    marked_share: float | None = None
    seed_model: "Trial | None" = None
    base: "Trial | None" = None
    trained: bool = True
    closing: str | None = None
    freeze_indicator: bool = False
    data_seed_offset: int = 0

    @property
    def has_indicator(self) -> bool:
        return self.marks is not None or (self.base is not None and self.base.has_indicator)


@dataclass(frozen=True)
class Asking:
    """How a model is asked: in the chat template or in raw text, with the indicator behind the question, steered.

    closing: what questions end with instead of their own mark, as in `Trial`.
    questions: those of the `town`, which fine-tuning is about, or of the `domains` that no chat holds.
    """

    template: bool = True
    indicator: bool = False
    steering_alpha: float | None = None
    closing: str | None = None
    questions: Literal["town", "domains"] = "town"


VANILLA, PRETRAINED = Trial(), Trial(trained=False)
TEMPLATE, RAW, INDICATED = Asking(), Asking(template=False), Asking(indicator=True)


def open_evidence(params_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """`open_experiment` for the notebooks from 06 on; InputError unless the file has their section and the town."""
    params = experiment.open_experiment(params_file, overrides)
    if params.evidence is None:
        raise InputError(f"{params.file}: evidence: null; take params/evidence.yaml, or copy that section from there")
    if {params.conversations.source, params.needle.source} != {experiment.EMBEDDED}:
        raise InputError(f"{params.file}: trials need the truth: conversations.source and needle.source 'miniature'")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # a notebook loads hundreds of models
    return params


def run(
    params: Params,
    trials: Mapping[str, Trial],
    asked: Mapping[str, Asking],
    seeds: Sequence[int],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Every trial at every seed, asked in every way: condition, seed, metric, id, value; a row a question and metric.

    A condition is the trial's name and the asking's, as in "vanilla, template". Metrics go by their names in NAMES;
    recall also by the needles' kind, attention by layer and as the mean over all layers.

    The seed draws the conversations, the training's order and first weights, and the questions, so that trials of one
    seed are asked the same; a trial that names its own keeps it. A model without marks in its training has no indicator
    and is not asked with one. What another process is at work on is taken last.
    """
    jobs = [
        (f"{name}, {way}", seed, _at_seed(trial, seed), asking)
        for seed in seeds
        for name, trial in trials.items()
        for way, asking in asked.items()
        if trial.has_indicator or not asking.indicator
    ]
    found: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(jobs), desc="trials", disable=not progress) as bar:
        for timeout in (0, -1):
            for place, (condition, seed, trial, asking) in enumerate(jobs):
                if place in found:
                    continue
                try:
                    frame = answers(params, trial, asking, timeout=timeout)
                except Timeout:  # taken up again when all else is done
                    continue
                found[place] = _named(frame).assign(condition=condition, seed=seed)
                bar.update()
    table = pd.concat([found[place] for place in range(len(jobs))], ignore_index=True)
    return table[["condition", "seed", "metric", "id", "value"]]


def by_run(table: pd.DataFrame, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The answers of `run` in numbers: condition, seed, metric, value, ci_low, ci_high, n; a row a run and metric.

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


def _named(table: pd.DataFrame) -> pd.DataFrame:
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
    """The scores of every trial's turns at every seed, layer by layer, beside what is known about the turns.

    Columns: condition (the trial's name), seed, layer, conversation, turn, kind, depends_on_context (the truth), score.
    """
    parts = []
    for seed in seeds:
        for name, trial in trials.items():
            its = _at_seed(trial, seed)
            known = indicator.turn_table(_corpus(params, its)[0]).drop(columns="score")
            found = scores(params, its).merge(known, on=["conversation", "turn"])
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


def answers(params: Params, trial: Trial, asking: Asking, *, timeout: int | float = -1) -> pd.DataFrame:
    """What the trial's model answers and looks at: a row a question and metric, with the columns COLUMNS.

    Metrics, in [0, 1]: those of MEASURES, by family (`one_sentence`: the whole answer is one sentence that says one
    thing of one person, and so it ended by itself); and `attention_to_user` and `attention_to_passage` of the families
    LOOKED_AT, by layer: shares of the first response token's attention, mean over heads, the template's left out (as
    by `allocation.renormalise`), for `allocation.prompts` questions of each, where nothing is steered.

    Raises InputError for an indicator that the model has not; filelock's Timeout when another process is at work on
    the same trial for longer than `timeout` seconds (-1: as long as it takes).
    """
    if asking.indicator and not trial.has_indicator:
        raise InputError("a trial without marks has no indicator to be asked with; give it marks")
    its, folder = params.changed(trial.changes), _folder(params, _description(params, trial))
    questions = [replace(one, messages=_closed(one.messages, asking.closing)) for one in _questions(its, asking)]
    asked = {
        "measures": MEASURES,
        "questions": [[q.id, q.messages[-1].content, q.response_prefix, *q.answers] for q in questions],
        "asking": {name: how for name, how in asdict(asking).items() if name != "questions"},  # they stand above
        "limits": [its.needle.max_new_tokens, its.qa.max_new_tokens, its.instructions.max_new_tokens],
        "batch_size": its.models.batch_size,
        "variants": [its.needle.variant, its.qa.variant, its.steering.variant],
        "allocation": its.allocation.model_dump(mode="json"),
    }
    file = folder / f"answers-{digest(asked)}.parquet"
    if not file.exists():
        with _locked(folder, timeout):
            if not file.exists():
                frame = _ask(its, *tuned(params, trial), questions, asking)
                write(file, frame.to_parquet(index=False))
    return pd.read_parquet(file)


def tuned(params: Params, trial: Trial) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The trial's model and its tokenizer, which knows the indicator if there were marks; trained first if need be.

    Adapters are merged into their base, but for those over 4-bit weights, which were trained with what these round to.
    """
    its = params.changed(trial.changes)
    path = train(params, trial) if trial.trained else _base_path(params, trial)
    quantisation = models.trained_over(path) or its.models.quantisation
    model = models.load_model(path, dtype=its.models.dtype, quantisation=quantisation, attention=its.models.attention)
    if isinstance(model, PeftModel) and not quantisation:
        model = model.merge_and_unload()
    return model, models.load_tokenizer(path) if trial.trained else _tokenizer(params, trial)


def train(params: Params, trial: Trial) -> Path:
    """The folder of the trial's adapter (or whole model), fine-tuned first if need be; a killed training goes on."""
    its, description = params.changed(trial.changes), _description(params, trial)
    folder = _folder(params, description)
    with _locked(folder):
        if not (folder / "model").exists():
            write(folder / "trial.json", to_json(description))
            finetune(
                _base_path(params, trial),
                _tokenizer(params, trial),
                marked(params, trial).conversations,
                out_dir=folder / "model",
                indicator=its.models.indicator if trial.marks else None,
                max_length=its.conversations.max_length,
                attention=its.models.attention,
                seed=its.seed,
                freeze_indicator=trial.freeze_indicator,
                progress=False,
                **its.finetune.model_dump(),
            )
    return folder / "model"


def marked(params: Params, trial: Trial) -> Corpus:
    """The conversations that the trial is trained on, marked and closed as it says."""
    corpus = _with_marks(params, trial)
    closed = (replace(one, messages=_closed(one.messages, trial.closing)) for one in corpus.conversations)
    return replace(corpus, conversations=tuple(closed))


def _closed(messages: Sequence[Message], closing: str | None) -> tuple[Message, ...]:
    """The messages, the user's with another end."""
    if closing is None:
        return tuple(messages)
    return tuple(
        replace(one, content=one.content.rstrip(".?!") + closing) if one.role == "user" else one for one in messages
    )


def _with_marks(params: Params, trial: Trial) -> Corpus:
    its = params.changed(trial.changes)
    corpus, _ = _corpus(params, trial)
    if trial.marks is None:
        return corpus
    if trial.marks == "oracle":
        return indicator.mark_oracle(corpus)
    found, layer, threshold = scores(params, trial), its.scoring.layer, its.scoring.threshold
    if trial.marked_share is not None:
        threshold = indicator.threshold_for_fraction(found, trial.marked_share, layer=layer)
    if trial.marks == "random":
        return indicator.mark_random(corpus, int((at_layer(found, layer).score > threshold).sum()), its.seed)
    return indicator.mark(corpus, found, threshold, layer=layer, variant=its.finetune.variant)


def scores(params: Params, trial: Trial) -> pd.DataFrame:
    """Scores of the trial's turns at every layer, by its seed model: the columns of `score_corpus`."""
    its, scorer = params.changed(trial.changes), _scorer(params, trial)
    corpus, _ = _corpus(params, trial)
    folder = _folder(params, _scoring(params, trial))
    file = folder / "scores.parquet"
    if not file.exists():
        with _locked(folder):
            if not file.exists():
                frame = score_corpus(
                    *tuned(params, scorer),
                    corpus,
                    variant=its.scoring.variant,
                    head_reduction=its.scoring.head_reduction,
                    max_length=its.conversations.max_length,
                    token_budget=its.scoring.token_budget,
                    progress=False,
                )
                write(file, frame.to_parquet(index=False))
    return pd.read_parquet(file)


def _ask(
    its: Params,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    asking: Asking,
) -> pd.DataFrame:
    token = its.models.indicator if asking.indicator else None
    scored = experiment.ask(
        its,
        model,
        tokenizer,
        questions,
        condition="",
        model_key="",
        template=asking.template,
        indicator=token,
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
            parts.append(_attention(its, model, tokenizer, experiment.spread(asked, its.allocation.prompts), asking))
    frame = pd.concat([part[COLUMNS].astype({"layer": "Int64"}) for part in parts], ignore_index=True)
    return frame.dropna(subset="value").reset_index(drop=True)


def _attention(
    its: Params,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    asking: Asking,
) -> pd.DataFrame:
    maps = experiment.prompts(
        tokenizer,
        questions,
        template=asking.template,
        first_response_token=its.allocation.first_response_token,
        indicator=its.models.indicator if asking.indicator else None,
    )
    frame = allocation.attention_allocation(
        model,
        [roles.question_apart(rendered, question.messages) for rendered, question in zip(maps, questions, strict=True)],
        names=roles.PARTS,
        batch_size=its.models.batch_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    shares = allocation.mean_over_heads(allocation.renormalise(frame)).pivot(
        index=["example", "layer"], columns="role", values="attention_allocation"
    )
    by_metric = pd.DataFrame(
        {"attention_to_user": shares.passage + shares.question, "attention_to_passage": shares.passage}
    )
    rows = by_metric.melt(var_name="metric", ignore_index=False).reset_index()
    known = pd.DataFrame([(question.family, question.kind, question.id) for question in questions], columns=COLUMNS[:3])
    return rows.merge(known, left_on="example", right_index=True)


def _questions(its: Params, asking: Asking) -> list[Question]:
    if asking.questions == "domains":
        return experiment.domain_questions(its)
    return [
        *experiment.needles(its, experiment.tokenizer(its)),
        *experiment.passage_questions(its),
        *experiment.fact_questions(its),
        *experiment.instruction_questions(its),
    ]


def _at_seed(trial: Trial, seed: int) -> Trial:
    return replace(trial, changes={"seed": seed, **trial.changes})


def _scorer(params: Params, trial: Trial) -> Trial:
    """The trial whose model scores the turns."""
    if trial.seed_model is None:
        return Trial({"models.pretrained": params.models.seed_model}, trained=False)
    return _at_seed(trial.seed_model, params.changed(trial.changes).seed)


def _base(params: Params, trial: Trial) -> Trial | None:
    """The trial whose model is trained further."""
    return trial.base and _at_seed(trial.base, params.changed(trial.changes).seed)


def _base_path(params: Params, trial: Trial) -> str | Path:
    """The whole model that the trial begins with: an adapter of the trial before it is merged into its base."""
    base = _base(params, trial)
    if base is None:
        return experiment.model_path(params.changed(trial.changes), "pretrained")
    path = train(params, base) if base.trained else _base_path(params, base)
    if not models.is_adapter(path):
        return path
    merged = path.with_name("merged")
    with _locked(path.parent):
        if not merged.exists():
            export_merged(path, merged)
    return merged


def _tokenizer(params: Params, trial: Trial) -> PreTrainedTokenizerBase:
    """The tokenizer that the trial begins with."""
    if trial.base is None:
        return experiment.tokenizer(params.changed(trial.changes))
    return models.load_tokenizer(_base_path(params, trial))


_corpora: dict[str, tuple[Corpus, str]] = {}


def _corpus(params: Params, trial: Trial) -> tuple[Corpus, str]:
    """The conversations without marks, and the hash of their texts."""
    its = params.changed(trial.changes)
    its = its.changed({"seed": its.seed + trial.data_seed_offset})
    key = digest([its.conversations.model_dump(), its.miniature.model_dump(), its.seed])
    if key not in _corpora:
        corpus = experiment.conversations(its)
        _corpora[key] = corpus, corpus_hash(corpus)
    return _corpora[key]


def _description(params: Params, trial: Trial) -> dict[str, Any]:
    """Everything that can change the trial's model: values, and hashes of models, texts and scores."""
    its, base = params.changed(trial.changes), _base(params, trial)
    start = digest(_description(params, base)) if base else models.model_hash(experiment.model_path(its, "pretrained"))
    found = {"version": VERSION, "packages": {name: version(name) for name in PACKAGES}, "threads": its.threads}
    found |= {"base": start, "template": its.models.chat_template and its.path(its.models.chat_template).read_text()}
    found |= its.models.model_dump(include={"dtype", "quantisation", "attention"})
    if not trial.trained:
        return found
    found |= {"seed": its.seed, "conversations": _corpus(params, trial)[1]}
    found |= {"max_length": its.conversations.max_length}
    found |= {"finetune": its.finetune.model_dump(exclude={"save_every"}), "marks": trial.marks}
    if trial.marks:
        found |= {"indicator": its.models.indicator}
    if trial.closing is not None:
        found |= {"closing": trial.closing}
    if trial.freeze_indicator:
        found |= {"freeze_indicator": True}
    if trial.marks in ("score", "random"):
        picked = {"threshold": its.scoring.threshold} if trial.marked_share is None else {"share": trial.marked_share}
        found |= {"scores": digest(_scoring(params, trial)), "layer": its.scoring.layer, **picked}
    return found


def _scoring(params: Params, trial: Trial) -> dict[str, Any]:
    """Everything that can change the scores of the trial's turns."""
    its = params.changed(trial.changes)
    return {
        "seed_model": digest(_description(params, _scorer(params, trial))),
        "conversations": _corpus(params, trial)[1],
        "max_length": its.conversations.max_length,
        **its.scoring.model_dump(include={"variant", "head_reduction", "token_budget"}),
    }


def _folder(params: Params, description: Mapping[str, Any]) -> Path:
    return params.output_dir / "work" / "trials" / digest(description)


def _locked(folder: Path, timeout: int | float = -1) -> AbstractContextManager:
    """One process at a time; the one that has the lock may take it again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_suffix(".lock"), is_singleton=True).acquire(timeout=timeout)
