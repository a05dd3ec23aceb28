"""Supervised fine-tuning with or without the indicator: labels, LoRA / QLoRA / full, resumable, whole or not at all."""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
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
from ctxlib.models import (
    add_indicator_token,
    is_adapter,
    load_model,
    model_hash,
    require_chat_template,
    set_indicator_row,
)
from ctxlib.params import InputError
from ctxlib.roles import Role, RoleMap, role_map, role_table

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
IGNORED = -100
LOG_EVERY = 10
BATCHES_GROUPED = 8


@dataclass(frozen=True)
class Example:
    """A conversation as it is trained on; `labels` is -100 where nothing is supervised."""

    input_ids: Int[Tensor, " pos"]
    labels: Int[Tensor, " pos"]
    roles: Int[Tensor, " pos"]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that can close an answer: eos, and special tokens such as `<|eot_id|>` or `<|im_end|>`."""
    openers = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id}
    return frozenset(set(tokenizer.all_special_ids) - openers | {tokenizer.eos_token_id} - {None})


def supervised_mask(
    role_map: RoleMap, reading: str = "clean", end_ids: Collection[int] = frozenset()
) -> Bool[Tensor, " pos"]:
    """True for the tokens that carry a label.

    `clean`: the content of every answer and the token that closes it, so that the model learns to stop. That token is
    the first template token after the content, in the same turn; where a template puts something between the two
    (Llama-2: a space), everything up to the first of `end_ids`. A newline after it carries no label.
    `paper`: every token (official script: the completion-only collator is commented out).
    """
    if reading == "paper":
        return torch.ones(len(role_map), dtype=torch.bool)
    if reading != "clean":
        raise InputError(f"reading '{reading}': expected 'clean' or 'paper'")
    roles, turns, ids = role_map.roles.tolist(), role_map.turns.tolist(), role_map.ids.tolist()
    supervised = [role == Role.ASSISTANT for role in roles]
    for last in range(len(ids) - 1):
        if roles[last] != Role.ASSISTANT or roles[last + 1] != Role.TEMPLATE:
            continue
        stop = last + 1
        while stop < len(ids) and roles[stop] == Role.TEMPLATE and turns[stop] == turns[last]:
            stop += 1
        closing = range(last + 1, stop)
        n_labels = next((n for n, position in enumerate(closing, start=1) if ids[position] in end_ids), 1)
        for position in closing[:n_labels]:
            supervised[position] = True
    return torch.tensor(supervised, dtype=torch.bool)


def label_audit(tokenizer: PreTrainedTokenizerBase, role_map: RoleMap, mask: Bool[Tensor, " pos"]) -> pd.DataFrame:
    """One row per token, to look at before training: `token` (as text), `role`, `turn`, `supervised`."""
    return role_table(tokenizer, role_map).assign(supervised=mask.tolist())


def training_examples(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    reading: str = "clean",
    indicator: str | None = None,
    max_length: int = 2048,
) -> tuple[list[Example], dict[str, int]]:
    """Token ids and labels of every conversation, and the counts `used`, `truncated`, `too_long`, `unlabelled`.

    A conversation over `max_length` tokens loses its last turns (`truncated`), or is left out if already its first is
    too long (`too_long`); in the `paper` reading it is cut at `max_length`, in the middle of a word if need be. One
    without any label is left out (`unlabelled`).

    Raises InputError if none remains.
    """
    end_ids = end_of_turn_ids(tokenizer)
    examples, counts = [], {"used": 0, "truncated": 0, "too_long": 0, "unlabelled": 0}
    render = partial(role_map, tokenizer, indicator=indicator, indicator_space=reading == "paper")
    for conversation in conversations:
        try:
            rendered = render(conversation.messages)
        except InputError as error:
            raise InputError(f"conversation {conversation.id}: {error}") from error
        truncated = len(rendered) > max_length
        if truncated and reading == "paper":
            rendered = rendered.truncate(max_length)
        elif truncated:
            rendered = _whole_turns(render, conversation, rendered, max_length)
            if rendered is None:
                counts["too_long"] += 1
                continue
        mask = supervised_mask(rendered, reading, end_ids)
        if not mask[1:].any():  # the first token is never predicted
            counts["unlabelled"] += 1
            continue
        counts["truncated"] += truncated
        counts["used"] += 1
        examples.append(Example(rendered.ids, torch.where(mask, rendered.ids, IGNORED), rendered.roles))
    if not examples:
        raise InputError(
            f"no conversation to train on, of {len(conversations)}: {counts['too_long']} are longer than max_length "
            f"{max_length}, {counts['unlabelled']} have no supervised token (no assistant message?)"
        )
    return examples, counts


def label_counts(examples: Sequence[Example], indicator_id: int | None = None) -> pd.DataFrame:
    """How much of each role is supervised, over all examples: role, tokens, supervised, fraction in [0, 1].

    The indicator, whose role is template, gets a row of its own.
    """
    ids, labels, roles = (torch.cat([getattr(e, part) for e in examples]) for part in ("input_ids", "labels", "roles"))
    indicator = ids == (-1 if indicator_id is None else indicator_id)
    parts = [*((role.name.lower(), (roles == role) & ~indicator) for role in Role), ("indicator", indicator)]
    counts = [(name, int(chosen.sum()), int((labels[chosen] != IGNORED).sum())) for name, chosen in parts]
    frame = pd.DataFrame(counts, columns=["role", "tokens", "supervised"])
    frame = frame[frame.tokens > 0].reset_index(drop=True)
    return frame.assign(fraction=frame.supervised / frame.tokens)


def _whole_turns(render: partial, conversation: Conversation, rendered: RoleMap, max_length: int) -> RoleMap | None:
    """The longest beginning of the conversation that ends with an answer and fits, rendered; None if none fits."""
    fits = rendered.truncate(max_length)
    last_turn = int(fits.turns[fits.roles == Role.ASSISTANT].max()) if Role.ASSISTANT in fits.roles else 0
    for n_messages in range(len(conversation.messages), 0, -1):
        beginning = conversation.messages[:n_messages]
        if beginning[-1].role == "assistant" and sum(m.role == "user" for m in beginning) <= last_turn:
            shorter = render(beginning)
            if len(shorter) <= max_length:
                return shorter
    return None


def finetune(
    model_path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    out_dir: str | Path,
    method: str = "lora",
    indicator: str | None = None,
    reading: str = "clean",
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
    save_every: int = 100,
    seed: int = 42,
    revision: str | None = None,
    attention: str = "sdpa",
    progress: bool = True,
) -> pd.DataFrame:
    """Fine-tunes the model at `model_path` and writes adapter (or model), tokenizer and loss log to `out_dir`.

    Defaults are those of paper Table 4 for LoRA. With `indicator`, user messages with `indicated=True` end in that
    token, which is added to a copy of the tokenizer. Under LoRA its row of the input embedding is trained alone of all
    rows in the `clean` reading, and stays at the mean of the embeddings in the `paper` reading (official script).
    Exactly one of `steps` and `epochs` is given. A step takes `batch_size * gradient_accumulation` conversations.
    `group_by_length` puts conversations of like length into one batch, the batches themselves in random order.

    The result lies in `out_dir` whole or not at all: until the end all is written to `<out_dir>.training-<hash>`
    beside it. Called again after a kill, training goes on from the last checkpoint, with the same final weights; called
    again when done, the saved log is returned. The hash covers the model, the tokenized data and every setting.

    Returns the loss log `step, loss, learning_rate` (a row for every 10 steps, mean loss per supervised token in nats);
    its `attrs` hold the counts of `training_examples` and the `config_hash`.

    Raises InputError for a bad setting, data without labels, an `out_dir` that holds something else; before anything
    is written.
    """
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    _check_settings(settings)
    if is_adapter(model_path):
        raise InputError(f"{model_path}: an adapter cannot be fine-tuned further; give a whole model")
    require_chat_template(tokenizer)
    tokenizer, n_tokens = deepcopy(tokenizer), len(tokenizer)
    indicator_id = None if indicator is None else add_indicator_token(tokenizer, indicator)
    examples, counts = training_examples(
        tokenizer, conversations, reading=reading, indicator=indicator, max_length=max_length
    )
    out_dir = Path(out_dir).expanduser()
    config_hash = _config_hash(model_hash(model_path, revision=revision), tokenizer, examples, settings)
    if (finished := _finished_log(out_dir, config_hash)) is not None:
        return finished
    work_dir = out_dir.with_name(f"{out_dir.name}.training-{config_hash}")

    effective_batch = batch_size * gradient_accumulation
    n_rows = steps * effective_batch if steps else max(1, round(epochs * len(examples)))
    n_steps = math.ceil(n_rows / effective_batch)
    order = training_order([len(e.input_ids) for e in examples], effective_batch, n_rows, seed, group_by_length)

    cuda = torch.cuda.is_available()
    set_seed(seed)
    model = load_model(
        model_path,
        dtype="bfloat16" if cuda and method != "full" else "float32",
        quantisation="nf4" if method == "qlora" else None,
        attention=attention,
        revision=revision,
    )
    if indicator_id is not None:
        set_indicator_row(model, indicator_id, n_tokens)
    if (largest := max(int(example.input_ids.max()) for example in examples)) >= model.config.vocab_size:
        raise InputError(
            f"{model_path}: token {largest} of the tokenizer {tokenizer.name_or_path} lies beyond the model's "
            f"vocabulary of {model.config.vocab_size}; take the model's own tokenizer"
        )
    frozen_rows = []
    if method != "full":
        model = add_lora(model, lora_rank, lora_alpha, lora_dropout, indicator_id=indicator_id, base_revision=revision)
        frozen_rows = _frozen_rows(model, reading)
    model.config.use_cache = False
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=n_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=SCHEDULES[schedule],
        warmup_steps=math.ceil(warmup_fraction * n_steps),
        max_grad_norm=max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=min(LOG_EVERY, n_steps),
        logging_nan_inf_filter=False,
        save_steps=save_every,
        save_total_limit=1,
        seed=seed,
        use_cpu=not cuda,
        bf16=cuda,
        activation_checkpointing=cuda,
        activation_checkpointing_kwargs={"use_reentrant": False} if cuda else None,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer would multiply the batch by the number of GPUs
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[examples[row] for row in order],
        data_collator=partial(collate, pad_id=tokenizer.pad_token_id),
        callbacks=[_Progress(out_dir.name, frozen_rows, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    _discard_other_trainings(out_dir, keep=work_dir)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or not cuda)
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(work_dir))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    model.config.use_cache = True
    columns = ["step", "loss", "learning_rate"]
    log = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row], columns=columns)
    log.attrs = {**counts, "config_hash": config_hash}
    result = work_dir / "result"
    shutil.rmtree(result, ignore_errors=True)
    model.save_pretrained(result)
    tokenizer.save_pretrained(result)
    log.to_csv(result / "loss.csv", index=False)
    _write_json(result / "finetune.json", {**log.attrs, **settings})
    _move_into_place(result, out_dir)
    shutil.rmtree(work_dir)
    return log


_SETTINGS = (
    "method", "indicator", "reading", "steps", "epochs", "batch_size", "gradient_accumulation", "learning_rate",
    "warmup_fraction", "schedule", "lora_rank", "lora_alpha", "lora_dropout", "max_length", "max_grad_norm",
    "group_by_length", "seed",
)  # fmt: skip


def training_order(
    lengths: Sequence[int], effective_batch: int, n_rows: int, seed: int, group_by_length: bool = True
) -> list[int]:
    """The rows to train on, in order, epoch after epoch: a resumed run sees the same data as an uninterrupted one.

    Grouping sorts by length within 8 batches at a time and shuffles the batches. (Trainer's own "group_by_length"
    runs from the longest to the shortest of 50 batches, and a resumed run draws another order from its second epoch.)
    """
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < n_rows:
        epoch = torch.randperm(len(lengths), generator=generator).tolist()
        if group_by_length:
            pools = _chunks(epoch, effective_batch * BATCHES_GROUPED)
            batches = _chunks([row for pool in pools for row in sorted(pool, key=lengths.__getitem__)], effective_batch)
            shuffled = torch.randperm(len(epoch) // effective_batch, generator=generator).tolist()
            incomplete = batches[len(shuffled) :]
            epoch = [row for batch in [*(batches[n] for n in shuffled), *incomplete] for row in batch]
        order += epoch
    return order[:n_rows]


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Int[Tensor, "batch pos"]]:
    """Pads on the right to the longest of the batch; padding is told from text by `attention_mask` only."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad([example.input_ids for example in examples], padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(example.input_ids) for example in examples]),
        "labels": pad([example.labels for example in examples], padding_value=IGNORED),
    }


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


def add_lora(
    model: PreTrainedModel,
    lora_rank: int = 16,
    lora_alpha: int | float = 16,
    lora_dropout: int | float = 0.05,
    *,
    indicator_id: int | None = None,
    base_revision: str | None = None,
) -> PeftModel:
    """LoRA on all linear layers (paper Table 4), which changes no logit until it is trained.

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
        target_modules=LORA_TARGETS,
        trainable_token_indices=rows,
        revision=base_revision,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"{model.name_or_path}: LoRA does not fit this model: {error}") from error
    # The rows above are all that is new in the embeddings: without this peft would store both of them whole.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _frozen_rows(model: PeftModel, reading: str) -> list[torch.nn.Parameter]:
    """The indicator's row of the output embedding; in the paper's reading that of the input embedding too."""
    inputs = model.get_input_embeddings()
    trained = {id(parameter) for parameter in inputs.parameters()} if reading == "clean" else set()
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    return [parameter for parameter in rows if id(parameter) not in trained]


def _check_settings(settings: dict) -> None:
    for name, choices in (
        ("method", ("full", "lora", "qlora")),
        ("reading", ("clean", "paper")),
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


def _last_checkpoint(work_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end (its trainer_state.json is written last)."""
    for folder in sorted(work_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


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
