"""The console command `ctxlib`. Bad input is one line on stderr and exit status 2; a failed notebook is 1."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ctxlib.params import InputError, load_params

DEFAULT_PARAMS = Path("params/miniature.yaml")
# where `ctxlib run` leaves the line about bad input for the `ctxlib reproduce` that started it
INPUT_ERROR_FILE = "CTXLIB_INPUT_ERROR_FILE"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ParamsFile = Annotated[Path, typer.Option("--params", help="The experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Replace a parameter: --set needle.per_cell=2")]
_IN, _DATA, _SCORE, _MODEL, _RUN = (
    {"rich_help_panel": name} for name in ("Input and output", "The data", "The score", "The model", "The run")
)


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
def plan(
    params: Annotated[Path, typer.Argument(help="The experiment, a YAML file.")] = DEFAULT_PARAMS,
    overrides: Overrides = None,
) -> None:
    """What an experiment would take, before anything runs: steps, downloads, GPU memory, time, and what would not fit.

    Nothing is downloaded and no weight is loaded.
    """
    from ctxlib.plan import make_plan, show

    for line in show(make_plan(load_params(params, _parse(overrides)))):
        print(line)


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


@app.command()
def score(
    model: Annotated[
        str, typer.Option(help="Seed model: a folder with safetensors, a hub id, or miniature:instruct.", **_IN)
    ],
    data: Annotated[
        str, typer.Option(help="A .json, .jsonl or .parquet file, a folder of such, or a hub's owner/name.", **_IN)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the scores; a stopped run goes on from there.", **_IN)],
    format: Annotated[
        Literal["sharegpt", "messages", "instruction"] | None,
        typer.Option(help="Of the rows.", show_default="told by their keys", **_DATA),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a hub's dataset.", **_DATA)] = "train",
    on_bad_row: Annotated[
        Literal["error", "drop"], typer.Option(help="Stop at a malformed row, or drop, count and list it.", **_DATA)
    ] = "error",
    max_bad_rows: Annotated[float, typer.Option(help="Give up if a greater fraction is bad.", **_DATA)] = 0.05,
    remove_refusals: Annotated[
        bool, typer.Option("--remove-refusals", help="Leave out conversations with a refusal.", **_DATA)
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many conversations.", **_DATA)] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="From 0; may be repeated; or all.",
            show_default="the paper's 15 of 22, to scale: round(depth × 15/22)",
            **_SCORE,
        ),
    ] = None,
    reading: Annotated[
        Literal["clean", "paper"],
        typer.Option(help="The formula as it stands, or as the authors' code has it.", **_SCORE),
    ] = "clean",
    head_reduction: Annotated[
        Literal["max_then_mean", "mean_then_max", "mean", "first_token"],
        typer.Option(help="From heads and answer tokens to one number; the first is the paper's.", **_SCORE),
    ] = "max_then_mean",
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a conversation.", show_default="all positions; reading paper: 2047", **_SCORE),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A .jinja file.", show_default="the tokenizer's own", **_MODEL)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub's model.", **_MODEL)] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.", **_MODEL)
    ] = "float32",
    quantisation: Annotated[Literal["nf4"] | None, typer.Option(help="4-bit weights.", **_MODEL)] = None,
    attention: Annotated[
        Literal["sdpa", "eager"], typer.Option(help="eager: for models without sdpa, such as Gemma 2.", **_MODEL)
    ] = "sdpa",
    token_budget: Annotated[
        int | None,
        typer.Option(help="Tokens in a batch, padding included.", show_default="8192; on a CPU 512", **_RUN),
    ] = None,
    conversations_per_part: Annotated[int, typer.Option(help="What a stop can lose at most.", **_RUN)] = 256,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Score only this share of the parts, counted from 1: 1/4 … 4/4.", **_RUN)
    ] = "1/1",
) -> None:
    """Context-dependency scores of your conversations, turn by turn.

    OUT will hold scores.parquet (a row a turn and layer), scores.json (settings, hashes, counts, versions),
    dropped_rows.csv, and parts/, from which a stopped run goes on. Everything is checked before the model is loaded.
    Shares (--shard) may run at the same time with the same OUT; the last to finish puts the scores together.
    """
    from ctxlib.score_folder import Settings, parse_layers, parse_share, prepare

    share = parse_share(shard)
    settings = Settings(
        model=model,
        data=data,
        layers=parse_layers(layer),
        reading=reading,
        head_reduction=head_reduction,
        max_length=max_length,
        token_budget=token_budget,
        conversations_per_part=conversations_per_part,
        dtype=dtype,
        quantisation=quantisation,
        attention=attention,
        chat_template=chat_template,
        revision=revision,
        format=format,
        split=split,
        on_bad_row=on_bad_row,
        max_bad_rows=max_bad_rows,
        remove_refusals=remove_refusals,
        limit=limit,
    )
    prepared = prepare(settings)
    for line in prepared.description():
        print(line, flush=True)
    try:
        finished = prepared.score(out, share)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from the parts in {out}", file=sys.stderr)
        raise SystemExit(130) from None
    for line in finished.summary():
        print(line)


@app.command()
def mark(
    scores: Annotated[Path, typer.Option(help="The folder that `ctxlib score` wrote.")],
    out: Annotated[Path, typer.Option(help="The marked dataset: .jsonl, .json or .parquet.")],
    threshold: Annotated[float | None, typer.Option(help="Mark turns with a score over this; the paper: 0.6.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Or mark this top share of the scored turns.")] = None,
    layer: Annotated[int | None, typer.Option(help="Needed where several were scored.")] = None,
    reading: Annotated[
        Literal["clean", "paper"] | None,
        typer.Option(help="paper: also ends user texts with a full stop.", show_default="that of the scores"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the scored data are now, if they were moved.")] = None,
) -> None:
    """Mark the user turns whose answers depend on their context, by their scores.

    The file that comes out is in the messages format: an answer carries its `score`, a marked user message
    `indicated: true`. The data must be those that were scored, byte by byte.
    """
    from ctxlib.score_folder import mark_data

    marked = mark_data(scores, out, threshold=threshold, fraction=fraction, layer=layer, reading=reading, data=data)
    print(marked.summary())
    print(f"written to {out}")


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
