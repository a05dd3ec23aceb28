"""Fetched files: the remains of failed downloads, and refusals of the hub."""

import json
import socket
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import errors
from safetensors import SafetensorError, safe_open

from ctxlib.params import InputError

AGAIN = "fetch it again"


def check_is_itself(path: Path) -> None:
    """Raises InputError for a Git-LFS pointer, a web page, a folder, pipe or device in place of a file.

    The file may be absent. Nothing but a regular file is opened: reading a pipe or a device may never end.
    """
    if not path.exists():
        return
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise InputError(f"{path}: not a regular file but {what}; name a file")
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git-LFS pointer, not the file itself; fetch that with: git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path}: a web page, not the file itself (an error or a login, mostly); {AGAIN}")


def read_text(path: Path, remedy: str = AGAIN) -> str:
    """The content of a text file, without a byte order mark.

    Raises InputError, naming the file and ending with the `remedy`, for one that is absent, unreadable, cut within
    a character, not UTF-8, or something else that was saved under its name.
    """
    try:
        check_is_itself(path)
        content = path.read_bytes()
        if content.startswith(b"PAR1"):
            raise InputError(f"{path}: a Parquet file, not a text; give it the suffix .parquet")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        if error.end == len(content) and error.reason == "unexpected end of data":
            raise InputError(f"{path}: cut short, it ends within a character; {AGAIN}") from error
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8, or {remedy}") from error


def text_files(folder: Path) -> list[Path]:
    """The folder's .txt files in the order of their names; a warning names any other file there that is not hidden."""
    inside = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    files = [path for path in inside if path.suffix.lower() == ".txt"]
    if files and (unread := [path.name for path in inside if path not in files]):
        warnings.warn(f"{folder}: not read, as they are no .txt files: {', '.join(unread)}", stacklevel=3)
    return files


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The content of a JSON file; InputError as `read_text`, with line and column if it is malformed or cut short."""
    return parse_json(read_text(path, remedy), path, remedy)


def parse_json(text: str, path: Path, remedy: str = AGAIN) -> Any:
    """The value that a JSON text spells; InputError as `read_json`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise InputError(f"{path}: empty; {remedy}") from error
        hint = "" if text.rstrip().endswith(("]", "}")) else "; the file seems cut short"
        hint = "; one row per line belongs in a .jsonl file" if error.msg == "Extra data" else hint
        why = f"{error.msg}, column {error.colno}"
        raise InputError(f"{path}, line {error.lineno}: malformed JSON ({why}){hint}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({error}); {remedy}") from error


def read_json_object(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """Keys and values of a JSON file; InputError as `read_json`, and if it holds anything but an object."""
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values in {{ }}, found {type(content).__name__}; {remedy}")
    return content


def check_safetensors(paths: Iterable[Path]) -> None:
    """Raises InputError for a file of weights that is absent, cut short or no such file; reads only the headers."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: this file of the weights is missing; {AGAIN}")
        check_is_itself(path)
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise InputError(f"{path}: cut short or damaged, {size:,} bytes ({one_line(error)}); {AGAIN}") from error


def hub_remedy(name: str, kind: Literal["model", "dataset"], revision: str | None, error: BaseException) -> str:
    """Why the hub did not deliver a model or dataset, and the remedy, in a few words that name its page."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    causes, said = list(_causes(error)), str(error)  # datasets gives some of its causes only in words

    def is_one(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_one(errors.GatedRepoError) or f"is a gated {kind}" in said:
        return f"it is gated: ask for access at {page}, then log in with: hf auth login"
    if is_one(errors.RevisionNotFoundError):
        return f"there is no revision '{revision}'; choose a branch, tag or commit from {page}/commits/main"
    if is_one(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in said:
        return f"the hub shows no such {kind}: see {page}; correct the name or, if it is private: hf auth login"
    if is_one(ConnectionError, TimeoutError, socket.gaierror, errors.LocalEntryNotFoundError):
        return f"the hub cannot be reached, and the files are not in the cache; try again online ({page})"
    return f"see {page}"


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    if isinstance(error, KeyError):
        return f"no such key: {error}"
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
