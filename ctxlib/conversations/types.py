"""Messages, conversations and questions: text, never tokens."""

from collections.abc import Collection
from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True, slots=True)
class Message:
    """One utterance. `kind` and `depends_on_context` (truth, where it is known) and `score` belong to answers;
    `indicated` belongs to the user message that gets the indicator."""

    role: str
    content: str
    kind: str | None = None
    depends_on_context: bool | None = None
    score: float | None = None
    indicated: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    messages: tuple[Message, ...]


def no_rows() -> pd.DataFrame:
    return pd.DataFrame(columns=["place", "key", "reason", "remedy"], dtype=str)


@dataclass(frozen=True)
class Corpus:
    """Conversations, and how many rows or turns were dropped for which reason (columns reason, n).

    `dropped_rows` lists the rows that were dropped whole, in their order (columns place, key, reason, remedy).
    `conversations` is a tuple, or for a large file what reads it anew each time (`open_conversations`).
    """

    conversations: Collection[Conversation]
    dropped: pd.DataFrame
    source: str
    dropped_rows: pd.DataFrame = field(default_factory=no_rows)
    format: str | None = None

    def __len__(self) -> int:
        return len(self.conversations)


@dataclass(frozen=True)
class Rule:
    """A verifiable instruction: its name in `ctxlib.instructions.RULES`, and the number and text that it asks for."""

    name: str
    number: int = 0
    text: str = ""


@dataclass(frozen=True)
class Question:
    """A prompt that ends with the user's message, with everything needed to score its answer.

    `answers` are the distinct gold answers as texts; `annotations` every annotator's answer, as its spans, in the
    order of the file, as the official rules of QuAC and DROP need them. `dialogue` names the dialogue it is a turn of.
    `context` is the passage or haystack in the first message, and `question` that message without it and without its
    instructions: what `ctxlib.questions.contexts.without_context` asks. `cluster` names questions that are not
    independent of one another (the same question about several passages).
    """

    id: str
    family: str  # needle, qa, facts, instructions, mt_bench, code, arithmetic
    kind: str
    messages: tuple[Message, ...]
    response_prefix: str = ""
    answers: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    memory_answer: str | None = None
    context_length_tokens: int | None = None
    depth_percent: float | None = None
    annotations: tuple[tuple[str, ...], ...] = ()
    dialogue: str | None = None
    rules: tuple[Rule, ...] = ()
    context: str | None = None
    question: str | None = None
    cluster: str | None = None
