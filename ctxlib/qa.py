"""Reading comprehension from files in the official SQuAD format (v1.1 and v2.0)."""

import json
import random
from pathlib import Path

from ctxlib.conversations import Message, Question
from ctxlib.params import InputError

PROMPT = "{context}\nAnswer the question according to the above passage: {question}"


def squad_questions(path: Path, n: int | None = None, seed: int = 0) -> list[Question]:
    """Questions with their passages, in the paper's prompt (its Tables 5 and 6); `n` of them, drawn by the seed.

    Raises InputError, naming file and key, for a file that is not in SQuAD's format.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            (paragraph["context"], qa)
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        questions = [_question(context, qa) for context, qa in found]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error}); see qa.source") from None
    if not questions:
        raise InputError(f"{path}: holds no question; see qa.source")
    return questions if n is None or n >= len(questions) else random.Random(seed).sample(questions, n)


def _question(context: str, qa: dict) -> Question:
    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
    return Question(
        id=str(qa["id"]),
        family="qa",
        kind="squad",
        messages=(Message("user", PROMPT.format(context=context, question=qa["question"])),),
        answers=answers or ("",),
    )
