"""Conversations ready to be scored: where each answer is, which tokens are the user's, which share a batch."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxlib.conversations import Conversation
from ctxlib.params import InputError, Variant
from ctxlib.roles import Role, RoleMap, role_map

HeadReduction = Literal["max_then_mean", "mean_then_max", "mean", "first_token"]
AUTHORS_MAX_LENGTH = 2047


@dataclass(frozen=True)
class AnswerSpan:
    """The place of one turn's answer in its conversation; the score averages over the query positions `rows`."""

    turn: int
    rows: Int[Tensor, " row"]
    user_tokens: int
    answer_tokens: int
    context_tokens: int


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation ready to be scored: its map ends with the last answer that fits, `skipped` gives reasons by turn.

    The map is None if the chat template cannot express the conversation.
    """

    id: str
    map: RoleMap | None
    answers: list[AnswerSpan]
    skipped: dict[int, str]


def answered_turns(conversation: Conversation) -> list[tuple[int, int, int]]:
    """(turn, index of the user message, index of the assistant message that answers it), turns counted from 1."""
    messages, turn, found = conversation.messages, 0, []
    for i, message in enumerate(messages):
        turn += message.role == "user"
        if turn and message.role == "assistant" and messages[i - 1].role == "user":
            found.append((turn, i - 1, i))
    return found


def encode_conversation(
    tokenizer, conversation: Conversation, variant: Variant, max_length: int
) -> EncodedConversation:
    """Ids, roles and answer spans of a conversation; answers that end beyond `max_length` tokens are skipped."""
    turns = [turn for turn, _, _ in answered_turns(conversation)]
    try:
        role_of = role_map(tokenizer, conversation.messages)
    except InputError as error:
        return EncodedConversation(conversation.id, None, [], dict.fromkeys(turns, str(error)))
    closing = torch.zeros_like(role_of.ids, dtype=torch.bool)
    if variant == "authors_code":
        role_of, closing = _as_the_authors_code(role_of, tokenizer)
    answers, skipped = [], {}
    for turn in turns:
        content = torch.nonzero((role_of.roles == Role.ASSISTANT) & (role_of.turns == turn)).flatten()
        if len(content) == 0:
            skipped[turn] = "the answer has no tokens in this rendering"
        elif content[-1] >= max_length:
            skipped[turn] = f"the answer ends beyond {max_length} tokens"
        else:
            end = int(content[-1]) + 1
            while end < min(len(closing), max_length) and closing[end]:
                end += 1
            rows = torch.cat([content, torch.arange(int(content[-1]) + 1, end)])
            user_tokens = int(((role_of.roles == Role.USER) & (role_of.turns == turn)).sum())
            answers.append(AnswerSpan(turn, rows, user_tokens, len(content), int(content[0])))
    if answers:
        role_of = role_of.truncate(int(answers[-1].rows[-1]) + 1)
    return EncodedConversation(conversation.id, role_of, answers, skipped)


def _as_the_authors_code(role_of: RoleMap, tokenizer) -> tuple[RoleMap, Tensor]:
    """The map with the user's tokens as the official script counts them, and which tokens may close an answer.

    token     <s>  Be  brief  <|user|>  Hi  \\n\\n  </s>  ▁  It  is  0  </s>  ▁  \\n
    role      b    s   s      t         u   u     t     t  a   a   a  t     t  t
    becomes   b    u   u      t         u   t     t     u  a   a   a  t     t  t     system is user, newlines are not
    closing   .    .   .      .         .   .     x     .  .   .   .  x     x  x     extends the answer if it follows it
    """
    # Two changes, made on the roles so that the rest of the scoring is the same for both variants: which keys count as
    # the user's, and which template tokens may close an answer. Only closing tokens directly behind an answer extend it
    # (`_encode`); the others have no effect. The lone "▁" that a sentencepiece tokenizer puts in front of text behind a
    # special token is not in the script's list of ids to leave out, so it belongs to the last speaker.
    newline = torch.tensor([_is_newlines(tokenizer, token_id) for token_id in role_of.ids.tolist()])
    special = torch.isin(role_of.ids, torch.tensor(tokenizer.all_special_ids))
    roles = role_of.roles.clone()
    lone_space = (roles == Role.TEMPLATE) & (role_of.ids == _lone_space_id(tokenizer))
    said = (roles != Role.TEMPLATE) & (roles != Role.BOS)
    last_said = torch.where(said, torch.arange(len(roles)), -1).cummax(0).values
    after_answer = (last_said >= 0) & (roles[last_said] == Role.ASSISTANT)
    closing = (roles == Role.TEMPLATE) & (newline | (role_of.ids == tokenizer.eos_token_id))
    closing |= lone_space & after_answer
    roles[roles == Role.SYSTEM] = Role.USER
    roles[lone_space & ~after_answer] = Role.USER
    roles[(roles == Role.USER) & (newline | special)] = Role.TEMPLATE
    return replace(role_of, roles=roles), closing


@functools.lru_cache(maxsize=2**18)
def _is_newlines(tokenizer, token_id: int) -> bool:
    text = tokenizer.decode([token_id])
    return bool(text) and not text.strip("\n")


def reduce_heads(user_attention: Float[Tensor, "layer head row"], how: HeadReduction) -> Float[Tensor, " layer"]:
    """One number per layer, in [0, 1], from the attention of each answer token (row) to the user's tokens.

    `max_then_mean` takes the best head for every token (the released scores), `mean_then_max` one head for the whole
    answer (as the paper's appendix B.3 can be understood), `mean` averages all heads, `first_token` takes the best head
    of the answer's first token.
    """
    if how == "max_then_mean":
        return user_attention.amax(dim=1).mean(dim=-1)
    if how == "mean_then_max":
        return user_attention.mean(dim=-1).amax(dim=1)
    if how == "mean":
        return user_attention.mean(dim=(1, 2))
    if how == "first_token":
        return user_attention[:, :, 0].amax(dim=1)
    raise InputError(f"head_reduction {how!r}: choose max_then_mean, mean_then_max, mean or first_token")


def rope_borders(config) -> list[int]:
    """Lengths in tokens beyond which a model turns to other rotary frequencies, for a whole batch at once (LongRoPE).

    `config` is the text model's. Dynamic scaling begins only beyond the model's positions, where nothing is scored.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    key, borders = "original_max_position_embeddings", set()
    for parameters in of_layers:
        if parameters.get("rope_type") == "longrope":
            borders.add(parameters.get(key) or getattr(config, key, None) or config.max_position_embeddings)
    return sorted(borders)


def length_buckets(
    examples: Sequence[EncodedConversation], token_budget: int, borders: Sequence[int] = ()
) -> Iterator[list[EncodedConversation]]:
    """Batches of similar length, the longest first, of at most token_budget tokens with padding, or of one example.

    A batch stays on one side of each of the `borders` (`rope_borders`), so that no score depends on what shares its
    batch.
    """

    def side(example: EncodedConversation) -> list[bool]:
        return [len(example.map) > border for border in borders]

    batch: list[EncodedConversation] = []
    for example in sorted(examples, key=lambda example: -len(example.map)):
        full = batch and len(batch[0].map) * (len(batch) + 1) > token_budget
        if full or (batch and side(batch[0]) != side(example)):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def checked_layers(layers: Literal["all"] | Sequence[int], depth: int, model: str = "the model") -> list[int]:
    """The layers in order, all of `depth` for "all". Raises InputError for none, and for one that does not exist."""
    chosen = list(range(depth)) if isinstance(layers, str) and layers == "all" else sorted(set(layers))
    for layer in chosen:
        if layer not in range(depth):
            raise InputError(f"layer {layer} does not exist: {model} has layers 0 to {depth - 1}")
    if not chosen:
        raise InputError("layers: name at least one layer, or 'all'")
    return chosen


def checked_length(max_length: int | None, positions: int, variant: Variant) -> int:
    """Tokens of a conversation that are read: `positions` at most, with None all ("authors_code": 2047)."""
    if variant not in ("standard", "authors_code"):
        raise InputError(f"variant {variant!r}: choose standard or authors_code")
    return min(positions, max_length or (AUTHORS_MAX_LENGTH if variant == "authors_code" else positions))


@functools.lru_cache(maxsize=8)
def _lone_space_id(tokenizer) -> int:
    return tokenizer.get_vocab().get("▁", -1)
