"""Both turns of every question, answered by the model under test."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ctxlib.commands.mt_bench.questions import Bench, Task
from ctxlib.conversations import Message, Question
from ctxlib.generate import answer_questions, question_prompt
from ctxlib.models import Subject
from ctxlib.params import InputError, Variant

TURNS = {"standard": (1, 2), "authors_code": (1,)}
ANSWER_COLUMNS = ("question", "category", "turn", "prompt", "answer", "answer_tokens")


def answer_turns(
    subject: Subject,
    bench: Bench,
    *,
    max_new_tokens: int,
    variant: Variant = "standard",
    indicator: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Greedy answers with the chat template: ANSWER_COLUMNS, one row per question and turn.

    The second turn is asked after the model's own first answer. With an `indicator` every user message carries it, the
    first one also when it is read again. `options` are passed to `answer_questions` (batch_size, cache_dir, …), which
    batches, caches and resumes.

    Raises InputError, before anything is answered, if two turns of `max_new_tokens` may not fit into the window.
    """
    _check_window(subject, bench, max_new_tokens, variant, indicator)
    said: dict[str, list[str]] = {task.id: [] for task in bench.tasks}
    parts = []
    for turn in TURNS[variant]:
        questions = [_question(task, said[task.id], indicator) for task in bench.tasks]
        frame = answer_questions(
            subject,
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


def _check_window(subject: Subject, bench: Bench, max_new_tokens: int, variant: Variant, indicator: str | None) -> None:
    window = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    turns = len(TURNS[variant])
    last = [_question(task, ["."] * (turns - 1), indicator) for task in bench.tasks]
    lengths = [len(question_prompt(subject.tokenizer, question, True, indicator, False)) for question in last]
    longest = int(np.argmax(lengths))
    if window and lengths[longest] + turns * max_new_tokens > window:
        most = (window - lengths[longest]) // turns
        remedy = f"lower max_new_tokens to {most}" if most > 0 else "take a model with a longer window"
        raise InputError(
            f"question {bench.tasks[longest].id}: {lengths[longest]} tokens and {turns} × {max_new_tokens} new ones "
            f"may not fit into the model's window of {window}; {remedy}"
        )
