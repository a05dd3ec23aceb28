"""From messages to token ids and exactly one role for every token, made together, for any chat template.

How it is done. The template is rendered a second time with contents whose characters are replaced by private code
points, each of which names the character it stands for; to the template they look and behave like the plain text. What
comes out says where every character comes from, and must read exactly as the plain rendering: nothing is searched for,
and a template that hides the origin of a character is an error, never a guess. The text is then encoded once, as a
whole, by a twin of the tokenizer whose control tokens (special tokens, the indicator, added tokens that the template
writes) have secret names. Only what the template wrote is given these names, so text of a user that looks like a
control token stays text.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from enum import IntEnum
from weakref import WeakKeyDictionary

import jinja2
import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from jinja2.compiler import CodeGenerator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from ctxlib.conversations import Message
from ctxlib.params import InputError

ROLES = ("bos", "system", "user", "assistant", "template")
PARTS = ("bos", "question", "passage", "assistant", "template")  # what the roles mean after `question_apart`
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
      closing eos, a default system text, the indicator.
    - `bos` is the first token only. It is put in front where the tokenizer has one and the template wrote none;
      `bos=False` leaves that to the template.
    - Turn m is the m-th user message and all that follows up to the next one; what precedes the first, and system text,
      is turn 0. A template token has the turn of the content before it.
    - `indicator` follows, as one token, the content of every user message with `indicated=True` that the template
      keeps; `indicator_space` puts a space between them (official script). Without `indicator` the marks are ignored.
    - `response_prefix` is the beginning of the answer (role assistant), tokenised as a continuation of the prompt: the
      rendering of a last answer, ending there. It includes the generation prompt; a template may trim it.
    - The template alone decides which messages it shows: earlier reasoning or turns may be missing from the map.

    Raises InputError for a tokenizer without a chat template or offsets, a template that fails, that leaves out the
    last message or that rewrites contents so that the origin of a character is lost, an unknown role, invalid Unicode,
    and an indicator that is not a token.
    """
    for number, message in enumerate(messages, start=1):
        if message.role not in ("system", "user", "assistant"):
            raise InputError(f"message {number}: unknown role '{message.role}'; expected system, user or assistant")
        if indicator and message.indicated and message.role != "user":
            raise InputError(f"message {number}: only a user message can carry the indicator, this is '{message.role}'")
    if not messages:
        raise InputError("no messages: a rendering needs one at least")
    if indicator is not None and indicator not in tokenizer.get_added_vocab():
        raise InputError(f"indicator '{indicator}' is not a token of {_name(tokenizer)}; add it first (add_indicator)")
    if response_prefix and not response_prefix.strip():
        raise InputError("response_prefix is blank: leave it empty or give the first words of the answer")
    if response_prefix:
        messages = [*messages, Message("assistant", response_prefix)]
    contents = _Contents(messages)
    if template:
        text, origin = _render(tokenizer, contents, generation_prompt and not response_prefix)
        last = np.flatnonzero(origin >= contents.starts[-2])
        if contents.messages[-1].content.strip() and not len(last):
            raise InputError(f"the chat template of {_name(tokenizer)} leaves out the last message; use another one")
        if response_prefix:
            text, origin = text[: last[-1] + 1], origin[: last[-1] + 1]
    else:
        text, origin = _join(tokenizer, contents, generation_prompt, response_prefix, eos)
    if indicator is not None:
        text, origin = _insert_indicator(text, origin, contents, f"{' ' * indicator_space}{indicator}")
    ids, chars, first = _encode(tokenizer, text, origin)
    if tokenizer.bos_token_id is not None:
        written = len(ids) > 0 and ids[0] == tokenizer.bos_token_id and first[0] < 0
        if bos and not written:
            ids, first = np.insert(ids, 0, tokenizer.bos_token_id), np.insert(first, 0, -1)
            chars = np.insert(chars, 0, -1, axis=0)
        has_bos = written or bos
    else:
        has_bos = False
    roles, turns = contents.roles_and_turns(first)
    if has_bos:
        roles[0] = Role.BOS
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


def question_apart(rendered: RoleMap, messages: Sequence[Message]) -> RoleMap:
    """The same tokens with the user's told apart: the question, the last line of the last message, and all the rest.

    The roles are then to be read as `PARTS`: the passage stands in the user's place, the question in that of a system
    text. Raises InputError for a map that does not know its characters or that has a system text.
    """
    if rendered.chars is None or (rendered.roles == Role.SYSTEM).any():
        raise InputError("question_apart: needs a map made by role_map, of messages without a system text")
    start = sum(len(message.content) for message in messages[:-1]) + messages[-1].content.rfind("\n") + 1
    is_question = (rendered.roles == Role.USER) & (rendered.chars[:, 1] > start)
    return dataclasses.replace(rendered, roles=torch.where(is_question, int(Role.SYSTEM), rendered.roles))


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
    """One row a token, to look at: `token` (its text), `role`, `turn`."""
    return pd.DataFrame(
        {
            "token": [tokenizer.decode([token]) for token in role_map.ids.tolist()],
            "role": [ROLES[role] for role in role_map.roles.tolist()],
            "turn": role_map.turns.tolist(),
        }
    )


class _Contents:
    """The contents of all messages, one after the other: a character's place in there is its origin."""

    def __init__(self, messages: Sequence[Message]):
        self.messages = messages
        self.starts = np.cumsum([0, *(len(message.content) for message in messages)])  # one more than messages
        try:
            self.codes = _codes("".join(message.content for message in messages))
        except UnicodeEncodeError as error:
            number = int(np.searchsorted(self.starts, error.start, side="right"))
            raise InputError(f"message {number}: invalid Unicode (a lone surrogate); repair or remove it") from error

    def traced(self) -> list[dict[str, str]]:
        """The messages as a template reads them, with private code points for the characters."""
        raw = _text(np.arange(len(self.codes)) + _BASE)
        spans = zip(self.messages, self.starts, self.starts[1:], strict=False)
        return [{"role": message.role, "content": _Traced(raw[start:stop])} for message, start, stop in spans]

    def roles_and_turns(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Role and turn of tokens, given the origin of each one's first content character (-1: template)."""
        roles = np.array([Role[message.role.upper()] for message in self.messages] + [Role.TEMPLATE])
        turns = np.cumsum([message.role == "user" for message in self.messages])
        turns = np.append(np.where(roles[:-1] == Role.SYSTEM, 0, turns), 0)
        owner = np.where(first < 0, len(self.messages), np.searchsorted(self.starts, first, side="right") - 1)
        turn = turns[owner]
        return roles[owner], np.where(first < 0, np.maximum.accumulate(turn), turn)


# Text with origins: a str, and for each of its characters the place in the contents (>= 0) or -1 (template).


def _render(tokenizer: PreTrainedTokenizerBase, contents: _Contents, generation_prompt: bool) -> tuple[str, np.ndarray]:
    if not tokenizer.chat_template:
        raise InputError(f"{_name(tokenizer)} has no chat template: set models.chat_template, or turn the template off")
    plain = [{"role": message.role, "content": message.content} for message in contents.messages]
    compiled = _compiled(_template_text(tokenizer))
    token = _contents.set(contents.codes)
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation_prompt)
        raw = compiled.render(
            messages=contents.traced(),
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
        codes = _codes(raw)
    except Exception as error:  # a template is foreign code: it can raise anything
        roles = ", ".join(message.role for message in contents.messages)
        raise InputError(
            f"the chat template of {_name(tokenizer)} cannot express messages of {roles}: "
            f"{type(error).__name__}: {str(error) or 'no reason given'}; change the messages or the template"
        ) from error
    finally:
        _contents.reset(token)
    origin = np.where(codes >= _BASE, codes - _BASE, -1)
    if _text(_decoded(codes, contents.codes)) != text:
        raise InputError(
            f"the chat template of {_name(tokenizer)} rewrites contents (changes case, escapes, …): the roles of their "
            "characters are lost; use a template that writes contents as they are"
        )
    return text, origin


def _join(
    tokenizer: PreTrainedTokenizerBase, contents: _Contents, generation_prompt: bool, response_prefix: str, eos: bool
) -> tuple[str, np.ndarray]:
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
    return "".join([*pieces, end]), np.concatenate([*origins, np.full(len(end), -1)])


def _insert_indicator(text: str, origin: np.ndarray, contents: _Contents, mark: str) -> tuple[str, np.ndarray]:
    users = [n for n, message in enumerate(contents.messages) if message.role == "user"]
    for n in users:
        if not contents.messages[n].indicated:
            continue
        shown = np.flatnonzero((origin >= contents.starts[n]) & (origin < contents.starts[n + 1]))
        if len(shown):
            end = shown[-1] + 1
            text, origin = text[:end] + mark + text[end:], np.insert(origin, end, np.full(len(mark), -1))
        elif n == users[-1]:
            raise InputError(f"message {n + 1}: no place for the indicator, its content is not in the rendering")
    return text, origin


# Characters that say where they come from.

_BASE = 0x20000  # code points from here on stand for characters of the contents while a template is rendered
_CAPACITY = 0x110000 - _BASE
_PRIVATE = re.compile(f"[{chr(_BASE)}-{chr(0x10FFFF)}]")
_contents: ContextVar[np.ndarray] = ContextVar("contents")  # what the private code points stand for


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _decoded(codes: np.ndarray, contents: np.ndarray) -> np.ndarray:
    private = codes >= _BASE
    decoded = codes.copy()
    decoded[private] = contents[codes[private] - _BASE]
    return decoded


def _plain(value):
    """The text that a traced one stands for; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return _text(_decoded(_codes(value), _contents.get())) if isinstance(value, _Traced) else value


def _lift(value):
    """A string in which traced characters have come to lie, as a traced one."""
    plain_type = isinstance(value, str) and not isinstance(value, _Traced)
    return _Traced(value) if plain_type and _PRIVATE.search(value) else value


class _Traced(str):
    """A str of private code points that a template sees as the text they stand for.

    What a template cuts out of it or joins to it is traced as well. A method that is not listed here works on the
    private code points: what it yields still names its origin, and where that differs from what the plain text yields,
    the rendering is refused.
    """

    def __str__(self):
        return self

    def __getitem__(self, key):
        return _Traced(str.__getitem__(self, key))

    def __iter__(self):
        return map(_Traced, str.__iter__(self))

    def __add__(self, other):
        return _Traced(str.__add__(self, other))

    def __radd__(self, other):
        return _Traced(str.__add__(other, self))

    def __mod__(self, values):
        return _Traced(str.__mod__(self, values))

    def __rmod__(self, pattern):
        return _Traced(str.__mod__(pattern, self))

    def __mul__(self, times):
        return _Traced(str.__mul__(self, times))

    __rmul__ = __mul__

    def join(self, pieces):
        return _Traced(str.join(self, pieces))

    def lstrip(self, chars=None):
        return self[len(self) - len(_plain(self).lstrip(_plain(chars))) :]

    def rstrip(self, chars=None):
        return self[: len(_plain(self).rstrip(_plain(chars)))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep=None, maxsplit=-1):
        return self._cut(_plain(self).split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._cut(_plain(self).rsplit(_plain(sep), maxsplit), sep)

    def splitlines(self, keepends=False):
        lines = self._cut(_plain(self).splitlines(keepends=True), "")
        return lines if keepends else [line[: len(_plain(line).splitlines()[0])] for line in lines]

    def partition(self, sep):
        start = self.find(sep)
        return (self, "", "") if start < 0 else (self[:start], sep, self[start + len(sep) :])

    def rpartition(self, sep):
        start = self.rfind(sep)
        return ("", "", self) if start < 0 else (self[:start], sep, self[start + len(sep) :])

    def replace(self, old, new, count=-1):
        return _Traced(new).join(self.split(old, count)) if old else _Traced(str.replace(self, old, new, count))

    def _cut(self, pieces, sep):
        """The plain pieces of a split, cut out of the traced text."""
        plain, cut, stop = _plain(self), [], 0
        for n, piece in enumerate(pieces):
            start = plain.index(piece, stop) if sep is None else stop + len(sep) * (n > 0)
            stop = start + len(piece)
            cut.append(self[start:stop])
        return cut


def _asked_of_the_plain_text(name: str) -> Callable:
    asked = getattr(str, name)

    def method(self, *args):
        return asked(_plain(self), *map(_plain, args))

    return method


for _name_ in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__contains__", "startswith", "endswith"),
    *("find", "rfind", "index", "rindex", "count", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower"),
    *("isnumeric", "isprintable", "isspace", "istitle", "isupper"),
):
    setattr(_Traced, _name_, _asked_of_the_plain_text(_name_))


class _CodeGenerator(CodeGenerator):
    """Makes jinja's `~` join as the environment does."""

    def visit_Concat(self, node, frame):
        self.write("concat(map(str, (")
        for piece in node.nodes:
            self.visit(piece, frame)
            self.write(", ")
        self.write(")))")


@functools.lru_cache(maxsize=32)
def _compiled(chat_template: str) -> jinja2.Template:
    """The template in transformers' own environment, where strings that come out of filters and calls are lifted."""
    if _PRIVATE.search(chat_template):
        raise InputError("the chat template holds characters from U+20000 on, which are needed to follow the contents")
    try:
        environment = _compile_jinja_template(chat_template).environment.overlay()
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is faulty: {error}") from error

    def lifting(function: Callable) -> Callable:
        return functools.wraps(function)(lambda *args, **kwargs: _lift(function(*args, **kwargs)))

    environment.code_generator_class = _CodeGenerator
    environment.concat = lifting("".join)
    environment.call = lifting(environment.call)
    environment.filters = {name: lifting(function) for name, function in environment.filters.items()}
    return environment.from_string(chat_template)


# Encoding: control tokens only where the template wrote them.

_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # "noncharacters" of Unicode, never to be interchanged
_CONTROL = -2  # origin of the characters of a control token


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A twin of a tokenizer in which the control tokens have names that no content spells."""

    backend: Tokenizer | None  # None for a slow tokenizer
    control: re.Pattern
    names: dict[str, str]
    original_ids: dict[int, int]  # of the tokens whose id differs in the twin


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple, _Encoder]] = WeakKeyDictionary()


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [pos], content characters [pos, 2] (-1: none) and first content character [pos] of each token."""
    guard = next((guard for guard in _GUARDS if guard not in text), None)
    if guard is None:
        raise InputError("the text holds all of the noncharacters U+FDD0 to U+FDEF; remove one of them")
    borders = np.flatnonzero(np.diff(origin < 0)) + 1
    runs = list(zip([0, *borders], [*borders, len(text)], strict=True)) if text else []
    control = _control_tokens(tokenizer, "\0".join(text[start:stop] for start, stop in runs if origin[start] < 0))
    key = (guard, control, len(tokenizer))
    of_tokenizer = _encoders.setdefault(tokenizer, {})
    if key not in of_tokenizer:
        of_tokenizer[key] = _encoder(tokenizer, guard, control)
    encoder = of_tokenizer[key]

    pieces, origins = [], []
    for start, stop in runs:
        done = start
        for found in encoder.control.finditer(text, start, stop) if origin[start] < 0 else ():
            name = encoder.names[found.group()]
            pieces += [text[done : found.start()], name]
            origins += [origin[done : found.start()], np.full(len(name), _CONTROL)]
            done = found.end()
        pieces.append(text[done:stop])
        origins.append(origin[done:stop])
    origin = np.concatenate([*origins, [-1]])

    named = "".join(pieces)
    if encoder.backend is None:
        tokens, offsets = _encode_by_pieces(tokenizer, named, {name: token for token, name in encoder.names.items()})
    else:
        encoding = encoder.backend.encode(named, add_special_tokens=False)
        tokens, offsets = [encoder.original_ids.get(token, token) for token in encoding.ids], encoding.offsets
    ids = np.array(tokens, dtype=np.int64)
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    places = np.arange(len(origin))
    following = np.minimum.accumulate(np.where(origin >= 0, places, len(origin) - 1)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(origin >= 0, places, -1))
    controls = np.concatenate([[0], np.cumsum(origin == _CONTROL)])
    holds_content = (following[starts] < stops) & (controls[stops] == controls[starts])
    first = np.where(holds_content, origin[following[starts]], -1)
    last = np.where(holds_content, origin[preceding[np.maximum(stops - 1, 0)]], -2)
    return ids, np.stack([first, last + 1], axis=1), first


def _control_tokens(tokenizer: PreTrainedTokenizerBase, written: str) -> frozenset[str]:
    """Special tokens, and the other added tokens that the template wrote or spells, unless they are whitespace."""
    template = _template_text(tokenizer) if tokenizer.chat_template else ""
    special, ordinary = set(tokenizer.all_special_tokens), set()
    for token in tokenizer.added_tokens_decoder.values():
        (special if token.special else ordinary).add(token.content)
    return frozenset(special | {t for t in ordinary if t.strip() and (t in template or t in written)})


def _encoder(tokenizer: PreTrainedTokenizerBase, guard: str, control: frozenset[str]) -> _Encoder:
    names = {token: f"{guard}{n}{guard}" for n, token in enumerate(sorted(control))}

    longest_first = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
    if not tokenizer.is_fast:
        return _Encoder(None, longest_first, names, {})

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), *score] for piece, *score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    state["post_processor"] = state["truncation"] = state["padding"] = None  # it would trim offsets
    ids = {}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        ids[token["content"]] = token["id"]
    twin = Tokenizer.from_str(json.dumps(state))
    in_twin = {twin.token_to_id(content): token for content, token in ids.items()}
    return _Encoder(twin, longest_first, names, {token: own for token, own in in_twin.items() if token != own})


_AS_SPACE = bytes.maketrans(b"\t\n\v\f\r", b" " * 5)  # as sentencepiece's usual normalisation has it


def _encode_by_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, control: dict[str, str]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets with a slow (sentencepiece) tokenizer: each piece lies right behind the one before it."""
    ids, offsets, start = [], [], 0
    for part in re.split(f"({'|'.join(control) or '(?!)'})", text):
        if part in control:
            ids.append(tokenizer.convert_tokens_to_ids(control[part]))
            offsets.append((start, start + len(part)))
        elif part:
            text_bytes, place = part.encode().translate(_AS_SPACE), 0
            character = np.repeat(np.arange(len(part)), [len(c.encode()) for c in part]) + start
            for piece in tokenizer.tokenize(part, split_special_tokens=True):
                byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
                surface = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
                surface = surface.translate(_AS_SPACE)
                while not text_bytes.startswith(surface, place):
                    if surface[:1] == b" " and text_bytes.startswith(surface[1:], place):  # a space put in front
                        surface = surface[1:]
                    elif text_bytes[place : place + 1] == b" ":  # a space left out
                        place += 1
                    else:
                        raise InputError(
                            f"{_name(tokenizer)}: a slow tokenizer that normalises text, its tokens cannot be placed; "
                            "save it as tokenizer.json (PreTrainedTokenizerFast)"
                        )
                stop = place + len(surface)
                ids.append(tokenizer.convert_tokens_to_ids(piece))
                offsets.append((int(character[place]), int(character[stop - 1]) + 1) if surface else (start, start))
                place = stop
        start += len(part)
    return ids, offsets


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{_name(tokenizer)}: no default chat template among its several; name one") from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__
