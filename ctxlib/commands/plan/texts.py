"""Conversations and questions: how many, how long, and whether that was counted on local data or assumed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctxlib import experiment
from ctxlib.conversations import Message, Question
from ctxlib.paper import DATASETS, table_2
from ctxlib.params import InputError, Needle, Params, Qa, locate
from ctxlib.questions.needle import AUTHORS_BUFFER, PROMPTS
from ctxlib.roles import role_map

SAMPLED = 200  # texts whose tokens are counted
LONGEST = 5  # more of them, those of the most characters
SHORT = 50  # tokens of a context that any town has
CHARACTERS_PER_TOKEN = 4  # if there is no local tokenizer
TEMPLATE = 20  # tokens around a question and its answer, if there is no local tokenizer
# Official development sets: names of files or hub datasets that hold one, questions, and tokens of a prompt with its
# passage. The counts are official; the lengths are assumed: Llama-2's tokens in questions of each format, scaled to the
# mean words of the official passages (QuAC: Choi et al. 2018; DROP: Dua et al. 2019).
PASSAGES = json.loads(Path(__file__).with_name("known_passages.json").read_text())
QUAC_FIRST = {"title": "QuAC, first questions", "n": 1_000, "mean": 780, "longest": 2_200}  # as in the authors' code


@dataclass(frozen=True)
class Texts:
    """Number of texts, mean and greatest length in tokens, and the source of these numbers. nan: not known.

    `family` as in `Question`, or "conversations"; `lengths` is a sample, if one is known.
    """

    family: str
    n: int | float
    length: int | float
    longest: int | float
    source: str
    max_new_tokens: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def known(self) -> str:
        return "counted" if self.source.startswith("counted") else "assumed"


def all_texts(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Texts]:
    """Conversations and questions by name: that of the family, or of a source of passages. Raises InputError."""
    here = [source for source in params.qa.sources if _is_here(params, source)]
    experiment.passage_questions(params.changed({"qa.sources": here}))  # raises if two sources hold the same question
    found = {"conversations": _conversations(params, tokenizer), "needle": _needles(params, tokenizer)}
    for source in params.qa.sources:
        asked = experiment.passage_questions(params.changed({"qa.sources": [source]})) if source in here else []
        found[source] = _measured("qa", asked, params, tokenizer) if source in here else _assumed(source, params.qa)
    found["facts"] = _measured("facts", experiment.fact_questions(params), params, tokenizer)
    found["instructions"] = _measured("instructions", experiment.instruction_questions(params), params, tokenizer)
    return {name: texts for name, texts in found.items() if texts.n}


def _is_here(params: Params, source: str) -> bool:
    return source == experiment.EMBEDDED or params.path(source).exists()


def _conversations(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    """Cut at `conversations.max_length`; of data that is not here from the paper's Table 2."""
    section, limit = params.conversations, params.conversations.max_length
    if _is_here(params, section.source):
        corpus = experiment.conversations(params)
        if not corpus.conversations:
            raise InputError(f"{section.source}: every row was dropped; there is nothing to plan")
        sampled = experiment.spread([conversation.messages for conversation in corpus.conversations], SAMPLED)
        lengths = tuple(min(limit, length(messages, tokenizer)) for messages in sampled)
        source = f"counted here, {_unit(tokenizer)} of {len(sampled)}"
        source += "".join(f"; dropped {n:,} × {reason}" for reason, n in corpus.dropped.itertuples(index=False))
        mean = sum(lengths) / len(lengths)
        return Texts("conversations", len(corpus.conversations), mean, limit, source, lengths=lengths)
    if section.source not in DATASETS:
        return Texts("conversations", section.n or math.nan, limit, limit, "not here: max_length tokens each assumed")
    row = table_2().set_index("dataset").loc[DATASETS[section.source]]
    mean = min(limit, float(row.tokens_per_conversation))
    # quantiles of an exponential distribution with that mean: an assumption, to estimate padding
    spread = (math.ceil(-mean * math.log(1 - (i + 0.5) / SAMPLED)) for i in range(SAMPLED))
    lengths = tuple(min(limit, one) for one in spread)
    n = int(min(row.conversations, section.n or row.conversations))
    return Texts("conversations", n, mean, limit, "the paper's Table 2, in TinyLlama's tokens", lengths=lengths)


def _needles(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    section, new_tokens = params.needle, params.needle.max_new_tokens
    here = section.haystack is not None and params.path(section.haystack).exists()
    if section.source == "text" and here and tokenizer is not None:
        return _measured("needle", experiment.needles(params, tokenizer), params, tokenizer)
    lengths, around = needle_contexts(section, tokenizer), frame(params, tokenizer)
    kinds = 2 if section.source == experiment.EMBEDDED else 1  # about a newcomer, or contradicting memory
    n = len(lengths) * len(section.depths) * section.per_cell * kinds
    source = f"needle.lengths and {around} tokens around them"
    if lengths != section.lengths:
        source += f", which the authors' code cuts to {min(lengths):,} to {max(lengths):,}"
    return Texts("needle", n, sum(lengths) / len(lengths) + around, max(lengths) + around, source, new_tokens)


def needle_cost(section: Needle, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of all needles."""
    needles = [section.needle] if isinstance(section.needle, str) else section.needle or []
    return sum(_tokens(needle.strip(), tokenizer) for needle in needles)


def needle_contexts(section: Needle, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens of the contexts by `needle.lengths`: the same (standard), or what the authors' slicing leaves of them."""
    if section.variant == "standard" or section.source == experiment.EMBEDDED:
        return list(section.lengths)
    needles = needle_cost(section, tokenizer)
    ends = [(length, length - AUTHORS_BUFFER - needles) for length in section.lengths]
    return [needles + (end if end >= 0 else max(0, length + end)) for length, end in ends]


def frame(params: Params, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Tokens of a needle's prompt around its context; in the town, the most that a sample of short ones has."""
    section = params.needle
    if section.source == experiment.EMBEDDED:
        short = {"needle.lengths": [SHORT], "needle.depths": [0], "needle.per_cell": SAMPLED // 2}
        made = experiment.needles(params.changed(short), tokenizer)
        return math.ceil(_measured("needle", made, params, tokenizer).longest) - SHORT
    text = PROMPTS[section.prompt].format(context="", question=section.question)
    return length([Message("user", text)], tokenizer) + _tokens(section.response_prefix or "", tokenizer)


def _assumed(source: str, section: Qa) -> Texts:
    """Passages that are not here, recognised by the name of their source."""
    where = (Path(source).name.lower(), source.lower())
    named = (known for name in where for known in PASSAGES if any(part in name for part in known["names"]))
    known = next(named, None)
    if known is None or (locate(source) == "hub" and section.split != "validation"):
        like = PASSAGES[1]
        n, said = section.n, f"assumed: qa.n questions like {like['title']}"
    else:
        like = QUAC_FIRST if known["title"] == "QuAC" and section.variant == "authors_code" else known
        n, said = min(section.n, like["n"]), f"assumed: {like['title']}, {like['n']:,} in the official development set"
    return Texts("qa", n, like["mean"], like["longest"], said, section.max_new_tokens)


def _measured(
    family: str, asked: Sequence[Question], params: Params, tokenizer: PreTrainedTokenizerBase | None
) -> Texts:
    if not asked:
        return Texts(family, 0, 0, 0, "none")
    new_tokens = getattr(params, "qa" if family == "facts" else family).max_new_tokens
    lengths = [length(question.messages, tokenizer) for question in experiment.spread(asked, SAMPLED)]
    by_characters = sorted(asked, key=lambda question: sum(len(message.content) for message in question.messages))
    longest = max(lengths + [length(question.messages, tokenizer) for question in by_characters[-LONGEST:]])
    mean = sum(lengths) / len(lengths)
    return Texts(family, len(asked), mean, longest, f"counted here, {_unit(tokenizer)}", new_tokens)


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


def _unit(tokenizer: PreTrainedTokenizerBase | None) -> str:
    return f"{CHARACTERS_PER_TOKEN} characters per token" if tokenizer is None else "tokens"
