"""Files that appear whole or not at all, files that were fetched, and hashes."""

from ctxlib.files.atomic import (
    JsonLines,
    check_writable,
    disk_space,
    folder_for_now,
    make_folder,
    replacing,
    to_json,
    write,
)
from ctxlib.files.downloads import (
    AGAIN,
    check_is_itself,
    check_safetensors,
    hub_remedy,
    one_line,
    parse_json,
    read_json,
    read_json_object,
    read_text,
    text_files,
)
from ctxlib.files.hashes import digest, file_digest

__all__ = [
    "AGAIN",
    "JsonLines",
    "check_is_itself",
    "check_safetensors",
    "check_writable",
    "digest",
    "disk_space",
    "file_digest",
    "folder_for_now",
    "hub_remedy",
    "make_folder",
    "one_line",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_text",
    "replacing",
    "text_files",
    "to_json",
    "write",
]
