"""The datasets' loaders and cleaners: every dropped row is counted."""

import json
import math
import numbers
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from ctxlib.conversations.types import Conversation, Corpus, Message, no_rows
from ctxlib.files import AGAIN, check_is_itself, hub_remedy, one_line, read_json, replacing
from ctxlib.params import InputError, expanded, locate, nowhere

FORMATS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "instruction": "instruction",
}  # format: the key that identifies it
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


def load_conversations(
    source: str | Path,
    *,
    format: str | None = None,
    on_bad_row: str = "error",
    max_bad_rows: float = 1.0,
    remove_refusals: bool = False,
    limit: int | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """Conversations of a .json, .jsonl or .parquet file, of a folder of them, or of a dataset on the hub.

    Formats, recognised by the keys of the first good row unless forced by `format`: `sharegpt` (conversations: from,
    value), `messages` (messages: role, content; also the format of `save_conversations`) and `instruction`
    (instruction, input, output; instruction and input are joined by an empty line). A row without an id is named by its
    number, from 1. The files of a folder are read in the order of their names; of a hub dataset, the `split` at the
    `revision` is read.

    A row is bad if a line is no JSON, a key is missing, a text is not a string or not valid Unicode, a role is unknown,
    a turn is empty, it starts with the assistant, has no user turn, has the same role twice in a row or a system text
    after the first message, or has the id of an earlier row. With `on_bad_row="error"` the first one raises; with
    `"drop"` leading answers (paper: chunks without a user instruction) and an empty system text are removed; every
    other bad row is dropped whole, counted by reason and listed. A fraction of bad rows over `max_bad_rows` raises.
    `remove_refusals` drops conversations with a refusal among the answers (`REFUSALS`, anywhere in them, in upper or
    lower case), in either mode; they are listed but do not count as bad. `limit` stops after this many good ones.

    Raises InputError, naming file, row and key, for a bad row, too many of them, an unreadable file, a file in none of
    the formats, and a dataset that cannot be loaded from the hub.
    """
    if on_bad_row not in ("error", "drop"):
        raise InputError(f"on_bad_row: expected 'error' or 'drop', got '{on_bad_row}'")
    if not 0 <= max_bad_rows <= 1:
        raise InputError(f"max_bad_rows: expected a fraction from 0 to 1, got {max_bad_rows}")
    if format is not None and format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got '{format}'")
    conversations, dropped, listed = {}, Counter(), []
    n_rows, bad_rows = 0, []
    for n_rows, (place, row) in enumerate(_rows(source, split, revision), start=1):
        try:
            if isinstance(row, _BadRow):
                raise row
            format = format or _format(row)
            conversation, removed = _conversation(row, format, n_rows, mend=on_bad_row == "drop")
            if conversation.id in conversations:
                raise _BadRow("duplicate id", "id", f"'{conversation.id}' names an earlier row too; give each its own")
        except _BadRow as bad:
            if on_bad_row == "error":
                hint = ", or drop such rows (on_bad_row: drop)" if format else ""
                raise InputError(f"{source}, {bad.at(place)}: {bad.remedy}{hint}") from None
            dropped[bad.reason] += 1
            bad_rows.append(f"{bad.at(place)}: {bad.remedy}")
            listed.append((place, bad.key, bad.reason, bad.remedy))
            continue
        dropped.update(removed)
        if remove_refusals and (refusals := [n for n, m in enumerate(conversation.messages) if _is_refusal(m)]):
            dropped["refusal"] += 1
            listed.append((place, f"message {refusals[0] + 1}", "refusal", "removed on request"))
            continue
        conversations[conversation.id] = conversation
        if len(conversations) == limit:
            break
    if n_rows == 0:
        raise InputError(f"{source}: holds no rows")
    if len(bad_rows) == n_rows:
        raise InputError(f"{source}: every row is bad, from the first on: {bad_rows[0]}")
    if len(bad_rows) > max_bad_rows * n_rows:
        share = f"{len(bad_rows) / n_rows:.1%}, at most {max_bad_rows:.1%} may be"
        first = "; ".join([*bad_rows[:3], *(["…"] if len(bad_rows) > 3 else [])])
        remedy = "repair them, or allow more (max_bad_rows)"
        raise InputError(f"{source}: {len(bad_rows):,} of {n_rows:,} rows are bad ({share}): {first}: {remedy}")
    counts = pd.DataFrame({"reason": list(dropped), "n": list(dropped.values())}).astype({"reason": str, "n": int})
    dropped_rows = pd.DataFrame(listed, columns=no_rows().columns, dtype=str)
    return Corpus(tuple(conversations.values()), counts, str(source), dropped_rows, format)


def save_conversations(corpus: Corpus, path: str | Path) -> None:
    """Writes the conversations, whole or not at all, so that `load_conversations` reads them back.

    Raises InputError for another suffix than .jsonl, .json or .parquet, and if the disk is full.
    """
    path = expanded(path)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise InputError(f"{path}: expected the name of a .jsonl, .json or .parquet file")
    rows = [
        {
            "id": conversation.id,
            "messages": [
                {key: value for key, value in asdict(message).items() if value is not None}
                for message in conversation.messages
            ],
        }
        for conversation in corpus.conversations
    ]
    with replacing(path) as beside:
        if path.suffix == ".parquet":
            pd.DataFrame(rows, columns=["id", "messages"]).to_parquet(beside, index=False)
            return
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            if path.suffix == ".json":
                json.dump(rows, file, ensure_ascii=False, indent=1)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def is_hub_dataset(source: str | Path) -> bool:
    """True for a dataset on the hub, see `locate`."""
    return locate(source) == "hub"


def data_files(source: str | Path) -> list[Path]:
    """The files that `load_conversations` reads, in its order: the file itself, or the data files of a folder.

    Raises InputError if there are none.
    """
    path = expanded(source)
    if not path.exists():
        raise InputError(nowhere(source))
    kinds = ", ".join(_READERS)
    if path.is_dir():
        files = sorted(inner for inner in path.iterdir() if inner.suffix in _READERS and inner.is_file())
        if not files:
            raise InputError(f"{source}: no data file in this folder (looked for {kinds})")
        return files
    if path.suffix not in _READERS:
        raise InputError(f"{source}: expected a .json, .jsonl or .parquet file, a folder of them, or a hub id")
    return [path]


@dataclass
class _BadRow(Exception):
    reason: str
    key: str
    remedy: str

    def at(self, place: str) -> str:
        return f"{place}, {self.key}: {self.reason}" if self.key else f"{place}: {self.reason}"


def _rows(source: str | Path, split: str, revision: str | None) -> Iterator[tuple[str, object]]:
    """Each row, or its `_BadRow`, with its place in words."""
    if is_hub_dataset(source):
        yield from hub_rows(str(source), split, "or name a local .json, .jsonl or .parquet file", revision)
        return
    files = data_files(source)
    for path in files:
        try:
            check_is_itself(path)
            for place, row in _READERS[path.suffix](path):
                yield (place if len(files) == 1 else f"{path.name}, {place}"), row
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except OSError as error:
            raise InputError(f"{path}: not readable: {one_line(error)}; {AGAIN}") from error


def hub_rows(name: str, split: str, remedy: str, revision: str | None = None) -> Iterator[tuple[str, object]]:
    """Each row of a dataset on the hub, with its place in words.

    Loading scripts are never run: the rows of such a dataset come from the hub's own conversion to Parquet.
    Raises InputError, ending with the `remedy`, if they cannot be loaded.
    """
    import datasets  # takes seconds to import, and few need it

    try:
        try:
            rows = datasets.load_dataset(name, split=split, revision=revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            rows = datasets.load_dataset(name, split=split, revision="refs/convert/parquet")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = f"{' '.join(str(error).split()).rstrip('.')}; {hub_remedy(name, 'dataset', revision, error)}"
        raise InputError(f"{name}: no file here, and not loadable from the hub: {why}, {remedy}") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    rows = read_json(path, f"{AGAIN}, or repair it")
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, got {type(rows).__name__}; wrap the rows in [ ]")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parsed(line)
                if isinstance(row, _BadRow) and not line.endswith(b"\n"):
                    row = _BadRow("cut short", "", f"the file ends within this line; {AGAIN}")
                yield f"line {number}", row


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _BadRow("not UTF-8", "", f"byte {error.start} of the line is wrong; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        return _BadRow("malformed JSON", "", f"{getattr(error, 'msg', error)}; repair or remove it")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        frame = pd.read_parquet(path)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a Parquet file, or cut short: {one_line(error)}; {AGAIN}") from error
    yield from ((f"row {number}", row) for number, row in enumerate(frame.to_dict("records"), start=1))


_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}


def _format(row: object) -> str:
    keys = list(row) if isinstance(row, dict) else []
    for format, key in FORMATS.items():
        if key in keys:
            return format
    found, expected = ", ".join(map(repr, keys)) or "no keys", ", ".join(map(repr, FORMATS.values()))
    raise _BadRow("unknown format", "", f"found {found}; expected one of the keys {expected}")


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
    return Conversation(_identity(row, number), tuple(messages)), removed


def _identity(row: dict, number: int) -> str:
    key = next((key for key in ("id", "prompt_id", "conversation_id") if _present(row.get(key))), None)
    value = number if key is None else row[key]
    if not isinstance(value, str | numbers.Real):
        raise _BadRow("wrong type", key, f"expected a text or a number, got {type(value).__name__}")
    return str(value)


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
    if key not in of:
        raise _BadRow("missing key", where, f"found {', '.join(map(str, of)) or 'no keys'}; rename one, or add it")
    value = of[key]
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
