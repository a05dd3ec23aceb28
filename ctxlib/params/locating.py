"""The one door for paths, and where a model or a dataset is by its name: embedded, on this machine, or on the hub."""

import os
from pathlib import Path
from typing import Literal

from ctxlib.params.errors import InputError

Place = Literal["embedded", "disk", "hub", "nowhere"]
EMBEDDED = "miniature"
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


def expanded(path: str | Path, root: Path = Path()) -> Path:
    """A path that a user gave, with `~` expanded, relative to `root`: every such path passes through here.

    It may be absent. Raises InputError for an unknown home folder, a name that the system does not take (too long, a
    null byte), a link to something absent, and a folder above it that may not be read.
    """
    try:
        place = root / Path(path).expanduser()
        os.stat(place)
    except RuntimeError:
        raise InputError(f"{path}: there is no such home folder; write the path in full") from None
    except (FileNotFoundError, NotADirectoryError):
        if place.is_symlink():
            absent = os.readlink(place)
            raise InputError(f"{path}: a link to {absent}, which does not exist; correct or remove the link") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r}: not a path ({error}); correct it") from None
    except OSError as error:
        raise InputError(f"{path}: not a usable path ({error.strerror}); give another") from None
    return place


def locate(name: str | Path, root: Path = Path()) -> Place:
    """Where `name` is: the one rule for models, conversations and questions.

    embedded: `miniature` and `miniature:<model>`.
    disk: anything that exists, relative to `root`; it takes precedence over a hub id of the same name.
    hub: every id that huggingface_hub accepts, with or without an owner (`gpt2`, `rajpurkar/squad`), unless it looks
        like a path: a `Path`, a name that begins with . / or ~, ends in /, or has the suffix of a data file.
    nowhere: everything else. Whether the hub has the id is known only when it is loaded.
    """
    text = str(name)
    if text.split(":")[0] == EMBEDDED and isinstance(name, str):
        return "embedded"
    if not text.strip():
        return "nowhere"
    if expanded(name, root).exists():
        return "disk"
    looks_like_a_path = text.startswith((".", "/", "~")) or text.endswith(("/", *DATA_SUFFIXES))
    if isinstance(name, Path) or looks_like_a_path:
        return "nowhere"
    from huggingface_hub.errors import HFValidationError  # takes 0.2 s to import
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return "nowhere"
    return "hub"


def nowhere(name: str | Path, remedy: str = "correct the path, or give a hub id such as 'owner/name'") -> str:
    """The message about a name that is nowhere."""
    return f"no file or folder '{name}'; {remedy}"
