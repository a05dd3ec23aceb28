"""Supervised fine-tuning with or without the indicator: LoRA, QLoRA or full; resumable, written whole or not at all."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import (
    PreTrainedTokenizerBase,
    set_seed,
)

from ctxlib.conversations import Conversation, Message
from ctxlib.files import check_writable, disk_space, read_json_object
from ctxlib.finetune.adapters import add_lora, frozen_rows
from ctxlib.finetune.labels import (
    TrainingExample,
    TurnLoss,
    audit,
    packs_exactly,
    raw_text_examples,
    training_examples,
    training_order,
)
from ctxlib.finetune.trainer import Progress, make_trainer, train
from ctxlib.models import (
    BASE_FROM_HERE,
    add_indicator_token,
    is_adapter,
    is_local,
    load_model,
    model_hash,
    require_chat_template,
    set_indicator_row,
)
from ctxlib.params import Finetune, InputError, expanded

COUNTS = ("used", "truncated", "too_long", "unlabelled", "raw_text")
MANY = 1024  # a smaller batch may exceed the data: it is filled up from the first conversations


def finetune(
    model_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    settings: Finetune,
    *,
    out_dir: str | Path,
    raw_texts: Sequence[Conversation] = (),
    indicator: str | None = None,
    max_length: int = 2048,
    attention: str = "sdpa",
    seed: int = 42,
    revision: str | None = None,
    freeze_indicator: bool = False,
    turn_loss: Callable[[Message], TurnLoss] | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> pd.DataFrame:
    """Fine-tunes the model at `model_path` and writes adapter (or model), tokenizer and loss log to `out_dir`.

    settings: the section `finetune` of the parameters; `Finetune()` has the values of paper Table 4 for LoRA. A step
        takes `batch_size * gradient_accumulation` conversations, times the number of processes under `accelerate
        launch` (the last step is filled up from the first conversations there). `group_by_length` puts conversations of
        similar length into one batch, the batches themselves in random order. `packing` lays a batch out as one row
        without padding (`labels.pack`); the loss is the same up to rounding; None: only on CUDA, and only if the model
        keeps packed conversations apart (`labels.packs_exactly`). `gradient_checkpointing` computes
        activations twice to store fewer; None: only on CUDA, where the optimiser also pages its states and the
        arithmetic is bfloat16.
    raw_texts: plain text to train on in addition, without the chat template (`labels.raw_text_examples`). Conversations
        are as many as without it; for each there are s / (1 - s) pieces of text, s being `raw_text_share`.
    indicator: if given, user messages with `indicated=True` end in that token, which is added to a copy of the
        tokenizer. Under LoRA its row is the only row of the input embedding that is trained in the `standard` variant;
        in the `authors_code` variant it stays at the mean of the embeddings (official script).
    freeze_indicator: leave the indicator's row at the mean in the `standard` variant, too.
    turn_loss: what an answer counts in the loss (`objective.weighted_loss`); None: all tokens count alike. A reference
        to the base needs an adapter. Raw text counts as ever.
    console: if given, `labels.audit` is printed there.

    `out_dir` appears only when it is complete: until then everything is written to `<out_dir>.training-<hash>` next to
    it. If an interrupted training is called again, it resumes from the last checkpoint and ends with the same weights;
    if a finished one is called again, the saved log is returned. The hash covers the model, the tokenized data and
    every setting.

    Returns the loss log `step, loss, learning_rate` (one row per 10 steps, or fewer so that `save_every` falls on a
    row; mean loss per supervised token in nats); its `attrs` hold the counts of `training_examples` and the
    `config_hash`.

    Raises InputError for data without labels, an `out_dir` that holds something else or cannot be written, a batch of
    more conversations than there are, and a model that mixes packed conversations, before anything is written; later
    if memory or disk are full, and if loss, gradients or weights are no longer numbers (see `train`).
    """
    if not raw_texts:
        settings = settings.model_copy(update={"raw_text_share": 0.0})
    if freeze_indicator and (indicator is None or settings.method == "full"):
        raise InputError("finetune: freeze_indicator needs an indicator, and lora or qlora; 'full' trains every row")
    if is_adapter(model_path):
        raise InputError(f"{model_path}: an adapter cannot be fine-tuned further; give a whole model")
    require_chat_template(tokenizer)
    cuda, processes = torch.cuda.is_available(), _processes()
    # every value that can change the result: so not how often a checkpoint is written, nor what saves memory
    recorded = settings.model_dump(exclude={"save_every", "gradient_checkpointing"})
    recorded |= {"indicator": indicator, "freeze_indicator": freeze_indicator, "max_length": max_length, "seed": seed}
    recorded |= {
        "processes": processes.num_processes,
        "packing": settings.packs(cuda),
    }
    tokenizer, n_tokens = deepcopy(tokenizer), len(tokenizer)
    indicator_id = None if indicator is None else add_indicator_token(tokenizer, indicator)
    examples, counts = training_examples(
        tokenizer,
        conversations,
        variant=settings.variant,
        indicator=indicator,
        max_length=max_length,
        turn_loss=turn_loss,
    )
    if turn_loss is not None:
        _check_turn_loss(examples, settings)
        settings = settings.model_copy(update={"packing": False})
        recorded["packing"] = False
    if console is not None and processes.is_main_process:
        audit(tokenizer, examples, counts, console, indicator_id)
    n_chats = len(examples)
    counts["raw_text"] = n_raw = round(settings.raw_text_per_conversation * n_chats)
    examples += raw_text_examples(tokenizer, raw_texts, n_raw, variant=settings.variant, max_length=max_length)
    if settings.batch_size > max(len(examples), MANY):
        raise InputError(
            f"finetune.batch_size: {settings.batch_size:,}, but there are only {len(examples):,} conversations with "
            "something to learn; lower it (--batch-size)"
        )
    out_dir = expanded(out_dir)
    check_writable(out_dir.parent)
    config_hash = _config_hash(model_hash(model_path, revision=revision), tokenizer, examples, recorded)
    if (finished := _finished_log(out_dir, config_hash)) is not None:
        return finished
    work_dir = out_dir.with_name(f"{out_dir.name}.training-{config_hash}")

    effective_batch = settings.batch_size * settings.gradient_accumulation * processes.num_processes
    n_rows = max(1, round(settings.examples(n_chats, processes.num_processes)))
    n_steps = math.ceil(n_rows / effective_batch)
    lengths = [len(example.input_ids) for example in examples]
    order = training_order(lengths, effective_batch, n_rows, seed, settings.group_by_length)

    set_seed(seed)
    model = load_model(
        model_path,
        dtype="bfloat16" if cuda and settings.method != "full" else "float32",
        quantisation="nf4" if settings.method == "qlora" else None,
        attention=attention,
        device=processes.device if processes.num_processes > 1 else None,
        revision=revision,
    )
    if indicator_id is not None:
        set_indicator_row(model, indicator_id, n_tokens)
    if (
        largest := max(int(example.input_ids.max()) for example in examples)
    ) >= model.config.get_text_config().vocab_size:
        raise InputError(
            f"{model_path}: token {largest} of the tokenizer {tokenizer.name_or_path} lies beyond the model's "
            f"vocabulary of {model.config.get_text_config().vocab_size}; take the model's own tokenizer"
        )
    shortest = sorted(examples, key=lambda example: len(example.input_ids))[:2]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    packing = recorded["packing"] and packs_exactly(model, shortest, tolerance)
    if settings.packing and not packing:
        raise InputError(f"{model_path}: this model mixes conversations that are packed into one row; packing: false")
    settings = settings.model_copy(update={"packing": packing})
    frozen = []
    if settings.method != "full":
        lora = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
        model = add_lora(model, *lora, indicator_id=indicator_id, base_revision=revision)
        frozen = frozen_rows(model, inputs_too=freeze_indicator or settings.variant == "authors_code")
    rows = [examples[row] for row in order]
    trainer = make_trainer(
        model, rows, settings, work_dir=work_dir, pad_id=tokenizer.pad_token_id, steps=n_steps, seed=seed
    )
    trainer.add_callback(Progress(out_dir.name, frozen, progress and processes.is_main_process))
    if processes.is_main_process:
        _discard_other_trainings(out_dir, keep=work_dir)
    train(trainer)
    columns = ["step", "loss", "learning_rate"]
    log = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row], columns=columns)
    log.attrs = {**counts, "config_hash": config_hash}
    if processes.is_main_process:
        result = work_dir / "result"
        shutil.rmtree(result, ignore_errors=True)
        with disk_space(result):
            model.save_pretrained(result)
            tokenizer.save_pretrained(result)
            log.to_csv(result / "loss.csv", index=False)
            base = _as_seen_from(out_dir, model_path)
            _write_json(result / "finetune.json", {**log.attrs, **recorded, **base})
        _move_into_place(result, out_dir)
        shutil.rmtree(work_dir)
    processes.wait_for_everyone()
    return log


def _check_turn_loss(examples: Sequence[TrainingExample], settings: Finetune) -> None:
    if settings.packing:
        raise InputError("finetune.packing: true, but turns that count differently are trained unpacked; set it false")
    values = torch.cat([example.turn_loss for example in examples])
    if not (values.isfinite().all() and (values >= 0).all()):
        raise InputError("finetune: a turn's weight or reference is negative or no number; give 0 or more")
    if settings.method == "full" and (values[:, 1] > 0).any():
        raise InputError("finetune.method: full has no base to be held to; take lora or qlora, or a reference of 0")


def _as_seen_from(out_dir: Path, model_path: str | Path) -> dict[str, str]:
    """`base_from_here`: the relative path of a local base model, by which a moved project folder finds it again."""
    if not is_local(model_path):
        return {}
    return {BASE_FROM_HERE: os.path.relpath(expanded(model_path).resolve(), out_dir.resolve())}


def is_main_process() -> bool:
    """True but for all processes save one under `accelerate launch`."""
    return _processes().is_main_process


def _processes() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def _config_hash(
    model: str, tokenizer: PreTrainedTokenizerBase, examples: Sequence[TrainingExample], settings: dict
) -> str:
    digest = hashlib.sha256(json.dumps([model, tokenizer.chat_template, settings], sort_keys=True).encode())
    for example in examples:
        digest.update(torch.stack([example.input_ids, example.labels]).numpy().tobytes())
        if example.turn_loss is not None:
            digest.update(example.turn_loss.numpy().tobytes())
    return digest.hexdigest()[:12]


def _finished_log(out_dir: Path, config_hash: str) -> pd.DataFrame | None:
    """The log of a finished run of the same configuration; None if there is none, or one of another configuration."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not out_dir.is_dir():
        raise InputError(f"{out_dir}: a file; name a folder for the fine-tuned model")
    try:
        record = read_json_object(out_dir / "finetune.json")
        log = pd.read_csv(out_dir / "loss.csv")
        if record["config_hash"] != config_hash:
            return None
        log.attrs = {name: record[name] for name in (*COUNTS, "config_hash")}
    except (InputError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{out_dir}: holds something else than a fine-tuned model; choose another folder") from error
    return log


def _discard_other_trainings(out_dir: Path, keep: Path) -> None:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    for folder in out_dir.parent.glob(f"{out_dir.name}.training-*"):
        if folder != keep:
            shutil.rmtree(folder)


def _move_into_place(result: Path, out_dir: Path) -> None:
    if out_dir.exists():
        out_dir.rename(result.with_name("replaced"))
    result.rename(out_dir)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
