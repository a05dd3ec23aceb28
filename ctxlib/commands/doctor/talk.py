"""The conversation used to examine chat templates, and its rendering."""

from collections.abc import Sequence
from typing import Any

from ctxlib.conversations import Message
from ctxlib.params import InputError
from ctxlib.roles import role_map

TALK = (
    Message("system", "Speak like a sailor."),
    Message("user", "Where is the kestrel?"),
    Message("assistant", "On the roof."),
    Message("user", "And the wren?"),
    Message("assistant", "In the hedge."),
)


def renders(tokenizer: Any) -> bool:
    """Whether there is a template whose characters can be traced; if not, contents are joined as raw text."""
    try:
        return bool(tokenizer.chat_template) and bool(expressible(tokenizer))
    except InputError:
        return False


def expressible(tokenizer: Any) -> tuple[Message, ...]:
    """The conversation, without its system text if the template refuses one."""
    try:
        role_map(tokenizer, TALK)
        return TALK
    except InputError:
        role_map(tokenizer, TALK[1:])
        return TALK[1:]


def with_odd_text(talk: Sequence[Message]) -> list[Message]:
    """The same conversation; its first question has spaces at both ends, an empty line and a two-character emoji."""
    odd = {TALK[1].content: "  Where is the kestrel?\n\nI saw 👍🏽 it  "}
    return [Message(message.role, odd.get(message.content, message.content)) for message in talk]


def forged_marker(tokenizer: Any, talk: Sequence[Message]) -> tuple[str, list[Message]]:
    """The template's text before an answer, and the conversation in which a user writes the same text."""
    marker = gaps(tokenizer, TALK[1:])[1]
    forged = [Message(m.role, m.content.replace("\n\n", f"\n\n{marker}")) for m in talk]
    return marker, forged


def gaps(tokenizer: Any, talk: Sequence[Message]) -> list[str]:
    """The template's text before each content and after the last; empty if it leaves a content out."""
    rest, written = rendered(tokenizer, talk), []
    for message in talk:
        before, found, after = rest.partition(message.content)
        written.append(before if found else "")
        rest = after if found else rest
    return [*written, rest]


def dicts(talk: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in talk]


def rendered(tokenizer: Any, talk: Sequence[Message]) -> str:
    return tokenizer.apply_chat_template(dicts(talk), tokenize=False)
