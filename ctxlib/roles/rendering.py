"""A chat template as text that knows, for every character, the message it comes from.

The template is rendered a second time with contents whose characters are replaced by private code points, each of which
names the character it stands for; to the template they look and behave like the plain text. What comes out says where
every character comes from, and must read exactly as the plain rendering: nothing is searched for, and a template that
hides the origin of a character is an error, never a guess.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int
from jinja2.compiler import CodeGenerator
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.roles.limits import TemplateLimit, bounded, time_limit

_BASE = 0x20000  # code points from here on stand for characters of the contents while a template is rendered
_CAPACITY = 0x110000 - _BASE
_PRIVATE = re.compile(f"[{chr(_BASE)}-{chr(0x10FFFF)}]")
_contents: ContextVar[np.ndarray] = ContextVar("contents")  # what the private code points stand for


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A text, and for each of its characters the place in the contents (>= 0) or -1 (written by the template)."""

    text: str
    origin: Int[np.ndarray, " char"]

    def until(self, stop: int) -> "Rendering":
        """The first `stop` characters."""
        return Rendering(self.text[:stop], self.origin[:stop])

    def masked(self, mask: str) -> str:
        """The text with `mask` in place of every character of the contents."""
        return _text(np.where(self.origin < 0, _codes(self.text), ord(mask)))


class Contents:
    """The contents of all messages, one after the other: a character's place in there is its origin.

    `starts` holds each message's first place, and one more for the end; `codes` the code points. Raises InputError for
    invalid Unicode.
    """

    def __init__(self, messages: Sequence[Message]):
        self.messages = messages
        self.starts = np.array([*itertools.accumulate((len(message.content) for message in messages), initial=0)])
        try:
            self.codes = _codes("".join(message.content for message in messages))
        except UnicodeEncodeError as error:
            number = int(np.searchsorted(self.starts, error.start, side="right"))
            raise InputError(f"message {number}: invalid Unicode (a lone surrogate); repair or remove it") from error

    def traced(self) -> list[dict[str, str]]:
        """The messages as a template reads them, with private code points for the characters."""
        spans = zip(self.messages, itertools.pairwise(self.starts.tolist()), strict=True)
        return [{"role": m.role, "content": _Traced(_private()[slice(*span)], m.content)} for m, span in spans]


def render(tokenizer: PreTrainedTokenizerBase, contents: Contents, generation_prompt: bool) -> Rendering:
    """The text that `apply_chat_template` yields, and where its characters come from.

    Raises InputError for a tokenizer without a chat template, a template that is faulty, that fails, or that rewrites
    contents so that the origin of a character is lost, and for more than 983,040 characters.
    """
    name, chat_template = tokenizer_name(tokenizer), template_source(tokenizer)
    if not chat_template:
        raise InputError(f"{name} has no chat template: set models.chat_template, or turn the template off")
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        raise InputError(f"{name} writes chats by code of its own, which cannot be followed; load it with a template")
    if len(contents.codes) > _CAPACITY:
        raise InputError(f"{len(contents.codes):,} characters in one conversation; at most {_CAPACITY:,}: split it")
    plain, followed = _plainly_compiled(chat_template), _compiled(chat_template)
    given = _variables(tokenizer.special_tokens_map, generation_prompt)
    token = _contents.set(contents.codes)
    try:
        with time_limit():
            text = plain.render(messages=_as_dicts(contents.messages), **given)
            traced = followed.render(messages=contents.traced(), **given)
            codes = _codes(traced)
    except Exception as error:  # a template is foreign code: it can raise anything
        raise InputError(_why_not(name, contents.messages, chat_template, error)) from error
    finally:
        _contents.reset(token)
    if _plain(traced) != text:
        raise InputError(
            f"the chat template of {name} rewrites contents (changes case, escapes, draws at random, …): the roles of "
            "their characters are lost; use a template that writes contents as they are"
        )
    return Rendering(text, np.maximum(codes - _BASE, -1))


def _why_not(name: str, messages: Sequence[Message], chat_template: str, error: Exception) -> str:
    if isinstance(error, TemplateLimit):
        return f"the chat template of {name} is refused: {error}; use another template"
    roles = ", ".join(message.role for message in messages)
    said = " ".join(str(error).split()) or "no reason given"
    needs = [word for word in ("tools", "documents") if re.search(rf"\b{word}\b", chat_template)]
    remedy = "change the messages or the template"
    if _wants_parts(chat_template):
        remedy = _OF_PARTS
    elif needs and isinstance(error, (TypeError, jinja2.UndefinedError)):
        remedy = f"it asks for {' and '.join(needs)}, of which chats here have none: use a template that does without"
    return f"the chat template of {name} cannot express messages of {roles}: {type(error).__name__}: {said}; {remedy}"


_OF_PARTS = "it asks for contents as parts (type, text), which are texts here: use a template that takes texts"


def _wants_parts(chat_template: str) -> bool:
    """Whether a template looks for the type of parts of a content and has no branch for a text."""
    return bool(re.search(r"(\[['\"]type['\"]\]|\.type\b)", chat_template)) and "is string" not in chat_template


def left_out(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to say of a template that leaves out the last message."""
    remedy = _OF_PARTS if _wants_parts(template_source(tokenizer)) else "use another one"
    return f"the chat template of {tokenizer_name(tokenizer)} leaves out the last message; {remedy}"


def spelled_by_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's source, and what it writes around contents in conversations of every role ('' without one)."""
    chat_template = template_source(tokenizer)
    return _spelled(chat_template, tuple(tokenizer.special_tokens_map.items())) if chat_template else ""


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The default chat template, '' without one. Raises InputError if there are several and none is the default."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError as error:
        names = ", ".join(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else "several"
        raise InputError(
            f"{tokenizer_name(tokenizer)}: none of its chat templates ({names}) is the default; save the one to use as "
            "a .jinja file and name it as models.chat_template (--chat-template)"
        ) from error


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's name in error messages: its folder, or its class."""
    return tokenizer.name_or_path or type(tokenizer).__name__


@functools.lru_cache(maxsize=32)
def _spelled(chat_template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    spelled = [chat_template]
    for roles in (("user", "assistant"), ("system", "user", "assistant"), ("user",), ("system", "user")):
        messages = _as_dicts([Message(role, "\0") for role in roles])
        for generation_prompt in (False, True):
            given = _variables(dict(special_tokens), generation_prompt)
            with contextlib.suppress(Exception), time_limit():  # what a template refuses it does not write
                spelled.append(_plainly_compiled(chat_template).render(messages=messages, **given))
    return "\0".join(spelled)


def _variables(special_tokens: dict[str, str], generation_prompt: bool) -> dict[str, Any]:
    """What a template is given besides the messages; a stopped clock, so that two renderings agree."""
    clock = datetime.datetime.now().strftime
    fixed = {"tools": None, "documents": None, "strftime_now": clock, "add_generation_prompt": generation_prompt}
    return {**fixed, **special_tokens}


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


@functools.cache
def _private() -> str:
    """All private code points: the n-th stands for the n-th character of the contents."""
    return _text(np.arange(_BASE, 0x110000))


def _decoded(codes: np.ndarray) -> np.ndarray:
    """Code points of a rendering, with those that stand for the contents replaced by what they stand for."""
    private = codes >= _BASE
    decoded = codes.copy()
    decoded[private] = _contents.get()[codes[private] - _BASE]
    return decoded


def _plain(value):
    """The text that a traced one stands for; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._plain if isinstance(value, _Traced) else value


def _lift(value):
    """A string that holds traced characters, as a traced one."""
    if isinstance(value, str) and not isinstance(value, _Traced) and not value.isascii() and _PRIVATE.search(value):
        return _Traced(value)
    return value


class _Traced(str):
    """A str of private code points that a template sees as the text they stand for, `_plain`.

    What a template cuts out of it or joins to it is traced as well. A method that is not listed here works on the
    private code points: what it yields still names its origin, and where that differs from what the plain text yields,
    the rendering is refused. In another case (`lower()`) it answers in that case, and is refused if it is written.

    The contents "Hi" and "Yo" are places 0 to 3, so the template is given the messages as the code points
    U+20000 U+20001 and U+20002 U+20003. It writes "<u> " and the first one stripped: "<u> " U+20000 U+20001; read back,
    that is "<u> Hi" with the origins -1 -1 -1 -1 0 1.
    """

    def __new__(cls, raw: str, plain: str | None = None):
        traced = str.__new__(cls, raw)
        traced._plain = _text(_decoded(_codes(raw))) if plain is None else plain
        return traced

    def __str__(self):
        return self

    def __getitem__(self, key):
        return _Traced(str.__getitem__(self, key), self._plain[key])

    def __iter__(self):
        return map(_Traced, str.__iter__(self), self._plain)

    def __add__(self, other):
        return _Traced(str.__add__(self, other), self._plain + _plain(other))

    def __radd__(self, other):
        return _Traced(str.__add__(other, self), other + self._plain)

    def join(self, pieces):
        pieces = list(pieces)
        return _Traced(str.join(self, pieces), self._plain.join(map(_plain, pieces)))

    def lstrip(self, chars=None):
        return self[len(self) - len(self._plain.lstrip(_plain(chars))) :]

    def rstrip(self, chars=None):
        return self[: len(self._plain.rstrip(_plain(chars)))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix):
        return self[: len(self) - len(suffix)] if self.endswith(suffix) else self

    def split(self, sep=None, maxsplit=-1):
        return self._cut(self._plain.split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._cut(self._plain.rsplit(_plain(sep), maxsplit), sep)

    def splitlines(self, keepends=False):
        lines = self._cut(self._plain.splitlines(keepends=True), "")
        return lines if keepends else [line[: len(line._plain.splitlines()[0])] for line in lines]

    def partition(self, sep):
        start = self.find(sep)
        return (self, "", "") if start < 0 else self._parted(start, start + len(sep))

    def rpartition(self, sep):
        start = self.rfind(sep)
        return ("", "", self) if start < 0 else self._parted(start, start + len(sep))

    def replace(self, old, new, count=-1):
        if old:
            return _Traced(new, _plain(new)).join(self.split(old, count))
        return _Traced(str.replace(self, old, new, count), self._plain.replace(old, _plain(new), count))

    def _parted(self, start, stop):
        return self[:start], self[start:stop], self[stop:]

    def _cut(self, pieces, sep):
        """The plain pieces of a split, cut out of the traced text."""
        cut, stop = [], 0
        for n, piece in enumerate(pieces):
            start = self._plain.index(piece, stop) if sep is None else stop + len(sep) * (n > 0)
            stop = start + len(piece)
            cut.append(self[start:stop])
        return cut


def _asked_of_the_plain_text(name: str) -> Callable:
    asked = getattr(str, name)

    def method(self, *args):
        return asked(self._plain, *map(_plain, args))

    return method


def _in_another_case(name: str) -> Callable:
    def method(self):
        return _Traced(self, getattr(self._plain, name)())

    return method


for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__contains__", "startswith", "endswith"),
    *("find", "rfind", "index", "rindex", "count", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower"),
    *("isidentifier", "isnumeric", "isprintable", "isspace", "istitle", "isupper"),
):
    setattr(_Traced, _name, _asked_of_the_plain_text(_name))
for _name in ("lower", "upper", "casefold", "capitalize", "title", "swapcase"):
    setattr(_Traced, _name, _in_another_case(_name))


class _CodeGenerator(CodeGenerator):
    """Makes jinja's `~` join as the environment does."""

    def visit_Concat(self, node, frame):
        self.write("concat(map(str, (")
        for piece in node.nodes:
            self.visit(piece, frame)
            self.write(", ")
        self.write(")))")


def _environment() -> jinja2.Environment:
    """transformers' own, with limits."""
    environment = bounded(_compile_jinja_template("").environment)
    environment.code_generator_class = _CodeGenerator
    # jinja's ChainMap would be copied key by key for every rendering
    environment.make_globals = lambda given: environment.globals | (given or {})
    return environment


@functools.lru_cache(maxsize=32)
def _plainly_compiled(chat_template: str) -> jinja2.Template:
    try:
        with time_limit():
            return _environment().from_string(chat_template)
    except Exception as error:  # constants are folded when it is compiled
        raise InputError(f"the chat template is faulty: {' '.join(str(error).split())}; repair it") from error


@functools.lru_cache(maxsize=32)
def _compiled(chat_template: str) -> jinja2.Template:
    """The template in the same environment, lifting what operators, filters and calls yield."""
    environment = _environment()
    literals = environment.parse(chat_template).find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const))
    if any(_PRIVATE.search(str(value)) for literal in literals for _, value in literal.iter_fields()):
        raise InputError("the chat template holds characters from U+20000 on, which are needed to follow the contents")

    def lifting(function: Callable) -> Callable:
        return functools.wraps(function)(lambda *args, **kwargs: _lift(function(*args, **kwargs)))

    environment.concat = lifting(environment.concat)
    environment.call = lifting(environment.call)
    environment.call_binop = lifting(environment.call_binop)
    environment.filters = {name: lifting(function) for name, function in environment.filters.items()}
    return environment.from_string(chat_template)
