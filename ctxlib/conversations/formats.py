"""From a row of any known format to a conversation, or to the reason why it is none."""

import math
import numbers
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ctxlib.conversations.sources import BadRow
from ctxlib.conversations.types import Conversation, Message

FORMATS = {  # format: the key that identifies it
    "messages": "messages",
    "sharegpt": "conversations",
    "instruction": "instruction",
    "mt_bench_101": "history",
}
SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
# Dolly's categories, and whether an answer needs its passage
DOLLY = {
    **dict.fromkeys(("closed_qa", "information_extraction", "summarization"), True),
    **dict.fromkeys(("brainstorming", "classification", "creative_writing", "general_qa", "open_qa"), False),
}
_SYSTEM = ("system", "system_prompt")
_IDS = ("id", "prompt_id", "conversation_id")
# Keys that change what a row or a turn means, and are not read. Others (sources, dates, scores) are ignored.
_ROW_CHANGES = (
    *("context", "passage", "document", "documents", "history", "tools", "functions"),
    *("image", "images", "video", "videos", "audio", "audios", "chosen", "rejected"),
)
_TURN_CHANGES = (
    *("image", "images", "video", "videos", "audio", "audios"),
    *("tool_calls", "function_call", "reasoning_content"),
)
_WEIGHTS = ("weight", "train")  # of a turn in training; 1 and true change nothing
_TYPES = {"kind": str, "depends_on_context": bool, "score": float | int, "indicated": bool}

Placed = tuple[str, Message]  # a message, and the keys that lead to it


def format_of(row: Any) -> str:
    """The format, by the first of its keys that holds something. Raises BadRow if there is none."""
    if not isinstance(row, dict):
        raise _not_an_object(row)
    for format, key in FORMATS.items():
        if _present(row.get(key)):
            return format
    found, expected = ", ".join(map(repr, row)) or "no keys", ", ".join(map(repr, FORMATS.values()))
    raise BadRow("unknown format", "", f"found {found}; expected one of the keys {expected}")


def conversation_of(row: Any, format: str, name: str | None, mend: bool) -> tuple[Conversation, Counter]:
    """The conversation of a row, with what was removed from it, counted by reason. Raises BadRow.

    name: the conversation's id, by default the row's own. mend: without leading answers and an empty system text.
    """
    if not isinstance(row, dict):
        raise _not_an_object(row)
    key = FORMATS[format]
    _check_keys(row, _ROW_CHANGES, "", but=("context",) if format == "instruction" else (key,))
    if isinstance(row.get("label"), bool):
        raise _not_read("label", "it marks good and bad answers")
    turns = _instruction(row) if format == "instruction" else _turns(row, key)
    turns = _with_system(row, turns)
    removed = Counter()
    if mend:
        if turns and turns[0][1].role == "system" and not turns[0][1].content.strip():
            turns, removed["empty system text removed"] = turns[1:], 1
        start = 1 if turns and turns[0][1].role == "system" else 0
        leading = next((n for n, (_, m) in enumerate(turns[start:]) if m.role != "assistant"), len(turns) - start)
        if leading:
            turns = [*turns[:start], *turns[start + leading :]]
            removed["leading assistant turn removed"] = leading
    _check(turns, key)
    return Conversation(name or given_id(row) or "", tuple(message for _, message in turns)), removed


def given_id(row: Any) -> str | None:
    """The id that a row has, None if it has none. Raises BadRow for one of another type, or no valid Unicode."""
    key = next((key for key in _IDS if _present(row.get(key))), None) if isinstance(row, dict) else None
    if key is None:
        return None
    value = row[key]
    if not isinstance(value, str | numbers.Real):
        raise BadRow("wrong type", key, f"expected a text or a number, got {type(value).__name__}")
    return _valid(str(value), key)


def _not_an_object(row: Any) -> BadRow:
    hint = 'write {"conversations": [...]} around each list' if isinstance(row, list) else "correct the row"
    return BadRow("not an object", "row", f"expected keys and values, the row is a {type(row).__name__}; {hint}")


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _says_something(value: Any) -> bool:
    return _present(value) and bool(value.strip() if isinstance(value, str) else value)


def _not_read(where: str, why: str) -> BadRow:
    return BadRow("key not read", where, f"{why}; write it into the texts, or remove the key")


def _check_keys(of: dict, keys: Sequence[str], where: str, but: Sequence[str] = ()) -> None:
    for key in keys:
        if key not in but and _says_something(of.get(key)):
            raise _not_read(f"{where}{key}", f"it changes what the {'turn' if where else 'row'} means")


def _instruction(row: dict) -> list[Placed]:
    """Alpaca's keys, and Dolly's for the same things: context for input, response for output."""
    instruction = _string(row, "instruction", "instruction")
    source, target = _either(row, "input", "context"), _either(row, "output", "response")
    context = _string(row, source, source) if _present(row.get(source)) else ""
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    category = row.get("category")
    kind = category if isinstance(category, str) and category in DOLLY else None
    answer = Message("assistant", _string(row, target, target), kind, DOLLY.get(kind) if kind else None)
    return [("instruction", Message("user", prompt)), (target, answer)]


def _either(row: dict, key: str, synonym: str) -> str:
    """The one of two keys that holds something; the first if none does."""
    if not _says_something(row.get(synonym)):
        return synonym if key not in row and synonym in row else key
    if _says_something(row.get(key)):
        raise _not_read(synonym, f"the row has {key}, too")
    return synonym


def _turns(row: dict, key: str) -> list[Placed]:
    turns = row.get(key)
    if turns is None or isinstance(turns, str | dict) or not hasattr(turns, "__iter__"):
        raise BadRow("missing turns", key, f"expected a list of turns, got {type(turns).__name__}")
    if key == "history":
        return [pair for n, turn in enumerate(turns) for pair in _exchange(turn, f"{key}[{n}]")]
    role_key, text_key = ("from", "value") if key == "conversations" else ("role", "content")
    return [(f"{key}[{n}]", _message(turn, role_key, text_key, f"{key}[{n}]")) for n, turn in enumerate(turns)]


def _exchange(turn: Any, where: str) -> list[Placed]:
    if not isinstance(turn, dict):
        raise BadRow("not an object", where, f"expected user and bot, got {type(turn).__name__}")
    said = (("user", "user"), ("bot", "assistant"))
    return [(f"{where}.{key}", Message(role, _string(turn, key, f"{where}.{key}"))) for key, role in said]


def _message(turn: Any, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("not an object", where, f"expected {role_key} and {text_key}, got {type(turn).__name__}")
    speaker = _string(turn, role_key, f"{where}.{role_key}")
    if speaker not in SPEAKERS:
        raise BadRow("unknown role", f"{where}.{role_key}", f"'{speaker}' is none of {', '.join(SPEAKERS)}; rename it")
    content = _string(turn, text_key, f"{where}.{text_key}")
    _check_keys(turn, _TURN_CHANGES, f"{where}.")
    for key in _WEIGHTS:
        if _present(turn.get(key)) and turn[key] != 1:
            raise _not_read(f"{where}.{key}", "every answer is learned with the same weight")
    if role_key == "from":
        return Message(SPEAKERS[speaker], content)
    ours = {key: turn[key] for key in _TYPES if _present(turn.get(key))}
    for key, value in ours.items():
        if not isinstance(value, _TYPES[key]):
            raise BadRow("wrong type", f"{where}.{key}", f"got {value!r}; correct or remove it")
    return Message(SPEAKERS[speaker], content, **ours)


def _with_system(row: dict, turns: list[Placed]) -> list[Placed]:
    """With the row's own system text in front."""
    keys = [key for key in _SYSTEM if _says_something(row.get(key))]
    if not keys:
        return turns
    text = _string(row, keys[0], keys[0])
    if turns and turns[0][1].role == "system":
        if turns[0][1].content == text:
            return turns
        raise _not_read(keys[0], "the first turn is another system text")
    return [(keys[0], Message("system", text)), *turns]


def _string(of: dict, key: str, where: str) -> str:
    if key not in of:
        raise BadRow("missing key", where, f"found {', '.join(map(str, of)) or 'no keys'}; rename one, or add it")
    value = of[key]
    if not isinstance(value, str):
        raise BadRow("not a text", where, f"expected a string, got {type(value).__name__}")
    return _valid(value, where)


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode", where, "it holds a lone surrogate; repair it") from None
    return text


def _check(turns: Sequence[Placed], key: str) -> None:
    """A first system text at most, then user and assistant in turn, all with content."""
    empty = ((place, message) for place, message in turns if not message.content.strip())
    if (found := next(empty, None)) is not None:
        raise BadRow("empty turn", found[0], f"the {found[1].role}'s text is blank; fill it in")
    roles = [message.role for _, message in turns]
    start = 1 if roles[:1] == ["system"] else 0
    if "system" in roles[start:]:
        place = turns[roles.index("system", start)][0]
        raise BadRow("system text after the first message", place, "move it to the front")
    if roles[start : start + 1] == ["assistant"]:
        raise BadRow("starts with the assistant", turns[start][0], "put the user's turn before it")
    if "user" not in roles:
        raise BadRow("no user turn", key, "add one")
    for n in range(start + 1, len(roles)):
        if roles[n] == roles[n - 1]:
            raise BadRow("same role twice in a row", turns[n][0], f"two turns of the {roles[n]}; join them")
