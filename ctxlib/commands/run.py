"""Papermill, guarded: check the input, execute, prove that every cell ran, write the manifest."""

import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import nbformat
import papermill
from filelock import FileLock
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from ctxlib.files import check_writable, disk_space, file_digest, to_json, write
from ctxlib.params import InputError, NotebookError, Params, expanded, load_params
from ctxlib.results import code_version, gather_claims, gather_evidence, gather_predictions, short_path

MEMORY_ADVICE = (
    "if memory ran out, lower models.batch_size, scoring.token_budget, finetune.batch_size or "
    "conversations.max_length; finished work is not repeated"
)
FEW_FILES = 128  # a kernel, its connections and the libraries need about 60
PROGRESS_BAR = re.compile(r"^.*\d+%\|.*\| *\d+/\d+ .*\n?", re.MULTILINE)  # a line of tqdm


def run_notebook(
    notebook: str | Path,
    params_file: str | Path,
    out_path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Executes a notebook on an experiment's parameters and gives the path of the executed copy.

    The copy goes to `out_path` (default `outputs/<experiment>/<notebook>.ipynb`) when every code cell has completed; a
    failed one goes next to it as `<notebook>.failed.ipynb`. A success is recorded in the experiment's `manifest.json`
    and leaves a receipt in `work/receipts/`, which the Snakefile waits for.

    Raises InputError for bad parameters, a missing notebook or folder, and for an InputError in a cell (nothing is
    left behind then); NotebookError when a cell fails or does not run.
    """
    notebook = expanded(notebook)
    params = load_params(params_file, overrides)
    params.check_inputs()
    source = _read_notebook(notebook)
    name = notebook.stem
    out_path = expanded(out_path) if out_path else params.output_dir / f"{name}.ipynb"
    receipt = params.output_dir / "work" / "receipts" / f"{name}.json"
    running = out_path.with_name(f".{name}.running.ipynb")
    failed = out_path.with_name(f"{name}.failed.ipynb")
    if out_path.is_dir():
        raise InputError(f"{out_path}: is a folder; name a file for the executed notebook")
    check_writable(out_path.parent)
    check_writable(receipt.parent)
    receipt.unlink(missing_ok=True)
    made = [folder for folder in (out_path.parent, *out_path.parent.parents) if not folder.exists()]
    out_path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with disk_space(out_path):
            executed = papermill.execute_notebook(
                source,
                running.resolve(),
                parameters={"params_file": str(params_file), "overrides": dict(overrides or {})},
                kernel_name="python3",
                language="python",
                progress_bar={"desc": name},
                cwd=params.root.resolve(),
                coalesce_streams=True,
                start_timeout=300,
                iopub_timeout=120,
                extra_arguments=["--log-level=ERROR"],
            )
        _check_completed(executed, notebook)
        _drop_progress_bars(executed)
    except PapermillExecutionError as error:
        if error.ename == "InputError":
            running.unlink(missing_ok=True)
            (params.output_dir / "work" / "journal" / f"{name}.json").unlink(missing_ok=True)
            _remove_empty(params.output_dir, made)
            raise InputError(error.evalue) from None
        running.replace(failed)
        cell = f"the cell In [{error.exec_count}]"
        advice = f"; {MEMORY_ADVICE}" if error.ename == "OutOfMemoryError" else ""
        raise NotebookError(f"{notebook}: {cell} failed: {error.ename}: {error.evalue}{advice}; see {failed}") from None
    except BaseException as error:
        if running.exists():
            running.replace(failed)
        _remove_empty(params.output_dir, made)
        if isinstance(error, DeadKernelError) or re.search("Kernel died|Too many open files", str(error)):
            seen = f"; see {failed}" if failed.exists() else ""
            raise NotebookError(f"{notebook}: {_death()}{seen}") from None
        raise
    running.unlink()
    executed.metadata.papermill |= {"input_path": short_path(params, notebook), "output_path": out_path.name}
    write(out_path, nbformat.writes(executed) + "\n")
    failed.unlink(missing_ok=True)
    _record(params, notebook, out_path, time.monotonic() - started)
    made_by = {"params": params.digest, "notebook": file_digest(notebook), "code": code_version(notebook.stem)}
    write(receipt, to_json(made_by))
    return out_path


def _death() -> str:
    """The likely reason for which a kernel died."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < FEW_FILES:
        return f"the kernel died, most likely since only {files} files may be open (ulimit -n); set ulimit -n 1024"
    return f"the kernel died, most likely out of memory; {MEMORY_ADVICE}"


def _read_notebook(notebook: Path) -> NotebookNode:
    if not notebook.is_file():
        there = ", ".join(path.name for path in sorted(notebook.parent.glob("*.ipynb")))
        raise InputError(f"{notebook}: no such notebook; there are: {there or 'none in that folder'}")
    try:
        source = nbformat.read(notebook, as_version=4)
    except OSError as error:
        raise InputError(f"{notebook}: not readable: {error.strerror}; correct its permissions") from None
    except (nbformat.ValidationError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{notebook}: not a notebook: {str(error).splitlines()[0][:80]}") from None
    if not any("parameters" in cell.metadata.get("tags", []) for cell in source.cells):
        raise InputError(f"{notebook}: no cell is tagged 'parameters'; tag the one with params_file and overrides")
    return source


def _check_completed(executed: NotebookNode, notebook: Path) -> None:
    """`SystemExit(0)` in a cell ends a notebook early; papermill calls that a success, we do not."""
    for number, cell in enumerate((cell for cell in executed.cells if cell.cell_type == "code"), start=1):
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        if errors or (cell.source.strip() and cell.metadata.papermill.status != "completed"):
            state = f"raised {errors[0]}" if errors else f"is {cell.metadata.papermill.status}"
            raise NotebookError(f"{notebook}: code cell {number} {state}: not every cell has completed")


def _drop_progress_bars(executed: NotebookNode) -> None:
    """Bars are of use while a notebook runs; stored ones differ from run to run, and widgets are not displayed."""
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = PROGRESS_BAR.sub("", output.text)
            cell.outputs = [output for output in cell.outputs if not _is_empty_or_widget(output)]


def _is_empty_or_widget(output: NotebookNode) -> bool:
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or (output.output_type == "stream" and not output.text.strip())


def _record(params: Params, notebook: Path, out_path: Path, wall_seconds: float) -> None:
    """Records the run in `manifest.json`; the peak memory is that of the largest child process so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak_memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
    name = notebook.stem
    journal = _read_json(params.output_dir / "work" / "journal" / f"{name}.json")
    inputs = {
        short_path(params, path): file_digest(path)
        for path in (notebook, *(params.root / file for file in params.files))
    }
    inputs |= journal.get("inputs", {})
    outputs = {short_path(params, out_path): file_digest(out_path)} | journal.get("outputs", {})
    entry = {
        "code_version": code_version(name),
        "hardware": _hardware() | {"accelerator": journal.get("accelerator")},
        "inputs": {path: digest for path, digest in inputs.items() if path not in outputs},
        "outputs": outputs,
        "params_digest": params.digest,
        "peak_memory_mib": round(peak_memory),
        "seed": params.seed,
        "versions": _versions(),
        "wall_seconds": round(wall_seconds, 1),
    }
    path = params.output_dir / "manifest.json"
    with FileLock(params.output_dir / "work" / "manifest.lock"):  # notebooks may run side by side
        gathered = []
        gathering = {"claims": gather_claims, "evidence": gather_evidence, "predictions": gather_predictions}
        for part, gather in gathering.items():
            if (params.output_dir / "tables" / part).is_dir():
                gathered += gather(params)
        manifest = {
            "experiment": params.experiment,
            "gathered": {short_path(params, table): file_digest(table) for table in gathered},
            "notebooks": _read_json(path).get("notebooks", {}) | {name: entry},
            "params": params.model_dump(mode="json"),
            "params_digest": params.digest,
        }
        write(path, to_json(manifest))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _versions() -> dict[str, str]:
    names = [name for name in requires("ctxlib") or [] if "extra ==" not in name]
    packages = {name: version(name) for name in (requirement.split(">")[0].strip() for requirement in names)}
    return {"python": platform.python_version(), "ctxlib": version("ctxlib")} | packages


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "cpu": models[0] if models else platform.processor(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _remove_empty(output_dir: Path, made: list[Path]) -> None:
    """Removes the empty folders that a run on bad input left."""
    work = output_dir / "work"
    for folder in (work / "journal", work / "receipts", work, output_dir, *made):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
