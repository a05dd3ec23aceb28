"""The seam: what a cure against the loss of context may change, in three hooks, each optional."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import pandas as pd

from ctxlib.conversations import Corpus, Message, Question
from ctxlib.files import digest
from ctxlib.finetune import TurnLoss
from ctxlib.models import Subject
from ctxlib.params import InputError

Marks = Literal["score", "oracle", "random"]


@dataclass(frozen=True)
class Material:
    """What a cure may build its training data from; what is expensive is computed when it is first asked for.

    corpus: the conversations, each answer of the miniature with the truth about it.
    find_scored, load_base: make `scored` and `base`.
    """

    corpus: Corpus
    find_scored: Callable[[], Corpus]
    load_base: Callable[[], Subject]

    @cached_property
    def scored(self) -> Corpus:
        """The corpus with the vanilla model's score of every answer, and marks where it is over `scoring.threshold`."""
        return self.find_scored()

    @cached_property
    def base(self) -> Subject:
        """The model before fine-tuning."""
        return self.load_base()


# Asks a model in the chat template and scores its answers: `ask(subject, questions, *, indicator=False,
# steering_alpha=None, around=None)`, the last as in `generate.answer_questions`. One row a question, in their order,
# with the columns of `experiment.ask`.
Ask = Callable[..., pd.DataFrame]


class Cure:
    """No cure. Subclass it and override what your idea changes; settings are the fields of a frozen dataclass.

    name: in tables and figures; two settings of one cure need two names.
    changes: parameters of the training, in dotted form, such as `{"finetune.raw_text_share": 0.25}`.
    marks: which turns are trained with the indicator after the user's text (`evidence.trials.Trial`); None: no turn.
    over_adapter: whether `answer` gets the adapter over its base instead of the two merged into one model.
    """

    name: str = "none"
    changes: ClassVar[Mapping[str, Any]] = {}
    marks: Marks | None = None
    over_adapter: ClassVar[bool] = False

    def corpus(self, material: Material) -> Corpus:
        """The conversations to train on."""
        return material.corpus

    def turn_loss(self, answer: Message) -> TurnLoss:
        """What an answer of `corpus` counts in the training's loss, and how closely it keeps to the base model."""
        return TurnLoss()

    def answer(self, subject: Subject, questions: Sequence[Question], ask: Ask) -> pd.DataFrame:
        """The answers to the questions, in their order: what `ask` returns, however it is asked."""
        return ask(subject, questions)


def overrides(cure: Cure, *hooks: str) -> bool:
    """Whether the cure has any of these hooks of its own."""
    return any(getattr(type(cure), hook) is not getattr(Cure, hook) for hook in hooks)


def key(cure: Cure, *hooks: str) -> str:
    """A hash of the cure's settings and of the code of these hooks, without comments and docstrings.

    Functions that the hooks call are not part of it. Raises InputError for a class whose code is in no file.
    """
    settings = {name: value for name, value in vars(cure).items() if name != "name"}
    return digest([settings, [_code(cure, hook) for hook in hooks if overrides(cure, hook)]])


def _code(cure: Cure, hook: str) -> str:
    try:
        source = inspect.getsource(getattr(type(cure), hook))
    except (OSError, TypeError) as error:
        raise InputError(f"cure {cure.name!r}: the code of its {hook} is in no file; put the class into one") from error
    function = ast.parse(textwrap.dedent(source)).body[0]
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.dump(function)
