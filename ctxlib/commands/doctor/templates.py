"""A folder of chat templates: which of them show who wrote which token, which are refused, and which are wrong.

A template is wrong if its map of roles is: if characters of a message lie in tokens of another role (a leak), or in
none. This is checked independently of the map's own bookkeeping, against the text that transformers renders and the
text that the tokens of a role spell.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import AddedToken

from ctxlib.commands.doctor.talk import TALK, dicts, with_odd_text
from ctxlib.conversations import Message
from ctxlib.files import read_text
from ctxlib.params import InputError, expanded
from ctxlib.roles import Role, RoleMap, role_map

VERDICTS = ("wrong", "refused", "supported")
CONVERSATIONS = {  # a template has to express the first
    "question and answer": TALK[1:3],
    "several turns": TALK[1:],
    "a system text": TALK,
    "odd text": tuple(with_odd_text(TALK[1:])),
    "a text that spells markers": (Message("user", "a</s>b <s> <|user|> [INST] <|im_end|> c"), TALK[2]),
}
# What templates write as tokens: <|im_start|>, <start_of_turn>, [INST], <<SYS>>, </s>, <｜User｜>
_MARKER = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<[a-z]+_of_[a-z]+>|</?[a-z_]{1,12}>|\[/?[A-Z_]{2,24}\]|<</?SYS>>")


def examine_templates(folder: str | Path, tokenizer: Any) -> pd.DataFrame:
    """One row per .jinja file of a folder, in the order of names: template, verdict (`VERDICTS`), finding.

    The `tokenizer` is extended by the tokens that a template spells, which its own tokenizer would have. Raises
    InputError for a folder that is absent or holds no .jinja file, and for a file that is not readable.
    """
    folder = expanded(folder)
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jinja", ".jinja2"))
    if not files:
        raise InputError(f"{folder}: no .jinja file in this folder; name the folder that holds chat templates")
    rows = [(file.name, *examine_template(read_text(file), tokenizer, file.name)) for file in files]
    return pd.DataFrame(rows, columns=["template", "verdict", "finding"], dtype=str)


def examine_template(template: str, tokenizer: Any, name: str = "this template") -> tuple[str, str]:
    """Verdict and finding of one template, which findings call `name`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.name_or_path = name
    tokenizer.chat_template = template
    known = tokenizer.get_vocab()
    spelled = [marker for marker in dict.fromkeys(_MARKER.findall(template)) if marker not in known]
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=True) for marker in spelled])
    refused, left_out = {}, []
    for what, messages in CONVERSATIONS.items():
        try:
            role_of = role_map(tokenizer, messages, bos=False)
        except InputError as error:
            refused[what] = str(error)
            continue
        if faults := list(_faults(tokenizer, messages, role_of)):
            return "wrong", f"{what}: {faults[0]}"
        left_out += [] if all(_shown(tokenizer, messages)) else [what]
    first = next(iter(CONVERSATIONS))
    if first in refused:
        return "refused", refused[first]
    found = [f"refuses {', '.join(refused)}"] if refused else []
    found += [f"leaves out messages of {', '.join(left_out)}"] if left_out else []
    return "supported", "; ".join(found) or "expresses all conversations"


def _shown(tokenizer: Any, messages: Sequence[Message]) -> list[bool]:
    """Which messages are in the text that transformers renders; a template may trim them."""
    text = tokenizer.apply_chat_template(dicts(messages), tokenize=False)
    return [message.content.strip() in text for message in messages]


def _faults(tokenizer: Any, messages: Sequence[Message], role_of: RoleMap) -> Iterator[str]:
    """The faults of a map: ids that differ from transformers', or tokens that spell less or more than the messages."""
    spells_markers = any(_MARKER.search(message.content) for message in messages)
    theirs = tokenizer.apply_chat_template(dicts(messages), return_dict=True)["input_ids"]
    if role_of.ids.tolist() != theirs and not spells_markers:
        yield "the ids are not those of apply_chat_template"
    shown = _shown(tokenizer, messages)
    for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT):
        name = role.name.lower()
        expected = "".join(m.content for m, there in zip(messages, shown, strict=True) if there and m.role == name)
        ids = role_of.ids[role_of.roles == role].tolist()
        said = _letters(tokenizer.decode(ids))
        if said != _letters(expected):
            yield f"the tokens of {name} spell {said!r:.60} instead of {_letters(expected)!r:.60}"


def _letters(text: str) -> str:
    """Letters and digits alone: tokens may join punctuation, and decoding may move spaces."""
    return "".join(character for character in text if character.isalnum())
