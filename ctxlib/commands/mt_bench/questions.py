"""Questions, judge prompts and reference answers, from a folder in the format of FastChat's `llm_judge`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctxlib.files import check_is_itself
from ctxlib.params import InputError, expanded

WITH_REFERENCE = ("math", "reasoning", "coding")  # graded against a reference answer, as in FastChat
PROMPT_NAMES = {  # by turns, and whether a reference is shown
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}


@dataclass(frozen=True)
class Task:
    """A question of two turns; `reference` has the right answers to both if the judge is shown them."""

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
    folder = expanded(folder)
    questions = _found("mt-bench folder", [folder / "question.jsonl"])
    prompts_file = _found(
        "judge prompts",
        [expanded(judge_prompts)]
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
    corrected = _references(expanded(corrected_references)) if corrected_references else {}
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
    if missing := [name for name in PROMPT_NAMES.values() if name not in prompts]:
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
    check_is_itself(path)
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
