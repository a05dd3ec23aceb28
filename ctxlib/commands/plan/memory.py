"""GPU memory of each step by part and batch size, and the parameters to change if it does not fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ctxlib.commands.network import BYTES, Network
from ctxlib.commands.plan.texts import Texts
from ctxlib.commands.sources import Source
from ctxlib.finetune import LORA_TARGETS
from ctxlib.finetune.loss import CHUNK_ELEMENTS
from ctxlib.params import TRAINED_MODELS, Params

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKEN_BUDGET = 8192  # of a batch to score, on a GPU


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step, by part. `setting` is the parameter that scales it, if any; one example is `each` of it."""

    what: str  # scoring, training, answering, or the comparison of embeddings
    setting: str | None
    value: int | None
    parts: dict[str, int]
    each: int = 1

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def footprints(params: Params, models: Mapping[str, Source], texts: Mapping[str, Texts]) -> list[Footprint]:
    """Peak of each step for the longest texts, with all models that a notebook has loaded at that moment."""
    tuning, dtype = params.finetune, params.models.dtype
    pretrained, seed = models["pretrained"].network, models["seed_model"].network
    loaded = {which: source.network.weights(dtype, params.models.quantisation) for which, source in models.items()}
    tuned = pretrained.weights(dtype, "nf4" if tuning.method == "qlora" else params.models.quantisation)
    adapter = 0 if tuning.method == "full" else 4 * pretrained.lora_parameters(tuning.lora_rank)

    length = min(params.conversations.max_length, seed.positions)
    budget = params.scoring.token_budget or TOKEN_BUDGET
    scoring = {"weights": loaded["seed_model"], "activations": scoring_memory(seed, max(budget, length), dtype)}
    training = training_memory(
        pretrained,
        method=tuning.method,
        batch_size=tuning.batch_size,
        length=params.conversations.max_length,
        rank=tuning.lora_rank,
        dropout=tuning.lora_dropout,
        checkpointing=tuning.gradient_checkpointing is not False,
        packing=tuning.packs(cuda=True),
    )
    compared = {"weights": 2 * loaded["pretrained"] + tuned, "adapter": adapter}
    compared |= {"activations": 3 * 4 * pretrained.vocabulary * pretrained.width}
    tuned_ones = len(TRAINED_MODELS) * tuned, len(TRAINED_MODELS) * adapter
    instructed = loaded["instruct"], adapter if models["instruct"].adapter else 0
    beside = max(tuned_ones, instructed, key=sum)  # the models that answer, besides the pretrained one
    asked = [one for one in texts.values() if one.family != "conversations"]
    answering = {"weights": loaded["pretrained"] + beside[0], "adapter": beside[1]}
    answering |= answering_memory(
        pretrained,
        batch_size=params.models.batch_size,
        prompt=int(max(one.longest for one in asked)),
        new_tokens=max(one.max_new_tokens for one in asked),
        dtype=dtype,
    )
    return [
        Footprint("scoring", "scoring.token_budget", budget, scoring, each=length),
        Footprint("training", "finetune.batch_size", tuning.batch_size, training),
        Footprint("comparing embeddings", None, None, compared),
        Footprint("answering", "models.batch_size", params.models.batch_size, answering),
    ]


def training_memory(
    network: Network,
    *,
    method: str,
    batch_size: int,
    length: int,
    rank: int,
    dropout: float,
    checkpointing: bool = True,
    packing: bool = False,
) -> dict[str, int]:
    """Bytes on a GPU at the peak of a training step, by part, for the longest batch.

    Exact: `weights` (bfloat16, NF4 under QLoRA, float32 under full fine-tuning), `adapter` (float32, with a row for
    the indicator in either embedding), `gradients` and `optimiser` (float32, Adam's two moments).

    Estimated: `activations` are what a layer keeps (norms in float32, projections and the inputs of linear layers in
    bfloat16, LoRA's dropout masks), for one layer and the inputs of all with `checkpointing`, else for all layers; the
    gradients passing through a layer; the mask, 3 bytes per pair of positions (if packed, all pairs of the row); and
    copies of weights (full: autocast's bfloat16; LoRA: embeddings with the indicator's row, and one gradient).
    `logits`: 14 bytes each: 2 in bfloat16, and float32 for the loss, the output and the log-softmax; at most as many
    as `chunked_loss` holds at a time.
    """
    tokens, full = batch_size * length, method == "full"
    rows = network.embeddings * network.width  # the indicator's
    weights = network.weights("float32" if full else "bfloat16", "nf4" if method == "qlora" else None)
    adapter = 0 if full else network.lora_parameters(rank) + rows
    trained = network.parameters + rows if full else network.lora_parameters(rank) + network.width
    width, intermediate = network.width, network.intermediate
    inputs = sum(size for name, size, _ in network.linears if name in LORA_TARGETS) / network.layers
    kept = 16 * width + 2 * (2 * network.attention_width + 2 * network.kv_width + 3 * intermediate)
    kept += inputs * (3 if dropout and not full else 2)
    passing = 2 * (2 * intermediate + 2 * width)
    layers = (4 if full else 2) * network.layers * width + kept if checkpointing else network.layers * kept
    pairs = 0 if batch_size == 1 else tokens**2 if packing else tokens * length
    copies = 2 * network.multiplied if full else (network.embeddings + 1) * 2 * network.vocabulary * width
    return {
        "weights": weights + rows * (4 if full else 2),
        "adapter": 4 * adapter,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "activations": int(tokens * (layers + passing)) + 3 * pairs + copies,
        "logits": 14 * min(tokens * network.vocabulary, CHUNK_ELEMENTS),
    }


def answering_memory(network: Network, *, batch_size: int, prompt: int, new_tokens: int, dtype: str) -> dict[str, int]:
    """Bytes besides the weights for a batch of the longest prompts; `activations` of the prompts' pass, an estimate.

    One layer at a time, its masks (3 bytes per pair of positions), and the logits of one position.
    """
    activations = _forward(network, batch_size * prompt, dtype)
    activations += batch_size * (3 * prompt**2 + 4 * network.vocabulary)
    return {"kv_cache": network.kv_cache(batch_size * (prompt + new_tokens), dtype), "activations": activations}


def scoring_memory(network: Network, tokens: int, dtype: str) -> int:
    """Bytes besides the weights, an estimate: one layer; queries, keys and values in float32; five roles' shares."""
    shares = 4 * 5 * network.layers * network.config.num_attention_heads
    return _forward(network, tokens, dtype) + tokens * (4 * 4 * network.attention_width + 2 * shares)


def _forward(network: Network, tokens: int, dtype: str) -> int:
    """One layer's activations without gradients: residual, norm, projections, and the widest part of its MLP."""
    elements = 4 * network.width + 3 * network.attention_width + 3 * network.intermediate
    return tokens * (elements * BYTES[dtype] + 4 * network.width)


def remedies(params: Params, footprint: Footprint) -> Iterator[dict[str, Any]]:
    """Changes that make a step smaller, first those that change no result: overrides for `load_params`."""
    tuning = params.finetune
    if footprint.what == "training":
        again = {"finetune.gradient_checkpointing": True} if tuning.gradient_checkpointing is False else {}
        methods = ("full", "lora", "qlora")
        for method in methods[methods.index(tuning.method) :]:
            changed = again | ({} if method == tuning.method else {"finetune.method": method})
            yield changed
            for size in range(tuning.batch_size - 1, 0, -1):  # the product with the accumulation stays
                steps, rest = divmod(tuning.batch_size * tuning.gradient_accumulation, size)
                if not rest:
                    changed = changed | {"finetune.batch_size": size, "finetune.gradient_accumulation": steps}
                    yield changed
        length = params.conversations.max_length
        while (length := length // 2) >= 256:
            yield changed | {"conversations.max_length": length}
        return
    quantised = [] if params.models.quantisation else [{"models.quantisation": "nf4"}]
    for more in ({}, *quantised):
        yield more
        value = footprint.value or 1
        while value > 1:
            value //= 2
            yield {footprint.setting: value} | more
