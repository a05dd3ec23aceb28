"""Which tokens of a conversation are trained on: ids and labels, the audit that shows them, and their batches."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxlib.conversations import Conversation, Message
from ctxlib.params import InputError
from ctxlib.roles import Role, RoleMap, role_map, role_table

IGNORED = -100
BATCHES_GROUPED = 8


@dataclass(frozen=True)
class TurnLoss:
    """What an answer counts in the loss: `weight` of its cross-entropy, `reference` of its divergence from the base."""

    weight: float = 1.0
    reference: float = 0.0


@dataclass(frozen=True)
class TrainingExample:
    """A conversation as token ids, labels (-100: not supervised) and roles.

    `turn_loss`, if the turns do not all count alike, has for every token the weight and the reference of its turn.
    """

    input_ids: Int[Tensor, " pos"]
    labels: Int[Tensor, " pos"]
    roles: Int[Tensor, " pos"]
    turn_loss: Float[Tensor, "pos 2"] | None = None


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that can close an answer: eos, and special tokens such as `<|eot_id|>` or `<|im_end|>`."""
    openers = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    return frozenset(set(tokenizer.all_special_ids) - openers | {tokenizer.eos_token_id} - {None})


def supervised_mask(
    role_map: RoleMap, variant: str = "standard", end_ids: Collection[int] = frozenset()
) -> Bool[Tensor, " pos"]:
    """True for the tokens that carry a label.

    `standard`: the content of every answer and the token that closes it, so that the model learns to stop. That token
    is the first template token after the content, in the same turn; if a template puts something between the two
    (Llama-2: a space), everything up to the first of `end_ids`. A newline after it carries no label. `authors_code`:
    every token (official script: the completion-only collator is commented out).

        token       <s>  Hi  ▁[/INST]  It  is  0  .  ▁    </s>  <s>  So
        role        b    u   t         a   a   a  a  t    t     b    u
        supervised  .    .   .         x   x   x  x  x    x     .    .      end_ids = {</s>}
    """
    if variant == "authors_code":
        return torch.ones(len(role_map), dtype=torch.bool)
    if variant != "standard":
        raise InputError(f"variant '{variant}': expected 'standard' or 'authors_code'")
    roles, turns, ids = role_map.roles.tolist(), role_map.turns.tolist(), role_map.ids.tolist()
    supervised = [role == Role.ASSISTANT for role in roles]
    # Where an answer's content ends, the template tokens of the same turn follow (`closing`). The label must reach the
    # one that ends the turn, and must not go beyond it: a newline after it is written by the template, never by the
    # model. If none of them is an end token, the first one closes the answer.
    for last in range(len(ids) - 1):
        if roles[last] != Role.ASSISTANT or roles[last + 1] != Role.TEMPLATE:
            continue
        stop = last + 1
        while stop < len(ids) and roles[stop] == Role.TEMPLATE and turns[stop] == turns[last]:
            stop += 1
        closing = range(last + 1, stop)
        n_labels = next((n for n, position in enumerate(closing, start=1) if ids[position] in end_ids), 1)
        for position in closing[:n_labels]:
            supervised[position] = True
    return torch.tensor(supervised, dtype=torch.bool)


def label_audit(tokenizer: PreTrainedTokenizerBase, role_map: RoleMap, mask: Bool[Tensor, " pos"]) -> pd.DataFrame:
    """One row per token, to look at before training: `token` (as text), `role`, `turn`, `supervised`."""
    return role_table(tokenizer, role_map).assign(supervised=mask.tolist())


def training_examples(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    variant: str = "standard",
    indicator: str | None = None,
    max_length: int = 2048,
    turn_loss: Callable[[Message], TurnLoss] | None = None,
) -> tuple[list[TrainingExample], dict[str, int]]:
    """Token ids and labels of every conversation, and the counts `used`, `truncated`, `too_long`, `unlabelled`.

    turn_loss: of an answer, by the loss of `objective.weighted_loss`; None: all tokens count alike.

    A conversation over `max_length` tokens loses its last turns (`truncated`), or is left out if even the first turn is
    too long (`too_long`); in the `authors_code` variant it is cut at `max_length`, if need be in the middle of a word.
    A conversation without any label is left out (`unlabelled`).

    Raises InputError if none remains.
    """
    end_ids = end_of_turn_ids(tokenizer)
    examples, counts = [], {"used": 0, "truncated": 0, "too_long": 0, "unlabelled": 0}
    render = partial(role_map, tokenizer, indicator=indicator, indicator_space=variant == "authors_code")
    for conversation in conversations:
        try:
            rendered = render(conversation.messages)
        except InputError as error:
            raise InputError(f"conversation {conversation.id}: {error}") from error
        truncated = len(rendered) > max_length
        if truncated and variant == "authors_code":
            rendered = rendered.truncate(max_length)
        elif truncated:
            rendered = _whole_turns(render, conversation, rendered, max_length)
            if rendered is None:
                counts["too_long"] += 1
                continue
        mask = supervised_mask(rendered, variant, end_ids)
        if not mask[1:].any():  # the first token is never predicted
            counts["unlabelled"] += 1
            continue
        counts["truncated"] += truncated
        counts["used"] += 1
        labels = torch.where(mask, rendered.ids, IGNORED)
        weights = None if turn_loss is None else _of_turns(conversation, rendered, turn_loss)
        examples.append(TrainingExample(rendered.ids, labels, rendered.roles, weights))
    if not examples:
        raise InputError(
            f"no conversation to train on, of {len(conversations)}: {counts['too_long']} are longer than max_length "
            f"{max_length} (raise it), {counts['unlabelled']} have no supervised token (give assistant messages, and a "
            "chat template that shows them)"
        )
    return examples, counts


def _of_turns(
    conversation: Conversation, rendered: RoleMap, turn_loss: Callable[[Message], TurnLoss]
) -> Float[Tensor, "pos 2"]:
    """Weight and reference of every token: those of the answer in its turn."""
    turn, of_turn = 0, {}
    for message in conversation.messages:
        turn += message.role == "user"
        if message.role == "assistant":
            its = turn_loss(message)
            of_turn[turn] = its.weight, its.reference
    plain = TurnLoss()
    return torch.tensor([of_turn.get(one, (plain.weight, plain.reference)) for one in rendered.turns.tolist()])


def raw_text_examples(
    tokenizer: PreTrainedTokenizerBase,
    raw_texts: Sequence[Conversation],
    n: int,
    *,
    variant: str = "standard",
    max_length: int = 2048,
) -> list[TrainingExample]:
    """The first `n` pieces of texts without a chat template, each of at most `max_length` tokens; labels as ever.

    A text is a conversation, so what stands in an answer carries labels: plain text is one answer, and all of it does.
    A longer text continues in the next piece. Raises InputError if there are fewer pieces than `n`.
    """
    end_ids = end_of_turn_ids(tokenizer)
    examples: list[TrainingExample] = []
    for text in raw_texts:
        if len(examples) >= n:
            break
        rendered = role_map(tokenizer, text.messages, template=False)
        labels = torch.where(supervised_mask(rendered, variant, end_ids), rendered.ids, IGNORED)
        parts = (part.split(max_length) for part in (rendered.ids, labels, rendered.roles))
        pieces = (TrainingExample(*piece) for piece in zip(*parts, strict=True))
        examples += [piece for piece in pieces if (piece.labels[1:] != IGNORED).any()]
    if len(examples) < n:
        raise InputError(
            f"raw text: {len(examples):,} pieces of at most {max_length:,} tokens, {n:,} are needed; bring more text, "
            "or lower finetune.raw_text_share (--raw-text-share)"
        )
    return examples[:n]


def audit(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    counts: Mapping[str, int],
    console: Console,
    indicator_id: int | None = None,
) -> None:
    """Prints the result of `training_examples`: its counts, the labels by role, and one example (`show_labels`).

    The example is the shortest one with an indicator, or the shortest of all.
    """
    console.print(", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()), markup=False)
    console.print(label_counts(examples, indicator_id).round(3).to_string(index=False), markup=False)
    shown = min(examples, key=lambda e: (indicator_id not in e.input_ids.tolist(), len(e.input_ids)))
    console.print(show_labels(tokenizer, shown, console.color_system is not None), soft_wrap=True)


def show_labels(tokenizer: PreTrainedTokenizerBase, example: TrainingExample, coloured: bool = True) -> Text:
    """The text of an example, to print before training: supervised tokens in green, or in ‹brackets›."""
    supervised = example.labels != IGNORED
    borders = [0, *(supervised.diff().nonzero().flatten() + 1).tolist(), len(supervised)]
    shown = Text()
    for start, stop in itertools.pairwise(borders):
        text = _printable(tokenizer.decode(example.input_ids[start:stop]))
        if coloured:
            shown.append(text, style="black on green" if supervised[start] else "bright_black")
        else:
            shown.append(f"‹{text}›" if supervised[start] else text)
    return shown


def _printable(text: str) -> str:
    """The text without characters that control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def label_counts(examples: Sequence[TrainingExample], indicator_id: int | None = None) -> pd.DataFrame:
    """Supervised tokens of each role, over all examples: role, tokens, supervised, fraction in [0, 1].

    The indicator, whose role is template, has its own row.
    """
    ids, labels, roles = (torch.cat([getattr(e, part) for e in examples]) for part in ("input_ids", "labels", "roles"))
    indicator = ids == (-1 if indicator_id is None else indicator_id)
    parts = [*((role.name.lower(), (roles == role) & ~indicator) for role in Role), ("indicator", indicator)]
    counts = [(name, int(chosen.sum()), int((labels[chosen] != IGNORED).sum())) for name, chosen in parts]
    frame = pd.DataFrame(counts, columns=["role", "tokens", "supervised"])
    frame = frame[frame.tokens > 0].reset_index(drop=True)
    return frame.assign(fraction=frame.supervised / frame.tokens)


def _whole_turns(render: partial, conversation: Conversation, rendered: RoleMap, max_length: int) -> RoleMap | None:
    """The longest beginning of the conversation that ends with an answer and fits, rendered; None if none fits."""
    fits = rendered.truncate(max_length)
    last_turn = int(fits.turns[fits.roles == Role.ASSISTANT].max()) if Role.ASSISTANT in fits.roles else 0
    for n_messages in range(len(conversation.messages), 0, -1):
        beginning = conversation.messages[:n_messages]
        if beginning[-1].role == "assistant" and sum(m.role == "user" for m in beginning) <= last_turn:
            shorter = render(beginning)
            if len(shorter) <= max_length:
                return shorter
    return None


def training_order(
    lengths: Sequence[int], effective_batch: int, n_rows: int, seed: int, group_by_length: bool = True
) -> list[int]:
    """The rows to train on, in order, epoch after epoch: a resumed run sees the same data as an uninterrupted one.

    Grouping sorts by length within 8 batches at a time and shuffles the batches. (Trainer's own "group_by_length"
    runs from the longest to the shortest of 50 batches, and a resumed run draws another order from its second epoch.)
    """
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < n_rows:
        epoch = torch.randperm(len(lengths), generator=generator).tolist()
        if group_by_length:
            pools = _chunks(epoch, effective_batch * BATCHES_GROUPED)
            batches = _chunks([row for pool in pools for row in sorted(pool, key=lengths.__getitem__)], effective_batch)
            shuffled = torch.randperm(len(epoch) // effective_batch, generator=generator).tolist()
            incomplete = batches[len(shuffled) :]
            epoch = [row for batch in [*(batches[n] for n in shuffled), *incomplete] for row in batch]
        order += epoch
    return order[:n_rows]


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def collate(examples: Sequence[TrainingExample], pad_id: int) -> dict[str, Int[Tensor, "batch pos"]]:
    """Pads on the right to the longest of the batch; only `attention_mask` distinguishes padding from text."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    batch = {
        "input_ids": pad([example.input_ids for example in examples], padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(example.input_ids) for example in examples]),
        "labels": pad([example.labels for example in examples], padding_value=IGNORED),
    }
    if any(example.turn_loss is not None for example in examples):
        plain = TurnLoss()
        alike = torch.tensor([plain.weight, plain.reference])
        batch["turn_loss"] = pad([
            alike.expand(len(e.input_ids), 2) if e.turn_loss is None else e.turn_loss for e in examples
        ])  # fmt: skip
    return batch


def pack(examples: Sequence[TrainingExample]) -> dict[str, Tensor]:
    """One row for the whole batch: the examples one after the other, with positions that restart at each.

    There is no padding, and logits are computed only where the next token carries a label (`logits_to_keep`). The loss
    is that of `collate` if the model treats restarted positions as separate texts (`packs_exactly`).
    """
    following = torch.cat([torch.cat([example.labels[1:], torch.tensor([IGNORED])]) for example in examples])
    kept = following != IGNORED
    return {
        "input_ids": torch.cat([example.input_ids for example in examples])[None],
        "position_ids": torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None],
        "logits_to_keep": kept[None],
        "labels": following[kept],
        "shift_labels": following[kept],
    }


@torch.no_grad()
def packs_exactly(model: torch.nn.Module, examples: Sequence[TrainingExample], tolerance: float) -> bool:
    """Whether the model in eval mode gives, up to rounding, the same logits for packed examples as for each alone.

    Long examples are cut at 64 tokens. tolerance: relative, of all logits' Euclidean norm.
    """
    ids = [example.input_ids[:64].to(model.device) for example in examples]
    positions = torch.cat([torch.arange(len(of_one)) for of_one in ids])[None].to(model.device)
    packed = model(input_ids=torch.cat(ids)[None], position_ids=positions, use_cache=False).logits[0].float()
    apart = torch.cat([model(input_ids=of_one[None], use_cache=False).logits[0].float() for of_one in ids])
    return bool((packed - apart).norm() <= tolerance * apart.norm())
