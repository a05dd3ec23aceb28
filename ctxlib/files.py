"""Files that appear whole or not at all, and files that grow by whole lines."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: str | bytes) -> Path:
    """Writes beside the place and renames, so that a reader sees the old file or the new one and never a part."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`: renamed at the end of the block, removed where it raises.

    For what is too large to be held as one text; the folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to, none where there is no file; one that a kill has torn is cut off."""
    whole, _, torn = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return whole.splitlines()
