"""What each step holds in a GPU's memory, by batch size, and which parameter to change where it would not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ctxlib.commands.plan.network import Network, answering_memory, reading_memory, training_memory
from ctxlib.commands.plan.questions import Texts
from ctxlib.commands.plan.sources import Source
from ctxlib.params import Params

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKEN_BUDGET = 8192  # of a batch to score, on a GPU


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step, by part. `setting` is the parameter that scales it, if any: `each` of it is one example."""

    notebook: str
    what: str
    kind: str  # answer, read, score, train, compare
    setting: str | None
    value: int | None
    parts: dict[str, int]
    each: int = 1

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def footprints(params: Params, models: dict[str, Source], questions: dict[str, Texts]) -> list[Footprint]:
    """The peak of each step, as its notebook holds its models: all that it has loaded stay in memory."""
    section, batch_size = params.finetune, params.models.batch_size
    pretrained, instruct, seed = (models[which].network for which in ("pretrained", "instruct", "seed_model"))
    of_pretrained, of_instruct, of_seed = (_inference(params, network) for network in (pretrained, instruct, seed))
    tuned = pretrained.weights(params.models.dtype, "nf4" if section.method == "qlora" else params.models.quantisation)
    adapter = 0 if section.method == "full" else 4 * pretrained.lora_parameters(section.lora_rank)
    longest = max(texts.longest for texts in questions.values() if texts.n)
    needles, new_tokens = questions["needle"].longest, max(texts.max_new_tokens for texts in questions.values())

    held = {
        "00": {"weights": of_pretrained},
        "01": {"weights": of_pretrained + of_instruct, "adapter": adapter if models["instruct"].adapter else 0},
        "04": {"weights": 2 * tuned + of_pretrained, "adapter": 2 * adapter},
    }
    found = []
    for notebook, loaded in held.items():
        prompt = longest if notebook == "04" else needles
        answering = answering_memory(
            pretrained, batch_size=batch_size, prompt=int(prompt), new_tokens=new_tokens, dtype=params.models.dtype
        )
        found.append(Footprint(notebook, "answers", "answer", "models.batch_size", batch_size, loaded | answering))
        if notebook != "00":
            reading = reading_memory(pretrained, tokens=batch_size * int(needles), dtype=params.models.dtype)
            found.append(Footprint(notebook, "attention", "read", "models.batch_size", batch_size, loaded | reading))

    length = min(params.conversations.max_length, seed.positions)
    budget = params.scoring.token_budget or TOKEN_BUDGET
    tokens = max(budget, length)
    scoring = reading_memory(seed, tokens=tokens, dtype=params.models.dtype, recorded_rows=tokens)
    scoring = {"weights": of_seed} | scoring
    found.append(Footprint("02", "scores", "score", "scoring.token_budget", budget, scoring, each=length))

    training = training_memory(
        pretrained,
        method=section.method,
        batch_size=section.batch_size,
        length=params.conversations.max_length,
        rank=section.lora_rank,
        dropout=section.lora_dropout,
        checkpointing=section.gradient_checkpointing is not False,
        packing=section.packing,
    )
    found.append(Footprint("03", "training", "train", "finetune.batch_size", section.batch_size, training))
    rows = {"weights": 2 * of_pretrained + tuned, "adapter": adapter}
    rows |= {"activations": 3 * 4 * pretrained.vocabulary * pretrained.width}
    found.append(Footprint("03", "embeddings compared", "compare", None, None, rows))
    return sorted(found, key=lambda footprint: footprint.notebook)


def _inference(params: Params, network: Network) -> int:
    return network.weights(params.models.dtype, params.models.quantisation)


def at_batch_size(params: Params, footprint: Footprint, batch_size: int) -> Params:
    """The parameters with so many examples in that step's batch; of scores, conversations of full length."""
    return replaced(params, {footprint.setting: batch_size * footprint.each})


def remedies(params: Params, footprint: Footprint) -> Iterator[dict[str, Any]]:
    """Changes that make a step smaller, those first that change no result: overrides for `load_params`."""
    quantised = {} if params.models.quantisation else {"models.quantisation": "nf4"}
    if footprint.kind == "train":
        again = {"finetune.gradient_checkpointing": True} if params.finetune.gradient_checkpointing is False else {}
        for method in _methods(params.finetune.method):
            changed = again | ({} if method == params.finetune.method else {"finetune.method": method})
            for batch in _same_batch(params):
                if changed | batch:
                    yield changed | batch
        length = params.conversations.max_length
        while (length := length // 2) >= 256:
            yield changed | batch | {"conversations.max_length": length}
        return
    if footprint.setting:
        for more in ({}, quantised) if quantised else ({},):
            if more:
                yield more
            value = footprint.value
            while value > 1:
                value //= 2
                yield {footprint.setting: value} | more
    elif quantised:
        yield quantised


def _methods(method: str) -> tuple[str, ...]:
    order = ("full", "lora", "qlora")
    return order[order.index(method) :]


def _same_batch(params: Params) -> Iterator[dict[str, int]]:
    """The batch as it is, then smaller and smaller ones, with the accumulation that leaves their product as it is."""
    section = params.finetune
    product = section.batch_size * section.gradient_accumulation
    yield {}
    for batch_size in range(section.batch_size - 1, 0, -1):
        if product % batch_size == 0:
            yield {"finetune.batch_size": batch_size, "finetune.gradient_accumulation": product // batch_size}


def replaced(params: Params, overrides: dict[str, Any]) -> Params:
    """The parameters with other values under their dotted keys."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {name: getattr(params, name).model_copy(update=values) for name, values in sections.items()}
    return params.model_copy(update=changed)
