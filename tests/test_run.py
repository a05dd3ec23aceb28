import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ctxlib.commands import cli
from ctxlib.commands import run as run_room
from ctxlib.commands.run import run_notebook
from ctxlib.params import InputError, NotebookError, load_params

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "params" / "smoke.yaml"
OPEN = """
from ctxlib.params import load_params
from ctxlib.results import open_results
params = load_params(params_file, overrides)
results = open_results(params, "01_test")
"""


def write_notebook(path: Path, *code: str, tags: tuple[str, ...] = ("parameters",)) -> Path:
    parameters = new_code_cell('params_file = "params/miniature.yaml"\noverrides = {}', metadata={"tags": list(tags)})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Test"), parameters, *map(new_code_cell, code)]), path)
    return path


def run(tmp_path: Path, *code: str) -> Path:
    notebook = write_notebook(tmp_path / "01_test.ipynb", *code)
    return run_notebook(notebook, SMOKE, overrides={"outputs": str(tmp_path / "outputs"), "seed": 5})


def test_a_run_writes_notebook_manifest_and_receipt(tmp_path):
    table = 'import pandas as pd\nresults.table(pd.DataFrame({"seed": [params.seed]}), "t", "T")'
    executed = run(tmp_path, OPEN, table, "block = bytearray(400 * 2**20)\nfor i in range(9): print(i)")
    folder = tmp_path / "outputs" / "smoke"
    assert executed == folder / "01_test.ipynb"
    assert len(nbformat.read(executed, 4).cells[-1].outputs) == 1
    assert (folder / "tables" / "t.csv").read_text() == "seed\n5\n"
    assert (folder / "work" / "receipts" / "01_test.json").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["notebooks"]["01_test"]
    assert manifest["params"]["seed"] == entry["seed"] == 5
    assert {"tables/t.csv", "tables/t.md", "01_test.ipynb"} == {
        Path(path).relative_to(folder).as_posix() for path in entry["outputs"]
    }
    for path, digest in (entry["inputs"] | entry["outputs"]).items():
        assert hashlib.sha256((ROOT / path).read_bytes()).hexdigest() == digest
    assert {"params/smoke.yaml", "params/miniature.yaml"} <= entry["inputs"].keys()  # the file and what it extends
    assert entry["peak_memory_mib"] > 400
    assert entry["wall_seconds"] > 0
    assert {"python", "torch", "transformers"} <= entry["versions"].keys()
    assert {"cpu", "cores", "memory_gib"} <= entry["hardware"].keys()


def test_notebooks_that_end_at_the_same_time_are_both_in_the_manifest(tmp_path, monkeypatch):
    params = load_params(SMOKE, {"outputs": str(tmp_path)})
    reading, both_in = [], Barrier(2)

    def slow(path):
        content = json.loads(path.read_text()) if path.is_file() else {}
        if path.name == "manifest.json":
            reading.append(path)
            with suppress(BrokenBarrierError):
                both_in.wait(timeout=2)  # met, if the second may read before the first has written
        return content

    monkeypatch.setattr(run_room, "_read_json", slow)
    names = ["01_one", "02_two"]
    notebooks = [write_notebook(tmp_path / f"{name}.ipynb") for name in names]
    enter = [Thread(target=run_room._record, args=(params, path, path, 1.0)) for path in notebooks]
    for thread in enter:
        thread.start()
    for thread in enter:
        thread.join()
    assert len(reading) == 2
    assert sorted(json.loads((params.output_dir / "manifest.json").read_text())["notebooks"]) == names


def test_a_failed_cell_keeps_its_traceback_and_the_old_success(tmp_path):
    executed = run(tmp_path, "1 + 1")
    before = executed.read_bytes()
    with pytest.raises(NotebookError, match=r"ZeroDivisionError: division by zero; see .*01_test\.failed\.ipynb"):
        run(tmp_path, "1 / 0", "2")
    folder = executed.parent
    assert executed.read_bytes() == before
    assert "ZeroDivisionError" in (folder / "01_test.failed.ipynb").read_text()
    assert not (folder / "work" / "receipts" / "01_test.json").exists()
    run(tmp_path, "1 + 2")
    assert not (folder / "01_test.failed.ipynb").exists()
    assert sorted(path.name for path in folder.glob("*")) == ["01_test.ipynb", "manifest.json", "work"]


def test_a_cell_that_exits_with_zero_is_a_failure(tmp_path):
    with pytest.raises(NotebookError, match="SystemExit: not every cell has completed"):
        run(tmp_path, "raise SystemExit(0)", "2")
    assert [path.name for path in (tmp_path / "outputs" / "smoke").glob("*.ipynb")] == ["01_test.failed.ipynb"]


def test_bad_input_in_a_cell_is_its_one_line_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match=r"^\S+tables/scores\.csv: no such table; first run the notebook .*$"):
        run(tmp_path, OPEN, 'results.read_table("scores")')
    assert [path.name for path in tmp_path.iterdir()] == ["01_test.ipynb"]


def test_memory_that_ran_out_in_a_cell_says_what_to_lower_and_keeps_the_traceback(tmp_path):
    full = 'import torch; raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")'
    with pytest.raises(NotebookError, match=r"OutOfMemoryError: CUDA out.*lower models\.batch_size.*failed\.ipynb"):
        run(tmp_path, full)
    with pytest.raises(NotebookError, match=r"the kernel died, most likely out of memory; .*models\.batch_size"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (tmp_path / "outputs" / "smoke" / "01_test.failed.ipynb").exists()


def test_the_advice_of_a_room_in_a_cell_is_the_one_line(tmp_path):
    room = "from ctxlib.models import memory_advice\nimport torch\n"
    room += (
        "with memory_advice('models.batch_size down', 'here'):\n    raise torch.OutOfMemoryError('CUDA out of memory.')"
    )
    with pytest.raises(
        InputError, match=r"^out of memory \(CUDA out of memory\): set models\.batch_size down; .* here, "
    ):
        run(tmp_path, room)


def test_a_full_disk_is_named_the_old_notebook_stays_and_a_run_with_room_ends_well(tmp_path, full_disk):
    executed = run(tmp_path, OPEN, "1 + 1")
    before = executed.read_bytes()
    table = 'import pandas as pd\nresults.table(pd.DataFrame({"n": range(9999)}), "t", "T")'
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))"
    with pytest.raises(InputError, match=r"tables/t\.csv: not written, the disk is full .*; make room there"):
        run(tmp_path, OPEN, limit, table)
    with pytest.raises(InputError, match=r"01_test\.ipynb: not written, the disk is full"), full_disk(3000):
        run(tmp_path, OPEN, "print('x' * 3000)")
    assert executed.read_bytes() == before and not list((tmp_path / "outputs" / "smoke").glob("tables/*"))
    run(tmp_path, OPEN, table)
    assert len((tmp_path / "outputs" / "smoke" / "tables" / "t.csv").read_text().splitlines()) == 10_000


def test_bad_input_is_found_before_anything_runs(tmp_path):
    untagged = write_notebook(tmp_path / "untagged.ipynb", "1", tags=())
    (tmp_path / "broken.ipynb").write_text("{")
    tagged = write_notebook(tmp_path / "tagged.ipynb", "1")
    outputs = {"outputs": str(tmp_path / "outputs")}
    for notebook, params_file, overrides, message in [
        (untagged, SMOKE, {}, "no cell is tagged 'parameters'"),
        (tmp_path / "broken.ipynb", SMOKE, {}, "not a notebook"),
        (tmp_path / "absent.ipynb", SMOKE, {}, "no such notebook; there are: broken.ipynb, tagged.ipynb"),
        (tagged, tmp_path / "absent.yaml", {}, "no such params file"),
        (tagged, SMOKE, {"sead": 1}, "did you mean 'seed'"),
        (tagged, SMOKE, {"models.instruct": "./absent"}, "models.instruct: no file or folder './absent'"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            run_notebook(notebook, params_file, overrides=outputs | overrides)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "notebooks/absent.ipynb", "--params", str(SMOKE)],
        ["run", "notebooks/absent.ipynb", "--params", str(SMOKE), "--set", "seed"],
        ["reproduce", "--params", "params/absent.yaml"],
        ["reproduce", "--params", str(SMOKE), "--set", "needle.per_cel=2"],
        ["reproduce", "--params", str(SMOKE), "--set", "qa.reading=clean"],
        ["mark", "--reading", "clean"],
        ["mark", "--scores"],
        ["finetune", "--model", "m", "--data", "d", "--out", "o", "--batch-size", "0"],
        ["finetune", "--model", "m", "--data", "d", "--out", "o", "--steps", "1", "--epochs", "1"],
        ["doctor", "m", "--dtype", "int8"],
        ["doctor", "m", "--layer", "-1"],
        ["dcotor", "m"],
    ],
)
def test_the_command_says_bad_input_in_one_line_and_exits_with_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ctxlib", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1


STUB = """
import json, sys, pathlib, time
said = [sys.argv[i + 1] for i, argument in enumerate(sys.argv) if argument == "--set"]
overrides = {key: json.loads(value) for key, _, value in (text.partition("=") for text in said)}
pathlib.Path("overrides.json").write_text(json.dumps(overrides))
folder = pathlib.Path(overrides.get("outputs", "outputs")) / "smoke" / "work" / "receipts"
folder.mkdir(parents=True, exist_ok=True)
notebook = pathlib.Path(sys.argv[2])
receipt = folder / f"{notebook.stem}.json"
receipt.write_text(notebook.read_text())
while pathlib.Path("never ends").exists():
    time.sleep(0.01)
"""


def small_copy(folder: Path, params_file: str = "params/smoke.yaml") -> list[str]:
    """A small copy of the repository with the real Snakefile, whose runner only writes the receipt; its notebooks."""
    for name in ("ctxlib", "params", "notebooks"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "Snakefile", folder)
    shutil.copy(SMOKE, folder / params_file)
    shutil.copy(SMOKE.with_name("miniature.yaml"), folder / "params")  # which it extends
    for name in ("params", "files"):
        shutil.copytree(ROOT / "ctxlib" / name, folder / "ctxlib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__", "results"):
        shutil.copy(ROOT / "ctxlib" / f"{name}.py", folder / "ctxlib")
    (folder / "ctxlib" / "__main__.py").write_text(STUB)
    story = (ROOT / "Snakefile").read_text().split("EVIDENCE =")[0]
    names = re.findall(r'"(\d\d_\w+)":', story)
    for name in names:
        (folder / "notebooks" / f"{name}.ipynb").write_text(name)
    return names


def test_a_killed_reproduction_goes_on_and_two_at_once_are_refused(tmp_path):
    copy, params_file = tmp_path / "a copy", "params/my smoke.yaml"
    names = small_copy(copy, params_file)
    call = "from pathlib import Path; from ctxlib.commands.cli import main; main()"
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv[1:] = ['reproduce', '--params', {params_file!r}]; {call}"
    command = [sys.executable, "-c", code]
    receipts = copy / "outputs" / "smoke" / "work" / "receipts"
    (copy / "never ends").touch()
    with subprocess.Popen(command, cwd=copy, start_new_session=True) as process:
        while not list(receipts.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        second = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        os.killpg(process.pid, signal.SIGKILL)
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == "outputs/smoke: a reproduction is running there; wait, or set other outputs\n"
    (copy / "never ends").unlink()
    finished = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.stem for path in receipts.iterdir()) == names


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": 3, "outputs": "elsewhere"},
        {"conversations.n": None, "finetune.packing": True, "steering.alphas": [1.0, 0.5], "models.indicator": "a 'b'"},
        {"qa": {"sources": [], "split": "a, b", "n": 3}},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_reproduce_sets_what_run_sets(overrides, tmp_path):
    names = small_copy(tmp_path)
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    arguments = ["reproduce", "--params", "params/smoke.yaml", *(f"--set={key}={words[key]}" for key in words)]
    call = "from pathlib import Path; from ctxlib.commands.cli import main; main()"
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv[1:] = {arguments!r}; {call}"
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "overrides.json").read_text()) == overrides
    receipts = tmp_path / overrides.get("outputs", "outputs") / "smoke" / "work" / "receipts"
    assert sorted(path.stem for path in receipts.iterdir()) == names


def test_the_help_imports_nothing_heavy():
    code = "import sys; from ctxlib.commands import cli; cli.app(['--help']); print(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pandas", "papermill", "datasets", "numpy", "huggingface_hub"}
    assert "reproduce" in asked.stdout and not heavy & set(asked.stdout.split())


def notebooks_to_run(folder: Path, *arguments: str, **overrides) -> set[str]:
    config = ["experiment=smoke", f"overrides={json.dumps(overrides)}"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments, "--config", *config]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return set(re.findall(r"output: outputs/smoke/work/receipts/(\w+)\.json", finished.stdout + finished.stderr))


def test_a_model_is_asked_after_it_is_trained(tmp_path):
    small_copy(tmp_path)
    asks_instruct = ["-n", "outputs/smoke/work/receipts/01_attention_shift.json"]
    assert notebooks_to_run(tmp_path, *asks_instruct) == {"01_attention_shift"}
    trained = {"models.instruct": "outputs/smoke/work/models/vanilla"}
    needed = {"01_attention_shift", "02_context_dependency", "03_indicator_sft"}
    assert notebooks_to_run(tmp_path, *asks_instruct, **trained) == needed


def test_an_edit_reruns_only_itself_and_what_depends_on_it(tmp_path):
    names = small_copy(tmp_path)
    snakemake = partial(notebooks_to_run, tmp_path)
    assert snakemake() == set(names)
    for path in [*tmp_path.glob("notebooks/*"), *tmp_path.glob("params/*"), *tmp_path.glob("ctxlib/*")]:
        path.touch()
    assert snakemake("-n") == set()
    edits = {
        "notebooks/00_the_miniature.ipynb": {"00_the_miniature"},
        "notebooks/01_attention_shift.ipynb": {"01_attention_shift", "04_evaluation", "05_figures_and_tables"},
        "notebooks/03_indicator_sft.ipynb": {"03_indicator_sft", "04_evaluation", "05_figures_and_tables"},
        "params/smoke.yaml": set(names),
        "params/miniature.yaml": set(names),  # which it extends
        "ctxlib/results.py": set(names),
    }
    for edited, expected in edits.items():
        path = tmp_path / edited
        before = path.read_text()
        path.write_text(before + "\n# edited\n")
        assert snakemake("-n") == expected, edited
        path.write_text(before)


def reproduce_here(arguments: list[str]) -> list[str]:
    """The command `ctxlib reproduce` of this repository, wherever it is run."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv[1:] = {['reproduce', *arguments]!r}; "
    return [sys.executable, "-c", f"{code}from ctxlib.commands.cli import main; main()"]


def test_the_words_of_snakemake_are_shown_when_nothing_can_start(tmp_path):
    small_copy(tmp_path)
    with (tmp_path / "Snakefile").open("a") as snakefile:
        snakefile.write("\nraise ValueError('the words of snakemake')\n")
    command = reproduce_here(["--params", "params/smoke.yaml"])
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "the words of snakemake" in ended.stderr


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_a_kill_of_reproduce_alone_ends_all_that_it_started_and_the_next_run_tidies_up(tmp_path):
    names = small_copy(tmp_path)
    stub = tmp_path / "ctxlib" / "__main__.py"
    words = (ROOT / "ctxlib" / "commands" / "reproduce.py").read_text()
    (tmp_path / "ctxlib" / "leader.py").write_text(words)
    stub.write_text(STUB.replace("while", "import ctxlib.leader\nctxlib.leader.end_with_leader()\nwhile"))
    command = reproduce_here(["--params", "params/smoke.yaml"])
    (tmp_path / "never ends").touch()
    receipts = tmp_path / "outputs" / "smoke" / "work" / "receipts"
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as process:
        while not list(receipts.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.01)
        started = children(process.pid)
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert started and not alive
    (tmp_path / "never ends").unlink()
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.stem for path in receipts.iterdir()) == names
    assert not (receipts.parent / "tmp").exists()


@pytest.mark.parametrize("name", ["a #b: 'c'.yaml", "spaces  and ü.yaml", 'double "quotes".yaml'])
def test_reproduce_takes_params_files_and_outputs_of_any_name(name, tmp_path):
    names = small_copy(tmp_path, f"params/{name}")
    arguments = ["--params", f"params/{name}", "--set", f"outputs={json.dumps(f'of {name}')}"]
    finished = subprocess.run(reproduce_here(arguments), cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.stem for path in (tmp_path / f"of {name}" / "smoke" / "work" / "receipts").iterdir()) == names


def test_reproduce_in_another_folder_than_the_clone_runs_its_notebooks(tmp_path):
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    names = small_copy(clone)
    elsewhere.mkdir()
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from ctxlib.commands import reproduce as room, cli; "
    code += f"from pathlib import Path; room.CLONE = Path({str(clone)!r}); "
    code += f"sys.argv[1:] = ['reproduce', '--params', {str(clone / 'params' / 'smoke.yaml')!r}]; cli.main()"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    receipts = elsewhere / "outputs" / "smoke" / "work" / "receipts"
    assert sorted(path.stem for path in receipts.iterdir()) == names


def plan_into(output: str, **environment: str) -> subprocess.CompletedProcess:
    command = f"{shlex.quote(sys.executable)} -m ctxlib plan params/smoke.yaml {output}"
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_a_full_output_is_one_line_a_closed_one_is_quiet_and_ascii_is_enough():
    full = plan_into("> /dev/full")
    assert full.returncode == 2 and full.stderr.splitlines() == ["output: No space left on device; make room"]
    closed = plan_into("| true; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED="1")
    assert closed.returncode == 141 and not closed.stderr
    narrow = plan_into(f"; exec {shlex.quote(sys.executable)} -m ctxlib doctor --help", PYTHONIOENCODING="ascii")
    assert narrow.returncode == 0 and not narrow.stderr and "?" in narrow.stdout


def test_few_open_files_are_named_when_the_kernel_dies(tmp_path):
    command = f"ulimit -n 40; exec {shlex.quote(sys.executable)} -m ctxlib run notebooks/00_the_miniature.ipynb"
    command += f" --params params/smoke.yaml --set outputs={tmp_path}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode in (1, 2) and "ulimit -n" in ended.stderr.splitlines()[-1]  # after the kernel's own words
