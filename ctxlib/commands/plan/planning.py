"""The plan: texts, steps, memory and downloads of an experiment, and everything that would stop it."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ctxlib import models
from ctxlib.commands import sources
from ctxlib.commands.plan.machines import Gpu, find_gpu, seconds
from ctxlib.commands.plan.memory import Footprint, footprints, remedies
from ctxlib.commands.plan.texts import CHARACTERS_PER_TOKEN, Texts, all_texts, needle_cost
from ctxlib.commands.plan.workload import Step, rehearsed_times, steps
from ctxlib.params import MODEL_ROLES, TRAINED_MODELS, InputError, Params


@dataclass(frozen=True)
class Plan:
    """Everything that is printed. `times` is empty without a rehearsal; `problems` do not depend on the GPU."""

    params: Params
    gpu: Gpu
    models: dict[str, sources.Source]
    texts: dict[str, Texts]
    times: dict[str, float]
    steps: list[Step]
    footprints: list[Footprint]
    problems: list[str] = field(default_factory=list)

    def downloads(self) -> dict[str, int]:
        """Bytes still to be downloaded, by name; of a dataset, its text."""
        found = {source.name: source.to_download for source in self.models.values() if source.to_download}
        data = self.params.conversations
        named = {name: (texts, None) for name, texts in self.texts.items() if name in self.params.qa.sources}
        for name, (texts, revision) in ({data.source: (self.texts["conversations"], data.revision)} | named).items():
            if self.params.locate(name) == "hub" and not sources.cached(name, "dataset", revision):
                found[name] = int(CHARACTERS_PER_TOKEN * texts.n * texts.length) if texts.n == texts.n else 0
        return found

    def results(self) -> dict[str, int]:
        """Bytes of the fine-tuned models that are not there yet, and of two checkpoints with two moments per weight."""
        section, network = self.params.finetune, self.models["pretrained"].network
        trained = network.parameters if section.method == "full" else network.lora_parameters(section.lora_rank)
        folder = self.params.output_dir / "work" / "models"
        found = {f"work/models/{name}": 4 * trained for name in TRAINED_MODELS if not (folder / name).is_dir()}
        return found | ({"two checkpoints during training": 2 * 12 * trained} if found else {})

    def hours(self, step: Step) -> int | float:
        """Estimated duration of a step on the plan's GPU; nan if its size is not known."""
        params, tuning = self.params, self.params.finetune
        network = self.models["seed_model" if step.what == "scoring" else "pretrained"].network
        passes = 2 + (tuning.gradient_checkpointing is not False) + (tuning.method == "full")  # forward, gradients
        weights = network.weights(params.models.dtype, params.models.quantisation)
        how = {"weights": weights, "batch_size": params.models.batch_size, "dtype": params.models.dtype}
        return seconds(step, network, self.gpu, passes=passes, **how) / 3600

    def remedies(self) -> list[tuple[Footprint, dict[str, Any] | None, int]]:
        """Steps that do not fit on the GPU, each with the change that makes it fit and its bytes then.

        The change is None if no setting is small enough.
        """
        found = []
        for footprint in (one for one in self.footprints if one.total > self.gpu.usable):
            changes = (
                (change, self.footprint(footprint.what, change).total) for change in remedies(self.params, footprint)
            )
            fitting = ((change, size) for change, size in changes if size <= self.gpu.usable)
            found.append((footprint, *next(fitting, (None, footprint.total))))
        return found

    def footprint(self, what: str, overrides: dict[str, Any]) -> Footprint:
        """The same step with other parameters."""
        found = footprints(self.params.changed(overrides), self.models, self.texts)
        return next(footprint for footprint in found if footprint.what == what)


def make_plan(params: Params, gpu: str = "a6000") -> Plan:
    """The plan of an experiment, from local files alone.

    Raises InputError for bad input, a missing path, a model of unknown shape, a GPU that is not in the table, and the
    params of the evidence. A missing haystack or passage file is a problem in the plan.
    """
    if params.evidence:
        raise InputError(
            f"{params.file}: evidence: only 00 to 05 can be planned; later notebooks state their own needs"
        )
    supplied = ("needle.haystack", "qa.sources", *(f"models.{which}" for which in MODEL_ROLES))
    missing = params.missing_inputs()
    for key, name in missing.items():
        if key.split("[")[0] not in supplied:
            raise InputError(f"{params.file}: {key}: no file or folder '{name}'; {params.remedy(key)}")
    machine, found = find_gpu(gpu), {which: sources.find_model(params, which) for which in MODEL_ROLES}
    tokenizer = _tokenizer(params, found)
    texts, times = all_texts(params, tokenizer), rehearsed_times(params)
    plan = Plan(params, machine, found, texts, times, steps(params, texts, times), footprints(params, found, texts))
    plan.problems.extend(f"{key}: '{name}' is missing; {params.remedy(key)}" for key, name in missing.items())
    plan.problems.extend([*_layers(plan), *_windows(plan, tokenizer), *_disk(plan)])
    return plan


def _tokenizer(params: Params, found: dict[str, sources.Source]) -> PreTrainedTokenizerBase | None:
    """The first that is here, with a chat template."""
    template = params.path(params.models.chat_template) if params.models.chat_template else None
    folder = next((source.folder for source in found.values() if source.has_tokenizer), None)
    if folder is None:
        return None
    tokenizer = models.load_tokenizer(folder, chat_template=template)
    models.require_chat_template(tokenizer)
    return tokenizer


def _layers(plan: Plan) -> Iterator[str]:
    read = {"allocation.layer": "instruct", "scoring.layer": "seed_model"}
    for (key, which), layer in zip(
        read.items(), (plan.params.allocation.layer, plan.params.scoring.layer), strict=True
    ):
        depth = plan.models[which].network.layers
        if layer >= depth:
            yield f"{key}: {layer} does not exist, {which} has layers 0 to {depth - 1}; choose one of them"


def _windows(plan: Plan, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """Texts that exceed the positions of the pretrained model."""
    params, positions = plan.params, plan.models["pretrained"].network.positions
    needle, longest, shortest = plan.texts["needle"], max(params.needle.lengths), min(params.needle.lengths)
    room = positions - needle.max_new_tokens - (needle.longest - longest)
    if longest > room:
        yield (
            f"needle.lengths: {longest:,} tokens, with {needle.longest - longest} around them and "
            f"{needle.max_new_tokens} new ones, exceed the window of {positions:,}; use at most {room:,}"
        )
    if shortest < (cost := needle_cost(params.needle, tokenizer)):
        yield f"needle.lengths: {shortest} is less than the {cost} tokens of all needles; raise it"
    for name in params.qa.sources:
        texts = plan.texts.get(name)
        if texts and texts.longest + texts.max_new_tokens > positions:
            yield (
                f"qa.sources: '{name}': its longest prompt, {texts.longest:,} tokens ({texts.known}), and "
                f"{texts.max_new_tokens} new ones exceed the window of {positions:,}; leave it out, shorten its "
                "passages, or use a model with a longer window"
            )
    if params.conversations.max_length > positions:
        yield (
            f"conversations.max_length: {params.conversations.max_length:,} exceeds the positions of "
            f"models.pretrained; set it to {positions}"
        )


def _disk(plan: Plan) -> Iterator[str]:
    needed, free = sum([*plan.downloads().values(), *plan.results().values()]), free_bytes(plan.params.output_dir)
    if needed > free:
        yield f"disk: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; set outputs and HF_HOME to another disk"


def free_bytes(path: Path) -> int:
    """On the disk of a folder, which need not exist yet."""
    path = path.resolve()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
