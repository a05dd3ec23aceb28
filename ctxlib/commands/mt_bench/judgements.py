"""The prompts and replies of the judge: one judgement at a time, each stored as it comes."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ctxlib.commands.mt_bench.judge import Judge, open_judge, stopped
from ctxlib.commands.mt_bench.questions import PROMPT_NAMES, Bench, Task
from ctxlib.files import JsonLines
from ctxlib.params import InputError

RATING_COLUMNS = (
    *("question", "category", "turn", "repeat", "rating", "problem"),
    *("attempts", "prompt_tokens", "completion_tokens"),
)
NO_RATING, REFUSED = "no rating", "refused"


def judge_prompt(bench: Bench, task: Task, answers: Sequence[str]) -> list[dict[str, str]]:
    """The prompt about the last of `answers` (one or two turns), as messages of the chat protocol.

    All names in braces are filled in at once, so that an answer that contains such a name stays unchanged. Raises
    InputError for a name that single-answer grading does not have.
    """
    name = PROMPT_NAMES[len(answers), task.reference is not None]
    values = {"question": task.turns[0], "answer": answers[-1]}
    values |= {f"question_{i}": text for i, text in enumerate(task.turns, start=1)}
    values |= {f"answer_{i}": text for i, text in enumerate(answers, start=1)}
    values |= {f"ref_answer_{i}": text for i, text in enumerate(task.reference or (), start=1)}
    system, template = bench.prompts[name]
    if unknown := set(re.findall(r"\{(\w+)\}", template)) - set(values):
        raise InputError(f"judge prompt '{name}': unknown name {{{min(unknown)}}}; known are {', '.join(values)}")
    filled = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], template)
    return [{"role": "system", "content": system}, {"role": "user", "content": filled}]


def parse_rating(text: str) -> float:
    """The number from 1 to 10 in double brackets, `[[7]]`; NaN if there is none, or two that differ.

    Drafts before a `</think>` do not count. FastChat takes the first of several, and a number in single brackets if
    there is none in double ones.
    """
    final = text.rpartition("</think>")[2]
    found = {float(number) for number in re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", final)}
    rating = found.pop() if len(found) == 1 else math.nan
    return rating if 1 <= rating <= 10 else math.nan


def judge_answers(
    answers: pd.DataFrame,
    bench: Bench,
    judge: Judge,
    path: str | Path,
    *,
    client: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Ratings of answers (question, turn, answer): RATING_COLUMNS, one row per judgement, in the order of `answers`.

    A judgement without a rating is requested once more; if it has none again, `rating` is NaN and `problem` is "no
    rating". If the server refuses one (for instance, an answer too long for the judge), `rating` is NaN, too, and
    `problem` has the reason. Tokens are those of all attempts, NaN if the server does not report them.

    Every judgement is appended to the JSONL file `path` as it comes, under a hash of prompt, judge and repeat, so that
    an interrupted run requests only the missing ones; refused ones are requested again, and also those on a damaged
    line of the file, with a warning.

    The frame's `attrs["asked"]` lists the parameters with which the judgements were requested (see `_Asking`).

    Raises InputError for answers to unknown questions or without their first turn, if no judgement was given at all or
    none has a rating, for a full disk, and as `open_judge` does (which returns the `client`) if the server fails
    permanently.
    """
    asked = _judgements(answers, bench, judge)
    kept = _Judgements(Path(path))
    todo = {key: messages for key, (_, messages) in asked.items() if key not in kept.known}
    refused: dict[str, str] = {}
    if todo:
        client = client or open_judge(judge)
        asking, pool = _Asking(client, judge), ThreadPoolExecutor(judge.workers)
        try:
            futures = {pool.submit(_judge_once, asking, kept, key, todo[key]): key for key in todo}
            bar = tqdm(
                as_completed(futures), "judgements", len(asked), initial=len(asked) - len(todo), disable=not progress
            )
            for future in bar:
                if reason := future.result():
                    refused[futures[future]] = reason
        finally:
            pool.shutdown(cancel_futures=True)  # those under way are paid for: they are awaited and kept
    if asked and len(refused) == len(asked):
        raise InputError(f"judge '{judge.model}' at {judge.base_url} refused every judgement: {min(refused.values())}")
    rows = []
    for key, (place, _) in asked.items():
        if key in refused:
            rows.append((*place, math.nan, f"{REFUSED}: {refused[key]}", 1, 0, 0))
        else:
            rows.append((*place, *kept.row(key)))
    ratings = pd.DataFrame(rows, columns=list(RATING_COLUMNS)).astype(
        {"rating": float, "prompt_tokens": float, "completion_tokens": float}
    )
    if len(ratings) and ratings["rating"].isna().all():
        raise InputError(
            f"judge '{judge.model}' at {judge.base_url}: no rating such as [[7]] in any of {len(ratings):,} "
            f"judgements, see {path}; take another judge, or raise max_tokens (--max-tokens)"
        )
    ratings.attrs["asked"] = kept.asked(asked)
    return ratings


def _judgements(
    answers: pd.DataFrame, bench: Bench, judge: Judge
) -> dict[str, tuple[tuple[str, str, int, int], list[dict[str, str]]]]:
    """By key: (question, category, turn, repeat), and the messages."""
    tasks = {task.id: task for task in bench.tasks}
    said = {(row.question, row.turn): row.answer for row in answers.itertuples()}
    if len(said) < len(answers):
        raise InputError("answers: a question and turn occurs more than once; pass the answers of one model")
    decides = {"model": judge.model, "base_url": judge.base_url}
    decides |= {"temperature": judge.temperature and float(judge.temperature), "max_tokens": judge.max_tokens}
    asked = {}
    for question, turn in said:
        if question not in tasks:
            raise InputError(f"answers: question '{question}' is not in the benchmark; pass the one that was answered")
        if missing := [t for t in range(1, turn) if (question, t) not in said]:
            raise InputError(f"answers: question '{question}' has no answer of turn {missing[0]}; pass all turns")
        task = tasks[question]
        messages = judge_prompt(bench, task, [said[question, t] for t in range(1, turn + 1)])
        for repeat in range(1, judge.repeats + 1):
            what = decides | {"question": question, "messages": messages, "repeat": repeat}
            canonical = json.dumps(what, sort_keys=True, ensure_ascii=False)
            key = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:24]
            asked[key] = (question, task.category, int(turn), repeat), messages
    return asked


class _Asking:
    """The parameters of a request, as this judge's server takes them; several threads ask at once.

    Newer hosted models take `max_completion_tokens` instead of `max_tokens`, or only their own temperature. A parameter
    that a refusal names is sent under its other name, or left out, once; once accepted, all others are sent so.
    """

    def __init__(self, client: Any, judge: Judge) -> None:
        self.client, self.judge = client, judge
        asked = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
        self.accepted = {name: value for name, value in asked.items() if value is not None}

    def complete(self, messages: list[dict[str, str]]) -> tuple[Any, dict[str, int | float]]:
        """A completion and the parameters that it was requested with; raises the errors of `openai`."""
        import openai

        asked = dict(self.accepted)
        for _ in range(3):  # as given, then without what the first and the second refusal name
            try:
                completion = self.client.chat.completions.create(model=self.judge.model, messages=messages, **asked)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if (other := _respelled(asked, str(error))) is None:
                    raise
                asked = other
            else:
                self.accepted = asked
                return completion, asked
        return self.client.chat.completions.create(model=self.judge.model, messages=messages, **asked), asked


def _respelled(asked: dict[str, int | float], refusal: str) -> dict[str, int | float] | None:
    """Other parameters to try after a refusal that names one of them."""
    if "temperature" in asked and "temperature" in refusal:
        return {name: value for name, value in asked.items() if name != "temperature"}
    if "max_tokens" in asked and "max_tokens" in refusal:
        return {"max_completion_tokens" if name == "max_tokens" else name: value for name, value in asked.items()}
    return None


def _judge_once(asking: _Asking, kept: "_Judgements", key: str, messages: list[dict[str, str]]) -> str | None:
    """Requests one judgement and stores it; returns the reason if the server refuses it."""
    import openai

    texts, spent, asked = [], np.zeros(2), {}
    while len(texts) < 2 and (not texts or math.isnan(parse_rating(texts[-1]))):
        try:
            completion, asked = asking.complete(messages)
            texts.append(_text(completion.choices[0].message.content))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if texts:
                break
            return " ".join(str(error).split())[:300]
        except openai.OpenAIError as error:
            raise stopped(asking.judge, error) from None
        except (ValueError, AttributeError, IndexError, TypeError):
            raise stopped(asking.judge, ValueError("the reply is no chat completion")) from None
        spent += [_count(completion.usage, name) for name in ("prompt_tokens", "completion_tokens")]
    kept.add(key, texts, *spent.tolist(), asked=asked)
    return None


def _text(content: Any) -> str:
    """The text of a reply, which may be a list of parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else vars(part) for part in content]
        return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if not isinstance(content, str | None):
        raise TypeError("content is no text")
    return content or ""


def _count(usage: Any, name: str) -> float:
    """A number of tokens; NaN if the server did not report it."""
    value = getattr(usage, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


class _Judgements:
    """One JSONL file, one line per judgement, each appended as it comes."""

    def __init__(self, path: Path) -> None:
        self.lock = Lock()
        self.lines = JsonLines(path, check=lambda judgement: (judgement["key"], self._row(judgement)))
        self.known = {judgement["key"]: judgement for judgement in self.lines.rows}

    def row(self, key: str) -> tuple[float, str, int, float, float]:
        """rating, problem, attempts, prompt_tokens, completion_tokens."""
        return self._row(self.known[key])

    @staticmethod
    def _row(judgement: dict[str, Any]) -> tuple[float, str, int, float, float]:
        rating = parse_rating(judgement["texts"][-1])
        tokens = (judgement[name] for name in ("prompt_tokens", "completion_tokens"))
        problem = NO_RATING if math.isnan(rating) else ""
        return rating, problem, len(judgement["texts"]), *(math.nan if n is None else float(n) for n in tokens)

    def asked(self, keys: Iterable[str]) -> list[dict[str, int | float]]:
        """The different parameters with which these judgements were requested, as far as they are recorded."""
        found = {json.dumps(self.known[key].get("asked"), sort_keys=True) for key in keys if key in self.known}
        return [json.loads(one) for one in sorted(found - {"null"})]

    def add(self, key: str, texts: list[str], *tokens: float, asked: dict[str, int | float]) -> None:
        counts = [None if math.isnan(n) else int(n) for n in tokens]
        judgement = {"key": key, "texts": texts, "prompt_tokens": counts[0], "completion_tokens": counts[1]}
        judgement |= {"asked": asked}
        with self.lock:
            self.known[key] = judgement
            self.lines.append(judgement)
