"""Files that are written while the disk fills up, processes die and others write, too."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from ctxlib.files import JsonLines, check_writable, disk_space, replacing, write
from ctxlib.params import InputError, expanded

ROOT = Path(__file__).resolve().parents[1]
BIG = torch.arange(9000.0)
WRITERS = {
    "text": lambda path: path.write_text("x" * 9000),
    "lines": lambda path: print("x" * 9000, file=path.open("w", buffering=1)),
    "csv": lambda path: pd.DataFrame({"a": BIG}).to_csv(path),
    "parquet": lambda path: pd.DataFrame({"a": BIG}).to_parquet(path),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "torch": lambda path: torch.save({"a": BIG}, path),
    "tokenizer": lambda path: Tokenizer(models.BPE(vocab={f"t{n}": n for n in range(999)}, merges=[])).save(str(path)),
}


@pytest.mark.parametrize("content", ["é\n", b"\x00\xff"])
def test_what_is_written_is_there_to_the_byte_in_a_folder_that_was_not(tmp_path, content):
    path = write(tmp_path / "new" / "file", content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "t.csv", "old")

    def full_disk(beside: Path, content: bytes) -> None:
        beside.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(path, "new")
    assert [inner.name for inner in tmp_path.iterdir()] == ["t.csv"]
    assert path.read_text() == "old"


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "t.csv", "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as beside:
        beside.write_text("new")
        assert beside.parent == path.parent and path.read_text() == "old"
        _ = 1 / 0
    assert [inner.name for inner in tmp_path.iterdir()] == ["t.csv"] and path.read_text() == "old"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_whoever_writes_and_the_old_file_stays(tmp_path, full_disk, kind):
    path = write(tmp_path / "folder" / "result", "old")
    full = pytest.raises(InputError, match=r"result: not written, the disk is full .*; make room there")
    with full as told, full_disk(4096), replacing(path) as beside:
        WRITERS[kind](beside)
    assert "\n" not in str(told.value)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    with replacing(path) as beside:
        WRITERS[kind](beside)
    assert path.stat().st_size > 4096


def test_every_word_for_a_full_disk_is_known_and_other_errors_are_left_alone(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(InputError, match=f"the disk is full \\({os.strerror(number)}\\)"), disk_space(tmp_path):
            raise OSError(number, os.strerror(number))
    for error in (PermissionError(errno.EACCES, "no"), RuntimeError("inline_container.cc: other"), Exception("full")):
        with pytest.raises(type(error), match=str(error).replace("[", r"\[")), disk_space(tmp_path):
            raise error


APPENDS = """
import sys
from pathlib import Path
from ctxlib.files import JsonLines

path, name = Path(sys.argv[1]), sys.argv[2]
lines = JsonLines(path, check=dict)
print("ready", flush=True)
sys.stdin.readline()
for n in range(150):
    lines.append({"id": f"{name}-{n}", "text": name * 30_000})
"""


def test_two_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "before"}\n{"id": "torn')
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen([sys.executable, "-c", APPENDS, path, name], **pipes) for name in "ab"]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wanted = {"before", *(f"{name}-{n}" for name in "ab" for n in range(150))}
    assert len(rows) == len(wanted) and {row["id"] for row in rows} == wanted
    assert all(row["text"] == row["id"][0] * 30_000 for row in rows[1:])
    order = [row["id"][0] for row in rows[1:]]
    assert order != sorted(order) and order != sorted(order, reverse=True)  # they did write at the same time


def test_the_line_that_a_kill_tore_is_taken_away_and_nothing_else(tmp_path):
    path = tmp_path / "lines.jsonl"
    JsonLines(path, check=dict).append({"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "text": "' + "x" * 200_000)
    lines = JsonLines(path, check=dict)
    assert lines.rows == [{"n": 1}]
    lines.append({"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'
    path.write_text('{"n": 1')
    JsonLines(path, check=dict).append({"n": 4})
    assert path.read_text() == '{"n": 4}\n'


def test_damaged_lines_are_left_out_and_told_by_their_numbers(tmp_path):
    path = tmp_path / "lines.jsonl"
    whole_lines = b'{"id": 1}\n\n{"id": \xff}\n{"other": 2}\n[]\n{"id": 3}\n'
    path.write_bytes(whole_lines)
    with pytest.warns(UserWarning, match=r"lines\.jsonl: lines 3, 4, 5 are damaged and left out"):
        lines = JsonLines(path, check=lambda row: row["id"])
    assert lines.rows == [{"id": 1}, {"id": 3}] and path.read_bytes() == whole_lines


def test_a_disk_that_fills_up_keeps_the_lines_before(tmp_path, full_disk):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, check=dict)
    lines.append({"n": 1})
    with pytest.raises(InputError, match=r"lines\.jsonl: not written, the disk is full"), full_disk(4096):
        lines.append({"n": 2, "text": "x" * 9000})
    lines.append({"n": 3})
    assert JsonLines(path, check=dict).rows == [{"n": 1}, {"n": 3}]


def test_the_next_write_removes_what_a_killed_process_left_and_only_that(tmp_path):
    code = "import os, signal; from pathlib import Path; from ctxlib.files import replacing\n"
    code += f"with replacing(Path({str(tmp_path / 'a')!r})) as beside: "
    code += "beside.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "b") as alive:
        alive.touch()
        (tmp_path / ".mine").touch()
        write(tmp_path / "c", "c")
        assert alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "b", "c"]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file" / "x", "a file is in its place"), (Path("/proc/nope"), "No such file")):
        with pytest.raises(InputError, match=rf"{folder}: no folder to write to \({reason}.*choose another"):
            check_writable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nobody-here/x", "no such home folder; write the path in full"),
        ("a\0b", r"'a\\x00b': not a path"),
        ("x" * 300, "not a usable path \\(File name too long\\)"),
        ("loop", "not a usable path|a link to loop"),
        ("dangling", "a link to gone, which does not exist"),
    ],
)
def test_a_path_that_cannot_be_one_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("gone")
    with pytest.raises(InputError, match=message):
        expanded(name)


@pytest.mark.parametrize("name", ["absent", "a {b} #c: 'd' \"e\"\nf", "folder/x", "~/x"])
def test_every_other_path_is_taken_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(name, tmp_path) == Path(str(tmp_path), *name.replace("~/", "").split("/"))
