"""Conversations of any source, read one at a time: every dropped row is counted and listed."""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlib.conversations.formats import FORMATS, conversation_of, format_of, given_id
from ctxlib.conversations.sources import BadRow, data_files, is_hub_dataset, reads_by_row, rows
from ctxlib.conversations.types import Conversation, Corpus, Message, no_rows
from ctxlib.files import replacing
from ctxlib.params import InputError, expanded

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


STREAMED_FROM = 64 * 2**20  # bytes of files; loaded whole, they take about 1.3 times as much memory


@dataclass
class Ledger:
    """What `iter_conversations` dropped so far, and the format that it found."""

    n_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[str, str, str, str]] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)
    format: str | None = None
    ids: set[str] | None = None  # those that rows have, looked up when the first row has none

    def counts(self) -> pd.DataFrame:
        """How many rows or turns were dropped or removed: columns reason, n."""
        columns = {"reason": list(self.dropped), "n": list(self.dropped.values())}
        return pd.DataFrame(columns).astype({"reason": str, "n": int})

    def dropped_rows(self) -> pd.DataFrame:
        """The rows dropped whole, in their order: columns place, key, reason, remedy."""
        return pd.DataFrame(self.listed, columns=no_rows().columns, dtype=str)


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

    Formats, recognised by the keys of the first good row that hold something, unless forced by `format`: `sharegpt`
    (conversations: from, value), `messages` (messages: role, content; also the format of `save_conversations`),
    `instruction` (instruction, input or context, output or response; instruction and input are joined by an empty
    line; Dolly's `category` becomes the answer's kind, and says whether it depends on its context) and `mt_bench_101`
    (history: user, bot). The text of a row's `system` or `system_prompt` becomes the first message. A row without an id
    is named by its number, from 1, or by `row N` if that is the id of another row. Files may be packed (.jsonl.gz), and
    the files of a folder are read in the order of their names; of a hub dataset, the `split` at the `revision` is read.

    A row is bad if a line is no JSON, a key is missing, a text is not a string or not valid Unicode, a role is unknown,
    a turn is empty, it starts with the assistant, has no user turn, has the same role twice in a row or a system text
    after the first message, has the id of an earlier row, or a key that changes what it means and is not read (images,
    tools, passages apart from the turns, chosen and rejected answers, weights of turns). With `on_bad_row="error"` the
    first one raises; with `"drop"` leading answers (paper: chunks without a user instruction) and an empty system text
    are removed; every other bad row is dropped whole, counted by reason and listed. A fraction of bad rows over
    `max_bad_rows` raises. `remove_refusals` drops conversations with a refusal among the answers (`REFUSALS`, anywhere
    in them, in upper or lower case), in either mode; they are listed but do not count as bad. `limit` stops after this
    many good ones.

    Raises InputError, naming file, row and key, for a bad row, too many of them, an unreadable file, a file in none of
    the formats, a folder with data that would not be read, and a dataset that cannot be loaded from the hub.
    """
    ledger = Ledger()
    conversations = tuple(
        iter_conversations(
            source,
            format=format,
            on_bad_row=on_bad_row,
            max_bad_rows=max_bad_rows,
            remove_refusals=remove_refusals,
            limit=limit,
            split=split,
            revision=revision,
            ledger=ledger,
        )
    )
    return Corpus(conversations, ledger.counts(), str(source), ledger.dropped_rows(), ledger.format)


def iter_conversations(
    source: str | Path,
    *,
    format: str | None = None,
    on_bad_row: str = "error",
    max_bad_rows: float = 1.0,
    remove_refusals: bool = False,
    limit: int | None = None,
    split: str = "train",
    revision: str | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Conversation]:
    """The conversations of `load_conversations` one at a time, without holding a .jsonl or .parquet file in memory.

    Only one id per conversation and the dropped rows are kept; the `ledger` is filled in on the way. Too many bad rows
    raise at the end. Raises InputError as `load_conversations` does.
    """
    if on_bad_row not in ("error", "drop"):
        raise InputError(f"on_bad_row: expected 'error' or 'drop', got '{on_bad_row}'")
    if not 0 <= max_bad_rows <= 1:
        raise InputError(f"max_bad_rows: expected a fraction from 0 to 1, got {max_bad_rows}")
    if format is not None and format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got '{format}'")
    ledger = Ledger() if ledger is None else ledger
    ledger.format, seen = format, set()
    for number, (place, row) in enumerate(rows(source, split, revision), start=1):
        ledger.n_rows = number
        try:
            if isinstance(row, BadRow):
                raise row
            ledger.format = ledger.format or format_of(row)
            name = given_id(row)
            if name is None:
                ledger.ids = _given_ids(source, split, revision) if ledger.ids is None else ledger.ids
                name = _free_name(number, ledger.ids)
            conversation, removed = conversation_of(row, ledger.format, name, mend=on_bad_row == "drop")
            if name in seen:
                raise BadRow("duplicate id", "id", f"'{name}' names an earlier row too; give each its own")
        except BadRow as bad:
            if on_bad_row == "error":
                hint = ", or drop such rows (on_bad_row: drop)" if ledger.format else ""
                raise InputError(f"{source}, {bad.at(place)}: {bad.remedy}{hint}") from None
            ledger.dropped[bad.reason] += 1
            ledger.bad_rows.append(f"{bad.at(place)}: {bad.remedy}")
            ledger.listed.append((place, bad.key, bad.reason, bad.remedy))
            continue
        ledger.dropped.update(removed)
        if remove_refusals and (refusals := [n for n, m in enumerate(conversation.messages) if _is_refusal(m)]):
            ledger.dropped["refusal"] += 1
            ledger.listed.append((place, f"message {refusals[0] + 1}", "refusal", "removed on request"))
            continue
        seen.add(name)
        yield conversation
        if len(seen) == limit:
            break
    _check_share(source, ledger, max_bad_rows)


class Streamed(Collection[Conversation]):
    """The conversations of files, read anew each time; in memory are their number and a set of ids.

    Raises InputError if a file changed in between.
    """

    def __init__(self, source: str | Path, options: dict[str, Any], n: int, ids: set[str] | None):
        self._source, self._options, self._n, self._ids = source, options, n, ids
        self._state = _state(source)

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Conversation]:
        yield from iter_conversations(self._source, **self._options, ledger=Ledger(ids=self._ids))
        if _state(self._source) != self._state:
            raise InputError(f"{self._source}: changed while it was read; start again when it is complete")

    def __contains__(self, conversation: object) -> bool:
        return any(conversation == one for one in self)


def _state(source: str | Path) -> list[tuple[Path, int, int]]:
    return [(path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in data_files(source)]


def open_conversations(source: str | Path, **options: Any) -> Corpus:
    """As `load_conversations`, with the same options, checks and errors, but without holding large files in memory.

    Files of lines and of Parquet of `STREAMED_FROM` bytes and more are read through once, to check and count them, and
    again whenever the corpus' conversations are iterated; other sources are loaded. Measured per 100,000 conversations
    of six turns (359 MB of .jsonl): 18 MB streamed, 460 MB loaded. Raises InputError as `load_conversations` does, and
    for a file that changes in between.
    """
    streams = not is_hub_dataset(source) and all(reads_by_row(path) for path in data_files(source))
    if not streams or sum(size for _, size, _ in _state(source)) < STREAMED_FROM:
        return load_conversations(source, **options)
    ledger = Ledger()
    n = sum(1 for _ in iter_conversations(source, **options, ledger=ledger))
    again = options | {"format": ledger.format}
    conversations = Streamed(source, again, n, ledger.ids)
    return Corpus(conversations, ledger.counts(), str(source), ledger.dropped_rows(), ledger.format)


def _check_share(source: str | Path, ledger: Ledger, max_bad_rows: float) -> None:
    """Raises InputError for a source without rows, without good ones, or with too many bad ones."""
    n_rows, bad_rows = ledger.n_rows, ledger.bad_rows
    if n_rows == 0:
        raise InputError(f"{source}: holds no rows")
    if len(bad_rows) == n_rows:
        raise InputError(f"{source}: every row is bad, from the first on: {bad_rows[0]}")
    if len(bad_rows) > max_bad_rows * n_rows:
        share = f"{len(bad_rows) / n_rows:.1%}, at most {max_bad_rows:.1%} may be"
        first = "; ".join([*bad_rows[:3], *(["…"] if len(bad_rows) > 3 else [])])
        remedy = "repair them, or allow more (max_bad_rows)"
        raise InputError(f"{source}: {len(bad_rows):,} of {n_rows:,} rows are bad ({share}): {first}: {remedy}")


def _given_ids(source: str | Path, split: str, revision: str | None) -> set[str]:
    ids = set()
    for _, row in rows(source, split, revision):
        try:
            ids.add(given_id(row))
        except BadRow:  # reported when the row is read
            continue
    return ids - {None}


def _free_name(number: int, given: set[str]) -> str:
    """A row's number as its name, unless it is the id of another row."""
    name = str(number)
    while name in given:
        name = f"row {name}"
    return name


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


def _is_refusal(message: Message) -> bool:
    text = message.content.lower().replace("’", "'")
    return message.role == "assistant" and any(refusal in text for refusal in REFUSALS)
