"""The Trainer of a fine-tuning: resumable, bit for bit the same on a CPU, and stopped when it leaves the numbers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ctxlib.files import disk_space
from ctxlib.finetune.checkpoints import last_checkpoint
from ctxlib.finetune.labels import (
    TrainingExample,
    collate,
    pack,
)
from ctxlib.finetune.loss import chunked_loss
from ctxlib.finetune.objective import batch_loss
from ctxlib.models import (
    memory_advice,
)
from ctxlib.params import Finetune, InputError

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
LOG_EVERY = 10
_LESS_MEMORY = (
    "finetune.gradient_checkpointing to true, finetune.batch_size down with finetune.gradient_accumulation up, or "
    "conversations.max_length down (changing batch size or length starts the training over)"
)


def make_trainer(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[TrainingExample],
    settings: Finetune,
    *,
    work_dir: Path,
    pad_id: int,
    steps: int,
    seed: int,
) -> Trainer:
    """A Trainer that takes the examples in the order given for `steps` steps; checkpoints go to `work_dir`."""
    cuda = torch.cuda.is_available()
    checkpointing = cuda if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    # a mean over steps on both sides of a checkpoint would lose those before it when training resumes from there
    log_every = min(LOG_EVERY, steps)
    log_every = math.gcd(log_every, settings.save_every) if settings.save_every < steps else log_every
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(settings.warmup_fraction * steps),
        max_grad_norm=settings.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
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
    collator = pack if settings.packing else partial(collate, pad_id=pad_id)
    trainer = _Trainer(model=model, args=arguments, train_dataset=list(rows), data_collator=collator)
    if any(row.turn_loss is not None for row in rows):
        trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated batches are averaged
    trainer.add_callback(_StaysFinite())
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(trainer: Trainer) -> None:
    """Trains, from the last whole checkpoint if there is one; on a CPU the result is the same to the bit.

    Damaged checkpoints are removed, with a warning. Raises InputError if memory or disk are full, or if loss, gradients
    or weights are no longer finite: on a CPU at once, on a GPU at the next logged step, which is never after a
    checkpoint. The checkpoint before stays.
    """
    work_dir = Path(trainer.args.output_dir)
    checkpoint = last_checkpoint(work_dir, tidy=trainer.is_world_process_zero())
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or not torch.cuda.is_available())
    try:
        rows = trainer.train_dataset
        most_tokens = trainer.args.per_device_train_batch_size * max(len(row.input_ids) for row in rows)
        if any(row.turn_loss is not None for row in rows):
            most_tokens = 0  # `batch_loss` needs the logits themselves
        with (
            disk_space(work_dir),
            memory_advice(_LESS_MEMORY, work_dir),
            chunked_loss(trainer.model, most_tokens, rows[0]),
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
            _check_weights_are_finite(trainer.model, trainer.state.global_step)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        with suppress(OSError):
            work_dir.rmdir()  # the trainer makes it at once: without a checkpoint nothing is to be kept
    trainer.model.config.use_cache = True


class _Trainer(Trainer):
    """Stops at the first loss that is not finite, where looking at it costs no synchronisation.

    Batches whose turns count differently have the loss of `objective.weighted_loss`.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "turn_loss" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return batch_loss(model, inputs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            raise _not_finite(f"the loss is {loss.item()}", self.state.global_step + 1, self.model)
        return loss


class _StaysFinite(TrainerCallback):
    """Stops at the first logged loss or gradient norm that is not finite: before the weights are saved."""

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise _not_finite(f"{name} is {logs[name]}", state.global_step, model)


def _not_finite(what: str, step: int, model: torch.nn.Module) -> InputError:
    if step == 1 and (name := next(_not_finite_weights(model), None)):
        return InputError(
            f"training stopped at step {step}: {what}, since the model's weight {name} holds values that are no "
            "numbers; fetch the model again, or take another"
        )
    return InputError(
        f"training stopped at step {step}: {what}; lower finetune.learning_rate or finetune.max_grad_norm, or load the "
        "model in float32; the last checkpoint is kept"
    )


def _check_weights_are_finite(model: torch.nn.Module, step: int) -> None:
    if name := next(_not_finite_weights(model), None):
        raise _not_finite(f"the weight {name} is no longer finite", step, model)


def _not_finite_weights(model: torch.nn.Module) -> Iterator[str]:
    return (
        name for name, weight in model.named_parameters() if weight.is_floating_point() and not weight.isfinite().all()
    )


class Progress(TrainerCallback):
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
