"""MT-Bench: both turns of every question, graded by any judge that speaks OpenAI's chat protocol.

    bench = load_mt_bench("mt_bench")
    answers = answer_turns(subject, bench, max_new_tokens=1024, …)
    ratings = judge_answers(answers, bench, Judge("gpt-4", repeats=3), "judgements.jsonl")
    summarise_ratings(ratings)

Questions, judge prompts and reference answers are read from a folder of the user's, in the format of FastChat's
`llm_judge` (Zheng et al. 2023, arXiv 2306.05685). Single-answer grading, 1 to 10. Variant `standard`: both turns, as
the benchmark is defined; `authors_code`: the first turn only (the paper's ratings are all multiples of 1/80, so one
judgement a question). Answers are greedy, where FastChat draws some categories at a temperature of 0.1 or 0.7.
"""

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ctxlib.commands.mt_bench.answers import ANSWER_COLUMNS, TURNS, answer_turns
from ctxlib.commands.mt_bench.judge import Judge, open_judge
from ctxlib.commands.mt_bench.judgements import (
    NO_RATING,
    RATING_COLUMNS,
    REFUSED,
    judge_answers,
    judge_prompt,
    parse_rating,
)
from ctxlib.commands.mt_bench.questions import WITH_REFERENCE, Bench, Task, load_mt_bench
from ctxlib.commands.mt_bench.ratings import question_ratings, spent, summarise_ratings
from ctxlib.commands.settings import Answering
from ctxlib.files import check_writable, file_digest, read_json_object, to_json, write
from ctxlib.miniature import model_source
from ctxlib.models import Subject, load_model, load_tokenizer, model_hash, require_chat_template
from ctxlib.params import InputError, Loading, expanded

__all__ = [
    "ANSWER_COLUMNS",
    "NO_RATING",
    "RATING_COLUMNS",
    "REFUSED",
    "TURNS",
    "WITH_REFERENCE",
    "Bench",
    "Judge",
    "Task",
    "answer_turns",
    "evaluate",
    "judge_answers",
    "judge_prompt",
    "load_mt_bench",
    "open_judge",
    "parse_rating",
    "question_ratings",
    "spent",
    "summarise_ratings",
]


def evaluate(
    model: str,
    bench: Bench,
    judge: Judge,
    out: str | Path,
    answering: Answering,
    loading: Loading,
    *,
    prices: tuple[int | float, int | float] | None = None,
) -> tuple[pd.DataFrame, dict[str, int | float]]:
    """MT-Bench of a model, into a folder: the summary, and what the judging took (`spent`).

    The folder will hold answers.jsonl, ratings.csv, summary.csv and, written last, mt_bench.json (settings, sha256 of
    the files, versions, counts); with `cache/` and judgements.jsonl an interrupted run resumes without repeating
    answers or judgements. The judge's server is contacted before the model is loaded.

    Raises InputError as `answer_turns`, `judge_answers` and `load_model` do, and for a folder with the ratings of
    another model.
    """
    out = expanded(out)
    check_writable(out)
    client = open_judge(judge)
    source = model_source(model)
    tokenizer = load_tokenizer(source, chat_template=loading.chat_template, revision=loading.revision)
    require_chat_template(tokenizer)
    key = model_hash(source, revision=loading.revision)
    _check_folder(out, key)
    loaded = load_model(
        source,
        dtype=loading.dtype,
        quantisation=loading.quantisation,
        attention=loading.attention,
        revision=loading.revision,
    )
    answers = answer_turns(
        Subject(model, loaded, tokenizer, key),
        bench,
        variant=answering.variant,
        indicator=answering.indicator,
        max_new_tokens=answering.max_new_tokens,
        batch_size=answering.batch_size,
        cache_dir=out / "cache",
    )
    ratings = judge_answers(answers, bench, judge, out / "judgements.jsonl", client=client)
    summary, taken = summarise_ratings(ratings), spent(ratings, prices)
    settings = {"model": model, "model_hash": key, **answering.model_dump(exclude={"batch_size"})}
    settings |= {**loading.model_dump(), "chat_template": tokenizer.chat_template, "judge": asdict(judge)}
    manifest = {
        "settings": settings,
        "corrected_references": list(bench.corrected),
        "files": {str(file): file_digest(file) for file in bench.files},
        "asked": ratings.attrs["asked"],
        "spent": {name: None if math.isnan(value) else value for name, value in taken.items()},
        "versions": {name: version(name) for name in ("ctxlib", "torch", "transformers", "openai")}
        | {"python": platform.python_version()},
    }
    write(out / "answers.jsonl", answers.to_json(orient="records", lines=True, force_ascii=False))
    write(out / "ratings.csv", ratings.to_csv(index=False, lineterminator="\n"))
    write(out / "summary.csv", summary.to_csv(index=False, lineterminator="\n"))
    write(out / "mt_bench.json", to_json(manifest))
    return summary, taken


def _check_folder(out: Path, model_key: str) -> None:
    manifest = out / "mt_bench.json"
    if not manifest.is_file():
        return
    settings = read_json_object(manifest, "delete it, or choose another folder").get("settings", {})
    if settings.get("model_hash") != model_key:
        whose = f"{settings.get('model')} (hash {settings.get('model_hash')}, not {model_key})"
        raise InputError(f"{out}: holds the ratings of another model, {whose}; choose another folder")
