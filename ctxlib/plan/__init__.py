"""What an experiment would take, told before anything runs: its steps, downloads, memory, time, and what is there.

Nothing is downloaded and no weight is loaded. What is counted and what is estimated says so in the printed plan; how,
in `network` (bytes and operations) and `machines` (time).
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import PreTrainedTokenizerBase

from ctxlib import models
from ctxlib.params import MODEL_ROLES, InputError, Params, is_hub_id
from ctxlib.plan import sources
from ctxlib.plan.machines import ASSUMPTIONS, GIB, GPUS, seconds
from ctxlib.plan.memory import BATCH_SIZES, Footprint, at_batch_size, footprints, remedies, replaced
from ctxlib.plan.questions import CHARACTERS_PER_TOKEN, MT_BENCH, Texts, needle_cost, question_texts
from ctxlib.plan.sources import Source, find_model
from ctxlib.plan.steps import Step, afterwards, conversation_texts, steps

PARTS = ("weights", "adapter", "gradients", "optimiser", "kv_cache", "activations", "logits")


@dataclass(frozen=True)
class Plan:
    """All that is printed. `problems` are lines of what would not run, each with the change that lets it."""

    params: Params
    models: dict[str, Source]
    conversations: Texts
    questions: dict[str, Texts]
    steps: list[Step]
    afterwards: list[Step]  # what no notebook runs
    footprints: list[Footprint]
    problems: list[str]

    def downloads(self) -> dict[str, int]:
        """Bytes that the hub still has to give, by name."""
        found = {source.name: source.to_download for source in self.models.values() if source.to_download}
        section = self.params.conversations
        if self.data_on_hub and not sources.cached(section.source, "dataset", section.revision):
            found[section.source] = _text_bytes(self.conversations)
        for name, texts in self.questions["qa"].parts.items():
            if self.on_hub(name) and not sources.cached(name, "dataset", None):
                found[name] = _text_bytes(texts)
        return found

    def on_hub(self, name: str) -> bool:
        return is_hub_id(name) and not self.params.path(name).exists()

    @property
    def data_on_hub(self) -> bool:
        return self.on_hub(self.params.conversations.source)

    def results(self) -> dict[str, int]:
        """Bytes that the fine-tuned models and their checkpoints will take; those that are there take none.

        A checkpoint holds the trained weights and two moments of each; the one before it goes when it is whole.
        """
        section, network = self.params.finetune, self.models["pretrained"].network
        trained = network.parameters if section.method == "full" else network.lora_parameters(section.lora_rank)
        folder = self.params.output_dir / "work" / "models"
        missing = [name for name in ("vanilla", "indicator") if not (folder / name).is_dir()]
        found = {f"work/models/{name}": 4 * trained for name in missing}
        return found | ({"two checkpoints, while it trains": 2 * 12 * trained} if missing else {})


def make_plan(params: Params) -> Plan:
    """The plan of an experiment. Takes seconds, reads local data, never asks the hub.

    Raises InputError for input that is there and bad, for a path that leads nowhere, and for a model whose shape is not
    known. What the user still has to supply (the haystack, questions on passages) is a problem in the plan.
    """
    supplied = ("needle.haystack", "qa.sources", *(f"models.{which}" for which in MODEL_ROLES))
    for key, name in params.missing_inputs().items():
        if key.split("[")[0] not in supplied:
            raise InputError(f"{params.file}: {key}: no file or folder '{name}'; {params.remedy(key)}")
    found = {which: find_model(params, which) for which in MODEL_ROLES}
    tokenizer = _tokenizer(params, found)
    conversations, questions = conversation_texts(params, tokenizer), question_texts(params, tokenizer)
    planned = steps(params, conversations, questions)
    after = afterwards(params, found["pretrained"].network.positions)
    held = footprints(params, found, questions)
    plan = Plan(params, found, conversations, questions, planned, after, held, [])
    plan.problems.extend(_problems(plan, tokenizer))
    return plan


def _tokenizer(params: Params, found: dict[str, Source]) -> PreTrainedTokenizerBase | None:
    """The first that is here, with a chat template."""
    template = params.path(params.models.chat_template) if params.models.chat_template else None
    for source in found.values():
        if source.has_tokenizer:
            tokenizer = models.load_tokenizer(source.folder, chat_template=template)
            models.require_chat_template(tokenizer)
            return tokenizer
    return None


def _problems(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """What does not depend on the GPU: inputs to supply, layers, windows, room on the disk."""
    params, missing = plan.params, plan.params.missing_inputs()
    for key in missing:
        yield f"{key}: '{missing[key]}' is not there; {params.remedy(key)}"
    for key, which, layer in (
        ("allocation.layer", "instruct", params.allocation.layer),
        ("scoring.layer", "seed_model", params.scoring.layer),
    ):
        depth = plan.models[which].network.layers
        if layer >= depth:
            yield f"{key}: {layer} does not exist, {which} has layers 0 to {depth - 1}; choose one of them"
    positions = plan.models["pretrained"].network.positions
    needle, longest = plan.questions["needle"], max(params.needle.lengths)
    if needle.longest + needle.max_new_tokens > positions:
        around = math.ceil(needle.longest) - longest
        yield (
            f"needle.lengths: {longest:,} tokens, some {around} around them and {needle.max_new_tokens} new ones "
            f"exceed the window of {positions:,}; at most {positions - around - needle.max_new_tokens:,} are safe"
        )
    shortest, cost = min(params.needle.lengths), needle_cost(params.needle, tokenizer)
    if shortest < cost:
        yield f"needle.lengths: {shortest} is less than the {cost} tokens of all needles; raise it"
    for name, texts in plan.questions["qa"].parts.items():
        if texts.longest + params.qa.max_new_tokens > positions:
            yield (
                f"qa.sources: '{name}': its longest prompt, {math.ceil(texts.longest):,} tokens ({texts.known}), and "
                f"{params.qa.max_new_tokens} new ones exceed the window of {positions:,}; leave it out, or its long "
                "passages, or take a model with a longer window"
            )
    if params.conversations.max_length > positions:
        yield (
            f"conversations.max_length: {params.conversations.max_length:,} exceeds the positions of "
            f"models.pretrained; set it to {positions}"
        )
    needed = sum(plan.downloads().values()) + sum(plan.results().values())
    free = shutil.disk_usage(_existing(params.output_dir)).free
    if needed > free:
        yield f"disk: {_size(needed)} needed, {_size(free)} free; make room, or set outputs and HF_HOME elsewhere"


def fits(plan: Plan) -> list[tuple[int, Footprint, dict[str, Any] | None, int]]:
    """What would not fit: memory in GiB of a class of GPUs, the step, the change that makes it fit, its bytes then.

    The change is None where no setting is small enough.
    """
    found = []
    for memory, usable in sorted({(gpu.memory, gpu.usable) for gpu in GPUS}):
        for footprint in plan.footprints:
            if footprint.total <= usable:
                continue
            for change in remedies(plan.params, footprint):
                smaller = _again(plan, footprint, replaced(plan.params, change)).total
                if smaller <= usable:
                    found.append((memory, footprint, change, smaller))
                    break
            else:
                found.append((memory, footprint, None, footprint.total))
    return found


def _again(plan: Plan, footprint: Footprint, params: Params) -> Footprint:
    """The same step under other parameters."""
    for other in footprints(params, plan.models, plan.questions):
        if (other.notebook, other.what) == (footprint.notebook, footprint.what):
            return other
    raise AssertionError(footprint.what)


def hours(plan: Plan, step: Step) -> dict[str, int | float]:
    """Estimated hours of a step by GPU."""
    params, pretrained = plan.params, plan.models["pretrained"].network
    source = plan.models.get(step.model)
    network = source.network if source else pretrained
    tuned = source is None and params.finetune.method == "qlora"
    weights = network.weights(params.models.dtype, "nf4" if tuned else params.models.quantisation)
    how = {"weights": weights, "batch_size": params.models.batch_size, "dtype": params.models.dtype}
    full, again = params.finetune.method == "full", params.finetune.gradient_checkpointing is not False
    passes = 1 + again + (2 if full else 1)  # forward, once more where it is recomputed, gradients
    return {gpu.name: seconds(step, network, gpu, passes=passes, **how) / 3600 for gpu in GPUS}


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
    what = f"  a training: {_number(-(-step.rows // effective))} steps of {effective} conversations"
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
        f"{MT_BENCH.n} with --reading paper)"
    )


def _downloads(plan: Plan) -> Iterator[str]:
    rows = [("download", name, _size(size)) for name, size in plan.downloads().items()]
    rows += [("results", name, _size(size)) for name, size in plan.results().items()]
    total = sum([*plan.downloads().values(), *plan.results().values()])
    free = shutil.disk_usage(_existing(plan.params.output_dir)).free
    yield from _section("Downloads and disk", ["", "what", "size"], [*rows, ("", "all of it", _size(total))])
    yield f"  {_size(free)} free here; a dataset's size is its text at {CHARACTERS_PER_TOKEN} bytes a token"


def _memory(plan: Plan) -> Iterator[str]:
    rows = [
        (f.notebook, f.what, f"{f.setting} {f.value}" if f.setting else "", *_gib_parts(f), _gib(f.total))
        for f in plan.footprints
    ]
    yield from _section("GPU memory by step, GiB", ["", "step", "set to", *PARTS, "total"], rows)
    rows = []
    for footprint in plan.footprints:
        if footprint.setting:
            sizes = (_again(plan, footprint, at_batch_size(plan.params, footprint, size)) for size in BATCH_SIZES)
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
        data = f"in the hub's cache, {_size(found.size_on_disk)}" if found else "not in the hub's cache"
    answers = list((work / "answers").glob("*.jsonl"))
    n_answers = sum(path.read_bytes().count(b"\n") for path in answers)
    planned = sum(step.rows for step in plan.steps if step.kind == "answer")
    parts = len(list((work / "scores").glob("*/part-*.parquet")))
    trained = [name for name in ("vanilla", "indicator") if (work / "models" / name).is_dir()]
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


def _size(size: int | float) -> str:
    return f"{size / 1e9:,.2f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def _number(value: int | float) -> str:
    if value != value:
        return "not known"
    return f"{value / 1e6:,.1f} M" if value >= 1e7 else f"{value:,.0f}"


def _duration(value: int | float) -> str:
    if value != value:
        return "?"
    return f"{value:,.1f} h" if value >= 0.95 else f"{60 * value:.0f} min" if value >= 1 / 60 else "< 1 min"


def _text_bytes(texts: Texts) -> int:
    known = texts.n == texts.n
    return int(CHARACTERS_PER_TOKEN * texts.n * texts.length) if known else 0


def _manifest(params: Params) -> dict[str, Any]:
    path = params.output_dir / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else {}


def _existing(path: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    path = path.resolve()
    return path if path.exists() or path == path.parent else _existing(path.parent)
