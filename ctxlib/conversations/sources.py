"""Rows of files, of folders and of the hub, one at a time, each with its place in words."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from ctxlib.files import AGAIN, check_is_itself, hub_remedy, one_line, parse_json, read_json
from ctxlib.params import InputError, expanded, locate, nowhere

# Files of a folder that hold no data: what describes a dataset, and what systems leave.
_NO_DATA = {
    "",
    ".md",
    ".txt",
    ".rst",
    ".html",
    ".pdf",
    ".png",
    ".py",
    ".ipynb",
    ".yaml",
    ".yml",
    ".cff",
    ".bib",
    ".log",
}


@dataclass
class BadRow(Exception):
    """A row that is no conversation: why, at which key, and what to do about it."""

    reason: str
    key: str
    remedy: str

    def at(self, place: str) -> str:
        return f"{place}, {self.key}: {self.reason}" if self.key else f"{place}: {self.reason}"


def is_hub_dataset(source: str | Path) -> bool:
    """True for a dataset on the hub, see `locate`."""
    return locate(source) == "hub"


def data_files(source: str | Path) -> list[Path]:
    """The files that `load_conversations` reads, in its order: the file itself, or the data files of a folder.

    Suffixes count in any case, hidden files do not. Raises InputError if there are none, and for a folder that holds
    other data in addition (folders, tables, archives), which would be left out.
    """
    path = expanded(source)
    if not path.exists():
        raise InputError(nowhere(source))
    kinds = ", ".join(_READERS)
    if not path.is_dir():
        if _kind(path) not in _READERS:
            raise InputError(
                f"{source}: expected a .json, .jsonl or .parquet file (.json.gz, .jsonl.gz), a folder of them, or a "
                "hub id"
            )
        return [path]
    inside = sorted(inner for inner in path.iterdir() if not inner.name.startswith("."))
    files = [inner for inner in inside if _kind(inner) in _READERS and inner.is_file()]
    unread = [inner for inner in inside if inner not in files and _may_hold_data(inner)]
    if not files:
        found = f", found {_named(unread)}" if unread else ""
        raise InputError(f"{source}: no data file in this folder (looked for {kinds}{found})")
    if unread:
        raise InputError(
            f"{source}: holds also {_named(unread)}, which would not be read (only {kinds}, no sub-folders); "
            "move or remove such data, or name the files to read one by one"
        )
    return files


def _kind(path: Path) -> str:
    """The suffix in lower case, `.jsonl.gz` as one."""
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    return Path(name.removesuffix(".gz")).suffix + packed


def _may_hold_data(path: Path) -> bool:
    if path.is_dir():
        return any(not inner.name.startswith(".") for inner in path.iterdir())
    return path.suffix.lower() not in _NO_DATA


def _named(paths: list[Path]) -> str:
    names = [f"{path.name}/" if path.is_dir() else path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a data file, or its `BadRow`, with its place in words. Only .json is held in memory as a whole.

    Raises InputError for a file that cannot be read.
    """
    try:
        check_is_itself(path)
        yield from _READERS[_kind(path)](path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable: {one_line(error)}; {AGAIN}") from error


def rows(source: str | Path, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Each row, or its `BadRow`, with its place in words. Raises InputError for a source that cannot be read."""
    if is_hub_dataset(source):
        yield from hub_rows(str(source), split, "or name a local .json, .jsonl or .parquet file", revision)
        return
    in_folder = expanded(source).is_dir()
    for path in data_files(source):
        for place, row in file_rows(path):
            yield (f"{path.name}, {place}" if in_folder else place), row


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


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    remedy = f"{AGAIN}, or repair it"
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            content = parse_json(_decoded(file.read(), path), path, remedy)
    else:
        content = read_json(path, remedy)
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of rows, got {type(content).__name__}; wrap the rows in [ ]")
    yield from ((f"row {number}", row) for number, row in enumerate(content, start=1))


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if _is_one_list(path):
        yield from _json_rows(path)
        return
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parsed(line)
                if isinstance(row, BadRow) and not line.endswith(b"\n"):
                    row = BadRow("cut short", "", f"the file ends within this line; {AGAIN}")
                yield f"line {number}", row


def _opened(path: Path):
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _is_one_list(path: Path) -> bool:
    """Whether a .jsonl file holds one JSON list instead of a value per line: "[" alone, or a list of rows, opens it."""
    with _opened(path) as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"["):
            return False
        parsed = _parsed(first)
        if isinstance(parsed, list):
            return all(isinstance(row, dict) for row in parsed) and not any(line.strip() for line in file)
        return re.fullmatch(rb"\[(\s*\{.*)?", first) is not None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", "", f"byte {error.start} of the line is wrong; convert the file to UTF-8")
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow("malformed JSON", "", f"{getattr(error, 'msg', error)}{column}; repair or remove it")


def reads_by_row(path: Path) -> bool:
    """Whether a file is read row by row, never as a whole; False also for one that cannot be read."""
    try:
        check_is_itself(path)
        return _kind(path) == ".parquet" or (_READERS.get(_kind(path)) is _jsonl_rows and not _is_one_list(path))
    except (OSError, EOFError, zlib.error):
        return False


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a Parquet file, or cut short: {one_line(error)}; {AGAIN}") from error


_READERS = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".json.gz": _json_rows,
    ".jsonl.gz": _jsonl_rows,
    ".ndjson.gz": _jsonl_rows,
}
