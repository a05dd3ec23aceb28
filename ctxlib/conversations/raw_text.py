"""Plain text, for training without a chat template: .txt files, or rows with the key `text`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctxlib.conversations.sources import BadRow, is_hub_dataset, rows
from ctxlib.conversations.types import Conversation, Message
from ctxlib.files import read_text, text_files
from ctxlib.params import InputError, expanded


def load_raw_texts(source: str | Path, *, split: str = "train", revision: str | None = None) -> list[Conversation]:
    """The texts of a .txt file, of the .txt files of a folder, or of rows with the key `text` (as of C4, WikiText).

    Each is a conversation of one answer, which `role_map` renders as it is with `template=False`. Blank texts are left
    out. Raises InputError for a source without any text, a file that cannot be read, and a row without the key.
    """
    texts = dict(_texts(source, split, revision))
    found = [Conversation(place, (Message("assistant", text),)) for place, text in texts.items() if text.strip()]
    if not found:
        raise InputError(f"{source}: holds no text; name a .txt file, a folder of them, or rows with the key 'text'")
    return found


def _texts(source: str | Path, split: str, revision: str | None) -> Iterator[tuple[str, str]]:
    """Each text with its place in words."""
    path = expanded(source)
    plain = [path] if path.suffix.lower() == ".txt" else text_files(path)
    if plain and not is_hub_dataset(source):
        yield from ((file.name, read_text(file)) for file in plain)
        return
    for place, row in rows(source, split, revision):
        yield place, _text_of(row, f"{source}, {place}")


def _text_of(row: Any, place: str) -> str:
    if isinstance(row, BadRow):
        raise InputError(f"{row.at(place)}; {row.remedy}")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "no keys"
        raise InputError(f"{place}: no key 'text' with a text, found: {keys}; rename the one that holds the text")
    return row["text"]
