"""Supervised fine-tuning with or without the indicator: LoRA / QLoRA / full, resumable, whole or not at all."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ctxlib.conversations import Conversation
from ctxlib.files import disk_space
from ctxlib.finetune.adapters import add_lora, frozen_rows
from ctxlib.finetune.checkpoints import last_checkpoint
from ctxlib.finetune.labels import (
    Example,
    audit,
    collate,
    pack,
    packs_exactly,
    training_examples,
    training_order,
)
from ctxlib.models import (
    add_indicator_token,
    is_adapter,
    load_model,
    memory_advice,
    model_hash,
    require_chat_template,
    set_indicator_row,
)
from ctxlib.params import InputError

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
LOG_EVERY = 10
_LESS_MEMORY = (
    "finetune.gradient_checkpointing to true, finetune.batch_size down with finetune.gradient_accumulation up, or "
    "conversations.max_length down (either of the last two begins anew)"
)


def finetune(
    model_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    out_dir: str | Path,
    method: str = "lora",
    indicator: str | None = None,
    variant: str = "standard",
    steps: int | None = None,
    epochs: int | float | None = None,
    batch_size: int = 2,
    gradient_accumulation: int = 1,
    learning_rate: int | float = 2e-4,
    warmup_fraction: int | float = 0.1,
    schedule: str = "cosine",
    lora_rank: int = 16,
    lora_alpha: int | float = 16,
    lora_dropout: int | float = 0.05,
    max_length: int = 2048,
    max_grad_norm: int | float = 1.0,
    group_by_length: bool = True,
    packing: bool = False,
    gradient_checkpointing: bool | None = None,
    freeze_indicator: bool = False,
    save_every: int = 100,
    seed: int = 42,
    revision: str | None = None,
    attention: str = "sdpa",
    progress: bool = True,
    console: Console | None = None,
) -> pd.DataFrame:
    """Fine-tunes the model at `model_path` and writes adapter (or model), tokenizer and loss log to `out_dir`.

    Defaults are those of paper Table 4 for LoRA. With `indicator`, user messages with `indicated=True` end in that
    token, which is added to a copy of the tokenizer. Under LoRA its row of the input embedding is trained alone of all
    rows in the `standard` variant, and stays at the mean of the embeddings in the `authors_code` variant (official
    script). Exactly one of `steps` and `epochs` is given. A step takes `batch_size * gradient_accumulation`
    conversations, times the number of processes under `accelerate launch` (the last one is filled up from the first
    conversations there). `group_by_length` puts conversations of like length into one batch, the batches themselves in
    random order. `packing` lays a batch out as one row without padding (`labels.pack`), with the same loss up to
    rounding. `gradient_checkpointing` computes activations twice to store fewer; None: where there is CUDA. There, the
    optimiser pages its states and the arithmetic is bfloat16. `freeze_indicator` leaves the indicator's row at the mean
    in the `standard` variant, too. `labels.audit` is printed on `console`, if given.

    The result lies in `out_dir` whole or not at all: until the end all is written to `<out_dir>.training-<hash>`
    beside it. Called again after a kill, training goes on from the last checkpoint, with the same final weights; called
    again when done, the saved log is returned. The hash covers the model, the tokenized data and every setting.

    Returns the loss log `step, loss, learning_rate` (a row for every 10 steps, or fewer so that `save_every` falls on
    a row; mean loss per supervised token in nats); its `attrs` hold the counts of `training_examples` and the
    `config_hash`.

    Raises InputError for a bad setting, data without labels, an `out_dir` that holds something else, and a model that
    mixes packed conversations, before anything is written; later where memory or disk are full.
    """
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    _check_settings(settings)
    if freeze_indicator and (indicator is None or method == "full"):
        raise InputError("finetune: freeze_indicator needs an indicator, and lora or qlora; 'full' trains every row")
    if is_adapter(model_path):
        raise InputError(f"{model_path}: an adapter cannot be fine-tuned further; give a whole model")
    require_chat_template(tokenizer)
    cuda, processes = torch.cuda.is_available(), _processes()
    settings |= {"packing": True} if packing else {}
    settings |= {"freeze_indicator": True} if freeze_indicator else {}
    settings |= {"processes": processes.num_processes} if processes.num_processes > 1 else {}
    tokenizer, n_tokens = deepcopy(tokenizer), len(tokenizer)
    indicator_id = None if indicator is None else add_indicator_token(tokenizer, indicator)
    examples, counts = training_examples(
        tokenizer, conversations, variant=variant, indicator=indicator, max_length=max_length
    )
    if console is not None and processes.is_main_process:
        audit(tokenizer, examples, counts, console, indicator_id)
    out_dir = Path(out_dir).expanduser()
    config_hash = _config_hash(model_hash(model_path, revision=revision), tokenizer, examples, settings)
    if (finished := _finished_log(out_dir, config_hash)) is not None:
        return finished
    work_dir = out_dir.with_name(f"{out_dir.name}.training-{config_hash}")

    effective_batch = batch_size * gradient_accumulation * processes.num_processes
    n_rows = steps * effective_batch if steps else max(1, round(epochs * len(examples)))
    n_steps = math.ceil(n_rows / effective_batch)
    order = training_order([len(e.input_ids) for e in examples], effective_batch, n_rows, seed, group_by_length)

    set_seed(seed)
    model = load_model(
        model_path,
        dtype="bfloat16" if cuda and method != "full" else "float32",
        quantisation="nf4" if method == "qlora" else None,
        attention=attention,
        device=processes.device if processes.num_processes > 1 else None,
        revision=revision,
    )
    if indicator_id is not None:
        set_indicator_row(model, indicator_id, n_tokens)
    if (largest := max(int(example.input_ids.max()) for example in examples)) >= model.config.get_text_config().vocab_size:
        raise InputError(
            f"{model_path}: token {largest} of the tokenizer {tokenizer.name_or_path} lies beyond the model's "
            f"vocabulary of {model.config.get_text_config().vocab_size}; take the model's own tokenizer"
        )
    shortest = sorted(examples, key=lambda example: len(example.input_ids))[:2]
    if packing and not packs_exactly(model, shortest, tolerance=1e-3 if model.dtype == torch.float32 else 0.05):
        raise InputError(f"{model_path}: this model mixes conversations that are packed into one row; packing: false")
    frozen = []
    if method != "full":
        model = add_lora(model, lora_rank, lora_alpha, lora_dropout, indicator_id=indicator_id, base_revision=revision)
        frozen = frozen_rows(model, inputs_too=freeze_indicator or variant == "authors_code")
    trainer = make_trainer(
        model,
        [examples[row] for row in order],
        work_dir=work_dir,
        pad_id=tokenizer.pad_token_id,
        steps=n_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        warmup_fraction=warmup_fraction,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
        packing=packing,
        gradient_checkpointing=gradient_checkpointing,
        save_every=save_every,
        seed=seed,
    )
    trainer.add_callback(_Progress(out_dir.name, frozen, progress and processes.is_main_process))
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
            _write_json(result / "finetune.json", {**log.attrs, **settings})
        _move_into_place(result, out_dir)
        shutil.rmtree(work_dir)
    processes.wait_for_everyone()
    return log


def is_main_process() -> bool:
    """True but for all processes save one under `accelerate launch`."""
    return _processes().is_main_process


def _processes() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def make_trainer(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Example],
    *,
    work_dir: Path,
    pad_id: int,
    steps: int,
    batch_size: int,
    gradient_accumulation: int = 1,
    learning_rate: int | float = 2e-4,
    warmup_fraction: int | float = 0.1,
    schedule: str = "cosine",
    max_grad_norm: int | float = 1.0,
    packing: bool = False,
    gradient_checkpointing: bool | None = None,
    save_every: int = 100,
    seed: int = 42,
) -> Trainer:
    """A Trainer for the examples in the order given; checkpoints go to `work_dir`. Arguments as in `finetune`."""
    cuda = torch.cuda.is_available()
    checkpointing = cuda if gradient_checkpointing is None else gradient_checkpointing
    # a mean over steps on both sides of a checkpoint would lose those before it when training goes on from there
    log_every = min(LOG_EVERY, steps)
    log_every = math.gcd(log_every, save_every) if save_every < steps else log_every
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=math.ceil(warmup_fraction * steps),
        max_grad_norm=max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        save_steps=save_every,
        save_total_limit=1,
        seed=seed,
        use_cpu=not cuda,
        bf16=cuda,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **({"optim": "paged_adamw_32bit"} if cuda else {}),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer would multiply the batch by the number of GPUs
    collator = pack if packing else partial(collate, pad_id=pad_id)
    trainer = Trainer(model=model, args=arguments, train_dataset=list(rows), data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Trainer) -> None:
    """Trains, from the last whole checkpoint if there is one; on a CPU bit for bit the same every time.

    A warning tells of damaged checkpoints, which are removed. Raises InputError where memory or disk are full; the
    checkpoint before stays.
    """
    work_dir = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(work_dir, tidy=trainer.is_world_process_zero())
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or not torch.cuda.is_available())
    try:
        with disk_space(work_dir), memory_advice(_LESS_MEMORY, work_dir):
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    trainer.model.config.use_cache = True


_SETTINGS = (
    "method", "indicator", "variant", "steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate",
    "warmup_fraction", "schedule", "lora_rank", "lora_alpha", "lora_dropout", "max_length", "max_grad_norm",
    "group_by_length", "seed",
)  # fmt: skip


class _Progress(TrainerCallback):
    """A bar; and rows that stay frozen, also after a checkpoint was loaded, which makes every adapter weight train."""

    def __init__(self, name: str, frozen: list[torch.nn.Parameter], shown: bool):
        self.name, self.frozen, self.shown = name, frozen, shown

    def on_train_begin(self, args, state, control, **kwargs):
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=not self.shown
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def _check_settings(settings: dict) -> None:
    for name, choices in (
        ("method", ("full", "lora", "qlora")),
        ("variant", ("standard", "authors_code")),
        ("schedule", SCHEDULES),
    ):
        if settings[name] not in choices:
            raise InputError(f"finetune.{name} '{settings[name]}': expected one of {', '.join(choices)}")
    if (settings["steps"] is None) == (settings["epochs"] is None):
        raise InputError("finetune: give exactly one of steps and epochs")
    for name in ("steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate", "lora_rank", "max_length"):
        if settings[name] is not None and settings[name] <= 0:
            raise InputError(f"finetune.{name}: expected a positive number, got {settings[name]}")


def _config_hash(model: str, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: dict) -> str:
    digest = hashlib.sha256(json.dumps([model, tokenizer.chat_template, settings], sort_keys=True).encode())
    for example in examples:
        digest.update(torch.stack([example.input_ids, example.labels]).numpy().tobytes())
    return digest.hexdigest()[:12]


def _finished_log(out_dir: Path, config_hash: str) -> pd.DataFrame | None:
    """The log of a finished run of the same configuration; None if there is none, or one of another configuration."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        record = json.loads((out_dir / "finetune.json").read_text(encoding="utf-8"))
        log = pd.read_csv(out_dir / "loss.csv")
        found_hash = record["config_hash"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{out_dir}: holds something else than a fine-tuned model; choose another folder") from error
    if found_hash != config_hash:
        return None
    log.attrs = {name: record[name] for name in ("used", "truncated", "too_long", "unlabelled", "config_hash")}
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
