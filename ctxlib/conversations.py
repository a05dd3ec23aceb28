"""Messages and conversations: the datasets' loaders and cleaners. Text, never tokens; every dropped row counted."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from ctxlib.params import InputError

FORMATS = {"messages": "messages", "sharegpt": "conversations", "instruction": "instruction"}  # the key that tells it
SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
REFUSALS = (  # as in the public "unfiltered" cleanings of ShareGPT and WizardLM
    "as an ai language model",
    "as a language model",
    "as an artificial intelligence",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i'm sorry, i cannot",
    "i cannot fulfill",
    "i can't assist with",
    "i cannot assist with",
)


@dataclass(frozen=True)
class Message:
    """One utterance. `kind` and `depends_on_context` (truth, where it is known) and `score` belong to answers;
    `indicated` belongs to the user message that gets the indicator."""

    role: str
    content: str
    kind: str | None = None
    depends_on_context: bool | None = None
    score: float | None = None
    indicated: bool = False


@dataclass(frozen=True)
class Conversation:
    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Corpus:
    """Conversations, and how many rows or turns were dropped for which reason (columns reason, n)."""

    conversations: tuple[Conversation, ...]
    dropped: pd.DataFrame
    source: str

    def __len__(self) -> int:
        return len(self.conversations)


@dataclass(frozen=True)
class Question:
    """A prompt that ends with the user's message, and what is needed to score its answer."""

    id: str
    family: str  # needle, qa, facts, instructions
    kind: str
    messages: tuple[Message, ...]
    response_prefix: str = ""
    answers: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    memory_answer: str | None = None
    context_length_tokens: int | None = None
    depth_percent: float | None = None


def load_conversations(
    path: str | Path, *, format: str | None = None, on_bad_row: str = "error", remove_refusals: bool = False
) -> Corpus:
    """Conversations of a .json, .jsonl or .parquet file.

    Formats, told by the keys of the first row unless forced by `format`: `sharegpt` (conversations: from, value),
    `messages` (messages: role, content; also what `save_conversations` writes) and `instruction` (instruction, input,
    output; instruction and input are joined by an empty line). A row without an id is named by its number, from 1.

    A row is bad if a key is missing, a text is not a string or not valid Unicode, a role is unknown, a turn is empty,
    it starts with the assistant, has no user turn, has the same role twice in a row or a system text after the first
    message, or has the id of an earlier row. With `on_bad_row="error"` the first one raises; with `"drop"` leading
    answers (paper: chunks without a user instruction) and an empty system text are taken away, every other bad row is
    dropped whole, and all are counted by reason. `remove_refusals` drops conversations with a refusal among the answers
    (`REFUSALS`, anywhere in them, whatever the case), in either mode.

    Raises InputError, naming file, row and key, for a bad row, an unreadable file, or a file in none of the formats.
    """
    path = Path(path)
    if on_bad_row not in ("error", "drop"):
        raise InputError(f"on_bad_row: expected 'error' or 'drop', got '{on_bad_row}'")
    if format is not None and format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got '{format}'")
    conversations, dropped = {}, Counter()
    for number, (place, row) in enumerate(_rows(path), start=1):
        format = format or _format(path, place, row)
        try:
            conversation, removed = _conversation(row, format, number, mend=on_bad_row == "drop")
            if conversation.id in conversations:
                raise _BadRow("duplicate id", "id", f"'{conversation.id}' names an earlier row too; give each its own")
        except _BadRow as bad:
            if on_bad_row == "error":
                hint = 'or drop such rows (on_bad_row="drop")'
                raise InputError(f"{path}, {place}, {bad.key}: {bad.reason}: {bad.remedy}, {hint}") from None
            dropped[bad.reason] += 1
            continue
        dropped.update(removed)
        if remove_refusals and any(_is_refusal(message) for message in conversation.messages):
            dropped["refusal"] += 1
            continue
        conversations[conversation.id] = conversation
    if format is None:
        raise InputError(f"{path}: holds no rows")
    counts = pd.DataFrame({"reason": list(dropped), "n": list(dropped.values())}).astype({"reason": str, "n": int})
    return Corpus(tuple(conversations.values()), counts, str(path))


def save_conversations(corpus: Corpus, path: str | Path) -> None:
    """Writes the conversations as JSONL, beside the target and then renamed; `load_conversations` reads them back."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for conversation in corpus.conversations:
                messages = [
                    {key: value for key, value in asdict(message).items() if value is not None}
                    for message in conversation.messages
                ]
                file.write(json.dumps({"id": conversation.id, "messages": messages}, ensure_ascii=False) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@dataclass
class _BadRow(Exception):
    reason: str
    key: str
    remedy: str


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each row, with the words that name its place in the file."""
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a .json, .jsonl or .parquet file")
    try:
        yield from readers[path.suffix](path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: not readable: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "one row a line belongs in a .jsonl file" if error.msg == "Extra data" else "repair or remove it"
        raise InputError(f"{path}, line {error.lineno}: malformed JSON ({error.msg}); {hint}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, got {type(rows).__name__}; wrap the rows in [ ]")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: malformed JSON ({error.msg}); repair or remove it") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a Parquet file: {error}") from error
    yield from ((f"row {number}", row) for number, row in enumerate(frame.to_dict("records"), start=1))


def _format(path: Path, place: str, row: object) -> str:
    keys = list(row) if isinstance(row, dict) else []
    for format, key in FORMATS.items():
        if key in keys:
            return format
    raise InputError(
        f"{path}, {place}: unknown format: found {', '.join(map(repr, keys)) or 'no keys'}; "
        f"expected one of the keys {', '.join(map(repr, FORMATS.values()))}"
    )


def _conversation(row: object, format: str, number: int, mend: bool) -> tuple[Conversation, Counter]:
    if not isinstance(row, dict):
        raise _BadRow("not an object", "row", f"expected keys and values, got {type(row).__name__}")
    messages = _instruction(row) if format == "instruction" else _turns(row, FORMATS[format])
    removed = Counter()
    if mend:
        if messages and messages[0].role == "system" and not messages[0].content.strip():
            messages, removed["empty system text removed"] = messages[1:], 1
        start = 1 if messages and messages[0].role == "system" else 0
        leading = next((n for n, m in enumerate(messages[start:]) if m.role != "assistant"), len(messages) - start)
        if leading:
            messages = [*messages[:start], *messages[start + leading :]]
            removed["leading assistant turn removed"] = leading
    _check(messages, FORMATS[format])
    identity = next((row[key] for key in ("id", "prompt_id", "conversation_id") if _present(row.get(key))), number)
    return Conversation(str(identity), tuple(messages)), removed


def _present(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _instruction(row: dict) -> list[Message]:
    instruction, output = _string(row, "instruction", "instruction"), _string(row, "output", "output")
    context = _string(row, "input", "input") if _present(row.get("input")) else ""
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [Message("user", prompt), Message("assistant", output)]


def _turns(row: dict, key: str) -> list[Message]:
    turns = row.get(key)
    if turns is None or isinstance(turns, str | dict) or not hasattr(turns, "__iter__"):
        raise _BadRow("missing turns", key, f"expected a list of turns, got {type(turns).__name__}")
    role_key, text_key = ("from", "value") if key == "conversations" else ("role", "content")
    return [_message(turn, role_key, text_key, f"{key}[{n}]") for n, turn in enumerate(turns)]


def _message(turn: object, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _BadRow("not an object", where, f"expected {role_key} and {text_key}, got {type(turn).__name__}")
    speaker = _string(turn, role_key, f"{where}.{role_key}")
    if speaker not in SPEAKERS:
        raise _BadRow("unknown role", f"{where}.{role_key}", f"'{speaker}' is none of {', '.join(SPEAKERS)}; rename it")
    content = _string(turn, text_key, f"{where}.{text_key}")
    if role_key == "from":
        return Message(SPEAKERS[speaker], content)
    ours = {key: turn[key] for key in _TYPES if _present(turn.get(key))}
    for key, value in ours.items():
        if not isinstance(value, _TYPES[key]):
            raise _BadRow("wrong type", f"{where}.{key}", f"got {value!r}; correct or remove it")
    return Message(SPEAKERS[speaker], content, **ours)


_TYPES = {"kind": str, "depends_on_context": bool, "score": float | int, "indicated": bool}


def _string(of: dict, key: str, where: str) -> str:
    value = of.get(key)
    if not isinstance(value, str):
        raise _BadRow("not a text", where, f"expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow("invalid Unicode", where, "it holds a lone surrogate; repair it") from None
    return value


def _check(messages: Sequence[Message], key: str) -> None:
    """A first system text at most, then user and assistant in turn, all with content."""
    empty = (n for n, message in enumerate(messages) if not message.content.strip())
    if (n := next(empty, None)) is not None:
        raise _BadRow("empty turn", f"{key}[{n}]", f"the {messages[n].role}'s text is blank; fill it in")
    roles = [message.role for message in messages]
    start = 1 if roles[:1] == ["system"] else 0
    if "system" in roles[start:]:
        n = roles.index("system", start)
        raise _BadRow("system text after the first message", f"{key}[{n}]", "move it to the front")
    if roles[start : start + 1] == ["assistant"]:
        raise _BadRow("starts with the assistant", f"{key}[{start}]", "put the user's turn before it")
    if "user" not in roles:
        raise _BadRow("no user turn", key, "add one")
    for n in range(start + 1, len(roles)):
        if roles[n] == roles[n - 1]:
            raise _BadRow("same role twice in a row", f"{key}[{n}]", f"two turns of the {roles[n]}; join them")


def _is_refusal(message: Message) -> bool:
    text = message.content.lower().replace("’", "'")
    return message.role == "assistant" and any(refusal in text for refusal in REFUSALS)
