"""What a model holds and what it works with, in bytes and operations; counted on a copy that takes no memory."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ctxlib.finetune import LORA_TARGETS
from ctxlib.params import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "num_attention_heads": 32}
_TINYLLAMA = _LLAMA | {
    "num_hidden_layers": 22, "hidden_size": 2048, "num_key_value_heads": 4, "intermediate_size": 5632,
    "vocab_size": 32_000, "max_position_embeddings": 2048,
}  # fmt: skip
# Shapes as their makers publish them, with the dtype of the published weights, for hub models that are not here yet.
KNOWN: dict[str, dict[str, Any]] = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINYLLAMA | {"dtype": "float32"},
    "ucla-cmllab/tinyllama-sft-vicuna-full": _TINYLLAMA | {"dtype": "bfloat16"},
    "meta-llama/Llama-2-7b-hf": _LLAMA | {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_key_value_heads": 32, "intermediate_size": 11_008,
        "vocab_size": 32_000, "max_position_embeddings": 4096, "dtype": "float16",
    },
    "meta-llama/Meta-Llama-3-8B": _LLAMA | {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_key_value_heads": 8, "intermediate_size": 14_336,
        "vocab_size": 128_256, "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A causal language model's counts. `linears` are (name, inputs, outputs) of all but the output embedding."""

    config: PreTrainedConfig
    parameters: int
    linears: tuple[tuple[str, int, int], ...]

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def intermediate(self) -> int:
        return getattr(self.config, "intermediate_size", None) or 4 * self.width

    @property
    def attention_width(self) -> int:
        """All query heads together."""
        heads = self.config.num_attention_heads
        return heads * (getattr(self.config, "head_dim", None) or self.width // heads)

    @property
    def kv_width(self) -> int:
        """All key heads together."""
        heads = self.config.num_attention_heads
        return self.attention_width * (getattr(self.config, "num_key_value_heads", None) or heads) // heads

    @property
    def stored_bytes(self) -> int:
        """Of the weights as they are published: what is downloaded."""
        stored = str(self.config.dtype or "float32").removeprefix("torch.")
        return self.parameters * BYTES.get(stored, 4)

    @property
    def embeddings(self) -> int:
        """Two, input and output, or one where they are tied."""
        return 1 if self.config.tie_word_embeddings else 2

    @cached_property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with, the output embedding apart."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def weights(self, dtype: str, quantisation: str | None = None) -> int:
        """Bytes of the weights in memory. NF4 packs the linear layers; embeddings, norms and biases stay in `dtype`."""
        if quantisation is None:
            return self.parameters * BYTES[dtype]
        packed = sum(nf4_bytes(inputs * outputs) for _, inputs, outputs in self.linears)
        return packed + (self.parameters - self.multiplied) * BYTES[dtype]

    def lora_parameters(self, rank: int) -> int:
        return sum(rank * (inputs + outputs) for name, inputs, outputs in self.linears if name in LORA_TARGETS)

    def kv_cache(self, tokens: int, dtype: str) -> int:
        """Bytes of the keys and values of so many tokens."""
        return tokens * self.layers * 2 * self.kv_width * BYTES[dtype]

    def forward_operations(self, tokens: int | float, context: int | float, logits: int | float) -> int | float:
        """Floating-point operations of a forward pass over `tokens`, in stretches of `context`, `logits` of them read.

        Two for every weight and token, and those of causal attention: 2 × layers × width of all heads × context.
        """
        attention = 2 * self.layers * self.attention_width * context
        return tokens * (2 * self.multiplied + attention) + logits * 2 * self.vocabulary * self.width


def count(config: PreTrainedConfig) -> Network:
    """Counts of any architecture that transformers knows, in a moment: the model is built without weights.

    Raises InputError for a configuration that is no causal language model's.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"a {config.model_type} configuration makes no causal language model: {error}") from error
    output = model.get_output_embeddings()
    linears = tuple(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    )
    return Network(config.get_text_config(), sum(p.numel() for p in model.parameters()), linears)


def as_config(content: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a config.json's content. Raises InputError where transformers does not know it."""
    try:
        return AutoConfig.for_model(**content).get_text_config()
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a model's configuration: {error}") from error


def nf4_bytes(parameters: int) -> int:
    """Bytes of one matrix in 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3).

    Half a byte a parameter, a byte for every block of 64, a float32 for every 256 such blocks; and what each matrix
    brings along: its 16 levels, the 256 levels of the second quantisation and their mean, all float32.
    """
    blocks = math.ceil(parameters / 64)
    return math.ceil(parameters / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


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

    Estimated: `activations` are all that a layer keeps (norms in float32, projections and a copy of each linear layer's
    input in bfloat16, LoRA's dropout masks), of one layer beside the inputs of all with `checkpointing`, which
    recomputes them in the backward pass, else of all; the gradients that pass through a layer; the mask of a batch,
    3 bytes a pair of positions, of a packed one all pairs of the row; and copies of the weights (under full fine-tuning
    autocast's bfloat16 ones; under LoRA the embeddings, into which the indicator's row is put, with one gradient).
    `logits`: 14 bytes each, of which 2 in bfloat16, and float32 to compute the loss, to return, and for the
    log-softmax; where `packing` computes those of supervised tokens alone, they are fewer than these.
    """
    tokens, full = batch_size * length, method == "full"
    rows = network.embeddings * network.width  # the indicator's
    weights = network.weights("float32" if full else "bfloat16", "nf4" if method == "qlora" else None)
    adapter = 0 if full else network.lora_parameters(rank) + rows
    trained = network.parameters + rows if full else network.lora_parameters(rank) + network.width
    width, intermediate = network.width, network.intermediate
    stream = 4 if full else 2
    inputs = sum(size for name, size, _ in network.linears if name in LORA_TARGETS) / network.layers
    kept = 16 * width + 2 * (2 * network.attention_width + 2 * network.kv_width + 3 * intermediate)
    kept += inputs * (3 if dropout and not full else 2)
    passing = 2 * (2 * intermediate + 2 * width)
    layers = stream * network.layers * width + kept if checkpointing else network.layers * kept
    pairs = 0 if batch_size == 1 else tokens**2 if packing else tokens * length
    copies = 2 * network.multiplied if full else (network.embeddings + 1) * 2 * network.vocabulary * width
    return {
        "weights": weights + rows * (4 if full else 2),
        "adapter": 4 * adapter,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "activations": int(tokens * (layers + passing)) + 3 * pairs + copies,
        "logits": 14 * tokens * network.vocabulary,
    }


def answering_memory(network: Network, *, batch_size: int, prompt: int, new_tokens: int, dtype: str) -> dict[str, int]:
    """Bytes beside the weights while a batch of the longest prompts is answered: cache and activations.

    The activations, an estimate, are those of the prompt's pass: one layer at a time, its masks (3 bytes a pair of
    positions), and the logits of one position.
    """
    return {
        "kv_cache": network.kv_cache(batch_size * (prompt + new_tokens), dtype),
        "activations": _forward(network, batch_size * prompt, dtype)
        + 3 * batch_size * prompt**2
        + 4 * batch_size * network.vocabulary,
    }


def reading_memory(network: Network, *, tokens: int, dtype: str, recorded_rows: int = 0) -> dict[str, int]:
    """Bytes beside the weights while attention is read off a pass over `tokens`, an estimate.

    Of `recorded_rows` query positions queries, keys and values are held in float32, and the shares of five roles in
    every layer and head.
    """
    shares = 4 * 5 * network.layers * network.config.num_attention_heads
    return {
        "activations": _forward(network, tokens, dtype)
        + recorded_rows * (4 * 4 * network.attention_width + 2 * shares),
    }


def _forward(network: Network, tokens: int, dtype: str) -> int:
    """One layer's activations without gradients: residual, norm, projections, and the widest part of its MLP."""
    elements = 4 * network.width + 3 * network.attention_width + 3 * network.intermediate
    return tokens * (elements * BYTES[dtype] + 4 * network.width)
