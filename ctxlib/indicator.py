"""From scores to a marked dataset: which user messages get the indicator. A score stays a field, never text.

Reference: Wang et al. 2024, section 3.2; official script `process_dataset.py` (`modify_prompt`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ctxlib.conversations import Conversation, Corpus, Message
from ctxlib.params import InputError, Variant
from ctxlib.scoring import answered_turns

Rewrite = Callable[[Conversation, int, Message, Message], tuple[Message, Message]]  # conversation, turn, user, answer
NOT_SCORED = "turn has no score: left unmarked"


def mark(
    corpus: Corpus, scores: pd.DataFrame, threshold: float, *, layer: int, variant: Variant = "standard"
) -> Corpus:
    """A corpus whose answers carry their scores, and whose user messages are indicated where the score > threshold.

    scores: the frame of `score_corpus`; only the rows of `layer` are used. Turns without a score are left unmarked and
        counted in the result's `dropped`. Marks that were there before are replaced.
    variant: `authors_code` also ends every scored turn's user text, marked or not, with a full stop if its last
        character is a letter or digit, as the authors' script does; `standard` leaves all text as it is.

    Raises InputError when the layer was not scored, a turn has two scores or one that is not a number, or no score is
    about this corpus. Reference: Wang et al. 2024, section 3.2.
    """
    if variant not in ("standard", "authors_code"):
        raise InputError(f"variant {variant!r}: choose standard or authors_code")
    chosen = _one_layer(scores, layer)
    keys = list(zip(chosen["conversation"], chosen["turn"].astype(int), strict=True))
    by_turn = dict(zip(keys, chosen["score"].astype(float), strict=True))
    if len(by_turn) < len(keys):
        raise InputError(f"scores: some turns have more than one at layer {layer}; keep one variant and one seed model")
    turns = [(c.id, turn) for c in corpus.conversations for turn, _, _ in answered_turns(c)]
    missing = sum(turn not in by_turn for turn in turns)
    if missing == len(turns):
        raise InputError(f"scores: none of them is about a turn of {corpus.source}; were they made from other data?")

    def rewrite(conversation: Conversation, turn: int, user: Message, answer: Message) -> tuple[Message, Message]:
        score = by_turn.get((conversation.id, turn))
        stop = "." if variant == "authors_code" and score is not None and user.content[-1:].isalnum() else ""
        user = replace(user, content=user.content + stop, indicated=score is not None and score > threshold)
        return user, replace(answer, score=score)

    dropped = corpus.dropped
    if missing:
        counted = pd.DataFrame({"reason": [NOT_SCORED], "n": [missing]})
        dropped = pd.concat([dropped, counted], ignore_index=True) if len(dropped) else counted
    return replace(_rewrite_turns(corpus, rewrite), dropped=dropped)


def mark_oracle(corpus: Corpus) -> Corpus:
    """Mark exactly the turns whose answer is known to depend on its context (the truth, known for generated data).

    Raises InputError when an answer carries no truth.
    """

    def rewrite(conversation: Conversation, turn: int, user: Message, answer: Message) -> tuple[Message, Message]:
        if answer.depends_on_context is None:
            raise InputError(f"conversation {conversation.id!r}, turn {turn}: no truth to mark by; mark by scores")
        return replace(user, indicated=answer.depends_on_context), answer

    return _rewrite_turns(corpus, rewrite)


def mark_random(corpus: Corpus, n: int, seed: int) -> Corpus:
    """Mark n turns drawn without replacement: the control for a score-based marking of the same size.

    Raises InputError when the corpus has fewer than n answered turns.
    """
    turns = [(i, turn) for i, c in enumerate(corpus.conversations) for turn, _, _ in answered_turns(c)]
    if not 0 <= n <= len(turns):
        raise InputError(f"cannot mark {n} turns: {corpus.source} has {len(turns)} answered turns")
    drawn = {(corpus.conversations[i].id, turn) for i, turn in random.Random(seed).sample(turns, n)}
    return _rewrite_turns(corpus, lambda c, turn, user, a: (replace(user, indicated=(c.id, turn) in drawn), a))


def turn_table(corpus: Corpus) -> pd.DataFrame:
    """Everything known about the answered turns, one row each, in the corpus's order.

    Columns: conversation, turn (from 1), kind ("unknown" if the data do not say), depends_on_context (the truth: True,
    False, or None if it is not known, as in all data written by people), score (NaN before `mark`), indicated,
    words (of the answer).
    """
    rows = []
    for conversation in corpus.conversations:
        for turn, user, answer in answered_turns(conversation):
            asked, said = conversation.messages[user], conversation.messages[answer]
            known = (said.kind or "unknown", said.depends_on_context, said.score, asked.indicated)
            rows.append((conversation.id, turn, *known, len(said.content.split())))
    columns = ["conversation", "turn", "kind", "depends_on_context", "score", "indicated", "words"]
    types = {"turn": "int64", "depends_on_context": object, "score": "float64", "indicated": bool, "words": "int64"}
    return pd.DataFrame(rows, columns=columns).astype(types)


def marked_example(corpus: Corpus) -> Conversation:
    """The shortest conversation with marked and unmarked turns; if there is none, with marked turns; else of all."""

    def order(conversation: Conversation) -> tuple[bool, bool, int]:
        marked = [message.indicated for message in conversation.messages if message.role == "user"]
        return not any(marked), all(marked), sum(len(message.content) for message in conversation.messages)

    return min(corpus.conversations, key=order)


def fractions_over(scores: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    """Fraction of turns whose score is over each threshold (strictly), by layer, with its 95 % Wilson interval.

    Columns: layer, threshold, fraction, low, high (all in [0, 1]), n_over, n.
    Raises InputError for no scores or a score that is not a number.
    Reference: Wang et al. 2024, table 10.
    """
    rows = []
    for layer in sorted(scores["layer"].unique().tolist()) or [None]:
        values = _one_layer(scores, layer)["score"].to_numpy()
        for threshold in thresholds:
            over = int((values > threshold).sum())
            interval = binomtest(over, len(values)).proportion_ci(method="wilson")
            rows.append((layer, threshold, over / len(values), interval.low, interval.high, over, len(values)))
    return pd.DataFrame(rows, columns=["layer", "threshold", "fraction", "low", "high", "n_over", "n"])


def threshold_for_fraction(scores: pd.DataFrame, fraction: float, *, layer: int | None = None) -> float:
    """The threshold over which (strictly) the given fraction of turns lies, or fewer if scores are equal.

    layer: may be omitted if the frame has a single one.
    Raises InputError for no scores, several layers or a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction {fraction}: give a number from 0 to 1")
    values = np.sort(_one_layer(scores, layer)["score"].to_numpy())[::-1]
    wanted = round(fraction * len(values))
    return float(values[wanted]) if wanted < len(values) else float(np.nextafter(values[-1], -np.inf))


def _one_layer(scores: pd.DataFrame, layer: int | None) -> pd.DataFrame:
    layers = sorted(scores["layer"].unique().tolist())
    if layer is None and len(layers) > 1:
        raise InputError(f"scores of several layers {layers}: name one")
    chosen = scores if layer is None else scores[scores["layer"] == layer]
    if not layers:
        raise InputError("scores: the frame is empty")
    if chosen.empty:
        raise InputError(f"scores: none for layer {layer}; there are layers {layers}")
    if chosen["score"].isna().any():
        bad = chosen[chosen["score"].isna()].iloc[0]
        raise InputError(f"conversation {bad['conversation']!r}, turn {bad['turn']}: the score is not a number")
    return chosen


def _rewrite_turns(corpus: Corpus, rewrite: Rewrite) -> Corpus:
    """Replace the user message and the answer of every answered turn; other user messages lose their mark."""
    conversations = []
    for conversation in corpus.conversations:
        messages = [replace(message, indicated=False) for message in conversation.messages]
        for turn, user, answer in answered_turns(conversation):
            messages[user], messages[answer] = rewrite(conversation, turn, messages[user], messages[answer])
        conversations.append(replace(conversation, messages=tuple(messages)))
    return replace(corpus, conversations=tuple(conversations))
