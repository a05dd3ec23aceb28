"""The plan itself, what would not fit or run, and how long a step takes."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ctxlib import models
from ctxlib.commands.plan import sources
from ctxlib.commands.plan.machines import GPUS, seconds
from ctxlib.commands.plan.memory import Footprint, footprints, remedies, replaced
from ctxlib.commands.plan.questions import CHARACTERS_PER_TOKEN, Texts, needle_cost, question_texts
from ctxlib.commands.plan.sources import Source, find_model
from ctxlib.commands.plan.steps import Step, afterwards, conversation_texts, steps
from ctxlib.params import MODEL_ROLES, TRAINED_MODELS, InputError, Params


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
        return self.params.locate(name) == "hub"

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
        missing = [name for name in TRAINED_MODELS if not (folder / name).is_dir()]
        found = {f"work/models/{name}": 4 * trained for name in missing}
        return found | ({"two checkpoints, while it trains": 2 * 12 * trained} if missing else {})


def make_plan(params: Params) -> Plan:
    """The plan of an experiment. Takes seconds, reads local data, never asks the hub.

    Raises InputError for input that is there and bad, for a path that leads nowhere, for a model whose shape is not
    known, and for the params of the evidence. What the user still has to supply (the haystack, questions on passages)
    is a problem in the plan.
    """
    if params.evidence:
        raise InputError(f"{params.file}: evidence: plans are of 00 to 05; from 06 on each notebook says what it takes")
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
    free = shutil.disk_usage(nearest_folder(params.output_dir)).free
    if needed > free:
        yield f"disk: {in_bytes(needed)} needed, {in_bytes(free)} free; make room, or set outputs and HF_HOME elsewhere"


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
                smaller = footprint_under(plan, footprint, replaced(plan.params, change)).total
                if smaller <= usable:
                    found.append((memory, footprint, change, smaller))
                    break
            else:
                found.append((memory, footprint, None, footprint.total))
    return found


def footprint_under(plan: Plan, footprint: Footprint, params: Params) -> Footprint:
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


def in_bytes(size: int | float) -> str:
    return f"{size / 1e9:,.2f} GB" if size > 1e8 else f"{size / 1e6:,.1f} MB"


def _text_bytes(texts: Texts) -> int:
    known = texts.n == texts.n
    return int(CHARACTERS_PER_TOKEN * texts.n * texts.length) if known else 0


def nearest_folder(path: Path) -> Path:
    """The folder itself or the nearest one above it that is there."""
    path = path.resolve()
    return path if path.exists() or path == path.parent else nearest_folder(path.parent)
