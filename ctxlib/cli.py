"""The console command `ctxlib`. Bad input is one line on stderr and exit status 2; a failed notebook is 1."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ctxlib.params import InputError, load_params

DEFAULT_PARAMS = Path("params/miniature.yaml")
# where `ctxlib run` leaves the line about bad input for the `ctxlib reproduce` that started it
INPUT_ERROR_FILE = "CTXLIB_INPUT_ERROR_FILE"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ParamsFile = Annotated[Path, typer.Option("--params", help="The experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Replace a parameter: --set needle.per_cell=2")]


@app.callback()
def _commands() -> None:
    """Loss of context-awareness in instruction fine-tuning: measured, explained and cured."""


@app.command()
def run(
    notebook: Path,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where the executed notebook goes.")] = None,
) -> None:
    """Execute one notebook and prove that every cell ran."""
    from ctxlib.run import run_notebook  # papermill is slow to import

    run_notebook(notebook, params, out, _parse(overrides))


@app.command()
def reproduce(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Run every notebook that is not up to date, in the order of the Snakefile."""
    parsed = _parse(overrides)
    load_params(params, parsed).check_inputs()
    config = [f"params_file={params}", f"overrides={json.dumps(parsed)}"]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--config", *config]
    with tempfile.TemporaryDirectory() as folder:
        line = Path(folder) / "line"
        finished = subprocess.run(command, env=os.environ | {INPUT_ERROR_FILE: str(line)})
        if line.exists():
            raise InputError(line.read_text(encoding="utf-8"))
    raise SystemExit(finished.returncode)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="A folder with safetensors, a hub id, or miniature:instruct.")],
    layer: Annotated[
        int | None, typer.Option(help="Whose heads give the scores, from 0. [default: round(depth * 15 / 22)]")
    ] = None,
    indicator: Annotated[str, typer.Option(help="The text that is to become a token.")] = "[IND]",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    quantisation: Annotated[str | None, typer.Option(help="nf4: 4-bit weights.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file, instead of the tokenizer's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub's model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Examine a model before you spend GPU hours; exit status 1 if a check fails.

    Is its attention recorded and steered rightly, does its chat template tell who wrote which token, is the indicator
    free, and is the chosen layer like the others?
    """
    from rich.console import Console

    from ctxlib.doctor import examine, open_patient, show

    patient, tokenizer, corpus = open_patient(
        model, dtype=dtype, quantisation=quantisation, chat_template=chat_template, revision=revision
    )
    frame = examine(patient, tokenizer, layer=layer, indicator=indicator, corpus=corpus)
    if as_json:
        print(frame.to_json(orient="records", indent=2, force_ascii=False))
    else:
        show(frame, tokenizer, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    raise SystemExit(int((frame["verdict"] == "fail").any()))


@app.command()
def miniature(
    out: Annotated[Path, typer.Option(help="Folder for the two models; a stopped run goes on from there.")],
) -> None:
    """Train both models of the miniature from nothing and write their cards."""
    from ctxlib.miniature.build import build

    build(out)


def main() -> None:
    from ctxlib.run import NotebookError

    try:
        app()
    except InputError as error:
        if file := os.environ.get(INPUT_ERROR_FILE):
            Path(file).write_text(str(error), encoding="utf-8")
        else:
            print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except NotebookError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def _parse(overrides: list[str] | None) -> dict[str, Any]:
    parsed = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected key=value, such as --set needle.per_cell=2")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--set {override}: the value is not readable as YAML") from None
    return parsed


if __name__ == "__main__":
    main()
