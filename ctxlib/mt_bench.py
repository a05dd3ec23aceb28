"""MT-Bench: both turns of every question, graded by any judge that speaks OpenAI's chat protocol.

    bench = load_mt_bench("mt_bench")
    answers = answer_turns(model, tokenizer, bench, max_new_tokens=1024, …)
    ratings = judge_answers(answers, bench, Judge("gpt-4", repeats=3), "judgements.jsonl")
    summarise_ratings(ratings)

Questions, judge prompts and reference answers are read from a folder of the user's, in the format of FastChat's
`llm_judge` (Zheng et al. 2023, arXiv 2306.05685). Single-answer grading, 1 to 10. Reading `clean`: both turns, as the
benchmark is defined; `paper`: the first turn only (the paper's ratings are all multiples of 1/80, so one judgement a
question). Answers are greedy, where FastChat draws some categories at a temperature of 0.1 or 0.7.
"""

import hashlib
import ipaddress
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ctxlib.conversations import Message, Question
from ctxlib.generate import answer_questions, question_prompt
from ctxlib.metrics import bootstrap_interval
from ctxlib.miniature import model_source
from ctxlib.models import load_model, load_tokenizer, model_hash, require_chat_template
from ctxlib.params import InputError, Reading
from ctxlib.results import file_digest, to_json, write

TURNS = {"clean": (1, 2), "paper": (1,)}
WITH_REFERENCE = ("math", "reasoning", "coding")  # graded against a reference answer, as in FastChat
ANSWER_COLUMNS = ("question", "category", "turn", "prompt", "answer", "answer_tokens")
RATING_COLUMNS = (
    *("question", "category", "turn", "repeat", "rating", "problem"),
    *("attempts", "prompt_tokens", "completion_tokens"),
)
NO_RATING, REFUSED = "no rating", "refused"
_PROMPT_NAMES = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}


@dataclass(frozen=True)
class Task:
    """A question of two turns; `reference` holds the right answers to both where the judge is to see them."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None = None


@dataclass(frozen=True)
class Bench:
    """`prompts`: (system prompt, template) by FastChat's names. `corrected`: ids whose reference was replaced."""

    tasks: tuple[Task, ...]
    prompts: Mapping[str, tuple[str, str]]
    corrected: tuple[str, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Judge:
    """Who grades, and how.

    base_url: of OpenAI, or of a server of your own ("http://localhost:8000/v1"). The key is read from the environment
    variable `api_key_variable`; a server on this machine or in a private network needs none.
    temperature, max_tokens: of a judgement; None leaves them to the server (some models take no others).
    repeats: judgements an answer. workers: how many are asked for at a time.
    timeout: seconds that a request may take. max_retries: after a time-out, a lost connection, or a busy or failing
    server, with the client's growing pauses.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: int | float | None = 0.0
    max_tokens: int | None = 2048
    repeats: int = 1
    workers: int = 4
    timeout: int | float = 300.0
    max_retries: int = 5


def load_mt_bench(
    folder: str | Path,
    *,
    judge_prompts: str | Path | None = None,
    corrected_references: str | Path | None = None,
    limit: int | None = None,
) -> Bench:
    """Questions, judge prompts and reference answers of a folder in FastChat's format.

    `question.jsonl` (question_id, category, turns); `judge_prompts.jsonl` there or in the folder above, unless
    `judge_prompts` names it (name, system_prompt, prompt_template); `reference_answer/gpt-4.jsonl` or
    `reference_answer_gpt-4.jsonl` (question_id, choices[0].turns), as shipped. A file of the last format as
    `corrected_references` replaces the references of the questions that it names. `limit`: only so many questions,
    evenly spread.

    Raises InputError, naming file, line and key, for a missing or malformed file, a repeated question, a reference
    that is missing, and a corrected one that belongs to no question.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1, got {limit}")
    folder = Path(folder).expanduser()
    questions = _found("mt-bench folder", [folder / "question.jsonl"])
    prompts_file = _found(
        "judge prompts",
        [Path(judge_prompts)]
        if judge_prompts
        else [folder / "judge_prompts.jsonl", folder.parent / "judge_prompts.jsonl"],
    )
    shipped = _found(
        "reference answers", [folder / "reference_answer" / "gpt-4.jsonl", folder / "reference_answer_gpt-4.jsonl"]
    )
    tasks: dict[str, Task] = {}
    for place, row in _rows(questions):
        key, turns = str(_get(row, place, "question_id")), _texts(_get(row, place, "turns"), f"{place}, turns")
        if key in tasks:
            raise InputError(f"{place}, question_id: {key} is there more than once; give each question its own")
        tasks[key] = Task(key, str(_get(row, place, "category")), turns)
    references = _references(shipped)
    corrected = _references(Path(corrected_references)) if corrected_references else {}
    if unknown := [key for key in corrected if key not in tasks]:
        raise InputError(f"{corrected_references}: question_id {unknown[0]} is no question of {questions}; remove it")
    references |= corrected
    for key, task in tasks.items():
        if task.category in WITH_REFERENCE:
            if key not in references:
                raise InputError(f"{shipped}: no reference answer to question {key} ({task.category}); add a line")
            tasks[key] = replace(task, reference=references[key])
    prompts = {}
    for place, row in _rows(prompts_file):
        texts = tuple(_get(row, place, key) for key in ("name", "system_prompt", "prompt_template"))
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{place}: name, system_prompt and prompt_template are to be texts")
        prompts[texts[0]] = texts[1:]
    if missing := [name for name in _PROMPT_NAMES.values() if name not in prompts]:
        raise InputError(f"{prompts_file}: holds no prompt named '{missing[0]}'; take FastChat's judge_prompts.jsonl")
    chosen = list(tasks.values())
    if limit is not None and limit < len(chosen):
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    files = (questions, prompts_file, shipped, *([Path(corrected_references)] if corrected_references else []))
    return Bench(tuple(chosen), prompts, tuple(corrected), files)


def _found(what: str, places: Sequence[Path]) -> Path:
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"{what}: no file {' or '.join(map(str, places))}; take FastChat's data, or correct the path")


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; correct the path")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: malformed JSON ({error}); repair the line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object with keys; repair the line")
        rows.append((f"{path}, line {number}", row))
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _get(row: Mapping[str, Any], place: str, key: str) -> Any:
    if key not in row:
        raise InputError(f"{place}: no key '{key}'; the file is to be in FastChat's format")
    return row[key]


def _texts(turns: Any, place: str) -> tuple[str, str]:
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(t, str) and t.strip() for t in turns)):
        raise InputError(f"{place}: expected a list of two texts, one a turn")
    return tuple(turns)


def _references(path: Path) -> dict[str, tuple[str, str]]:
    references = {}
    for place, row in _rows(path):
        choices = _get(row, place, "choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise InputError(f"{place}, choices: expected a list with an object in it")
        turns = _texts(_get(choices[0], f"{place}, choices", "turns"), f"{place}, choices, turns")
        references[str(_get(row, place, "question_id"))] = turns
    return references


def answer_turns(
    model: Any,
    tokenizer: Any,
    bench: Bench,
    *,
    max_new_tokens: int,
    reading: Reading = "clean",
    indicator: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Greedy answers with the chat template: ANSWER_COLUMNS, a row a question and turn.

    The second turn is asked after the model's own first answer. With an `indicator` every user message carries it, the
    first one also when it is read again. `options` go to `answer_questions` (batch_size, model_key, cache_dir, …),
    which batches, caches and resumes.

    Raises InputError, before anything is answered, where two turns of `max_new_tokens` may not fit into the window.
    """
    _check_window(model, tokenizer, bench, max_new_tokens, reading, indicator)
    said: dict[str, list[str]] = {task.id: [] for task in bench.tasks}
    parts = []
    for turn in TURNS[reading]:
        questions = [_question(task, said[task.id], indicator) for task in bench.tasks]
        frame = answer_questions(
            model,
            tokenizer,
            questions,
            template=True,
            indicator=indicator,
            use_prefix=False,
            max_new_tokens=max_new_tokens,
            **options,
        )
        for task, answer in zip(bench.tasks, frame["answer"], strict=True):
            said[task.id].append(answer)
        parts.append(frame.assign(question=[task.id for task in bench.tasks], category=frame["kind"], turn=turn))
    return pd.concat(parts, ignore_index=True)[list(ANSWER_COLUMNS)]


def _question(task: Task, said: Sequence[str], indicator: str | None) -> Question:
    messages = [Message("user", task.turns[0], indicated=indicator is not None)]
    for answer, next_turn in zip(said, task.turns[1:], strict=True) if said else ():
        messages += [Message("assistant", answer), Message("user", next_turn, indicated=indicator is not None)]
    return Question(f"mt-bench-{task.id}-{len(said) + 1}", "mt_bench", task.category, tuple(messages))


def _check_window(
    model: Any, tokenizer: Any, bench: Bench, max_new_tokens: int, reading: Reading, indicator: str | None
) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    turns = len(TURNS[reading])
    last = [_question(task, ["."] * (turns - 1), indicator) for task in bench.tasks]
    lengths = [len(question_prompt(tokenizer, question, True, indicator, False)) for question in last]
    longest = int(np.argmax(lengths))
    if window and lengths[longest] + turns * max_new_tokens > window:
        most = (window - lengths[longest]) // turns
        remedy = f"lower max_new_tokens to {most}" if most > 0 else "take a model with a longer window"
        raise InputError(
            f"question {bench.tasks[longest].id}: {lengths[longest]} tokens and {turns} × {max_new_tokens} new ones "
            f"may not fit into the model's window of {window}; {remedy}"
        )


def judge_prompt(bench: Bench, task: Task, answers: Sequence[str]) -> list[dict[str, str]]:
    """What the judge reads about the last of `answers` (one or two turns), as messages of the chat protocol.

    The names in braces are filled in at one go, so that an answer that spells one stays as it is. Raises InputError for
    a name that single-answer grading does not have.
    """
    name = _PROMPT_NAMES[len(answers), task.reference is not None]
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
    """The number from 1 to 10 in double brackets, `[[7]]`; NaN where there is none, or two that differ.

    FastChat takes the first of several, and a number in single brackets where there is none in double ones.
    """
    found = {float(number) for number in re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", text)}
    rating = found.pop() if len(found) == 1 else math.nan
    return rating if 1 <= rating <= 10 else math.nan


def open_judge(judge: Judge) -> Any:
    """The client, once a server has answered at `base_url`.

    Raises InputError where a number makes no sense, the `openai` package or the key is missing, the key is refused, or
    no server is to be reached.
    """
    for name, least in (("repeats", 1), ("workers", 1), ("max_retries", 0)):
        if getattr(judge, name) < least:
            raise InputError(f"judge.{name}: expected at least {least}, got {getattr(judge, name)}")
    if judge.temperature is not None and not 0 <= judge.temperature <= 2:
        raise InputError(f"judge.temperature: expected 0 to 2, got {judge.temperature}")
    try:
        import openai
    except ImportError:
        raise InputError("the judge is asked through the package openai: pip install 'ctxlib[judge]'") from None
    key = os.environ.get(judge.api_key_variable)
    if not key and not _is_near(judge.base_url):
        raise InputError(
            f"no API key for {judge.base_url}: put it into the environment variable {judge.api_key_variable}, name "
            "another variable, or give the base URL of a server of your own, such as http://localhost:8000/v1"
        )
    client = openai.OpenAI(
        base_url=judge.base_url, api_key=key or "none", timeout=judge.timeout, max_retries=judge.max_retries
    )
    try:
        client.with_options(max_retries=0, timeout=min(judge.timeout, 30.0)).models.list()
    except openai.APITimeoutError:
        pass  # there, and busy
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        raise _stopped(judge, error) from None
    except (openai.OpenAIError, ValueError, AttributeError, TypeError):
        pass  # it answered; not every server lists its models, nor to every key
    return client


def _is_near(base_url: str) -> bool:
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local"))


def _stopped(judge: Judge, error: Exception) -> InputError:
    import openai

    what = " ".join(str(error).split())[:300]
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        remedy = f"check the key in {judge.api_key_variable}"
    elif isinstance(error, openai.NotFoundError):
        remedy = f"check the judge's name '{judge.model}', and that the base URL ends as the server has it, mostly /v1"
    else:
        remedy = "check the server and its base URL; the same command goes on from the judgements that are there"
    return InputError(f"judge at {judge.base_url}: {what}: {remedy}")


def judge_answers(
    answers: pd.DataFrame,
    bench: Bench,
    judge: Judge,
    path: str | Path,
    *,
    client: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Ratings of answers (question, turn, answer): RATING_COLUMNS, a row a judgement, in the order of `answers`.

    A judgement without a rating is asked for once more; is there none again, `rating` is NaN and `problem` "no rating".
    One that the server refuses (an answer too long for the judge, say) is NaN, too, `problem` giving the reason. Tokens
    are those of all attempts, NaN where the server does not tell.

    Every judgement is appended to the JSONL file `path` as it comes, under a hash of what the judge read, judge and
    repeat, so that a run that was stopped asks only for those that it lacks; refused ones are asked for again.

    Raises InputError for answers to unknown questions or without their first turn, for a damaged file, where no
    judgement was given at all, and as `open_judge` does (which gives the `client`) when the server fails for good.
    """
    asked = _judgements(answers, bench, judge)
    kept = _Judgements(Path(path))
    todo = {key: messages for key, (_, messages) in asked.items() if key not in kept.known}
    refused: dict[str, str] = {}
    if todo:
        client = client or open_judge(judge)
        pool = ThreadPoolExecutor(judge.workers)
        try:
            futures = {pool.submit(_judge_once, client, judge, kept, key, todo[key]): key for key in todo}
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
    return pd.DataFrame(rows, columns=list(RATING_COLUMNS)).astype(
        {"rating": float, "prompt_tokens": float, "completion_tokens": float}
    )


def _judgements(
    answers: pd.DataFrame, bench: Bench, judge: Judge
) -> dict[str, tuple[tuple[str, str, int, int], list[dict[str, str]]]]:
    """By key: (question, category, turn, repeat), and the messages."""
    tasks = {task.id: task for task in bench.tasks}
    said = {(row.question, row.turn): row.answer for row in answers.itertuples()}
    if len(said) < len(answers):
        raise InputError("answers: a question and turn is there more than once; pass the answers of one model")
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


def _judge_once(client: Any, judge: Judge, kept: "_Judgements", key: str, messages: list[dict[str, str]]) -> str | None:
    """Asks for one judgement and keeps it; the reason where the server refuses it."""
    import openai

    options = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    texts, spent = [], np.zeros(2)
    while len(texts) < 2 and (not texts or math.isnan(parse_rating(texts[-1]))):
        try:
            completion = client.chat.completions.create(model=judge.model, messages=messages, **options)
            texts.append(completion.choices[0].message.content or "")
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if texts:
                break
            return " ".join(str(error).split())[:300]
        except openai.OpenAIError as error:
            raise _stopped(judge, error) from None
        except (ValueError, AttributeError, IndexError, TypeError):
            raise _stopped(judge, ValueError("the reply is no chat completion")) from None
        usage = completion.usage
        spent += (usage.prompt_tokens, usage.completion_tokens) if usage else math.nan
    kept.add(key, texts, *spent.tolist())
    return None


class _Judgements:
    """One JSONL file, a line a judgement, appended whole as it comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock, self.known = path, Lock(), {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, _, torn = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        if torn:  # the run was killed in the middle of this line
            os.truncate(path, path.stat().st_size - len(torn))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                judgement = json.loads(line)
                self.known[judgement["key"]] = judgement
                self.row(judgement["key"])
            except (ValueError, KeyError, TypeError, IndexError) as damage:
                raise InputError(f"{path}, line {number}: no judgement ({damage}); delete the line") from None

    def row(self, key: str) -> tuple[float, str, int, float, float]:
        """rating, problem, attempts, prompt_tokens, completion_tokens."""
        judgement = self.known[key]
        rating = parse_rating(judgement["texts"][-1])
        tokens = (judgement[name] for name in ("prompt_tokens", "completion_tokens"))
        problem = NO_RATING if math.isnan(rating) else ""
        return rating, problem, len(judgement["texts"]), *(math.nan if n is None else float(n) for n in tokens)

    def add(self, key: str, texts: list[str], *tokens: float) -> None:
        counts = [None if math.isnan(n) else int(n) for n in tokens]
        judgement = {"key": key, "texts": texts, "prompt_tokens": counts[0], "completion_tokens": counts[1]}
        with self.lock:
            self.known[key] = judgement
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(judgement) + "\n")


def question_ratings(ratings: pd.DataFrame) -> pd.Series:
    """Rating of each question: the mean over its turns of the mean over the repeats.

    NaN where a turn has no rating at all. Two models are compared with `metrics.paired_difference` of these.
    """
    by_turn = ratings.groupby(["question", "turn"], sort=False)["rating"].mean()
    return by_turn.groupby("question", sort=False).agg(lambda turns: turns.mean(skipna=False))


def summarise_ratings(
    ratings: pd.DataFrame, *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Mean rating over all questions, of each turn and of each category: group, name, value, ci_low, ci_high, n, ….

    The interval is a percentile bootstrap over the `n` questions that have a rating for every turn. `judgements` and
    `without_rating` count what was asked for. `judge_variance` is the variance between repeated judgements of the same
    answer (unbiased, pooled over answers; NaN without repeats), and `judge_error` the standard error that it leaves in
    `value`; the interval holds it already, since it is part of the spread between questions.
    """
    groups = [("all", "all", ratings)]
    groups += [("turn", str(turn), part) for turn, part in ratings.groupby("turn", sort=True)]
    groups += [("category", str(name), part) for name, part in ratings.groupby("category", sort=False)]
    rows = []
    for group, name, part in groups:
        values = question_ratings(part).dropna()
        low, high = bootstrap_interval(values, samples, seed, level=level)
        variance, error = _judge_spread(part[part["question"].isin(values.index)])
        mean = float(values.mean()) if len(values) else math.nan
        missing = int(part["rating"].isna().sum())
        rows.append((group, name, mean, low, high, len(values), len(part), missing, variance, error))
    columns = ["group", "name", "value", "ci_low", "ci_high", "n", "judgements", "without_rating"]
    return pd.DataFrame(rows, columns=[*columns, "judge_variance", "judge_error"])


def _judge_spread(part: pd.DataFrame) -> tuple[float, float]:
    """Pooled variance of repeats, and the standard error it leaves in the mean over questions of means over turns."""
    cells = part.dropna(subset=["rating"]).groupby(["question", "turn"])["rating"].agg(["var", "count"])
    repeated = cells.dropna()
    freedom = (repeated["count"] - 1).sum()
    if not freedom:
        return math.nan, math.nan
    variance = float((repeated["var"] * (repeated["count"] - 1)).sum() / freedom)
    turns = cells.groupby("question")["count"].transform("size")
    weights = 1 / (turns * part["question"].nunique())
    return variance, math.sqrt(variance * float((weights**2 / cells["count"]).sum()))


def spent(ratings: pd.DataFrame, prices: tuple[int | float, int | float] | None = None) -> dict[str, int | float]:
    """judgements, attempts, without_rating, refused, prompt_tokens, completion_tokens, and, with `prices`, cost.

    Prices are those of a million prompt and completion tokens; tokens and cost are NaN where the server did not tell.
    """
    tokens = [float(ratings[name].sum(skipna=False)) for name in ("prompt_tokens", "completion_tokens")]
    counts = {
        "judgements": len(ratings),
        "attempts": int(ratings["attempts"].sum()),
        "without_rating": int((ratings["problem"] == NO_RATING).sum()),
        "refused": int(ratings["problem"].str.startswith(REFUSED).sum()),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
    }
    return counts | ({"cost": (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6} if prices else {})


def evaluate(
    model: str,
    bench: Bench,
    judge: Judge,
    out: str | Path,
    *,
    reading: Reading = "clean",
    indicator: str | None = None,
    max_new_tokens: int = 1024,
    batch_size: int = 8,
    dtype: str = "float32",
    quantisation: str | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    chat_template: str | Path | None = None,
    revision: str | None = None,
    prices: tuple[int | float, int | float] | None = None,
) -> tuple[pd.DataFrame, dict[str, int | float]]:
    """MT-Bench of a model, into a folder: the summary, and what the judging took (`spent`).

    The folder will hold answers.jsonl, ratings.csv, summary.csv and, written last, mt_bench.json (settings, sha256 of
    the files, versions, counts); `cache/` and judgements.jsonl let a stopped run go on and spare questions that were
    answered and judged before. The judge is looked for before the model is loaded.

    Raises InputError as the functions above and `load_model` do.
    """
    out = Path(out)
    client = open_judge(judge)
    source = model_source(model)
    tokenizer = load_tokenizer(source, chat_template=chat_template, revision=revision)
    require_chat_template(tokenizer)
    loaded = load_model(source, dtype=dtype, quantisation=quantisation, attention=attention, revision=revision)
    key = model_hash(source, revision=revision)
    answers = answer_turns(
        loaded,
        tokenizer,
        bench,
        reading=reading,
        indicator=indicator,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        model_key=key,
        cache_dir=out / "cache",
    )
    write(out / "answers.jsonl", answers.to_json(orient="records", lines=True, force_ascii=False))
    ratings = judge_answers(answers, bench, judge, out / "judgements.jsonl", client=client)
    summary, taken = summarise_ratings(ratings), spent(ratings, prices)
    settings = {"model": model, "model_hash": key, "reading": reading, "indicator": indicator, "dtype": dtype}
    settings |= {"max_new_tokens": max_new_tokens, "quantisation": quantisation, "attention": attention}
    settings |= {"revision": revision, "chat_template": tokenizer.chat_template, "judge": asdict(judge)}
    manifest = {
        "settings": settings,
        "corrected_references": list(bench.corrected),
        "files": {str(file): file_digest(file) for file in bench.files},
        "spent": {name: None if math.isnan(value) else value for name, value in taken.items()},
        "versions": {name: version(name) for name in ("ctxlib", "torch", "transformers", "openai")}
        | {"python": platform.python_version()},
    }
    write(out / "ratings.csv", ratings.to_csv(index=False, lineterminator="\n"))
    write(out / "summary.csv", summary.to_csv(index=False, lineterminator="\n"))
    write(out / "mt_bench.json", to_json(manifest))
    return summary, taken
