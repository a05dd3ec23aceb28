"""Bad inputs as data: each is one line on standard error, exit status 2, and nothing left behind.

`bad_inputs*.yaml` hold the inputs. A group is a product: every one of its inputs with every command that it names.

    commands:                       # by name; {input}, {tmp}, {out}, {chat}, {smoke} are filled in after splitting
      score: score --model {input} --data {chat} --out {out}
    groups:
      - about: configurations
        run: [score]                # names of commands, or whole commands
        says: [config.json]         # words of every message of this group
        inputs:
          layers as text:           # an input: what is made, what {input} is, and what the message says besides
            model: {config.json: {num_hidden_layers: six}}
            says: [num_hidden_layers]

What is made: `model`, a copy of the miniature's instruct model with files changed: the keys of a JSON file set, or
removed by `(removed)`; a text; null for a file that is absent; of the weights `{rename: {PATTERN: NEW}}`,
`{drop: PATTERN}`, `{shapes: {NAME: [2, 3]}}`, `{fill: {NAME: .nan}}`. `files`: by name a text, in which {instruct} is
the model that is copied; rows (JSON, one per line in .jsonl); `{hex: ffd8}`, `{tensors: {NAME: [2, 3]}}`,
`{link: TARGET}`, `{special: pipe | socket | folder}`. `value`: the text that {input} is; by default the model's folder,
else the first of the files.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ctxlib.commands import cli

# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ROOT = Path(__file__).resolve().parents[1]
INSTRUCT = ROOT / "ctxlib" / "miniature" / "models" / "instruct"
CHAT = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(3)
]
# lines that report progress: bars, and the doctor's checks
PROGRESS = re.compile(r"^checking .*…$|^.*\[\d+:\d\d.*\]$|^\s*$")
SPECIAL = {"hex", "link", "special", "tensors"}
IN_PROCESSES_OF_THEIR_OWN = 6


def rows() -> Iterator[Any]:
    seen: dict[str, str] = {}
    for file in sorted(Path(__file__).parent.glob("bad_inputs*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for group in content["groups"]:
            for name, given in group["inputs"].items():
                for of in group["run"]:
                    row = (given or {}) | {"command": content.get("commands", {}).get(of, of)}
                    row["says"] = [*group.get("says", []), *row.get("says", [])]
                    key = f"{group['about']}: {name}: {of}"
                    assert key not in seen, f"{file.name}: {key} occurs twice"
                    seen[key] = file.name
                    yield pytest.param(row, id=key)


ROWS = list(rows())


@pytest.fixture(scope="module")
def tally(request) -> Iterator[dict[str, float]]:
    counts = {"tried": 0, "clear": 0}
    began = time.process_time()
    yield counts
    if reporter := request.config.pluginmanager.get_plugin("terminalreporter"):
        words = f"bad inputs: {counts['tried']} tried, {counts['clear']} clear, {time.process_time() - began:.0f} s"
        reporter.write_line(f"\n{words}")


class Silent:
    """A standard input that nobody may read."""

    def __getattr__(self, name: str) -> Any:
        if name in ("isatty", "closed", "fileno", "encoding"):
            raise AttributeError(name)
        raise AssertionError(f"standard input was used: {name}")


def make(row: dict[str, Any], folder: Path) -> list[str]:
    """Writes the input of a row and gives the arguments of its command."""
    first = None
    if "model" in row:
        first = copy_of_instruct(folder / "model", row["model"])
    for name, content in row.get("files", {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        first = first or path
    (folder / "chat.json").write_text(json.dumps(CHAT))
    places = {"{chat}": folder / "chat.json", "{out}": folder / "out", "{tmp}": folder}
    places |= {"{smoke}": ROOT / "params" / "smoke.yaml", "{root}": ROOT}
    value = str(row.get("value", first or ""))
    for word, place in places.items():
        value = value.replace(word, str(place))
    arguments = []
    for word in shlex.split(row["command"]):
        for name, place in {**places, "{input}": value}.items():
            word = word.replace(name, str(place))
        arguments.append(word)
    return arguments


def write_file(path: Path, content: Any) -> None:
    if isinstance(content, str):
        path.write_bytes(content.replace("{instruct}", str(INSTRUCT)).encode("utf-8", "surrogatepass"))
    elif isinstance(content, list) and path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif isinstance(content, list) or not set(content) <= SPECIAL:
        write_file(path, json.dumps(content))
    elif "tensors" in content:
        save_file({name: torch.zeros(shape) for name, shape in content["tensors"].items()}, path)
    elif "hex" in content:
        path.write_bytes(bytes.fromhex(content["hex"]))
    elif "link" in content:
        path.symlink_to(content["link"])
    elif content["special"] == "pipe":
        os.mkfifo(path)
    elif content["special"] == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.path.relpath(path))
    else:
        path.mkdir()


def copy_of_instruct(folder: Path, changes: dict[str, Any]) -> Path:
    """The weights are linked, not copied."""
    folder.mkdir()
    for file in INSTRUCT.iterdir():
        os.link(file, folder / file.name) if file.name.endswith(".safetensors") else (folder / file.name).write_bytes(
            file.read_bytes()
        )
    for name, change in changes.items():
        path = folder / name
        if change is None:
            path.unlink()
        elif name.endswith(".safetensors") and isinstance(change, dict) and not set(change) <= SPECIAL:
            weights = changed_weights(load_file(path), **change)
            path.unlink()
            save_file(weights, path, metadata={"format": "pt"})
        elif isinstance(change, dict) and path.exists() and not set(change) <= SPECIAL:
            content = json.loads(path.read_text()) | change
            path.write_text(json.dumps({key: value for key, value in content.items() if value != "(removed)"}))
        else:
            path.unlink(missing_ok=True)
            write_file(path, change)
    return folder


def changed_weights(
    weights: dict[str, Any],
    rename: dict[str, str] | None = None,
    drop: str | None = None,
    shapes: dict[str, list[int]] | None = None,
    fill: dict[str, float] | None = None,
) -> dict[str, Any]:
    for pattern, new in (rename or {}).items():
        weights = {re.sub(pattern, new, name): value for name, value in weights.items()}
    if drop:
        weights = {name: value for name, value in weights.items() if not re.search(drop, name)}
    for name, shape in (shapes or {}).items():
        weights[name] = weights[name].new_zeros(shape)
    for name, value in (fill or {}).items():
        weights[name] = weights[name].fill_(value)
    return weights


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_clear(row: dict[str, Any], arguments: list[str], status: Any, said: str) -> None:
    lines = [line for line in said.splitlines() if not PROGRESS.match(line)]
    command = shlex.join(arguments)
    assert "Traceback" not in said, f"ctxlib {command}\n{said}"
    assert status == 2, f"exit status {status}: ctxlib {command}\n{said}"
    assert len(lines) == 1, f"{len(lines)} lines: ctxlib {command}\n{said}"
    missing = [word for word in row["says"] if word.lower() not in lines[0].lower()]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_input_is_one_line_and_leaves_nothing(row, tmp_path, monkeypatch, capfd, tally):
    tally["tried"] += 1
    monkeypatch.chdir(tmp_path)
    arguments = make(row, tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr(sys, "stdin", Silent())
    monkeypatch.setattr(sys, "argv", ["ctxlib", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert_clear(row, arguments, ended.value.code, capfd.readouterr().err)
    assert listing(tmp_path) == before
    tally["clear"] += 1


@pytest.mark.parametrize("row", ROWS[:: len(ROWS) // IN_PROCESSES_OF_THEIR_OWN or 1])
def test_it_is_the_same_in_a_process_of_its_own(row, tmp_path):
    arguments = make(row, tmp_path)
    before = listing(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "ctxlib", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_clear(row, arguments, ended.returncode, ended.stderr)
    assert listing(tmp_path) == before


def test_there_are_at_least_three_hundred():
    assert len(ROWS) >= 300
