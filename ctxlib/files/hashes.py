"""Names of things by their contents: sha256, 64 hex digits of files and 12 of everything else."""

import hashlib
import json
from pathlib import Path

from ctxlib.params import InputError


def digest(what) -> str:
    """12 hex digits of sha256 over anything that JSON can write."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: str | Path) -> str:
    """The sha256 of a file, or of a folder's file names and contents; InputError where there is neither."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    lines = [f"{file_digest(inner)} {inner.relative_to(path).as_posix()}\n" for inner in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
