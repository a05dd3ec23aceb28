"""Files that appear whole or not at all, files that grow by whole lines, and what a full disk means."""

import errno
import fcntl
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ctxlib.params import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(path: Path, content: str | bytes) -> Path:
    """Writes beside the place and renames, so that a reader sees the old file or the new one and never a part."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`: renamed at the end of the block, removed where it raises.

    For what is too large to be held as one text; the folder is made if need be. Raises InputError where the disk is
    full; the old file stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_space(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def disk_space(path: Path) -> Iterator[None]:
    """Raises InputError that names `path` and the remedy where writing there fails for want of room on the disk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise InputError(
            f"{path}: not written, the disk is full ({_reason(error)}); make room there or take another folder, then "
            "run the same again: what was finished before is kept"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # safetensors and tokenizers give Rust's words, torch.save those of its zip writer
    said = str(error)
    of_rust = re.search(r"\(os error (\d+)\)", said)
    of_torch = "inline_container.cc" in said and ("unexpected pos" in said or "PytorchStreamWriter" in said)
    return (of_rust and int(of_rust[1]) in FULL) or of_torch or _is_full_disk(error.__cause__)


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0].strip()


class JsonLines:
    """A file of JSON objects, one a line, appended as they come; several processes may do so at once.

    Each line is written under the file's lock. What a process that was killed left of its last line is taken away by
    the next one that appends, and a line of which `check` raises ValueError, KeyError, TypeError or IndexError is left
    out of `rows`; a warning tells how many were.
    """

    def __init__(self, path: Path, check: Callable[[dict[str, Any]], Any]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        damaged = []
        lines = self._finished_lines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else None
                if row is not None:
                    check(row)
                    self.rows.append(row)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                damaged.append(str(number))
        if damaged:
            which = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {', '.join(damaged)} are"
            warnings.warn(f"{path}: {which} damaged and left out; delete what is damaged", stacklevel=3)

    def _finished_lines(self) -> list[bytes]:
        with self.path.open("rb") as file:
            _lock(file, fcntl.LOCK_SH)
            return file.read().rpartition(b"\n")[0].split(b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Raises InputError where the disk is full; the lines before stay."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with disk_space(self.path), self.path.open("a+b") as file:
            _lock(file, fcntl.LOCK_EX)
            file.truncate(_end_of_lines(file))
            file.write(line)


def _lock(file: BinaryIO, how: int) -> None:
    """Until the file is closed. Some network file systems have no locks: one process at a time is safe there."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last finished line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
