"""`ctxlib reproduce`: snakemake on the repository's Snakefile, one run per output folder."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ctxlib.params import InputError, load_params

# `ctxlib run` writes the line about bad input to the file of this name for the `ctxlib reproduce` that started it
INPUT_ERROR_FILE = "CTXLIB_INPUT_ERROR_FILE"


def reproduce(params_file: Path, overrides: dict[str, Any]) -> int:
    """Runs every notebook that is not up to date; the exit status of snakemake.

    The parameters reach the Snakefile in a file, which keeps the types of their values. Snakemake's own lock outlives
    a kill; ours is the operating system's, which does not.

    Raises InputError for bad parameters or inputs, here or in a notebook, and if a reproduction is running already.
    """
    params = load_params(params_file, overrides)
    params.check_inputs()
    work = params.output_dir / "work"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "reproduce.lock").open("a") as lock, tempfile.TemporaryDirectory() as folder:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = "a reproduction is running there; wait, or set other outputs"
            raise InputError(f"{params.output_dir}: {busy}") from None
        config, line = Path(folder) / "config.json", Path(folder) / "line"
        config.write_text(json.dumps({"params_file": str(params_file), "overrides": overrides}), encoding="utf-8")
        command = [sys.executable, "-m", "snakemake", "--cores", "all" if params.evidence else "1", "--quiet", "all"]
        command += ["--nolock", "--rerun-incomplete", "--configfile", str(config)]
        finished = subprocess.run(command, env=os.environ | {INPUT_ERROR_FILE: str(line)}, pass_fds=[lock.fileno()])
        if line.exists():
            raise InputError(line.read_text(encoding="utf-8"))
    return finished.returncode
