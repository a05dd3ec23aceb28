"""Instruction following without a judge: small tasks on a list of words, each with one right answer."""

import random
from collections.abc import Sequence

from ctxlib.conversations import Message, Question

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
WORD_TASKS = ("repeat", "reverse", "count")


def word_task(task: str, words: Sequence[str]) -> tuple[str, str]:
    """(instruction, right answer) of `repeat`, `reverse` or `count` for at most seven words."""
    listed = " ".join(words)
    if task == "repeat":
        return f"Repeat these words: {listed}.", f"{listed}."
    if task == "reverse":
        return f"Reverse these words: {listed}.", f"{' '.join(reversed(words))}."
    if task == "count":
        return f"Count these words: {listed}.", f"There are {NUMBERS[len(words)]} words."
    raise ValueError(f"unknown task {task!r}")


def word_questions(words: Sequence[str], n: int, seed: int) -> list[Question]:
    """`n` questions, the tasks in turn, two to six of the given words each."""
    questions = []
    for i in range(n):
        rng = random.Random(f"instruction-{i}-{seed}")
        task = WORD_TASKS[i % len(WORD_TASKS)]
        instruction, answer = word_task(task, rng.sample(list(words), rng.randint(2, 6)))
        questions.append(
            Question(f"{task}-{i}", "instructions", task, (Message("user", instruction),), answers=(answer,))
        )
    return questions
