"""The console command `ctxlib`. Bad input is one line on stderr and exit status 2; a failed notebook is 1.

Options, defaults, choices and help texts are those of the sections of a params file (`ctxlib.params`) and of
`ctxlib.commands.settings`. A command imports what it needs only when it runs.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, CycloptsError, Group, Parameter
from pydantic import ConfigDict, ValidationError, create_model, field_validator

from ctxlib.commands.reproduce import INPUT_ERROR_FILE
from ctxlib.commands.reproduce import reproduce as run_all
from ctxlib.commands.settings import Answering, Judge, ScoredRows, ScoreRun
from ctxlib.params import (
    RENAMED_VALUES,
    Conversations,
    Count,
    Finetune,
    Fraction,
    InputError,
    Layer,
    Loading,
    Models,
    NotebookError,
    ScoreRule,
    Section,
    Variant,
    load_params,
)

DEFAULT_PARAMS = Path("params/miniature.yaml")
RENAMED_OPTIONS = {"--reading": "--variant"}

app = App(
    name="ctxlib",
    help="Loss of context-awareness in instruction fine-tuning: measured, explained and cured.",
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    help_format="plaintext",  # markdown takes 0.2 s to import
)
_IN, _DATA, _SCORE, _JUDGE, _MODEL, _RUN = (
    Group.create_ordered(name)
    for name in ("Input and output", "The data", "The score", "The judge", "The model", "The run")
)


def _from_text(value: Any) -> Any:
    return None if value in ("none", "null") else value


def options(section: type[Section], group: Group, *only: str) -> Any:
    """The keys of a section as options of a command; they are texts here, where a YAML file has types."""
    lax: Any = {"model_config": ConfigDict(strict=False), "from_text": field_validator("*", mode="before")(_from_text)}
    kind: Any = type(section.__name__, (section,), lax | {"__module__": __name__})
    if only:
        fields: Any = {name: (section.model_fields[name].annotation, section.model_fields[name]) for name in only}
        config = ConfigDict(extra="forbid", frozen=True)
        kind = create_model(section.__name__, __config__=config, __validators__={"none": lax["from_text"]}, **fields)
    return Annotated[kind, Parameter(name="*", group=group)]


def _option(help: str, group: Group | None = None, **more: Any) -> Parameter:
    return Parameter(help=help, group=group, **more)


ParamsFile = Annotated[Path, _option("The experiment, a YAML file.", name="--params")]
Overrides = Annotated[list[str] | None, _option("Replace a parameter: --set needle.per_cell=2", name="--set")]
Model = Annotated[str, _option("A folder with safetensors, a hub id, or miniature:instruct.", _IN)]


@app.command
def run(
    notebook: Path,
    *,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
    out: Annotated[Path | None, _option("Path of the executed notebook.")] = None,
) -> None:
    """Execute one notebook and prove that every cell ran."""
    from ctxlib.commands.run import run_notebook

    run_notebook(notebook, params, out, _parse(overrides))


@app.command
def reproduce(*, params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Run every notebook that is not up to date, in the order of the Snakefile.

    Those about evidence run in parallel, as many as the cores allow for their threads; the others one by one.
    """
    raise SystemExit(run_all(params, _parse(overrides)))


@app.command
def rehearse(
    params: ParamsFile = DEFAULT_PARAMS,
    *,
    overrides: Overrides = None,
    width: Annotated[int, _option("Of the random models, at most.")] = 64,
    layers: Annotated[int, _option("Of the random models, at most.")] = 4,
) -> None:
    """Run an experiment from end to end on small random models, before you spend GPU hours.

    Data, chat template, tokenizers, quantisation and method are those of the file; examples and steps are few. An
    interrupted rehearsal resumes with the same command.
    """
    from ctxlib.commands import rehearse as room

    rehearsal = room.prepare(params, _parse(overrides), width=width, layers=layers)
    print(f"{params} on random models, to be run again from {rehearsal.params_file}:")
    print("\n".join(rehearsal.description), flush=True)
    status = run_all(rehearsal.params_file, {})
    print("\n".join(room.summary(rehearsal.params)))
    raise SystemExit(status)


@app.command
def plan(params: ParamsFile = DEFAULT_PARAMS, *, overrides: Overrides = None) -> None:
    """Print an experiment's steps, downloads, GPU memory and time, and which of them would fail or not fit.

    Nothing is downloaded and no weight is loaded.
    """
    from ctxlib.commands.plan import make_plan, show

    for line in show(make_plan(load_params(params, _parse(overrides)))):
        print(line)


@app.command
def doctor(
    model: Model,
    *,
    layer: Annotated[Layer | None, _option("Layer to score (0-based); by default round(depth × 15/22).")] = None,
    indicator: Annotated[str, _option("The text that is to become a token.")] = Models.model_fields[
        "indicator"
    ].default,
    loading: options(Loading, _MODEL, "dtype", "quantisation", "chat_template", "revision") = None,
    as_json: Annotated[bool, _option("Print the checks as JSON.", name="--json", negative=())] = False,
) -> None:
    """Examine a model before you spend GPU hours; exit status 1 if a check fails.

    Is its attention recorded and steered correctly, does its chat template show who wrote which token, is the indicator
    free, and is the chosen layer like the others?
    """
    from rich.console import Console

    from ctxlib.commands.doctor import examine, open_patient, show

    patient, tokenizer, corpus = open_patient(model, **_values(loading))
    frame = examine(patient, tokenizer, layer=layer, indicator=indicator, corpus=corpus)
    if as_json:
        print(frame.to_json(orient="records", indent=2, force_ascii=False))
    else:
        show(frame, tokenizer, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    raise SystemExit(int((frame["verdict"] == "fail").any()))


@app.command
def miniature(*, out: Annotated[Path, _option("Folder for the two models; an interrupted run resumes there.")]) -> None:
    """Train both models of the miniature from scratch and write their cards."""
    from ctxlib.miniature.build import build

    build(out)


@app.command
def score(
    *,
    model: Model,
    data: Annotated[str, _option("A .json, .jsonl or .parquet file, a folder of them, or a hub id.", _IN)],
    out: Annotated[Path, _option("Folder for the scores; an interrupted run resumes there.", _IN)],
    rows: options(ScoredRows, _DATA) = None,
    layer: Annotated[
        list[str] | None, _option("0-based, repeatable, or all; by default round(depth × 15/22).", _SCORE)
    ] = None,
    rule: options(ScoreRule, _SCORE) = None,
    loading: options(Loading, _MODEL) = None,
    how: options(ScoreRun, _RUN) = None,
    shard: Annotated[str, _option("Score only this share of the parts, 1-based: 1/4 … 4/4.", _RUN)] = "1/1",
) -> None:
    """Context-dependency scores of your conversations, one per turn and layer.

    OUT will contain scores.parquet (one row per turn and layer), scores.json (settings, hashes, counts, versions),
    dropped_rows.csv, and parts/, from which an interrupted run resumes. Everything is checked before the model is
    loaded. Shards may run at the same time with the same OUT; the last to finish joins the scores.
    """
    from ctxlib.commands.score import Settings, parse_layers, parse_share, prepare

    share = parse_share(shard)
    named = {"model": model, "data": data, "layers": parse_layers(layer)}
    prepared = prepare(Settings(**named, **_values(rows, rule, loading, how)))
    for line in prepared.description():
        print(line, flush=True)
    try:
        finished = prepared.score(out, share)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command resumes from the parts in {out}", file=sys.stderr)
        raise SystemExit(130) from None
    for line in finished.summary():
        print(line)


@app.command
def mark(
    *,
    scores: Annotated[Path, _option("The folder that `ctxlib score` wrote.")],
    out: Annotated[Path, _option("The marked dataset: .jsonl, .json or .parquet.")],
    threshold: Annotated[Fraction | None, _option("Mark turns with a score over this; the paper: 0.6.")] = None,
    fraction: Annotated[Fraction | None, _option("Or mark this top fraction of the scored turns.")] = None,
    layer: Annotated[Layer | None, _option("Required if several were scored.")] = None,
    variant: Annotated[
        Variant | None, _option("authors_code: also ends user texts with a full stop; by default that of the scores.")
    ] = None,
    data: Annotated[str | None, _option("Where the scored data are now, if they were moved.")] = None,
) -> None:
    """Mark the user turns whose answers depend on their context, by their scores.

    The output is in the messages format: an answer carries its `score`, a marked user message `indicated: true`. The
    data must be identical, byte by byte, to those that were scored.
    """
    from ctxlib.commands.score import mark_data

    marked = mark_data(scores, out, threshold=threshold, fraction=fraction, layer=layer, variant=variant, data=data)
    print(marked.summary())
    print(f"written to {out}")


@app.command
def finetune(
    *,
    model: Model,
    data: Annotated[str, _option("Conversations, such as the file that `ctxlib mark` wrote.", _IN)],
    out: Annotated[Path, _option("Folder for the result; an interrupted run resumes there.", _IN)],
    merged: Annotated[Path | None, _option("Folder for a whole model, the adapter merged into its base.", _IN)] = None,
    rows: options(Conversations, _DATA, "on_bad_row", "max_length") = None,
    indicator: Annotated[
        str | None,
        _option("Token after marked user messages, [IND] in the paper; without it, marks are ignored.", _DATA),
    ] = None,
    loading: options(Loading, _MODEL, "chat_template", "revision", "attention") = None,
    settings: options(Finetune, _RUN) = None,
    seed: Annotated[int, _option("Of the order of the data and of new weights.", _RUN)] = 42,
) -> None:
    """Fine-tune a model on your conversations, with or without the indicator.

    Printed first: the fraction of each role that is learned, and one conversation with the learned tokens. On several
    GPUs: accelerate launch -m ctxlib finetune --model …
    """
    from ctxlib.commands.finetune import train

    train(model, data, out, settings or Finetune(), merged, indicator, seed, **_values(rows, loading))


@app.command(name="mt-bench")
def mt_bench(
    *,
    model: Model,
    questions: Annotated[Path, _option("A folder in FastChat's format: question.jsonl, …", _IN)],
    out: Annotated[Path, _option("Folder for the ratings; an interrupted run resumes there.", _IN)],
    judge_prompts: Annotated[
        Path | None, _option("FastChat's judge_prompts.jsonl; by default next to the questions.", _IN)
    ] = None,
    references: Annotated[
        Path | None, _option("Corrected reference answers; by default those of FastChat.", _IN)
    ] = None,
    limit: Annotated[Count | None, _option("Only this many questions, evenly spread.", _IN)] = None,
    judge: Annotated[Judge, Parameter(name="*", group=_JUDGE)],
    prices: Annotated[
        tuple[float, float] | None, _option("Per million prompt and completion tokens, to report the cost.", _JUDGE)
    ] = None,
    answering: options(Answering, _MODEL) = None,
    loading: options(Loading, _MODEL) = None,
) -> None:
    """MT-Bench of a model, graded by a judge of your choice: ratings with intervals and the judge's own variance.

    OUT will contain answers.jsonl, ratings.csv (one row per judgement), summary.csv, mt_bench.json (settings, hashes,
    tokens) and the answers and judgements from which an interrupted run resumes. The judge's server is tried before
    the model is loaded.
    """
    from ctxlib.commands import mt_bench as room

    bench = room.load_mt_bench(questions, judge_prompts=judge_prompts, corrected_references=references, limit=limit)
    try:
        summary, taken = room.evaluate(model, bench, judge, out, prices=prices, **_values(answering, loading))
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command resumes from {out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary.to_string(index=False, float_format="%.3f", na_rep=""))
    print(", ".join(f"{name.replace('_', ' ')} {value:,.10g}" for name, value in taken.items()))


def main() -> None:
    """Runs the command of the command line and exits with its status."""
    try:
        _refuse_renamed(sys.argv[1:])
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except InputError as error:
        if file := os.environ.get(INPUT_ERROR_FILE):
            Path(file).write_text(str(error), encoding="utf-8")
        else:
            print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except (CycloptsError, ValidationError) as error:
        print(_one_line(error), file=sys.stderr)
        raise SystemExit(2) from None
    except NotebookError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(0)


def _refuse_renamed(arguments: list[str]) -> None:
    for old, new in RENAMED_OPTIONS.items():
        if old in (argument.split("=")[0] for argument in arguments):
            values = ", ".join(f"{now} (was {before})" for before, now in RENAMED_VALUES.items())
            raise InputError(f"{old} is now {new}, one of {values}")


def _one_line(error: CycloptsError | ValidationError) -> str:
    if isinstance(error, CycloptsError):
        return " ".join(str(error).split())
    problem = error.errors()[0]
    option = " ".join(f"--{str(part).replace('_', '-')}" for part in problem["loc"][:1])
    what = problem["msg"].removeprefix("Value error, ")
    return f"{option} {problem['input']}: {what[:1].lower()}{what[1:]}" if option else what


def _values(*sections: Section | None) -> dict[str, Any]:
    """Of all options together; none of a section that was not touched, whose defaults are those of the library."""
    return {name: value for section in sections if section for name, value in section.model_dump().items()}


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
