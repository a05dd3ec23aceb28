"""The console command `ctxlib`. Bad input is one line on stderr and exit status 2; a failed notebook is 1."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ctxlib.params import InputError, Variant, load_params

DEFAULT_PARAMS = Path("params/miniature.yaml")
# where `ctxlib run` leaves the line about bad input for the `ctxlib reproduce` that started it
INPUT_ERROR_FILE = "CTXLIB_INPUT_ERROR_FILE"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ParamsFile = Annotated[Path, typer.Option("--params", help="The experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Replace a parameter: --set needle.per_cell=2")]
_IN, _DATA, _SCORE, _JUDGE, _MODEL, _RUN = (
    {"rich_help_panel": name}
    for name in ("Input and output", "The data", "The score", "The judge", "The model", "The run")
)


ChatTemplate = Annotated[str | None, typer.Option(help="A .jinja file.", show_default="the tokenizer's own", **_MODEL)]
Revision = Annotated[str | None, typer.Option(help="Of a hub's model.", **_MODEL)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.", **_MODEL)]
Quantisation = Annotated[Literal["nf4"] | None, typer.Option(help="4-bit weights.", **_MODEL)]
Attention = Annotated[
    Literal["sdpa", "eager"], typer.Option(help="eager: for models without sdpa, such as Gemma 2.", **_MODEL)
]


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
    from ctxlib.commands.run import run_notebook

    run_notebook(notebook, params, out, _parse(overrides))


@app.command()
def reproduce(params: ParamsFile = DEFAULT_PARAMS, overrides: Overrides = None) -> None:
    """Run every notebook that is not up to date, in the order of the Snakefile.

    Those about evidence run side by side, as many as there are cores for their threads; the others one by one.
    """
    raise SystemExit(_reproduce(params, _parse(overrides)))


@app.command()
def rehearse(
    params: Annotated[Path, typer.Argument(help="The experiment, a YAML file.")] = DEFAULT_PARAMS,
    overrides: Overrides = None,
    width: Annotated[int, typer.Option(min=1, help="Of the random models, at most.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Of the random models, at most.")] = 4,
) -> None:
    """Run an experiment from end to end on small random models: a trial of its files before you spend GPU hours.

    Data, chat template, tokenizers, quantisation and method are those of the file; examples and steps are few. A
    stopped rehearsal goes on with the same command.
    """
    from ctxlib.commands import rehearse as room

    rehearsal = room.prepare(params, _parse(overrides), width=width, layers=layers)
    print(f"{params} on random models, to be run again from {rehearsal.params_file}:")
    print("\n".join(rehearsal.description), flush=True)
    status = _reproduce(rehearsal.params_file, {})
    print("\n".join(room.summary(rehearsal.params)))
    raise SystemExit(status)


@app.command()
def plan(
    params: Annotated[Path, typer.Argument(help="The experiment, a YAML file.")] = DEFAULT_PARAMS,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="rtx3090, rtx4090, a100-40, a6000, a100-80 or h100.")] = "a6000",
) -> None:
    """Print what an experiment needs: downloads, GPU memory, time, and problems, each with the setting that fixes it.

    Nothing is run or downloaded.
    """
    from ctxlib.commands.plan import make_plan, print_plan

    for line in print_plan(make_plan(load_params(params, _parse(overrides)), gpu)):
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

    from ctxlib.commands.doctor import examine, open_patient, print_examination

    patient, tokenizer, corpus = open_patient(
        model, dtype=dtype, quantisation=quantisation, chat_template=chat_template, revision=revision
    )
    frame = examine(patient, tokenizer, layer=layer, indicator=indicator, corpus=corpus, progress=_announce)
    if as_json:
        print(frame.to_json(orient="records", indent=2, force_ascii=False))
    else:
        print_examination(frame, tokenizer, Console(highlight=False, width=None if sys.stdout.isatty() else 160))
    raise SystemExit(int((frame["verdict"] == "fail").any()))


def _announce(check: str) -> None:
    print(f"checking {check} …", file=sys.stderr, flush=True)


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
    variant: Annotated[
        Variant,
        typer.Option(help="The formula as it stands, or as the authors' code has it.", **_SCORE),
    ] = "standard",
    head_reduction: Annotated[
        Literal["max_then_mean", "mean_then_max", "mean", "first_token"],
        typer.Option(help="From heads and answer tokens to one number; the first is the paper's.", **_SCORE),
    ] = "max_then_mean",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a conversation.", show_default="all positions; variant authors_code: 2047", **_SCORE
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    dtype: Dtype = "float32",
    quantisation: Quantisation = None,
    attention: Attention = "sdpa",
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
    from ctxlib.commands.score import Settings, parse_layers, parse_share, prepare

    share = parse_share(shard)
    settings = Settings(
        model=model,
        data=data,
        layers=parse_layers(layer),
        variant=variant,
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
    variant: Annotated[
        Variant | None,
        typer.Option(help="paper: also ends user texts with a full stop.", show_default="that of the scores"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the scored data are now, if they were moved.")] = None,
) -> None:
    """Mark the user turns whose answers depend on their context, by their scores.

    The file that comes out is in the messages format: an answer carries its `score`, a marked user message
    `indicated: true`. The data must be those that were scored, byte by byte.
    """
    from ctxlib.commands.score import mark_data

    marked = mark_data(scores, out, threshold=threshold, fraction=fraction, layer=layer, variant=variant, data=data)
    print(marked.summary())
    print(f"written to {out}")


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="A folder with safetensors, or a hub id.", **_IN)],
    data: Annotated[str, typer.Option(help="Conversations, such as the file that `ctxlib mark` wrote.", **_IN)],
    out: Annotated[Path, typer.Option(help="Folder for the result; a killed run goes on from there.", **_IN)],
    merged: Annotated[
        Path | None, typer.Option(help="Folder for a whole model, the adapter merged into its base.", **_IN)
    ] = None,
    on_bad_row: Annotated[
        Literal["error", "drop"], typer.Option(help="Stop at a malformed row, or drop and count it.", **_DATA)
    ] = "error",
    max_length: Annotated[int, typer.Option(help="Tokens of a conversation.", **_DATA)] = 2048,
    indicator: Annotated[
        str | None,
        typer.Option(help="Token after marked user messages, [IND] in the paper; without it marks do not count."),
    ] = None,
    variant: Annotated[
        Variant,
        typer.Option(help="clean: answers are learned, and the indicator; paper: every token, the indicator frozen."),
    ] = "standard",
    method: Annotated[Literal["lora", "qlora", "full"], typer.Option(help="What is trained.", **_MODEL)] = "lora",
    lora_rank: Annotated[int, typer.Option(**_MODEL)] = 16,
    lora_alpha: Annotated[float, typer.Option(**_MODEL)] = 16,
    lora_dropout: Annotated[float, typer.Option(**_MODEL)] = 0.05,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    epochs: Annotated[float | None, typer.Option(show_default="1", **_RUN)] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of epochs.", **_RUN)] = None,
    batch_size: Annotated[int, typer.Option(help="Conversations at a time, for each process.", **_RUN)] = 2,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.", **_RUN)] = 8,
    learning_rate: Annotated[float, typer.Option(**_RUN)] = 2e-4,
    packing: Annotated[bool, typer.Option("--packing", help="A batch in one row, without padding.", **_RUN)] = False,
    save_every: Annotated[int, typer.Option(help="Steps, what a kill can lose at most.", **_RUN)] = 100,
    seed: Annotated[int, typer.Option(**_RUN)] = 42,
) -> None:
    """Fine-tune a model on your conversations, with the indicator or without.

    Shown first: how much of each role is learned, and one conversation with what is learned of it. On several GPUs:
    accelerate launch -m ctxlib finetune --model …
    """
    from rich.console import Console

    from ctxlib.conversations import load_conversations
    from ctxlib.finetune import export_merged, is_main_process
    from ctxlib.finetune import finetune as train
    from ctxlib.miniature import model_source
    from ctxlib.models import load_tokenizer

    model = model_source(model)
    corpus = load_conversations(data, on_bad_row=on_bad_row)
    marks = sum(message.indicated for conversation in corpus.conversations for message in conversation.messages)
    if indicator and not marks:
        raise InputError(f"{data}: no user message is marked, {indicator} would learn nothing; first: ctxlib mark")
    if merged and (method == "full" or merged.exists()):
        remedy = "full makes no adapter, leave it out" if method == "full" else "is there already, choose another"
        raise InputError(f"--merged {merged}: {remedy}")
    if is_main_process():
        print(f"{data}: {len(corpus):,} conversations, {marks:,} marked user messages")
        for reason, n in corpus.dropped.itertuples(index=False):
            print(f"  {n:,} × {reason}")
        if marks and not indicator:
            print("  the marks do not count; that they do: --indicator '[IND]'")
    log = train(
        model,
        load_tokenizer(model, chat_template=chat_template, revision=revision),
        corpus.conversations,
        out_dir=out,
        method=method,
        indicator=indicator,
        variant=variant,
        steps=steps,
        epochs=1 if epochs is None and steps is None else epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        max_length=max_length,
        packing=packing,
        save_every=save_every,
        seed=seed,
        revision=revision,
        console=Console(highlight=False),
    )
    if is_main_process():
        if merged:
            export_merged(out, merged)
        print(f"loss {log.loss.iloc[0]:.3f} → {log.loss.iloc[-1]:.3f} nats per supervised token; written to {out}")


@app.command()
def mt_bench(
    model: Annotated[str, typer.Option(help="A folder with safetensors, a hub id, or miniature:instruct.", **_IN)],
    questions: Annotated[Path, typer.Option(help="A folder in FastChat's format: question.jsonl, …", **_IN)],
    judge: Annotated[str, typer.Option(help="The judge's name, as its server has it.", **_IN)],
    out: Annotated[Path, typer.Option(help="Folder for the ratings; a stopped run goes on from there.", **_IN)],
    judge_prompts: Annotated[
        Path | None, typer.Option(help="FastChat's judge_prompts.jsonl.", show_default="beside the questions", **_IN)
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Corrected reference answers.", show_default="as shipped", **_IN)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions, evenly spread.", **_IN)] = None,
    base_url: Annotated[
        str, typer.Option(help="Any server with OpenAI's protocol: http://localhost:8000/v1", **_JUDGE)
    ] = "https://api.openai.com/v1",
    api_key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the key; a local server needs none.", **_JUDGE)
    ] = "OPENAI_API_KEY",
    repeats: Annotated[int, typer.Option(help="Judgements an answer.", **_JUDGE)] = 1,
    temperature: Annotated[float, typer.Option(help="Of the judge; below 0: the server's own.", **_JUDGE)] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Of a judgement; 0: the server's own limit.", **_JUDGE)] = 2048,
    workers: Annotated[int, typer.Option(help="Judgements asked for at a time.", **_JUDGE)] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds for one judgement.", **_JUDGE)] = 300.0,
    prices: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Of a million prompt and completion tokens, to tell the cost.", **_JUDGE),
    ] = None,
    variant: Annotated[
        Variant, typer.Option(help="Both turns, or only the first as in the paper.", **_MODEL)
    ] = "standard",
    indicator: Annotated[str | None, typer.Option(help="Put after every user message: [IND]", **_MODEL)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", **_MODEL)] = 1024,
    batch_size: Annotated[int, typer.Option(help="Answers written at a time.", **_MODEL)] = 8,
    chat_template: ChatTemplate = None,
    revision: Revision = None,
    dtype: Dtype = "float32",
    quantisation: Quantisation = None,
    attention: Attention = "sdpa",
) -> None:
    """MT-Bench of a model, graded by a judge that you name: ratings with intervals and the judge's own variance.

    OUT will hold answers.jsonl, ratings.csv (a row a judgement), summary.csv, mt_bench.json (settings, hashes, tokens)
    and what a stopped run goes on from. The judge's server is tried before the model is loaded.
    """
    from ctxlib.commands import mt_bench as room

    bench = room.load_mt_bench(questions, judge_prompts=judge_prompts, corrected_references=references, limit=limit)
    grader = room.Judge(
        judge,
        base_url=base_url,
        api_key_variable=api_key_variable,
        temperature=temperature if temperature >= 0 else None,
        max_tokens=max_tokens or None,
        repeats=repeats,
        workers=workers,
        timeout=timeout,
    )
    try:
        summary, taken = room.evaluate(
            model,
            bench,
            grader,
            out,
            variant=variant,
            indicator=indicator,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chat_template=chat_template,
            revision=revision,
            dtype=dtype,
            quantisation=quantisation,
            attention=attention,
            prices=prices,
        )
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from what is in {out}", file=sys.stderr)
        raise SystemExit(130) from None
    print(summary.to_string(index=False, float_format="%.3f", na_rep=""))
    print(", ".join(f"{name.replace('_', ' ')} {value:,.10g}" for name, value in taken.items()))


def _reproduce(params_file: Path, overrides: dict[str, Any]) -> int:
    """The exit status of snakemake. Its own lock outlives a kill, so ours is the operating system's, which does not."""
    params = load_params(params_file, overrides)
    params.check_inputs()
    config = [f"params_file={params_file}", f"overrides={json.dumps(overrides)}"]
    after_a_kill = ["--nolock", "--rerun-incomplete"]
    command = [sys.executable, "-m", "snakemake", "--cores", "all" if params.evidence else "1", "--quiet", "all"]
    command += [*after_a_kill, "--config", *config]
    work = params.output_dir / "work"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "reproduce.lock").open("a") as lock, tempfile.TemporaryDirectory() as folder:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{params.output_dir}: a reproduction is running there; wait, or set other outputs"
            ) from None
        line = Path(folder) / "line"
        finished = subprocess.run(command, env=os.environ | {INPUT_ERROR_FILE: str(line)}, pass_fds=[lock.fileno()])
        if line.exists():
            raise InputError(line.read_text(encoding="utf-8"))
    return finished.returncode


def main() -> None:
    from ctxlib.commands.run import NotebookError

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
