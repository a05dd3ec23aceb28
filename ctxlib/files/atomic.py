"""Files that appear whole or not at all, files that grow by whole lines, and what a full disk means."""

import errno
import fcntl
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ctxlib.params import InputError, expanded

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def to_json(content: Any) -> str:
    """The text of a .json file: sorted keys, one per line."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    """Writes next to the place and renames, so that a reader sees the old file or the new one and never a part."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write the new content of `path`: renamed to it at the end of the block, removed if the block raises.

    For content that is too large for one text in memory; the folder is made if need be. Files that killed processes of
    this machine left in the folder are removed. Raises InputError if `path` is a folder, cannot be written, or the disk
    is full; the old file stays.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file to write")
    beside = path.with_name(f".{path.name}{_OURS}{os.getpid()}")
    try:
        with disk_space(path):
            make_folder(path.parent)
            _remove_left_behind(path.parent)
            yield beside
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


_OURS = f".{platform.node()}-"  # a process id says nothing about the processes of another machine


def _remove_left_behind(folder: Path) -> None:
    for entry in os.scandir(folder):
        pid = entry.name.rpartition(_OURS)[2]
        if entry.name.startswith(".") and _OURS in entry.name and pid.isdecimal() and not _is_alive(int(pid)):
            Path(entry.path).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it. Raises InputError if that is impossible, and nothing is left of it then."""
    made = _absent(expanded(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(made)
        if error.errno in FULL:
            raise
        why = "a file is in its place" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
        raise InputError(f"{folder}: no folder to write to ({why}); choose another") from error


@contextmanager
def folder_for_now(folder: Path) -> Iterator[None]:
    """A folder that exists in the block; if it, or one above it, had to be made, empty ones are removed at the end."""
    made = _absent(expanded(folder))
    make_folder(folder)
    try:
        yield
    finally:
        inside = sorted(made[-1].rglob("*/"), reverse=True) if made else []  # the innermost first
        _remove_empty([*inside, *made])


def check_writable(folder: Path) -> None:
    """Raises InputError unless files can be written to a folder, before expensive work.

    The folder need not exist; nothing is left of the trial.
    """
    try:
        with folder_for_now(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except FileNotFoundError:
        pass  # another process tried the same folder, and removed it: it can be written
    except OSError as error:
        raise InputError(f"{folder}: no folder to write to ({error.strerror}); choose another") from error


def _absent(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def disk_space(path: Path) -> Iterator[None]:
    """Raises InputError that names `path` and the remedy if writing there fails because the disk is full."""
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
    """A file of JSON objects, one per line, appended as they come; several processes may do so at once.

    Each line is written under the file's lock. The next process that appends removes the unfinished last line of a
    killed one. A line for which `check` raises ValueError, KeyError, TypeError or IndexError is left out of `rows`,
    with a warning that counts them.
    """

    def __init__(self, path: Path, check: Callable[[dict[str, Any]], Any]) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        with disk_space(path):
            make_folder(path.parent)
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
            warnings.warn(f"{path}: {which} damaged and left out; delete the damaged lines", stacklevel=3)

    def _finished_lines(self) -> list[bytes]:
        with self.path.open("rb") as file:
            _lock(file, fcntl.LOCK_SH)
            return file.read().rpartition(b"\n")[0].split(b"\n")

    def append(self, row: dict[str, Any]) -> None:
        """Raises InputError if the disk is full; the lines before stay."""
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
