"""The questions that the notebooks ask, and MT-Bench's: how many, how long, and where that is known from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctxlib import experiment
from ctxlib.conversations import Message, Question
from ctxlib.params import Needle, Params, Qa, locate
from ctxlib.questions.needle import AUTHORS_BUFFER, PROMPTS
from ctxlib.roles import role_map

SAMPLED = 200  # texts whose tokens are counted
LONGEST = 5  # more of them, those of the most characters
SHORT = 50  # tokens of a context that any town has
CHARACTERS_PER_TOKEN = 4  # where no tokenizer is here
TEMPLATE = 20  # tokens around a question and its answer, where no tokenizer is here


@dataclass(frozen=True)
class Texts:
    """How many texts there are, their mean and greatest length in tokens, and where that is known from.

    `parts` are the sources that they are put together from, by name; `lengths` a sample, where one is known.
    """

    n: int | float
    length: int | float
    longest: int | float
    source: str
    max_new_tokens: int = 0
    parts: dict[str, "Texts"] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    @property
    def known(self) -> str:
        return "counted" if self.source.startswith("counted") else "assumed"


@dataclass(frozen=True)
class DevelopmentSet:
    """Questions of an official development set; tokens of a prompt, its passage and all, mean and longest."""

    title: str
    n: int
    length: int
    longest: int


# The counts are official. The lengths are assumed: Llama-2's tokens in questions of each format, scaled to the mean
# words of the official passages where these differ (QuAC: Choi et al. 2018; DROP: Dua et al. 2019).
DEVELOPMENT_SETS = {
    "squad": DevelopmentSet("SQuAD 1.1", 10_570, 220, 900),
    "squad_v2": DevelopmentSet("SQuAD 2.0", 11_873, 220, 900),
    "quac": DevelopmentSet("QuAC", 7_354, 980, 2_400),  # behind its dialogue's earlier questions and answers
    "drop": DevelopmentSet("DROP", 9_536, 340, 1_400),
}
QUAC_FIRST = DevelopmentSet("QuAC, first questions", 1_000, 780, 2_200)  # one a dialogue, as the paper reads it
NAMES = {  # what a file or hub dataset is called that holds one of them; the first that fits
    "squad_v2": ("squad_v2", "squad2", "squad-v2", "v2.0"),
    "squad": ("squad", "dev-v1.1"),
    "quac": ("quac", "val_v0.2"),
    "drop": ("drop",),
}


@dataclass(frozen=True)
class MtBench:
    """The 80 questions of FastChat: tokens (Llama-2's) of a first and a second turn, mean, and of both, longest."""

    n: int = 80
    first: int = 78
    second: int = 25
    longest: int = 456
    max_new_tokens: int = 1024

    def room(self, positions: int) -> int:
        """New tokens for each turn, as many as two turns of the longest question leave in the window."""
        return min(self.max_new_tokens, (positions - self.longest - 2 * TEMPLATE) // 2)

    def length(self, new_tokens: int) -> float:
        """Mean of the prompts of both turns: the second one holds the first answer, here as long as allowed."""
        first, second = self.first + TEMPLATE, self.second + TEMPLATE
        return (first + first + new_tokens + second) / 2


MT_BENCH = MtBench()


def question_texts(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Texts]:
    """Number and length of the questions by family: of the questions themselves where they are here.

    Else needles by their cells, and passages by the official development sets. Raises InputError for bad data.
    """
    families = {
        "needle": _needles(params, tokenizer),
        "qa": _passages(params, tokenizer),
        "facts": _measured(experiment.fact_questions(params), tokenizer),
        "instructions": _measured(experiment.instruction_questions(params), tokenizer),
    }
    limits = {"needle": params.needle, "instructions": params.instructions}
    return {
        name: replace(texts, max_new_tokens=limits.get(name, params.qa).max_new_tokens)
        for name, texts in families.items()
    }


def _needles(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    section = params.needle
    here = section.haystack is not None and params.path(section.haystack).exists()
    if section.source == "text" and here and tokenizer is not None:
        return _measured(experiment.needles(params, tokenizer), tokenizer)
    lengths, around = needle_contexts(section, tokenizer), frame(params, tokenizer)
    n = len(lengths) * len(section.depths) * section.per_cell * needle_kinds(params)
    source = f"needle.lengths and {around} tokens around them"
    if isinstance(section.needle, list):
        source += f"; {len(section.needle)} needles in each"
    if lengths != section.lengths:
        source += f"; of {min(section.lengths):,} to {max(section.lengths):,} the paper's slicing leaves "
        source += f"{min(lengths):,} to {max(lengths):,}"
    return Texts(n, sum(lengths) / len(lengths) + around, max(lengths) + around, source)


def needle_cost(section: Needle, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of all needles."""
    needles = [section.needle] if isinstance(section.needle, str) else section.needle or []
    return sum(_tokens(needle.strip(), tokenizer) for needle in needles)


def needle_contexts(section: Needle, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of the contexts, by `needle.lengths`: as many (standard), or what the authors' slicing leaves (paper)."""
    if section.variant == "standard" or section.source == experiment.EMBEDDED:
        return list(section.lengths)
    needles = needle_cost(section, tokenizer)
    kept = [(length, length - AUTHORS_BUFFER - needles) for length in section.lengths]
    return [needles + (end if end >= 0 else max(0, length + end)) for length, end in kept]


def needle_kinds(params: Params) -> int:
    """The town's needles are about a newcomer, or contradict memory; a text's are of one kind."""
    return 2 if params.needle.source == experiment.EMBEDDED else 1


def frame(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of a needle's prompt beside its context: instruction, question, response prefix, template.

    Of the town's: the most that short ones have.
    """
    section = params.needle
    if section.source == experiment.EMBEDDED:
        short = {"lengths": [SHORT], "depths": [0], "per_cell": SAMPLED // needle_kinds(params)}
        made = experiment.needles(params.model_copy(update={"needle": section.model_copy(update=short)}), tokenizer)
        return math.ceil(_measured(made, tokenizer).longest) - SHORT
    text = PROMPTS[section.prompt].format(context="", question=section.question)
    return length([Message("user", text)], tokenizer) + _tokens(section.response_prefix or "", tokenizer)


def _passages(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    """Source by source; those that are here together, too, so that a question that two of them hold is found."""
    parts, here = {}, []
    for source in params.qa.sources:
        if source == experiment.EMBEDDED or params.path(source).exists():
            here.append(source)
            parts[source] = _measured(experiment.passage_questions(_of_sources(params, [source])), tokenizer)
        else:
            parts[source] = _assumed(source, params.qa)
    if len(here) > 1:
        experiment.passage_questions(_of_sources(params, here))
    n = sum(texts.n for texts in parts.values())
    if not n:
        return Texts(0, 0, 0, "none")
    mean = sum(texts.n * texts.length for texts in parts.values()) / n
    longest = max(texts.longest for texts in parts.values())
    return Texts(n, mean, longest, "; ".join(texts.source for texts in parts.values()), parts=parts)


def _of_sources(params: Params, sources: list[str]) -> Params:
    return params.model_copy(update={"qa": params.qa.model_copy(update={"sources": sources})})


def _assumed(source: str, section: Qa) -> Texts:
    """What a source that is not here is taken to hold, by its name."""
    name = _named(Path(source).name) or _named(source)
    if name is None or (locate(source) == "hub" and section.split != "validation"):
        known = DEVELOPMENT_SETS["squad"]
        return Texts(section.n, known.length, known.longest, f"not here: at most qa.n, taken to be like {known.title}")
    known = QUAC_FIRST if name == "quac" and section.variant == "authors_code" else DEVELOPMENT_SETS[name]
    n = min(section.n, known.n)
    said = f"{known.n:,} in the official development set" + (f", {n:,} of them by qa.n" if n < known.n else "")
    return Texts(n, known.length, known.longest, f"not here: {known.title}, {said}; lengths assumed")


def _named(name: str) -> str | None:
    return next((key for key, parts in NAMES.items() if any(part in name.lower() for part in parts)), None)


def _measured(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    if not questions:
        return Texts(0, 0, 0, "none")
    lengths = [length(question.messages, tokenizer) for question in experiment.spread(questions, SAMPLED)]
    by_characters = sorted(questions, key=lambda question: sum(len(message.content) for message in question.messages))
    longest = max(length(question.messages, tokenizer) for question in by_characters[-LONGEST:])
    mean = sum(lengths) / len(lengths)
    return Texts(len(questions), mean, max([longest, *lengths]), f"counted here, {how(tokenizer)}")


def length(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of a conversation in its template, or an estimate."""
    if tokenizer is None:
        asked = sum(message.role == "user" for message in messages)
        return _tokens("".join(message.content for message in messages), None) + TEMPLATE * asked
    return len(role_map(tokenizer, messages))


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def how(tokenizer: PreTrainedTokenizerBase | None) -> str:
    return f"{CHARACTERS_PER_TOKEN} characters a token" if tokenizer is None else "tokens"
