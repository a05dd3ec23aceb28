"""From messages to token ids and exactly one role for every token, made together, for any chat template.

How it is done: `rendering` follows every character of a content through the chat template, `encoding` makes tokens of
the text as a whole, with control tokens only where the template wrote them. A role is then read off a token's
characters.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.roles.encoding import encode
from ctxlib.roles.rendering import Contents, Rendering, left_out, render, spelled_by_template, tokenizer_name

ROLES = ("bos", "system", "user", "assistant", "template")
QUESTION_GROUPS = ("bos", "system", "question", "passage", "assistant", "template")
PLAIN_SEPARATOR = "\n\n"


class Role(IntEnum):
    BOS = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TEMPLATE = 4


@dataclasses.dataclass(frozen=True)
class RoleMap:
    """Token ids of one rendering, with the role and the turn of each.

    `chars` are the characters that a token holds, counted over the contents of all messages and the response prefix
    written one after the other: first and last + 1, or -1, -1 for a token of the template (for `content_alignment`).
    """

    ids: Int[Tensor, " pos"]
    roles: Int[Tensor, " pos"]
    turns: Int[Tensor, " pos"]
    chars: Int[Tensor, "pos 2"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, n: int) -> "RoleMap":
        """The first n tokens."""
        chars = None if self.chars is None else self.chars[:n]
        return RoleMap(self.ids[:n], self.roles[:n], self.turns[:n], chars)


@dataclasses.dataclass(frozen=True)
class Groups:
    """A grouping of the tokens of one rendering: `ids` has one index into `names` per token."""

    names: tuple[str, ...]
    ids: Int[Tensor, " pos"]


@dataclasses.dataclass
class RoleBatch:
    """Padded role maps. Padding has attention 0, role -1 and turn -1."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    roles: Int[Tensor, "batch pos"]
    turns: Int[Tensor, "batch pos"]


def role_map(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    template: bool = True,
    generation_prompt: bool = False,
    response_prefix: str = "",
    indicator: str | None = None,
    indicator_space: bool = False,
    bos: bool = True,
    eos: bool = True,
) -> RoleMap:
    """Token ids of a conversation, each with exactly one role and turn.

    With the template on, the ids are those of `tokenizer.apply_chat_template` as long as no content spells a control
    token (a special token, or an added token that the template writes); such text is encoded as plain text and keeps
    its role. With the template off they are those of the contents joined by `PLAIN_SEPARATOR` (paper: prompt, blank
    line, response prefix), closed by eos after an answer (unless `eos=False`) or by a separator as generation prompt.

    - A token that holds characters of a content has the role of the first of them, also where it straddles a border
      (`?` of the user and `\\n` of the template in one token: user). All others are `template`: markers, separators,
      closing eos, a default system text, the indicator, a `<think>` block that the template writes itself, and a lone
      "▁" that a sentencepiece tokenizer puts in front of text.
    - Text that spells a control token stays its author's, as text: `a</s>b` and `<s>` in a message are never the tokens
      of that name, also with sentencepiece tokenizers whose old settings (`legacy`) would split them off.
    - `bos` is the first token only (whitespace of the template may precede it). It is put in front where the tokenizer
      has one and the template wrote none; `bos=False` leaves that to the template.
    - Turn m is the m-th user message and all that follows up to the next one; what precedes the first, and system text,
      is turn 0. A template token has the highest turn of the contents before it.
    - `indicator` follows, as one token, the content of every user message with `indicated=True` that the template
      keeps; `indicator_space` puts a space between them (official script). Without `indicator` the marks are ignored.
    - `response_prefix` is the beginning of the answer (role assistant), tokenised as a continuation of the prompt: the
      rendering of a last answer, ending there. It includes the generation prompt; a template may trim it.
    - The template alone decides which messages it shows: earlier reasoning or turns may be missing from the map.

    Raises InputError for a tokenizer without a chat template or offsets, a template that fails, that leaves out the
    last message or that rewrites contents so that the origin of a character is lost, an unknown role, invalid Unicode,
    and an indicator that is not a token.
    """
    name = tokenizer_name(tokenizer)
    for number, message in enumerate(messages, start=1):
        if message.role not in ("system", "user", "assistant"):
            raise InputError(f"message {number}: unknown role '{message.role}'; expected system, user or assistant")
        if indicator and message.indicated and message.role != "user":
            raise InputError(f"message {number}: only a user message can carry the indicator, this is '{message.role}'")
    if not messages:
        raise InputError("no messages: a rendering needs one at least")
    if indicator is not None and indicator not in tokenizer.get_added_vocab():
        raise InputError(f"indicator '{indicator}' is not a token of {name}; add it first (add_indicator)")
    if response_prefix and not response_prefix.strip():
        raise InputError("response_prefix is blank: leave it empty or give the first words of the answer")
    if response_prefix:
        messages = [*messages, Message("assistant", response_prefix)]
    contents = Contents(messages)
    if template:
        rendering = render(tokenizer, contents, generation_prompt and not response_prefix)
        (last,) = (rendering.origin >= contents.starts[-2]).nonzero()
        if contents.messages[-1].content.strip() and not len(last):
            raise InputError(left_out(tokenizer))
        if response_prefix:
            rendering = rendering.until(int(last[-1]) + 1)
    else:
        rendering = _join(tokenizer, contents, generation_prompt, response_prefix, eos)
    if indicator is not None:
        rendering = _insert_indicator(rendering, contents, f"{' ' * indicator_space}{indicator}")
    ids, chars = encode(tokenizer, rendering, spelled_by_template(tokenizer))
    bos_place, bos_id = [], tokenizer.bos_token_id
    if bos_id is not None:
        bos_place = ((ids == bos_id) & (chars[:, 0] < 0)).nonzero()[0][:1]
        if not (len(bos_place) and _begins_with(tokenizer.bos_token, rendering)):
            bos_place = [0] * bos
            if bos:
                ids, chars = np.concatenate([[bos_id], ids]), np.concatenate([[[-1, -1]], chars])
    roles, turns = _roles_and_turns(contents, chars[:, 0])
    roles[bos_place] = Role.BOS
    return RoleMap(*map(torch.from_numpy, (ids, roles, turns, chars)))


def content_alignment(on: RoleMap, off: RoleMap) -> Int[Tensor, "pair 2"]:
    """Positions, in both renderings of the same messages, of the tokens that are the same piece of the same content.

    A pair has the same id and the same characters. Left out is what differs at the edges of a content: a word that has
    lost its leading space, a full stop merged with the template's newline, trimmed whitespace.
    Raises InputError for maps that do not know their characters.
    """
    if on.chars is None or off.chars is None:
        raise InputError("content_alignment: needs two maps made by role_map")

    def pieces(of: RoleMap) -> dict[tuple[int, int, int, int], int]:
        seen, positions = {}, {}
        for position, (token, (start, stop)) in enumerate(zip(of.ids.tolist(), of.chars.tolist(), strict=True)):
            if start >= 0:
                nth = seen[start, stop] = seen.get((start, stop), -1) + 1  # the bytes of one character
                positions[start, stop, nth, token] = position
        return positions

    of_off = pieces(off)
    pairs = [(position, of_off[piece]) for piece, position in pieces(on).items() if piece in of_off]
    return torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)


def question_groups(rendered: RoleMap, messages: Sequence[Message]) -> Groups:
    """The roles with the user's tokens split in two, `QUESTION_GROUPS`.

    The question is the last line of the last message, the passage is all other text of the user. Raises InputError for
    a map that does not know its characters.
    """
    if rendered.chars is None:
        raise InputError("question_groups: needs a map made by role_map")
    start = sum(len(message.content) for message in messages[:-1]) + messages[-1].content.rfind("\n") + 1
    return split_user(rendered, rendered.chars[:, 1] > start, QUESTION_GROUPS)


def split_user(rendered: RoleMap, inside: Bool[Tensor, " pos"], names: Sequence[str]) -> Groups:
    """The roles as groups, with the user's tokens in two of them: `names[2]` if `inside`, else `names[3]`.

    names: bos, system, the two groups of the user, assistant, template.
    """
    in_place_of = {Role.BOS: 0, Role.SYSTEM: 1, Role.USER: 3, Role.ASSISTANT: 4, Role.TEMPLATE: 5}
    ids = torch.tensor([in_place_of[role] for role in Role])[rendered.roles]
    return Groups(tuple(names), ids.where((rendered.roles != Role.USER) | ~inside, 2))


def pad_groups(groups: Sequence[Groups]) -> Int[Tensor, "batch pos"]:
    """The ids of groupings of different lengths as one batch, padded on the right with -1."""
    return torch.nn.utils.rnn.pad_sequence([one.ids for one in groups], batch_first=True, padding_value=-1)


def pad_batch(maps: Sequence[RoleMap], pad_id: int, side: str = "left") -> RoleBatch:
    """Role maps of different lengths as one batch, padded on `side`. Raises InputError for no maps, or no such side."""
    if not maps or side not in ("left", "right"):
        raise InputError(f"pad_batch: {len(maps)} maps, side '{side}'; expected one map at least, 'left' or 'right'")

    def pad(tensors: Iterable[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value, padding_side=side)

    return RoleBatch(
        input_ids=pad((map.ids for map in maps), pad_id),
        attention_mask=pad((torch.ones_like(map.ids) for map in maps), 0),
        roles=pad((map.roles for map in maps), -1),
        turns=pad((map.turns for map in maps), -1),
    )


def role_table(tokenizer: PreTrainedTokenizerBase, role_map: RoleMap) -> pd.DataFrame:
    """One row per token, to look at: `token` (its text), `role`, `turn`."""
    return pd.DataFrame(
        {
            "token": [tokenizer.decode([token]) for token in role_map.ids.tolist()],
            "role": [ROLES[role] for role in role_map.roles.tolist()],
            "turn": role_map.turns.tolist(),
        }
    )


def _roles_and_turns(contents: Contents, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Role and turn of tokens, given the origin of each one's first content character (-1: template)."""
    messages = contents.messages
    turns = itertools.accumulate(message.role == "user" for message in messages)
    turns = [0 if message.role == "system" else turn for message, turn in zip(messages, turns, strict=True)]
    roles = [ROLES.index(role) for role in (*(message.role for message in messages), "template")]
    owner = np.searchsorted(contents.starts, first, side="right") - 1  # -1, the last one, for the template
    turn = np.array([*turns, 0])[owner]
    return np.array(roles)[owner], np.where(first < 0, np.maximum.accumulate(turn), turn)


def _begins_with(token: str | None, rendering: Rendering) -> bool:
    """Whether the template wrote the token in front of all else."""
    start = len(rendering.text) - len(rendering.text.lstrip())
    written = token is not None and rendering.text.startswith(token, start)
    return written and bool((rendering.origin[: start + len(token)] < 0).all())


def _join(
    tokenizer: PreTrainedTokenizerBase, contents: Contents, generation_prompt: bool, response_prefix: str, eos: bool
) -> Rendering:
    pieces, origins = [], []
    for n, message in enumerate(contents.messages):
        separator = PLAIN_SEPARATOR if n else ""
        pieces += [separator, message.content]
        origins += [np.full(len(separator), -1), np.arange(*contents.starts[n : n + 2])]
    end = ""
    if contents.messages[-1].role == "assistant" and not response_prefix:
        end = (tokenizer.eos_token or "") if eos else ""
    elif generation_prompt and not response_prefix:
        end = PLAIN_SEPARATOR
    return Rendering("".join([*pieces, end]), np.concatenate([*origins, np.full(len(end), -1)]))


def _insert_indicator(rendering: Rendering, contents: Contents, mark: str) -> Rendering:
    # A mark goes behind the last character of its message that the template shows, wherever the template puts the
    # message. The text is cut at these ends and joined by the mark; the marks' characters get the origin -1:
    #   text    < u > H i \n      ends [0, 5, 6]        < u > H i [ ] \n
    #   origin  - - - 0 1 -       cut at 5, mark "[]"   - - - 0 1 - - -
    users = [n for n, message in enumerate(contents.messages) if message.role == "user"]
    shown = np.searchsorted(contents.starts, rendering.origin, side="right") - 1  # the message of each character, or -1
    places = []
    for n in users:
        if contents.messages[n].indicated:
            places += np.flatnonzero(shown == n)[-1:].tolist()
            if n == users[-1] and n not in shown:
                raise InputError(f"message {n + 1}: no place for the indicator, its content is not in the rendering")
    ends = [0, *sorted(place + 1 for place in places), len(rendering.text)]
    pieces = (rendering.text[start:stop] for start, stop in itertools.pairwise(ends))
    origin = np.insert(rendering.origin, np.repeat(ends, len(mark))[len(mark) : -len(mark)], -1)
    return Rendering(mark.join(pieces), origin)
