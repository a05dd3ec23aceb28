"""LoRA adapters: added to a model, frozen in part, merged into their base."""

import shutil
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ctxlib.files import check_writable, disk_space
from ctxlib.models import is_adapter, load_model, load_tokenizer
from ctxlib.params import InputError, expanded

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Llama


def add_lora(
    model: PreTrainedModel,
    lora_rank: int = 16,
    lora_alpha: int | float = 16,
    lora_dropout: int | float = 0.05,
    *,
    indicator_id: int | None = None,
    base_revision: str | None = None,
) -> PeftModel:
    """LoRA on all linear layers of the decoder (paper Table 4), which changes no logit until it is trained.

    The adapter carries the indicator's rows too, input and output, so that it loads onto the bare base model.
    Raises InputError if the model has none of these layers.
    """
    rows = None
    if indicator_id is not None:
        names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        rows = {names[inputs]: [indicator_id]}
        if outputs.weight is not inputs.weight:
            rows[names[outputs]] = [indicator_id]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_linear_layers(model),
        trainable_token_indices=rows,
        revision=base_revision,
    )
    try:
        model = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        remedy = "set finetune.lora_dropout to 0" if "dropout" in str(error) else "set finetune.method to full"
        raise InputError(f"{model.name_or_path}: LoRA does not fit this model: {error}; {remedy}") from error
    # The rows above are all that is new in the embeddings: without this peft would store both of them whole.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers in the decoder's blocks: of a Llama `LORA_TARGETS`, fused ones elsewhere (Phi-3)."""
    linear = [name for name, module in model.get_decoder().named_modules() if isinstance(module, torch.nn.Linear)]
    found = dict.fromkeys(name.rpartition(".")[2] for name in linear if "." in name)
    return sorted(found, key=lambda name: LORA_TARGETS.index(name) if name in LORA_TARGETS else -1)


def frozen_rows(model: PeftModel, inputs_too: bool) -> list[torch.nn.Parameter]:
    """The indicator's row of the output embedding and, if asked for, that of the input embedding."""
    inputs = model.get_input_embeddings()
    trained = set() if inputs_too else {id(parameter) for parameter in inputs.parameters()}
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    return [parameter for parameter in rows if id(parameter) not in trained]


def export_merged(adapter: str | Path, out_dir: str | Path, *, dtype: str = "float32") -> None:
    """Writes the adapter at `adapter`, merged into its base model, and its tokenizer, as a model of its own.

    Base weights are taken unquantised, also if the adapter was trained over 4-bit ones: the merged model then
    differs from the trained one by the quantisation error.
    Raises InputError if there is no adapter, or `out_dir` exists already.
    """
    out_dir = expanded(out_dir)
    if not is_adapter(adapter):
        raise InputError(f"{adapter}: no adapter there (adapter_config.json is missing)")
    if out_dir.exists():
        raise InputError(f"{out_dir}: exists already; choose another folder for the merged model")
    check_writable(out_dir.parent)
    part = out_dir.with_name(f"{out_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    merged = load_model(adapter, dtype=dtype, device="cpu").merge_and_unload()
    with disk_space(part):
        merged.save_pretrained(part)
        load_tokenizer(adapter).save_pretrained(part)
    part.rename(out_dir)
