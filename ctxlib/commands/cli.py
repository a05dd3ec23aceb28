"""The console command `ctxlib`. Bad input is one line on stderr and exit status 2; a failed notebook is 1.

Options, defaults, choices and help texts are those of the sections of a params file (`ctxlib.params`) and of
`ctxlib.commands.settings`. A command imports what it needs only when it runs.
"""

import errno
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from ctxlib.commands.options import (
    DATA,
    INPUT,
    JUDGE,
    MODEL,
    RUN,
    SCORE,
    one_line,
    option,
    options,
    parse_overrides,
    refuse_renamed,
    values,
)
from ctxlib.commands.reproduce import INPUT_ERROR_FILE, LEADER, end_with_leader, temporary_files
from ctxlib.commands.reproduce import reproduce as run_all
from ctxlib.commands.settings import Answering, Judge, ScoredRows, ScoreRun
from ctxlib.params import (
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
    Seed,
    Variant,
    expanded,
    load_params,
)

DEFAULT_PARAMS = Path("params/miniature.yaml")

app = App(
    name="ctxlib",
    help="Loss of context-awareness in instruction fine-tuning: measured, explained and cured.",
    default_parameter=Parameter(negative_iterable=(), allow_repeating=True),  # the last value counts
    result_action="return_value",
    help_format="plaintext",  # markdown takes 0.2 s to import
)
ParamsFile = Annotated[Path, option("The experiment, a YAML file.", name="--params")]
Overrides = Annotated[list[str] | None, option("Replace a parameter: --set needle.per_cell=2", name="--set")]
Model = Annotated[str, option("A folder with safetensors, a hub id, or miniature:instruct.", INPUT)]


@app.command
def run(
    notebook: Path,
    *,
    params: ParamsFile = DEFAULT_PARAMS,
    overrides: Overrides = None,
    out: Annotated[Path | None, option("Path of the executed notebook.")] = None,
) -> None:
    """Execute one notebook and prove that every cell ran."""
    from ctxlib.commands.run import run_notebook

    end_with_leader()
    values_set = parse_overrides(overrides)
    work = load_params(params, values_set).output_dir / "work"
    # within `ctxlib reproduce` there is such a folder already
    with nullcontext() if LEADER in os.environ else temporary_files(work / "tmp" / notebook.stem):
        run_notebook(notebook, params, out, values_set)


@app.command
def reproduce(*, params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Run every notebook that is not up to date, in the order of the Snakefile.

    Those about evidence run in parallel, as many as the cores allow for their threads; the others one by one.
    """
    raise SystemExit(run_all(params, parse_overrides(overrides)))


@app.command
def cures(
    params: Annotated[Path, option("The experiment, with a section cures.")] = Path("params/cures.yaml"),
    *,
    overrides: Overrides = None,
    cure: Annotated[list[str] | None, option("A cure of your own: path.py:Name.", name="--cure")] = None,
    seeds: Annotated[list[Seed] | None, option("By default cures.trained_seeds.")] = None,
) -> None:
    """Try cures of your own beside no cure: reading gained, price paid. `make cures` compares all built-in ones."""
    from ctxlib.commands.cures import try_cures

    print(try_cures(params, cure or [], seeds, parse_overrides(overrides)))


@app.command
def verify(
    yours: Annotated[Path, option("An experiment's folder, such as outputs/miniature.", INPUT)],
    committed: Annotated[Path, option("The folder to compare it with.", INPUT)],
    *,
    tolerance: Annotated[Fraction, option("By which a value may lie outside of the committed interval.")] = 0.02,
) -> None:
    """Compare your tables with the committed ones, claim by claim; exit status 1 if one differs."""
    from ctxlib.commands.verify import report
    from ctxlib.commands.verify import verify as compared

    frame = compared(yours, committed, tolerance)
    print(report(frame))
    raise SystemExit(int(not frame.agrees.all()))


@app.command
def compare(
    a: Annotated[Path, option("An experiment's folder, or a CSV or Parquet file with id and value.", INPUT)],
    b: Annotated[Path, option("Another one.", INPUT)],
) -> None:
    """Compare two experiments, paired by question: mean difference A - B, with its interval."""
    from ctxlib.commands.compare import compare as paired

    frame = paired(a, b)
    print(frame.to_string(index=False, float_format="{:.3f}".format))
    print(f"{frame.attrs['unpaired']:,} rows are in one of the two alone")


@app.command
def rehearse(
    params: ParamsFile = DEFAULT_PARAMS,
    *,
    overrides: Overrides = None,
    width: Annotated[Count, option("Of the random models, at most.")] = 64,
    layers: Annotated[Count, option("Of the random models, at most.")] = 4,
) -> None:
    """Run an experiment from end to end on small random models, before you spend GPU hours.

    Data, chat template, tokenizers, quantisation and method are those of the file; examples and steps are few. An
    interrupted rehearsal resumes with the same command.
    """
    from ctxlib.commands import rehearse as room

    rehearsal = room.prepare(params, parse_overrides(overrides), width=width, layers=layers)
    print(f"{params} on random models, to be run again from {rehearsal.params_file}:")
    print("\n".join(rehearsal.description), flush=True)
    status = run_all(rehearsal.params_file, {})
    print("\n".join(room.summary(rehearsal.params)))
    raise SystemExit(status)


@app.command
def plan(
    params: ParamsFile = DEFAULT_PARAMS,
    *,
    overrides: Overrides = None,
    gpu: Annotated[str, option("rtx3090, rtx4090, a100-40, a6000, a100-80 or h100.")] = "a6000",
) -> None:
    """Print what an experiment needs: downloads, GPU memory, time, and problems, each with the setting that fixes it.

    Nothing is run or downloaded.
    """
    from ctxlib.commands.plan import make_plan, print_plan

    for line in print_plan(make_plan(load_params(params, parse_overrides(overrides)), gpu)):
        print(line)


@app.command
def doctor(
    model: Model | None = None,
    *,
    templates: Annotated[Path | None, option("Examine the .jinja files of this folder instead of a model.")] = None,
    layer: Annotated[Layer | None, option("Layer to score (0-based); by default round(depth × 15/22).")] = None,
    indicator: Annotated[str, option("The text that is to become a token.")] = Models.model_fields["indicator"].default,
    loading: options(Loading, MODEL, "dtype", "quantisation", "chat_template", "revision") = None,
    as_json: Annotated[bool, option("Print the checks as JSON.", name="--json", negative=())] = False,
) -> None:
    """Examine a model before you spend GPU hours; exit status 1 if a check fails.

    Is its attention recorded and steered correctly, does its chat template show who wrote which token, is the indicator
    free, and is the chosen layer like the others?
    """
    from rich.console import Console

    from ctxlib.commands.doctor import examine, open_patient, print_examination, print_templates

    if (model is None) == (templates is None):
        raise InputError("doctor: name a model, or a folder of chat templates (--templates), and not both")
    if templates is not None:
        raise SystemExit(print_templates(templates, as_json=as_json))
    patient, tokenizer, corpus = open_patient(model, **values(loading))
    frame = examine(patient, tokenizer, layer=layer, indicator=indicator, corpus=corpus, progress=_announce)
    if as_json:
        print(frame.to_json(orient="records", indent=2, force_ascii=False))
    else:
        print_examination(frame, tokenizer, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    raise SystemExit(int((frame["verdict"] == "fail").any()))


def _announce(check: str) -> None:
    print(f"checking {check} …", file=sys.stderr, flush=True)


@app.command
def miniature(
    *,
    out: Annotated[Path, option("Folder for the models; an interrupted run resumes there.")],
    adapters: Annotated[Path | None, option("Instead: copy and examine the adapters that 03 wrote here.")] = None,
) -> None:
    """Train the two whole models of the miniature from scratch and write their cards.

    With `--adapters outputs/miniature/work/models`, add the two adapters of notebook 03 to the models in `out`.
    """
    from ctxlib.files import check_writable
    from ctxlib.miniature.build import build, ship_adapters

    check_writable(expanded(out))
    build(expanded(out)) if adapters is None else ship_adapters(expanded(adapters), expanded(out))


@app.command(name="class")
def class_forms(
    *,
    out: Annotated[Path, option("Folder for student/, solutions/ and colab/.")] = Path("class"),
    masters: Annotated[Path, option("Folder of the masters.")] = Path("class/master"),
    seed: Annotated[Seed, option("Of the needles: another one gives other numbers than the published solutions.")] = 0,
) -> None:
    """Write the student's, the solution's and the Colab form of every exercise of the class."""
    from ctxlib.teaching.split import write_forms

    for file in write_forms(expanded(masters), expanded(out), seed=seed):
        print(file)


@app.command
def view(*, out: Annotated[Path, option("The HTML file.")] = Path("site/attention.html")) -> None:
    """Write the attention view: six prompts, every head and token, in one HTML file that loads nothing."""
    from ctxlib.teaching.view import write_view

    print(write_view(expanded(out)))


@app.command
def site(*, out: Annotated[Path, option("Folder for the pages.")] = Path("site")) -> None:
    """Write the static site of the class: notebooks with stored outputs, exercises, pages. Nothing is executed."""
    from ctxlib.teaching.site import build_site

    print(f"{len(build_site(expanded(out)))} pages: {out / 'index.html'}")


@app.command
def gguf(
    file: Path,
    folder: Path,
    *,
    sha256: Annotated[str | None, option("Refuse a file with another one.")] = None,
) -> None:
    """Make a model folder from a GGUF file, once: dequantised, with its tokenizer and chat template.

    The folder appears whole or not at all. Its README.md states the file's sha256 and what its quantisation lost.
    """
    from ctxlib.models import convert_gguf

    for line in convert_gguf(file, folder, sha256=sha256):
        print(line)


@app.command
def score(
    *,
    model: Model,
    data: Annotated[str, option("A .json, .jsonl or .parquet file, a folder of them, or a hub id.", INPUT)],
    out: Annotated[Path, option("Folder for the scores; an interrupted run resumes there.", INPUT)],
    rows: options(ScoredRows, DATA) = None,
    layer: Annotated[
        list[str] | None,
        option("0-based, repeatable, or all; by default the paper's 15 of 22, to scale: round(depth × 15/22).", SCORE),
    ] = None,
    rule: options(ScoreRule, SCORE) = None,
    loading: options(Loading, MODEL) = None,
    how: options(ScoreRun, RUN) = None,
    shard: Annotated[str, option("Score only this share of the parts, 1-based: 1/4 … 4/4.", RUN)] = "1/1",
) -> None:
    """Context-dependency scores of your conversations, one per turn and layer.

    OUT will contain scores.parquet (one row per turn and layer), scores.json (settings, hashes, counts, versions),
    dropped_rows.csv, and parts/, from which an interrupted run resumes. Everything is checked before the model is
    loaded. Shards may run at the same time with the same OUT; the last to finish joins the scores.
    """
    from ctxlib.commands.score import Settings, parse_layers, parse_share, prepare

    share = parse_share(shard)
    named = {"model": model, "data": data, "layers": parse_layers(layer)}
    prepared = prepare(Settings(**named, **values(rows, rule, loading, how)))
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
    scores: Annotated[Path, option("The folder that `ctxlib score` wrote.")],
    out: Annotated[Path, option("The marked dataset: .jsonl, .json or .parquet.")],
    threshold: Annotated[Fraction | None, option("Mark turns with a score over this; the paper: 0.6.")] = None,
    fraction: Annotated[Fraction | None, option("Or mark this top fraction of the scored turns.")] = None,
    layer: Annotated[Layer | None, option("Required if several were scored.")] = None,
    variant: Annotated[
        Variant | None, option("authors_code: also ends user texts with a full stop; by default that of the scores.")
    ] = None,
    data: Annotated[str | None, option("Where the scored data are now, if they were moved.")] = None,
) -> None:
    """Mark the user turns whose answers depend on their context, by their scores.

    The output is in the messages format: an answer carries its `score`, a marked user message `indicated: true`. The
    data must be identical, byte by byte, to those that were scored.
    """
    from ctxlib.commands.mark import mark_data

    marked = mark_data(scores, out, threshold=threshold, fraction=fraction, layer=layer, variant=variant, data=data)
    print(marked.summary())
    print(f"written to {out}")


@app.command
def finetune(
    *,
    model: Model,
    data: Annotated[str, option("Conversations, such as the file that `ctxlib mark` wrote.", INPUT)],
    out: Annotated[Path, option("Folder for the result; an interrupted run resumes there.", INPUT)],
    merged: Annotated[Path | None, option("Folder for a whole model, the adapter merged into its base.", INPUT)] = None,
    rows: options(Conversations, DATA, "raw_text", "on_bad_row", "max_length") = None,
    indicator: Annotated[
        str | None,
        option("Token after marked user messages, [IND] in the paper; without it, marks are ignored.", DATA),
    ] = None,
    loading: options(Loading, MODEL, "chat_template", "revision", "attention") = None,
    settings: options(Finetune, RUN) = None,
    seed: Annotated[Seed, option("Of the order of the data and of new weights.", RUN)] = 42,
) -> None:
    """Fine-tune a model on your conversations, with or without the indicator.

    Printed first: the fraction of each role that is learned, and one conversation with the learned tokens. On several
    GPUs: accelerate launch -m ctxlib finetune --model …
    """
    from ctxlib.commands.finetune import train

    train(model, data, out, settings or Finetune(), merged, indicator, seed, **values(rows, loading))


@app.command(name="mt-bench")
def mt_bench(
    *,
    model: Model,
    questions: Annotated[Path, option("A folder in FastChat's format: question.jsonl, …", INPUT)],
    out: Annotated[Path, option("Folder for the ratings; an interrupted run resumes there.", INPUT)],
    judge_prompts: Annotated[
        Path | None, option("FastChat's judge_prompts.jsonl; by default next to the questions.", INPUT)
    ] = None,
    references: Annotated[
        Path | None, option("Corrected reference answers; by default those of FastChat.", INPUT)
    ] = None,
    limit: Annotated[Count | None, option("Only this many questions, evenly spread.", INPUT)] = None,
    judge: Annotated[Judge, Parameter(name="*", group=JUDGE)],
    prices: Annotated[
        tuple[float, float] | None, option("Per million prompt and completion tokens, to report the cost.", JUDGE)
    ] = None,
    answering: options(Answering, MODEL) = None,
    loading: options(Loading, MODEL) = None,
) -> None:
    """MT-Bench of a model, graded by a judge of your choice: ratings with intervals and the judge's own variance.

    OUT will contain answers.jsonl, ratings.csv (one row per judgement), summary.csv, mt_bench.json (settings, hashes,
    tokens) and the answers and judgements from which an interrupted run resumes. The judge's server is tried before
    the model is loaded.
    """
    from ctxlib.commands import mt_bench as room

    bench = room.load_mt_bench(questions, judge_prompts=judge_prompts, corrected_references=references, limit=limit)
    try:
        answering, loading = answering or Answering(), loading or Loading()
        summary, taken = room.evaluate(model, bench, judge, out, answering, loading, prices=prices)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command resumes from {out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary.to_string(index=False, float_format="%.3f", na_rep=""))
    print(", ".join(f"{name.replace('_', ' ')} {value:,.10g}" for name, value in taken.items()))


for _name in app:  # a paragraph of a docstring is one line, which the help then wraps at the terminal's width
    if not _name.startswith("-"):
        app[_name].help = "\n\n".join(" ".join(part.split()) for part in app[_name].help.split("\n\n"))


def main() -> None:
    """Runs the command of the command line and exits with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of characters that the terminal does not have
    try:
        try:
            status = _status(sys.argv[1:])
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as in `ctxlib … | head`
        _discard_output()
        status = 128 + 13  # as a shell reports SIGPIPE
    except (OSError, ImportError) as error:
        if "Too many open files" in str(error):
            print("too many open files: raise the limit, for instance to 1024: ulimit -n 1024", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, ImportError):
            raise
        is_full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if error.filename is None and not is_full:
            raise
        what, remedy = error.filename, "correct it, or its permissions"
        if is_full:
            _discard_output()
            what, remedy = "output", "make room"
        print(f"{what}: {error.strerror}; {remedy}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


def _status(arguments: list[str]) -> int:
    """Runs a command; its exit status. What is wrong is one line on stderr."""
    report = os.environ.get(INPUT_ERROR_FILE)
    try:
        refuse_renamed(arguments)
        app(arguments, exit_on_error=False, print_error=False)
    except (InputError, CycloptsError, ValidationError) as error:
        line = " ".join((str(error) if isinstance(error, InputError) else one_line(error)).splitlines())
        if report:
            Path(report).write_text(line, encoding="utf-8", errors="replace")
        else:
            print(line, file=sys.stderr)
        return 2
    except NotebookError as error:
        print(error, file=sys.stderr)
        if report:
            Path(report).with_name("failed").touch()
        return 1
    return 0


def _discard_output() -> None:
    """Or the interpreter would try to write the rest at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
