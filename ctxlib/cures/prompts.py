"""Cures that change only the prompt: a system text, and a quotation before the answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from ctxlib.conversations import Message, Question
from ctxlib.cures.cure import Ask, Cure
from ctxlib.models import Subject


@dataclass(frozen=True)
class SystemPrompt(Cure):
    """A system text in front of every question.

    The miniature's template has the system role, but its conversations never used it, and its 515 words have neither
    "answer" nor "text": there the bench says, in words that it knows, "Tell me the words that this says."
    """

    text: str = "Answer from the text that the user gives, even if it contradicts what you know."
    name: str = "system prompt"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        system = Message("system", self.text)
        return ask(subject, [replace(one, messages=(system, *one.messages)) for one in questions])


@dataclass(frozen=True)
class QuoteFirst(Cure):
    """The passage's sentence nearest to the question is quoted as a first answer; then the question is asked again.

    user: passage and question; assistant: the quotation; user: the question. Nearest: most words of the question, each
    counted once; of equals the shortest, then the first. Questions that share no word with a passage are asked as ever.
    Reference: Menick et al. 2022 (arXiv 2203.11147), answers with verified quotes; there the model picks the quotation.
    """

    name: str = "quoting first"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        return ask(subject, [self.quoted(one) for one in questions])

    def quoted(self, question: Question) -> Question:
        if question.context is None or (sentence := quotation(question.context, question.question or "")) is None:
            return question
        more = Message("assistant", sentence), Message("user", question.question)
        return replace(question, messages=(*question.messages, *more))


def quotation(passage: str, question: str) -> str | None:
    """The passage's sentence that has the most words of the question; None if none has any."""
    asked = _words(question)
    sentences = [one for one in re.split(r"(?<=[.!?])\s+", passage) if one]
    best = max(sentences, key=lambda one: (len(asked & _words(one)), -len(one)), default="")
    return best if asked & _words(best) else None


def _words(text: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"\w+", text)}
