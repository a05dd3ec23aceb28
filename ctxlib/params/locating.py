"""Where a model or a dataset is, by its name alone: embedded, on this machine, or on the Hugging Face hub."""

from pathlib import Path
from typing import Literal

Place = Literal["embedded", "disk", "hub", "nowhere"]
EMBEDDED = "miniature"
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


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
    if (root / Path(name).expanduser()).exists():
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
