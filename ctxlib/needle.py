"""Needle in a haystack: one sentence that holds the answer, somewhere in a long text that does not matter."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ctxlib.conversations import Message, Question
from ctxlib.params import InputError

PROMPT = (
    "You are a helpful AI assistant that answers a question using only the provided document: "
    "\n{context}\n\nQuestion: {question}"
)


def place_needle(sentences: Sequence[str], needle: str, depth_percent: int | float) -> str:
    """The text with the needle before the sentence at that depth: 0 puts it first, 100 last (paper section 2.1)."""
    place = round(depth_percent / 100 * len(sentences))
    return " ".join([*sentences[:place], needle, *sentences[place:]])


def read_haystack(folder: Path) -> list[str]:
    """All sentences of the folder's .txt files in the order of their names; newlines become spaces, as in the paper.

    Raises InputError where there is no text.
    """
    files = sorted(folder.glob("*.txt"))
    text = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in files)
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
    if not sentences:
        raise InputError(f"needle.haystack: {folder} holds no .txt file with text; put the haystack's texts there")
    return sentences


def text_needles(
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    needle: str,
    question: str,
    keywords: Sequence[str],
    response_prefix: str = "",
    lengths: Sequence[int],
    depths: Sequence[int | float],
    per_cell: int,
    seed: int,
) -> list[Question]:
    """One question for each length × depth × repetition; a repetition is another stretch of the haystack.

    `context_length_tokens` is measured in tokens of the tokenizer and never exceeded: the haystack is the longest run
    of whole sentences that fits beside the needle. Raises InputError if the texts are shorter than the longest length.
    """
    costs = [len(tokenizer(" " + sentence, add_special_tokens=False)["input_ids"]) for sentence in sentences]
    needle_cost = len(tokenizer(" " + needle, add_special_tokens=False)["input_ids"])
    if sum(costs) + needle_cost < max(lengths):
        raise InputError(
            f"needle.haystack: its texts hold {sum(costs)} tokens, needle.lengths asks for {max(lengths)}; "
            "add texts or lower the lengths"
        )
    questions = []
    for length in lengths:
        for depth in depths:
            for i in range(per_cell):
                rng = random.Random(f"needle-{length}-{depth:g}-{i}-{seed}")
                hay = _stretch(sentences, costs, length - needle_cost, rng.randrange(len(sentences)))
                context = place_needle(hay, needle, depth)
                questions.append(
                    Question(
                        id=f"needle-text-{length}-{depth:g}-{i}",
                        family="needle",
                        kind="text",
                        messages=(Message("user", PROMPT.format(context=context, question=question)),),
                        response_prefix=response_prefix,
                        answers=(needle,),
                        keywords=tuple(keywords),
                        context_length_tokens=length,
                        depth_percent=float(depth),
                    )
                )
    return questions


def _stretch(sentences: Sequence[str], costs: Sequence[int], budget: int, start: int) -> list[str]:
    """Whole sentences from `start` on, around the end if need be, while they fit."""
    taken = []
    for i in range(len(sentences)):
        at = (start + i) % len(sentences)
        if costs[at] > budget:
            break
        budget -= costs[at]
        taken.append(sentences[at])
    return taken
