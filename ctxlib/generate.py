"""Batched greedy answers, with a response cache keyed by model, adapter, template, steering and decoding."""

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ctxlib.attention import steer_attention
from ctxlib.conversations import Question
from ctxlib.files import JsonLines
from ctxlib.models import Subject, memory_advice
from ctxlib.params import InputError
from ctxlib.roles import PLAIN_SEPARATOR, Role, RoleBatch, RoleMap, pad_batch, role_map

RESPONSE_COLUMNS = (
    "id", "family", "kind", "context_length_tokens", "depth_percent", "prompt", "answer", "answer_tokens"
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The questions that are answered together, their prompts padded on the left with `pad_id`."""

    questions: Sequence[Question]
    roles: RoleBatch
    pad_id: int


# Opened around the generation of a batch; it may yield more arguments of transformers' `generate`.
Around = Callable[[torch.nn.Module, Batch], AbstractContextManager[Mapping[str, Any] | None]]


def answer_questions(
    subject: Subject,
    questions: Sequence[Question],
    *,
    template: bool,
    indicator: str | None,
    max_new_tokens: int,
    batch_size: int,
    use_prefix: bool,
    steering_alpha: int | float | None = None,
    steering_options: Mapping[str, Any] | None = None,
    stop_text: str | None = None,
    reuse_prefixes: bool = False,
    cache_dir: str | Path | None = None,
    around: Around | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Greedy answer to every question: one row per question, in the given order, with the columns RESPONSE_COLUMNS.

    `prompt` is the decoded text that the model read (response prefix included), `answer` the generated text without the
    prefix, and `answer_tokens` the number of generated tokens, without the end token. An answer ends at an end token of
    the tokenizer or of the model's generation config, after `max_new_tokens`, or before the first `stop_text` ("\n" or
    PLAIN_SEPARATOR suit raw text, where nothing else may end an answer). The model is left in eval mode.

    With an `indicator` the last user message carries it. With a `steering_alpha` in (0, 1] all but the user's tokens
    are weighted down (paper, section 2.3); `steering_options` are passed to `steer_attention`. With a `cache_dir` every
    answer is stored in a JSONL file specific to model, adapter, template, indicator, prefix, steering and decoding, and
    an interrupted run resumes. Several processes may use the folder at once; a damaged line of such a file is skipped
    with a warning, and its question asked again.

    With `reuse_prefixes` the prompts are sorted by their tokens, and each is read only from its first token that
    differs from the prompt before it: keys and values of common beginnings (a haystack up to its needle, a passage with
    several questions) are computed once. The answers are the same up to rounding. It has no effect under steering,
    inside `record_allocation` or `steer_attention`, and for models whose state is not one key and value per token
    (linear attention) or whose positions depend on the prompt's length (dynamic and long rope).

    `around` is opened around the generation of every batch, and may steer the model or pass `generate` more arguments;
    it is called with the model without its adapter's wrapping. Such answers cannot be cached.

    Raises InputError for repeated ids, for `around` with a `cache_dir`, for a prompt that leaves no room for the
    answer, and if memory or the disk of the cache is full.
    """
    if around is not None and cache_dir is not None:
        raise InputError("answer_questions: a cache does not know what `around` does; pass no cache_dir")
    model, tokenizer = subject.model.eval(), subject.tokenizer
    maps = [question_prompt(tokenizer, question, template, indicator, use_prefix) for question in questions]
    _check(model, questions, maps, max_new_tokens)
    steering = None if steering_alpha is None else {"steering_alpha": float(steering_alpha), **(steering_options or {})}
    commit = getattr(_base(model).config, "_commit_hash", None)  # a hub's model may change under its name
    key = {
        "model": [
            *(subject.key, str(model.dtype), bool(getattr(model, "is_quantized", False)), _adapter_hash(model)),
            *([commit] if commit else []),
        ],
        "template": [template, tokenizer.chat_template if template else PLAIN_SEPARATOR],
        "indicator": indicator,
        "prefix": use_prefix,
        "steering": steering,
        "decoding": ["greedy", max_new_tokens, stop_text],
    }
    cache = _Cache(cache_dir, key)
    prompts = [tokenizer.decode(prompt.ids) for prompt in maps]
    answered = {q.id: cache.get(q.id, prompt) for q, prompt in zip(questions, prompts, strict=True)}
    prefixes = (
        _Prefixes(model) if reuse_prefixes and steering is around is None and _keys_can_be_reused(model) else None
    )
    todo = [index for index, question in enumerate(questions) if answered[question.id] is None]
    todo.sort(key=lambda index: maps[index].ids.tolist() if prefixes else -len(maps[index]))
    with tqdm(total=len(questions), initial=len(questions) - len(todo), desc="answers", disable=not progress) as bar:
        for batch in (todo[start : start + batch_size] for start in range(0, len(todo), batch_size)):
            with memory_advice("models.batch_size down (mt-bench: --batch-size)", cache.path):
                its_maps, asked = [maps[i] for i in batch], [questions[i] for i in batch]
                opened = around and (lambda base, roles, pad_id, asked=asked: around(base, Batch(asked, roles, pad_id)))
                written = _greedy(model, tokenizer, its_maps, max_new_tokens, stop_text, steering, prefixes, opened)
            for index, (answer, answer_tokens) in zip(batch, written, strict=True):
                answered[questions[index].id] = answer, answer_tokens
                cache.add(questions[index].id, prompts[index], answer, answer_tokens)
            bar.update(len(batch))
    rows = [
        (q.id, q.family, q.kind, q.context_length_tokens, q.depth_percent, prompt, *answered[q.id])
        for q, prompt in zip(questions, prompts, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(RESPONSE_COLUMNS))


def question_prompt(
    tokenizer: Any, question: Question, template: bool, indicator: str | None, use_prefix: bool
) -> RoleMap:
    """A question as the model reads it, up to where its answer begins; its last message may carry the indicator."""
    *earlier, last = question.messages
    return role_map(
        tokenizer,
        [*earlier, replace(last, indicated=indicator is not None)],
        template=template,
        generation_prompt=True,
        response_prefix=question.response_prefix if use_prefix else "",
        indicator=indicator,
    )


def _check(model: torch.nn.Module, questions: Sequence[Question], maps: Sequence[RoleMap], max_new_tokens: int) -> None:
    ids = [question.id for question in questions]
    if repeated := [key for key, times in Counter(ids).items() if times > 1]:
        raise InputError(f"question {repeated[0]!r} occurs more than once; give every question its own id")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(maps)), key=lambda index: len(maps[index]), default=None)
    if window and longest is not None and len(maps[longest]) + max_new_tokens > window:
        raise InputError(
            f"question {ids[longest]!r}: {len(maps[longest])} tokens and {max_new_tokens} new ones do not fit into the "
            f"model's window of {window}; shorten the context or max_new_tokens"
        )


def _greedy(
    model: torch.nn.Module,
    tokenizer: Any,
    maps: Sequence[RoleMap],
    max_new_tokens: int,
    stop_text: str | None,
    steering: Mapping[str, Any] | None,
    prefixes: "_Prefixes | None" = None,
    around: Callable[..., AbstractContextManager[Mapping[str, Any] | None]] | None = None,
) -> list[tuple[str, int]]:
    """Text and number of tokens of each prompt's greedy continuation."""
    base = _base(model)
    end_ids = _end_ids(base, tokenizer)
    pad_id = end_ids[0] if end_ids else tokenizer.pad_token_id or 0  # masked in prompts, and ends a finished answer
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end_ids or None, pad_token_id=pad_id
    )
    batch = pad_batch(maps, pad_id, side="left")
    ids, mask = (tensor.to(base.device) for tensor in (batch.input_ids, batch.attention_mask))
    stops = [_StopAtText(tokenizer, stop_text, ids.shape[1])] if stop_text else None
    keep = (batch.roles == Role.USER).to(base.device)
    read = {"past_key_values": prefixes.read(maps, max_new_tokens)} if prefixes and min(map(len, maps)) > 1 else {}
    steered = steer_attention(base, keep, **steering) if steering else nullcontext()
    with _only(base, config), steered, around(base, batch, pad_id) if around else nullcontext() as more:
        written = base.generate(
            ids, attention_mask=mask, generation_config=config, stopping_criteria=stops, **read, **(more or {})
        )
    return [_answer(tokenizer, row, {*end_ids, pad_id}, stop_text) for row in written[:, ids.shape[1] :].tolist()]


def _base(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _keys_can_be_reused(model: torch.nn.Module) -> bool:
    """Whether a token's keys and values depend only on the tokens before it, and no recording or steering is active."""
    config = _base(model).config
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, Mapping)}
    layers = DynamicCache(config=config).layers
    return (
        all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and not kinds & {"dynamic", "longrope"}
        and not config._attn_implementation.startswith("ctxlib")
    )


class _Prefixes:
    """Keys and values of the prompt that was read last: the next one is read from the first token that differs.

    read before    <s> a b c d        cached: <s> a b c d
    to read        <s> a b x y z      kept: <s> a b; read anew: x y      (z is left to `generate`)
    in the batch   . . <s> a b x y    padded on the left to the longest prompt, then room for z and the answer
    """

    # transformers' continuous batching (`generate_batch`) shares prefixes, too, and gave the same tokens, but took 20
    # times as long on a CPU (five needle prompts of 300 tokens), and takes no stopping criteria: `stop_text` needs one.
    #
    # The last token of a prompt stays unread, because `generate` needs one token to compute the first logits from. The
    # cache of one row is copied into the batch, so that prompts of different length decode together; a copy per prompt
    # costs far less than reading a long common beginning again.

    def __init__(self, model: torch.nn.Module):
        self.decoder = _base(model).get_decoder()
        self.ids: list[int] = []
        self.cache = DynamicCache()

    @torch.no_grad()
    def read(self, maps: Sequence[RoleMap], max_new_tokens: int) -> DynamicCache:
        """All tokens of each prompt but the last, padded on the left, with room for the last and for the answer."""
        width = max(map(len, maps)) - 1
        batch = DynamicCache()
        for row, prompt in enumerate(maps):
            self._read(prompt.ids[:-1].tolist())
            if not row:
                batch.layers = [_Roomy(layer, len(maps), width, 1 + max_new_tokens) for layer in self.cache.layers]
            for mine, theirs in zip(batch.layers, self.cache.layers, strict=True):
                mine.keys[row, :, width - len(self.ids) :] = theirs.keys[0]
                mine.values[row, :, width - len(self.ids) :] = theirs.values[0]
        return batch

    def _read(self, ids: list[int]) -> None:
        parted = (place for place, (old, new) in enumerate(zip(self.ids, ids, strict=False)) if old != new)
        shared = next(parted, min(len(self.ids), len(ids)))
        if shared:
            self.cache.crop(shared - len(self.ids))
        else:
            self.cache = DynamicCache()
        if shared < len(ids):
            new = torch.tensor([ids[shared:]], device=self.decoder.device)
            self.decoder(input_ids=new, past_key_values=self.cache, use_cache=True)
        self.ids = ids


class _Roomy(DynamicLayer):
    """Keys and values with spare room, so that no decoding step has to copy all of them."""

    def __init__(self, like: DynamicLayer, batch: int, width: int, more: int):
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        self.room = tuple(t.new_zeros(batch, t.shape[1], width + more, t.shape[3]) for t in (like.keys, like.values))
        self._show(width)

    def _show(self, end: int) -> None:
        self.keys, self.values = (tensor[:, :, :end] for tensor in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        for tensor, states in zip(self.room, (key_states, value_states), strict=True):
            tensor[:, :, begin:end] = states
        self._show(end)
        return self.keys, self.values


def _end_ids(model: torch.nn.Module, tokenizer: Any) -> list[int]:
    theirs = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _answer(tokenizer: Any, written: list[int], end_ids: set[int], stop_text: str | None) -> tuple[str, int]:
    length = next((place for place, token in enumerate(written) if token in end_ids), len(written))
    answer = tokenizer.decode(written[:length], skip_special_tokens=True)
    return (answer.split(stop_text)[0] if stop_text else answer).strip(), length


@contextmanager
def _only(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own generation config, whose values (sampling, penalties) `generate` would fall back on."""
    theirs, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = theirs


class _StopAtText(StoppingCriteria):
    """Ends a row once the last tokens that it wrote contain `text`."""

    def __init__(self, tokenizer: Any, text: str, prompt_length: int):
        self.tokenizer, self.text, self.prompt_length = tokenizer, text, prompt_length
        self.reach = len(text.encode()) + 2

    def __call__(self, input_ids: Int[Tensor, "batch pos"], scores: Any, **kwargs: Any) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :][:, -self.reach :])
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)


def _adapter_hash(model: torch.nn.Module) -> str | None:
    """sha256 over the active adapter's weights, so that two adapters never share answers, whatever the key."""
    if not isinstance(model, PeftModel):
        return None
    digest = hashlib.sha256()
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


class _Cache:
    """Answers in one JSONL file per `key`, one line per answer, written as it comes; without a folder, no cache."""

    def __init__(self, folder: str | Path | None, key: Mapping[str, Any]):
        self.path: Path | None = None
        self.known: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=False)
        self.path = Path(folder) / f"{hashlib.sha256(canonical.encode()).hexdigest()[:16]}.jsonl"
        self.lines = JsonLines(self.path, check=operator.itemgetter("id", "prompt", "answer", "answer_tokens"))
        self.known = {sample["id"]: sample for sample in self.lines.rows}

    def get(self, key: str, prompt: str) -> tuple[str, int] | None:
        sample = self.known.get(key)
        return (sample["answer"], sample["answer_tokens"]) if sample and sample["prompt"] == prompt else None

    def add(self, key: str, prompt: str, answer: str, answer_tokens: int) -> None:
        if self.path:
            self.lines.append({"id": key, "prompt": prompt, "answer": answer, "answer_tokens": answer_tokens})
