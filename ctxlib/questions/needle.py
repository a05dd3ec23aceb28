"""Needle in a haystack: a sentence or several that hold the answer, somewhere in a long text that does not matter."""

import io
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctxlib.allocation import attention_allocation, mean_over_heads
from ctxlib.conversations import Message, Question
from ctxlib.files import read_text, text_files
from ctxlib.params import InputError, Variant
from ctxlib.roles import Groups, RoleMap, split_user

GRID = ["context_length_tokens", "depth_percent"]
NEEDLE_GROUPS = ("bos", "system", "needle", "user", "assistant", "template")
PROMPTS = {  # the paper's table 8, by number
    1: "You are a helpful AI assistant that answers a question using only the provided document: "
    "\n{context}\n\nQuestion: {question}",
    2: "You are a helpful AI assistant that answers a question using only the provided context: "
    "\n{context}\n\nQuestion: {question}",
    3: "Document: \n{context}\n\nAnswer the question according to the provided document: {question}",
    4: "Context: \n{context}\n\nAnswer the question according to the provided context: {question}",
}
PAPER_NEEDLE = {
    "needle": "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day. ",
    "question": "What is the best thing to do in San Francisco?",
    "keywords": ("eat", "sandwich", "sit", "dolores", "park", "sunny", "day"),
}
AUTHORS_PREFIX_WORDS = 8
AUTHORS_BUFFER = 200  # tokens of every length that the authors' code keeps free
LONGEST_SENTENCE = 500  # tokens; longer stretches have no sentence ends (a transcript, a table) and are cut into pieces
PIECE = 50  # tokens of such a piece
# A full stop of Latin scripts needs a space behind it; those of other scripts end a sentence by themselves, closing
# quotes included.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？｡।۔؟።])(?![”’」』）】])\s*|(?<=[。！？][”’」』）】])\s*")


def paper_grid(longest: int) -> dict[str, list[int]]:
    """`lengths`, 20 from 200 to `longest` tokens, and `depths`, 20 from 0 to 100 percent, rounded (section 2.1).

    `longest` is 1,000 for the models trained on WizardLM, 2,000 or 4,000 for the others, official models: their window.
    """
    evenly = {"lengths": np.linspace(200, longest, 20), "depths": np.linspace(0, 100, 20)}
    return {name: values.round().astype(int).tolist() for name, values in evenly.items()}


def needle_depths(first: int | float, n: int) -> list[float]:
    """Depths in percent of n needles: the first at `first`, the others evenly spread over the rest of the haystack."""
    return [first + (100 - first) * k / n for k in range(n)]


def place_needle(sentences: Sequence[str], needle: str, depth_percent: int | float) -> str:
    """The text with the needle before the sentence at that depth: 0 puts it first, 100 last (paper section 2.1)."""
    return place_needles(sentences, [needle], [depth_percent])


def place_needles(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int | float]) -> str:
    """The text with each needle at its own depth in percent of the haystack's sentences; at one place, in order."""
    pieces = list(sentences)
    places = [round(depth / 100 * len(sentences)) for depth in depths]
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda at: at[0])[::-1]:
        pieces.insert(place, needle)
    return " ".join(pieces)


def read_haystack(folder: Path, variant: Variant = "standard") -> list[str]:
    """All sentences of the folder's .txt files in the order of their names; newlines become spaces, as in the paper.

    `standard`: single spaces throughout. `authors_code`: the text as the authors' code reads it, which joined by spaces
    the sentences give again: double spaces and those of empty lines are kept, and the last character of every line is
    taken for its newline, so that a file without a final newline loses its last character.

    Other files are not read, with a warning that names them. Raises InputError if there is no text, and for a file that
    is not readable or something else than text.
    """
    texts = [read_text(file) for file in text_files(folder)]
    if variant == "authors_code":
        lines = (line for text in texts for line in io.StringIO(text, newline=None))
        sentences = re.split(r"(?<=[.!?]) ", "".join(f"{line[:-1]} " for line in lines))
    else:
        sentences = _SENTENCE_END.split(" ".join(" ".join(text.split()) for text in texts))
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise InputError(f"needle.haystack: {folder} holds no .txt file with text; put the haystack's texts there")
    return sentences


def text_needles(
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    needle: str | Sequence[str],
    question: str,
    keywords: Sequence[str],
    response_prefix: str | None = None,
    lengths: Sequence[int],
    depths: Sequence[int | float],
    per_cell: int,
    seed: int,
    prompt: int = 1,
    variant: Variant = "standard",
) -> list[Question]:
    """One question for each length × depth × repetition; a repetition is another stretch of the haystack.

    All depths of one length and repetition share the stretch. With several needles the depth is that of the first
    (`needle_depths` has the others), and `keywords` are those of all. `prompt` is a number of `PROMPTS`.

    - `standard`: the haystack is the longest run of whole sentences that fits in addition to the needles, so that a
      context is never longer than `context_length_tokens`, tokens of the tokenizer, and at most one sentence shorter.
      Stretches of more than LONGEST_SENTENCE tokens without a sentence end are cut into pieces, and a sentence without
      which more than half of the length would stay empty is cut at a token.
    - `authors_code`: the haystack is cut at a token; the needle's tokens go behind the last full stop before their
      depth; of each length `AUTHORS_BUFFER` tokens are kept free, with a slice that ends before its beginning at short
      lengths, so that of 200 tokens 200 are left, and of 242 only 42. `context_length_tokens` is the remainder; the
      requested length is part of the id. The first repetition is theirs, the haystack's beginning. Prompts 3 and 4 say
      "accoriding", and where no `response_prefix` is given it is the needle's first eight words.

    Reference: Wang et al. 2024, sections 2.1 and A.3, table 8; official LLMNeedleHaystackTester.py.

    Raises InputError if the texts are shorter than the longest length, a length is shorter than the needles, for a
    context less than half as long as asked for, and for a prompt or variant that does not exist.
    """
    needles = [needle] if isinstance(needle, str) else list(needle)
    if prompt not in PROMPTS or variant not in ("standard", "authors_code"):
        raise InputError(
            f"needle: prompt {prompt!r}, variant {variant!r}; give 1 to 4, and 'standard' or 'authors_code'"
        )
    if not needles or not all(text.strip() for text in needles):
        raise InputError("needle.needle: empty; give the sentence that holds the answer, or a list of such sentences")
    costs = _costs(tokenizer, sentences)
    if variant == "standard" and max(costs) > LONGEST_SENTENCE:
        sentences = [
            piece for text, cost in zip(sentences, costs, strict=True) for piece in _cut(tokenizer, text, cost)
        ]
        costs = _costs(tokenizer, sentences)
    needle_cost = sum(_costs(tokenizer, [text.strip() for text in needles]))
    if sum(costs) + (needle_cost if variant == "standard" else 0) < max(lengths):
        raise InputError(
            f"needle.haystack: its texts hold {sum(costs)} tokens, needle.lengths asks for {max(lengths)}; "
            "add texts or lower the lengths"
        )
    if min(lengths) < needle_cost:
        raise InputError(f"needle.lengths: {min(lengths)} is less than the needle's {needle_cost} tokens; raise it")

    wording, contexts = PROMPTS[prompt], _standard_contexts
    if variant == "authors_code":
        wording, contexts = wording.replace("according", "accoriding"), _authors_contexts
        if response_prefix is None:
            response_prefix = " ".join(needles[0].split()[:AUTHORS_PREFIX_WORDS])
    spread = [needle_depths(depth, len(needles)) for depth in depths]
    questions = []
    for length in lengths:
        starts = [random.Random(f"needle-{length}-{i}-{seed}").randrange(len(sentences)) for i in range(per_cell)]
        if variant == "authors_code":
            starts[0] = 0
        made = [contexts(tokenizer, sentences, costs, start, needles, length, spread) for start in starts]
        for place, depth in enumerate(depths):
            for i in range(per_cell):
                context, tokens = made[i][place]
                questions.append(
                    Question(
                        id=f"needle-text-{length}-{depth:g}-{i}",
                        family="needle",
                        kind="text",
                        messages=(Message("user", wording.format(context=context, question=question)),),
                        response_prefix=response_prefix or "",
                        answers=(" ".join(text.strip() for text in needles),),
                        keywords=tuple(keywords),
                        context_length_tokens=tokens,
                        depth_percent=float(depth),
                        context=context,
                        question=question,
                    )
                )
    return questions


def needle_groups(rendered: RoleMap, question: Question, needles: Sequence[str] | None = None) -> Groups:
    """The roles with the user's tokens split in two, `NEEDLE_GROUPS`: the needles', and all others.

    `needles` are the sentences as written in the question's messages, by default its first gold answer. Raises
    InputError for a map that does not know its characters, and for a needle that does not occur exactly once.
    """
    if rendered.chars is None:
        raise InputError("needle_groups: needs a map made by role_map")
    text = "".join(message.content for message in question.messages)
    inside = torch.zeros(len(rendered), dtype=torch.bool)
    for needle in map(str.strip, needles or question.answers[:1]):
        if text.count(needle) != 1:
            raise InputError(
                f"question {question.id!r}: {needle!r} is there {text.count(needle)} times instead of once; "
                "give the needle as it occurs in the haystack"
            )
        start = text.index(needle)
        inside |= (rendered.chars[:, 1] > start) & (rendered.chars[:, 0] < start + len(needle))
    return split_user(rendered, inside, NEEDLE_GROUPS)


def needle_attention(
    model: PreTrainedModel,
    maps: Sequence[RoleMap],
    questions: Sequence[Question],
    *,
    layer: int,
    batch_size: int,
    pad_token_id: int,
    needles: Sequence[str] | None = None,
    steering_alpha: float | None = None,
) -> pd.DataFrame:
    """Fraction of the last input token's attention that falls on the needles: one row per question, in their order.

    Columns: id, context_length_tokens, depth_percent, `needle_attention` (the mean over the heads of `layer`, in
    [0, 1]) and `needle_tokens` (the needles' share of all tokens, in [0, 1], which uniform attention would give).
    `maps` are the questions as the model reads them, `needles` as in `needle_groups`.
    `metrics.summarise(frame, GRID, "needle_attention")` is the map over length and depth, with intervals, to compare
    with that of the answers' `recalled`. Raises InputError as `needle_groups` does.
    """
    groups = [needle_groups(rendered, asked, needles) for rendered, asked in zip(maps, questions, strict=True)]
    shares = attention_allocation(
        model,
        maps,
        batch_size=batch_size,
        pad_token_id=pad_token_id,
        layers=[layer],
        steering_alpha=steering_alpha,
        groups=groups,
    )
    of_needle = NEEDLE_GROUPS.index("needle")
    on_needle = mean_over_heads(shares[shares.role == "needle"]).sort_values("example").attention_allocation
    return pd.DataFrame(
        {
            "id": [asked.id for asked in questions],
            "context_length_tokens": [asked.context_length_tokens for asked in questions],
            "depth_percent": [asked.depth_percent for asked in questions],
            "needle_attention": on_needle.to_numpy(),
            "needle_tokens": [(one.ids == of_needle).double().mean().item() for one in groups],
        }
    )


def _standard_contexts(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    costs: Sequence[int],
    start: int,
    needles: Sequence[str],
    length: int,
    spread: Sequence[Sequence[float]],
) -> list[tuple[str, int]]:
    """For each of the needles' depths the context of whole sentences, and its length."""
    needles = [needle.strip() for needle in needles]
    budget = length - sum(_costs(tokenizer, needles))
    hay = _stretch(sentences, costs, budget, start)
    left = budget - sum(_costs(tokenizer, hay)) if hay else budget
    if left > length / 2:
        hay = [*hay, *_pieces(tokenizer, sentences[(start + len(hay)) % len(sentences)], left - 1)[:1]]
        left = budget - sum(_costs(tokenizer, hay))
    if left > length / 2 or left < 0:
        raise InputError(
            f"needle.haystack: no context of about {length} tokens can be made of its texts, they cannot be cut there; "
            "give texts with sentence ends, or another length"
        )
    return [(place_needles(hay, needles, depths), length) for depths in spread]


def _cut(tokenizer: PreTrainedTokenizerBase, sentence: str, cost: int) -> list[str]:
    """The sentence, in pieces if it is too long for one."""
    return [sentence] if cost <= LONGEST_SENTENCE else _pieces(tokenizer, sentence, PIECE)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[str]:
    """The text cut at every so many tokens, at the last space there if there is one."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    pieces, start, at = [], 0, 0
    while at < len(spans):
        stop = spans[min(at + max(tokens, 1), len(spans)) - 1][1]
        space = text.rfind(" ", start, stop)
        if stop < len(text) and space > start:
            stop = space
        stop = max(stop, start + 1)
        pieces.append(text[start:stop].strip())
        start = stop
        while at < len(spans) and spans[at][1] <= stop:
            at += 1
    return [piece for piece in pieces if piece]


def _authors_contexts(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    costs: Sequence[int],
    start: int,
    needles: Sequence[str],
    length: int,
    spread: Sequence[Sequence[float]],
) -> list[tuple[str, int]]:
    """For each of the needles' depths the context as the authors' code slices it, and the tokens that are left."""
    pieces = [_ids(tokenizer, needle) for needle in needles]
    hay = _ids(tokenizer, " ".join(_stretch(sentences, costs, length + max(costs), start)))[:length]
    hay = hay[: length - AUTHORS_BUFFER - sum(map(len, pieces))]  # below zero: cut from the end
    full_stops = {token for token in set(hay) if tokenizer.decode([token]).strip() == "."}
    contexts = []
    for depths in spread:
        context = list(hay)
        for depth, piece in reversed(list(zip(depths, pieces, strict=True))):
            place = int(len(hay) * depth / 100)
            while depth < 100 and place and hay[place - 1] not in full_stops:
                place -= 1
            context[place:place] = piece
        contexts.append((tokenizer.decode(context), len(context)))
    return contexts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _costs(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> list[int]:
    """Tokens of each sentence in its place in the text, with the space before it."""
    ends = np.cumsum([len(sentence) + 1 for sentence in sentences])
    text = "".join(f" {sentence}" for sentence in sentences)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    last = np.array(encoded["offset_mapping"])[:, 1] - 1
    owners = np.searchsorted(ends, last, side="right").clip(0, len(sentences) - 1)
    return np.bincount(owners, minlength=len(sentences)).tolist()


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
