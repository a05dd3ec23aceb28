"""A plan as a reader sees it in a terminal."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from tabulate import tabulate

from ctxlib.commands.plan import sources
from ctxlib.commands.plan.machines import ASSUMPTIONS, GIB, GPUS
from ctxlib.commands.plan.memory import BATCH_SIZES, Footprint, at_batch_size
from ctxlib.commands.plan.planning import Plan, fits, footprint_under, hours, in_bytes, nearest_folder
from ctxlib.commands.plan.questions import CHARACTERS_PER_TOKEN, MT_BENCH
from ctxlib.params import TRAINED_MODELS, Params

PARTS = ("weights", "adapter", "gradients", "optimiser", "kv_cache", "activations", "logits")


def show(plan: Plan) -> Iterator[str]:
    """The plan, line by line, for a person."""
    params = plan.params
    yield f"{params.experiment} ({params.file}, params {params.digest}): a plan; nothing was run or downloaded"
    yield from _models_and_data(plan)
    yield from _section(
        "Steps",
        ["notebook", "step", "model", "rows", "tokens read", "new tokens, at most"],
        [
            (s.notebook, s.what, s.model, _number(s.rows), _number(s.tokens), _number(s.rows * s.new_tokens))
            for s in [*plan.steps, *plan.afterwards]
        ],
    )
    yield "  repeated questions are answered from the cache and not counted twice"
    yield from _training(plan)
    if plan.afterwards:
        yield from _mt_bench(plan)
    yield from _downloads(plan)
    yield from _memory(plan)
    yield from _time(plan)
    yield from _there(plan)
    yield from _does_not_fit(plan)


def _models_and_data(plan: Plan) -> Iterator[str]:
    rows = []
    for which, source in plan.models.items():
        network = source.network
        shape = f"{network.parameters / 1e9:.2f} B" if network.parameters > 1e8 else f"{network.parameters:,}"
        rows.append((which, source.name, f"{shape} parameters, {network.layers} layers", source.where))
    yield from _section("Models", ["", "name", "shape", "where"], rows)
    section, texts = plan.params.conversations, plan.conversations
    yield (
        f"  conversations: {section.source}, {_number(texts.n)} of {_number(texts.length)} tokens on average, at most "
        f"{section.max_length:,}; {texts.source}"
    )
    rows = []
    for family, of_family in plan.questions.items():
        for name, of_source in (of_family.parts or {"": of_family}).items():
            if of_source.n:
                sizes = (_number(of_source.n), _number(of_source.length), _number(math.ceil(of_source.longest)))
                rows.append((family, name, *sizes, of_source.source))
    yield from _section("Questions", ["family", "source", "questions", "tokens, mean", "longest", "known from"], rows)


def _training(plan: Plan) -> Iterator[str]:
    section, step = plan.params.finetune, next(step for step in plan.steps if step.kind == "train")
    effective = section.batch_size * section.gradient_accumulation
    n = "not known how many" if math.isnan(step.rows) else _number(math.ceil(step.rows / effective))
    what = f"  a training: {n} steps of {effective} conversations"
    if section.packing:
        yield f"{what}, {section.batch_size} at a time in one row without padding, each behind a mask of the whole row"
    elif section.batch_size > 1:
        order = "of like length" if section.group_by_length else "as they come (group_by_length: true pads less)"
        yield f"{what}, {section.batch_size} at a time {order}: padding adds {step.padding - 1:.0%} to the tokens"
    else:
        yield f"{what}, one at a time, without padding"


def _mt_bench(plan: Plan) -> Iterator[str]:
    new_tokens = plan.afterwards[0].new_tokens
    option = "" if new_tokens == MT_BENCH.max_new_tokens else f" --max-new-tokens {new_tokens}"
    yield (
        f"  after: the paper's MT-Bench, {MT_BENCH.n} questions of two turns, which no notebook runs but "
        f"`ctxlib mt-bench{option}`, with a judge that you name ({2 * MT_BENCH.n} judgements a model, "
        f"{MT_BENCH.n} with --variant authors_code)"
    )


def _downloads(plan: Plan) -> Iterator[str]:
    rows = [("download", name, in_bytes(size)) for name, size in plan.downloads().items()]
    rows += [("results", name, in_bytes(size)) for name, size in plan.results().items()]
    total = sum([*plan.downloads().values(), *plan.results().values()])
    free = shutil.disk_usage(nearest_folder(plan.params.output_dir)).free
    yield from _section("Downloads and disk", ["", "what", "size"], [*rows, ("", "all of it", in_bytes(total))])
    yield f"  {in_bytes(free)} free here; a dataset's size is its text at {CHARACTERS_PER_TOKEN} bytes a token"


def _memory(plan: Plan) -> Iterator[str]:
    rows = [
        (f.notebook, f.what, f"{f.setting} {f.value}" if f.setting else "", *_gib_parts(f), _gib(f.total))
        for f in plan.footprints
    ]
    yield from _section("GPU memory by step, GiB", ["", "step", "set to", *PARTS, "total"], rows)
    rows = []
    for footprint in plan.footprints:
        if footprint.setting:
            sizes = (
                footprint_under(plan, footprint, at_batch_size(plan.params, footprint, size)) for size in BATCH_SIZES
            )
            rows.append((footprint.notebook, footprint.what, *(_gib(size.total) for size in sizes)))
    yield from _section("GPU memory by batch size, GiB", ["", "step", *map(str, BATCH_SIZES)], rows)
    yield "  weights, adapter, gradients and optimiser are exact; the rest is an estimate for the longest texts"
    yield "  a batch of scores: so many conversations of full length"


def _time(plan: Plan) -> Iterator[str]:
    by_step = [(step, hours(plan, step)) for step in plan.steps]
    rows = [(s.notebook, s.what, s.model, *(_duration(h) for h in taken.values())) for s, taken in by_step]
    total = (_duration(sum(taken[gpu.name] for _, taken in by_step)) for gpu in GPUS)
    peaks = (f"{gpu.bfloat16:g}" for gpu in GPUS)
    rows += [("", "all of it", "", *total), ("", "dense bf16 TFLOP/s", "", *peaks)]
    for step in plan.afterwards:
        rows.append((step.notebook, step.what, step.model, *map(_duration, hours(plan, step).values())))
    yield from _section("Time, estimated", ["", "step", "model", *(gpu.name for gpu in GPUS)], rows)
    yield f"  assumed: {ASSUMPTIONS}"
    measured = _manifest(plan.params)
    if measured:
        same = all(entry.get("params_digest") == plan.params.digest for entry in measured.values())
        yield "  measured, whole notebooks" + ("" if same else " (with other parameters)") + ":"
        for name, entry in measured.items():
            machine = entry["hardware"]
            where = machine["accelerator"] or f"{machine['cores']} cores of {machine['cpu']}"
            yield f"    {name}: {entry['wall_seconds']:.0f} s, {entry['peak_memory_mib']:,} MiB of main memory, {where}"


def _there(plan: Plan) -> Iterator[str]:
    work = plan.params.output_dir / "work"
    section = plan.params.conversations
    data = "here"
    if plan.data_on_hub:
        found = sources.cached(section.source, "dataset", section.revision)
        data = f"in the hub's cache, {in_bytes(found.size_on_disk)}" if found else "not in the hub's cache"
    answers = list((work / "answers").glob("*.jsonl"))
    n_answers = sum(path.read_bytes().count(b"\n") for path in answers)
    planned = sum(step.rows for step in plan.steps if step.kind == "answer")
    parts = len(list((work / "scores").glob("*/part-*.parquet")))
    trained = [name for name in TRAINED_MODELS if (work / "models" / name).is_dir()]
    begun = [path.name for path in (work / "models").glob("*.training-*")]
    receipts = sorted(path.stem for path in (work / "receipts").glob("*.json"))
    rows = [
        ("conversations", data),
        ("scores", f"{parts:,} parts"),
        ("answers", f"{n_answers:,} of {_number(planned)}, if model and settings are still the same"),
        ("fine-tuned models", ", ".join(trained) or "none"),
        *([("trainings to be resumed", ", ".join(begun))] if begun else []),
        ("notebooks that ran", ", ".join(receipts) or "none"),
    ]
    yield from _section(f"What is there, in {work}", [], rows)


def _does_not_fit(plan: Plan) -> Iterator[str]:
    yield ""
    found = fits(plan)
    if not found and not plan.problems:
        yield "Everything fits."
        return
    yield "What would not fit or run, and the change that lets it"
    yield from (f"  {problem}" for problem in plan.problems)
    for memory in dict.fromkeys(row[0] for row in found):
        of_class = [row for row in found if row[0] == memory]
        yield f"  a GPU of {memory} GB:"
        for _, footprint, change, size in of_class:
            step = f"    {footprint.notebook} {footprint.what} takes {_gib(footprint.total)} GiB"
            if change is None:
                yield f"{step}: no setting of this file makes it fit; take a larger GPU"
            else:
                settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in change.items())
                yield f"{step}; {_gib(size)} with {settings}"
        changes = [change for _, _, change, _ in of_class if change]
        if len(changes) > 1:
            settings = " ".join(f"--set {key}={_yaml(value)}" for key, value in _together(changes).items())
            yield f"    all of them: {settings}"
    if not found:
        yield f"  memory: every step fits into {GPUS[0].memory} GB"


def _together(changes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The changes that several steps need, at once: the smallest value of each number."""
    joined: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            joined[key] = min(value, joined[key]) if isinstance(joined.get(key), int) else value
    return joined


def _section(title: str, headers: list[str], rows: Iterable[tuple]) -> Iterator[str]:
    yield f"\n{title}"
    text = tabulate([[*row] for row in rows], headers, tablefmt="plain", disable_numparse=True)
    yield "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _gib_parts(footprint: Footprint) -> list[str]:
    return [_gib(footprint.parts[part]) if footprint.parts.get(part) else "" for part in PARTS]


def _gib(size: int | float) -> str:
    return f"{size / GIB:.1f}" if size > GIB / 10 else f"{size / GIB:.3f}"


def _number(value: int | float) -> str:
    if value != value:
        return "not known"
    return f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,.0f}"


def _duration(value: int | float) -> str:
    if value != value:
        return "?"
    return f"{value:,.1f} h" if value >= 0.95 else f"{60 * value:.0f} min" if value >= 1 / 60 else "< 1 min"


def _manifest(params: Params) -> dict[str, Any]:
    path = params.output_dir / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else {}
