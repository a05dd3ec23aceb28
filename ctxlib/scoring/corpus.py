"""Scores of a whole corpus, in parts that are kept, so that an interrupted run resumes."""

import functools
import hashlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ctxlib.attention import record_allocation
from ctxlib.conversations import Conversation, Corpus
from ctxlib.files import digest, one_line, replacing, write
from ctxlib.models import memory_advice
from ctxlib.params import InputError, Scoring, Variant
from ctxlib.roles import Role, pad_batch
from ctxlib.scoring.answers import (
    EncodedConversation,
    HeadReduction,
    checked_layers,
    checked_length,
    encode_conversation,
    length_buckets,
    reduce_heads,
    rope_borders,
)

_ENCODERS = 2  # threads beside a GPU; more would only wait for each other, as templates are rendered in Python
SCORE_COLUMNS = {
    "conversation": "str",
    "turn": "int64",
    "layer": "int64",
    "score": "float64",
    "user_tokens": "int64",
    "answer_tokens": "int64",
    "context_tokens": "int64",
    "variant": "str",
    "seed_model": "str",
    "skipped": "str",
}


def score_corpus(
    model,
    tokenizer,
    corpus: Corpus,
    settings: Scoring,
    *,
    layers: Literal["all"] | Sequence[int] = "all",
    max_length: int | None = None,
    shard_dir: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    conversations_per_part: int = 256,
    seed_model: str | None = None,
    weights: str | None = None,
    data: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every answered turn of a corpus; one row per turn and layer, in the corpus's order.

    Columns: conversation, turn (from 1), layer (from 0), score in [0, 1], user_tokens (of this turn's user message),
    answer_tokens, context_tokens (all tokens before the answer), variant, seed_model. Turns that could not be scored
    have no row; `frame.attrs["skipped"]` counts them by reason. An answer cut off by `max_length` is skipped in both
    variants; the official script scores what is left of it, and drops some whole answers. That changes which turns have
    a score, not the scores themselves.

    Of a corpus that is streamed (`open_conversations`) one part is in memory (on a GPU two), with a set of ids and the
    scores. A conversation longer than `max_length` is scored as far as it fits; its other turns are skipped.

    settings: the section `scoring` of the parameters, of which `variant`, `head_reduction` and `token_budget` are used.
        The budget is the number of tokens in one batch, padding included; a longer conversation makes a batch of its
        own. Its default is 8192, on a CPU 512: there, long conversations are faster one at a time, and take less
        memory.
    max_length: tokens of a conversation that are read; by default the model's positions ("authors_code": 2047).
    shard_dir: folder for finished parts, under a hash of model, template, layers, variant, reduction and data. Finished
        parts are read instead of scored: an interrupted call resumes and ends with the same frame.
    shard: (i, n) takes every n-th part from the i-th on; when all n are done, a call without it reads them all.
    seed_model: the model's name in the frame; by default the hash of its weights.
    weights: that hash (`weights_hash`), if it is already known; data: the same for `corpus_hash`.

    Raises InputError for an empty corpus, repeated conversation ids, a layer that does not exist or has no attention,
    if no turn could be scored, and for a score that is not a number and a memory or disk that is full; finished parts
    are kept.
    Reference: Wang et al. 2024, section 3.1.
    """
    config = model.config.get_text_config()
    layers = checked_layers(layers, config.num_hidden_layers)
    max_length = checked_length(max_length, config.max_position_embeddings, settings.variant)
    borders = rope_borders(config)
    token_budget = settings.token_budget or (512 if model.device.type == "cpu" else 8192)
    index, shards = shard
    if not 0 <= index < shards:
        raise InputError(f"shard {index}/{shards}: the first number must be at least 0 and less than the second")
    _check_ids(corpus)
    made_by = {"layers": layers, "max_length": max_length}
    made_by |= {"variant": settings.variant, "head_reduction": settings.head_reduction}
    if weights is None and (shard_dir is not None or seed_model is None):
        weights = weights_hash(model)
    seed_model = seed_model or weights
    folder = None
    if shard_dir is not None:
        made_by |= {"weights": weights, "seed_model": seed_model, "dtype": str(model.dtype)}
        made_by |= {"template": _template_hash(tokenizer), "data": data or corpus_hash(corpus)}
        made_by |= {"conversations_per_part": conversations_per_part}
        folder = Path(shard_dir) / digest(made_by)
        write(folder / "settings.json", json.dumps(made_by, indent=1) + "\n")

    encode = functools.partial(encode_conversation, tokenizer, variant=settings.variant, max_length=max_length)
    n, size = len(corpus), conversations_per_part
    chosen = range(math.ceil(n / size))[index::shards]
    files = {number: folder and folder / f"part-{number:05d}.parquet" for number in chosen}
    if not all(file and file.exists() for file in files.values()):
        _check_attention(model, layers)
    todo = (_Part(these, files[number]) for number, these in _parts(corpus, size) if number in files)
    parts = []
    with _Progress(sum(min(size, n - number * size) for number in chosen), disable=not progress) as bar:
        for part, examples in encoded_ahead(todo, encode, 0 if model.device.type == "cpu" else _ENCODERS):
            if part.frame is not None:
                parts.append(part.frame)
                bar.update(len(part.conversations))
                continue
            bar.update(sum(not example.answers for example in examples))
            on_device = {}
            for batch in length_buckets([example for example in examples if example.answers], token_budget, borders):
                with memory_advice(_FEWER if len(batch) > 1 else _SHORTER, folder):
                    on_device |= _score_batch(model, tokenizer, batch, layers, settings.head_reduction)
                bar.scored(len(batch), tokens=sum(len(example.map) for example in batch))
            with memory_advice(_FEWER, folder):
                scores = _fetched(on_device)
            rows = [row for example in examples for row in _rows(example, scores.get(example.id, []), layers)]
            parts.append(_frame(rows, settings.variant, seed_model))
            if part.file:
                with replacing(part.file) as beside:
                    parts[-1].to_parquet(beside)

    frame = pd.concat(parts, ignore_index=True) if parts else _frame([], settings.variant, seed_model)
    scored = frame[frame["skipped"] == ""].drop(columns="skipped").reset_index(drop=True)
    skipped = frame["skipped"][frame["skipped"] != ""].value_counts().to_dict()
    if chosen and scored.empty:
        reasons = ", ".join(skipped) or "no user message has an answer"
        raise InputError(f"{corpus.source}: no turn could be scored: {reasons}")
    scored.attrs["skipped"] = {reason: int(n) for reason, n in skipped.items()}
    return scored


def at_layer(frame: pd.DataFrame, layer: int) -> pd.DataFrame:
    """The rows of one layer; InputError if it was not scored."""
    chosen = frame[frame["layer"] == layer]
    if chosen.empty:
        layers = sorted(frame["layer"].unique().tolist())
        raise InputError(f"scoring.layer: {layer} was not scored; choose one of {layers}")
    return chosen


class _Part:
    """Conversations that are scored and saved together; `frame` holds their scores if an earlier call finished them."""

    def __init__(self, conversations: Sequence[Conversation], file: Path | None):
        self.conversations, self.file, self.frame = conversations, file, _finished_part(file)

    @property
    def to_encode(self) -> Sequence[Conversation]:
        return self.conversations if self.frame is None else ()


def encoded_ahead(
    parts: Iterable[_Part], encode: Callable[[Conversation], EncodedConversation], threads: int
) -> Iterator[tuple[_Part, list[EncodedConversation]]]:
    """Every part with its conversations encoded, in order; with threads, the next part while one is being scored.

    At most two parts are held. Threads pay on a GPU, on which the forward pass leaves the CPU free, and the tokenizer
    leaves Python free; without threads (0) a part is encoded when its turn comes.
    """
    if not threads:
        yield from ((part, [encode(conversation) for conversation in part.to_encode]) for part in parts)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
    try:
        begun = ((part, [pool.submit(encode, conversation) for conversation in part.to_encode]) for part in parts)
        for (part, encoding), _ in itertools.pairwise(itertools.chain(begun, [None])):  # the next one has begun, too
            yield part, [future.result() for future in encoding]
    finally:
        pool.shutdown(cancel_futures=True)


def _check_ids(corpus: Corpus) -> None:
    """Raises InputError for a corpus without conversations, and for an id that occurs more than once."""
    seen = set()
    for conversation in corpus.conversations:
        if conversation.id in seen:
            raise InputError(
                f"{corpus.source}: conversation id {conversation.id!r} occurs more than once; ids must be unique"
            )
        seen.add(conversation.id)
    if not seen:
        raise InputError(f"{corpus.source}: no conversation to score")


def _parts(corpus: Corpus, size: int) -> Iterator[tuple[int, list[Conversation]]]:
    """The conversations in parts of `size`, numbered from 0; only one part is in memory if the corpus is streamed."""
    conversations = iter(corpus.conversations)
    for number in itertools.count():
        if not (part := list(itertools.islice(conversations, size))):
            return
        yield number, part


def weights_hash(model) -> str:
    """12 hex digits of sha256 over the names and bytes of all weights (about one second per gigabyte)."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


class _Progress(tqdm):
    """A progress bar over conversations that also shows the tokens scored per second."""

    def __init__(self, total: int, disable: bool):
        super().__init__(total=total, disable=disable, desc="scoring", unit=" conversations")
        self._tokens, self._began = 0, time.perf_counter()

    def scored(self, conversations: int, tokens: int) -> None:
        self._tokens += tokens
        self.set_postfix_str(f"{self._tokens / (time.perf_counter() - self._began):,.0f} tokens/s", refresh=False)
        self.update(conversations)


def _finished_part(file: Path | None) -> pd.DataFrame | None:
    if file is None or not file.exists():
        return None
    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as damage:
        warnings.warn(f"{file}: damaged, its conversations are scored again ({one_line(damage)})", stacklevel=3)
        return None


_FEWER = "scoring.token_budget down (ctxlib score: --token-budget)"
_SHORTER = "conversations.max_length down (ctxlib score: --max-length), it was a single conversation"


def _check_attention(model, layers: list[int]) -> None:
    """Raises InputError for layers whose attention cannot be recorded; two tokens are enough to find out."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with (
        torch.inference_mode(),
        record_allocation(model, ids + Role.USER, rows="last", layers=layers, stop_after=max(layers)) as recording,
    ):
        model.get_decoder()(input_ids=ids, use_cache=False)
    _ = recording.allocation


def _score_batch(
    model, tokenizer, batch: list[EncodedConversation], layers: list[int], head_reduction: HeadReduction
) -> dict[str, Float[Tensor, "answer layer"]]:
    """Scores by conversation, on the model's device: nothing waits for a GPU here (`_fetched` does).

    Padding is on the right, where a causal model needs no mask for it, and the fused kernels take none.
    """
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    padded = pad_batch([example.map for example in batch], pad_id, side="right")
    wanted = [torch.cat([answer.rows for answer in example.answers]) for example in batch]
    rows = pad_sequence(wanted, batch_first=True, padding_value=-1)
    scores = {}
    with torch.inference_mode():
        roles = padded.roles.to(model.device)
        with record_allocation(
            model, roles, rows=rows, layers=layers, stop_after=max(layers), precision="exact"
        ) as recording:
            model.get_decoder()(input_ids=padded.input_ids.to(model.device), use_cache=False)
        user = recording.allocation[..., Role.USER]
        for i, example in enumerate(batch):
            by_answer = user[:, i, :, : len(wanted[i])].split([len(answer.rows) for answer in example.answers], dim=-1)
            scores[example.id] = torch.stack([reduce_heads(of_one, head_reduction) for of_one in by_answer])
    return scores


def _fetched(scores: dict[str, Float[Tensor, "answer layer"]]) -> dict[str, list[list[float]]]:
    """The scores of many conversations as numbers, with one copy from the device."""
    if not scores:
        return {}
    values = iter(torch.cat([*scores.values()]).double().tolist())
    return {id: list(itertools.islice(values, len(of_one))) for id, of_one in scores.items()}


def _rows(example: EncodedConversation, scores: list[list[float]], layers: list[int]) -> list[dict]:
    """One row per turn and layer; a skipped turn has a single row, without score and layer, with the reason."""
    nothing = {"layer": -1, "score": math.nan, "user_tokens": 0, "answer_tokens": 0, "context_tokens": 0}
    rows = [{**nothing, "turn": turn, "skipped": reason} for turn, reason in example.skipped.items()]
    for answer, by_layer in zip(example.answers, scores, strict=True):
        counts = {name: getattr(answer, name) for name in ("turn", "user_tokens", "answer_tokens", "context_tokens")}
        for layer, score in zip(layers, by_layer, strict=True):
            if math.isnan(score):
                where = f"conversation {example.id!r}, turn {answer.turn}, layer {layer}"
                raise InputError(f"{where}: the score is not a number; does the model compute NaN in this dtype?")
            rows.append({**counts, "layer": layer, "score": score, "skipped": ""})
    return [{"conversation": example.id, **row} for row in rows]


def _frame(rows: list[dict], variant: Variant, seed_model: str) -> pd.DataFrame:
    return (
        pd.DataFrame(rows, columns=list(SCORE_COLUMNS))
        .assign(variant=variant, seed_model=seed_model)
        .astype(SCORE_COLUMNS)
    )


def _template_hash(tokenizer) -> str:
    return digest([tokenizer.chat_template, sorted(tokenizer.get_vocab().items())])


def corpus_hash(corpus: Corpus) -> str:
    """12 hex digits of the conversations' ids, roles and texts."""
    sha256, separator = hashlib.sha256(), "["
    for c in corpus.conversations:  # one at a time, with the bytes of `digest` of their list
        sha256.update(f"{separator}{json.dumps([c.id, [[m.role, m.content] for m in c.messages]])}".encode())
        separator = ", "
    sha256.update(b"[]" if separator == "[" else b"]")
    return sha256.hexdigest()[:12]
