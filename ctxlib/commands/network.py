"""Size of a model and of working with it, in bytes and operations; counted on a copy without weights."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ctxlib.finetune import LORA_TARGETS
from ctxlib.params import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Configurations as published, with the dtype of the published weights, for hub models that are not here yet.
KNOWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known_models.json").read_text())


@dataclass(frozen=True)
class Network:
    """A causal language model's counts. `linears` are (name, inputs, outputs) of all but the output embedding."""

    config: PreTrainedConfig
    parameters: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    width: int
    vocabulary: int
    positions: int
    intermediate: int
    attention_width: int  # of all query heads together
    kv_width: int  # of all key heads together

    @property
    def stored_bytes(self) -> int:
        """Download size: the weights as published."""
        stored = str(self.config.dtype or "float32").removeprefix("torch.")
        return self.parameters * BYTES.get(stored, 4)

    @property
    def embeddings(self) -> int:
        """2, input and output, or 1 if they are tied."""
        return 1 if self.config.tie_word_embeddings else 2

    @cached_property
    def multiplied(self) -> int:
        """Weights by which every token is multiplied, without the output embedding."""
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
        """Bytes of the keys and values of `tokens` tokens."""
        return tokens * self.layers * 2 * self.kv_width * BYTES[dtype]

    def forward_operations(self, tokens: int | float, context: int | float, logits: int | float) -> int | float:
        """Floating-point operations of a forward pass over `tokens` in rows of `context`, with `logits` positions read.

        Two per weight and token, and those of causal attention: 2 × layers × width of all heads × context.
        """
        attention = 2 * self.layers * self.attention_width * context
        return tokens * (2 * self.multiplied + attention) + logits * 2 * self.vocabulary * self.width


def count(config: PreTrainedConfig) -> Network:
    """Counts of any architecture known to transformers. Raises InputError if it makes no causal language model."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"a {config.model_type} configuration makes no causal language model: {error}") from error
    output, config = model.get_output_embeddings(), config.get_text_config()
    linears = tuple(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    )
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    return Network(
        config,
        sum(p.numel() for p in model.parameters()),
        linears,
        layers=config.num_hidden_layers,
        width=width,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        intermediate=getattr(config, "intermediate_size", None) or 4 * width,
        attention_width=heads * head_width,
        kv_width=head_width * (getattr(config, "num_key_value_heads", None) or heads),
    )


def as_config(content: dict[str, Any]) -> PreTrainedConfig:
    """The configuration in a config.json. Raises InputError for one unknown to transformers."""
    try:
        return AutoConfig.for_model(**content).get_text_config()
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a model's configuration: {error}") from error


def nf4_bytes(parameters: int) -> int:
    """Bytes of one matrix in 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, section 3).

    Half a byte per parameter, one byte per block of 64, a float32 per 256 such blocks; and for each matrix its 16
    levels, the 256 levels of the second quantisation and their mean, all float32.
    """
    blocks = math.ceil(parameters / 64)
    return math.ceil(parameters / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)
