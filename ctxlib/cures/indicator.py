"""The paper's cure: a token after the user's text, learned on the turns that depend on their context."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ctxlib.conversations import Question
from ctxlib.cures.cure import Ask, Cure, Marks
from ctxlib.models import Subject


@dataclass(frozen=True)
class Indicator(Cure):
    """Trained with the indicator on turns marked by score, by the truth (`oracle`) or at random, and asked with it.

    Reference: the paper, section 3.
    """

    marks: Marks = "score"
    name: str = "[IND], scored marks"

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        return ask(subject, questions, indicator=True)
