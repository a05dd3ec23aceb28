"""`ctxlib reproduce`: snakemake on the repository's Snakefile, one run per output folder."""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctxlib.params import InputError, NotebookError, Params, load_params

# `ctxlib run` writes the line about bad input to the file of this name for the `ctxlib reproduce` that started it, and
# makes a file `failed` next to it if it reported anything else
INPUT_ERROR_FILE = "CTXLIB_INPUT_ERROR_FILE"
LEADER = "CTXLIB_LEADER"  # process id of that `ctxlib reproduce`, without which a notebook ends
CLONE = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1


def reproduce(params_file: Path, overrides: dict[str, Any]) -> int:
    """Runs every notebook that is not up to date; the exit status of snakemake.

    The parameters reach the Snakefile in a file, which keeps the types of their values. Snakemake's own lock outlives
    a kill; ours is the operating system's, which does not. The Snakefile is that of the working directory, else that of
    the clone that this package is in.

    Raises InputError for bad parameters or inputs, here or in a notebook, for a folder that cannot be written, and if a
    reproduction is running already; NotebookError if snakemake fails before or between notebooks.
    """
    from ctxlib.files import (  # takes a second to import, and the command line needs this room
        check_writable,
        make_folder,
    )

    params = load_params(params_file, overrides)
    params.check_inputs()
    snakefile = _snakefile(params)
    _check_names(params, snakefile)
    work = params.output_dir / "work"
    check_writable(work)
    check_writable(Path(".snakemake"))
    make_folder(work)
    with (work / "reproduce.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = "a reproduction is running there; wait, or set other outputs"
            raise InputError(f"{params.output_dir}: {busy}") from None
        with temporary_files(work / "tmp") as folder:
            config, line = folder / "config.json", folder / "line"
            config.write_text(json.dumps({"params_file": str(params_file), "overrides": overrides}), encoding="utf-8")
            command = [sys.executable, "-m", "snakemake", "--cores", "all" if params.evidence else "1"]
            command += ["--nolock", "--rerun-incomplete", "--configfile", str(config)]
            command += ["--snakefile", str(snakefile)]
            finished = subprocess.run(
                [*command, "--quiet", "all"],
                env=os.environ | {INPUT_ERROR_FILE: str(line), LEADER: str(os.getpid())},
                pass_fds=[lock.fileno()],
                preexec_fn=_end_with_parent,
            )
            if line.exists():
                raise InputError(line.read_text(encoding="utf-8"))
            if finished.returncode and not line.with_name("failed").exists():
                raise NotebookError(f"{snakefile}: snakemake failed: {_last_words(command)}")
    return finished.returncode


def _snakefile(params: Params) -> Path:
    places = [folder / "Snakefile" for folder in (params.root, CLONE)]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"{places[0]}: no such file; run this in a clone of the repository, which has Snakefile and notebooks"
    )


def _check_names(params: Params, snakefile: Path) -> None:
    """Snakemake reads `{…}` in a path as a wildcard, and its records have one path per line."""
    for name in (params.output_dir, snakefile.parent, *params.files):
        if bad := [character for character in "{}\n\r" if character in str(name)]:
            raise InputError(f"{name}: snakemake takes no {bad[0]!r} in a path; rename it, or set other outputs")


@contextmanager
def temporary_files(folder: Path) -> Iterator[Path]:
    """Everything that this process and its children write into the temporary directory goes to `folder` in the block.

    The remains of a killed run are removed from it first, and it is removed at the end.
    """
    from ctxlib.files import folder_for_now

    shutil.rmtree(folder, ignore_errors=True)
    before = {name: os.environ.get(name) for name in ("TMPDIR", "JUPYTER_RUNTIME_DIR")}
    with folder_for_now(folder):
        os.environ |= dict.fromkeys(before, str(folder.resolve()))
        tempfile.tempdir = None  # asks the environment again
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            tempfile.tempdir = None
            shutil.rmtree(folder, ignore_errors=True)


def end_with_leader() -> None:
    """Ends this process when the `ctxlib reproduce` that started it has ended; its kernel ends with it.

    Between the two are snakemake and a shell, which a kill of their parent does not reach.
    """
    if leader := os.environ.get(LEADER):
        threading.Thread(target=_watch, args=(int(leader),), daemon=True).start()


def _watch(leader: int) -> None:
    while True:
        try:
            os.kill(leader, 0)
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)


def _end_with_parent() -> None:
    """Asks Linux to kill this process with its parent; elsewhere snakemake ends after its running notebook."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_words(command: list[str]) -> str:
    """The reason for a failure that no notebook reported: the last line of a dry run, which is not quiet."""
    asked = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, errors="replace")
    if not asked.returncode:
        return "a notebook's process was ended from outside, most likely out of memory; run the same again"
    said = (line.strip() for line in (asked.stdout + asked.stderr).splitlines())
    lines = [line for line in said if line and not line.startswith("File ")]  # without the place in the Snakefile
    return lines[-1] if lines else f"exit status {asked.returncode}"
