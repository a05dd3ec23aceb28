"""What a step of fine-tuning costs: ours against TRL's SFTTrainer.

    .venv/bin/python benchmarks/finetune.py [--shape tinyllama] [--device cuda]

TRL is no dependency: .venv/bin/python -m pip install --no-deps --target trl_lib trl, then PYTHONPATH=trl_lib.

The same random Llama with the same LoRA, or all its weights; the same conversations with the same labels, in the same
order and batches, padded alike; the same optimiser and schedule, float32 (bfloat16 on CUDA), no gradient checkpointing.
`packed` is ours again, with `packing: true`. Each way runs in a process of its own and they take turns; a process's
first step warms up, the time of the others is the median. Memory is the weights and the most that training holds
beyond them. The first losses must agree. Goals: speed_vs_trl >= 1, memory_vs_trl <= 1.
"""

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scoring import make_corpus
from side_by_side import arguments, measured, model_mib, random_llama, report
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ctxlib.finetune import TrainingExample, add_lora, collate, make_trainer, train, training_examples, training_order
from ctxlib.miniature import MODELS
from ctxlib.models import load_tokenizer
from ctxlib.params import Finetune

WAYS = ("ours", "trl", "packed")
MEAN_TOKENS, TURNS = 256, 2


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = arguments(__doc__, dtype=None, repeats=3, device=device)
    parser.add_argument("--methods", choices=("lora", "full"), nargs="+", default=("lora", "full"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install --no-deps --target trl_lib trl, then PYTHONPATH=trl_lib")
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    runs = pd.DataFrame(
        [in_a_process(way, method) for _ in range(options.repeats) for method in options.methods for way in WAYS]
    )
    compare_losses(runs)
    table = runs.groupby(["method", "way"], sort=False)[["tokens_per_s", "memory_mib"]].median().reset_index()
    repeats = runs.assign(repeat=runs.groupby(["method", "way"]).cumcount())
    speed, memory = (repeats.pivot(index=["method", "repeat"], columns="way", values=v) for v in table.columns[2:])
    speeds = speed.div(speed.trl, axis=0).groupby("method").median()
    memories = memory.div(memory.trl, axis=0).groupby("method").median()
    keys = pd.MultiIndex.from_frame(table[["method", "way"]])
    table["speed_vs_trl"] = speeds.stack().reindex(keys).to_numpy()
    table["memory_vs_trl"] = memories.stack().reindex(keys).to_numpy()
    report(
        table,
        packed_speed_vs_trl=speeds.packed.min(),
        packed_memory_vs_trl=memories.packed.max(),
        speed_vs_trl=speeds.ours.min(),
        memory_vs_trl=memories.ours.max(),
    )


def in_a_process(way: str, method: str) -> dict[str, object]:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--one", way, method]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    print(
        f"{method:>6} {way:>7} {measured['tokens_per_s']:8,.1f} tokens/s {measured['memory_mib']:8,.0f} MiB", flush=True
    )
    return {"method": method, "way": way} | measured


def compare_losses(runs: pd.DataFrame) -> None:
    for _, of_method in runs.groupby("method"):
        np.testing.assert_allclose(of_method.loss, of_method.loss.iloc[0], rtol=0.01)


def measure(way: str, method: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens (without padding) a second, MiB, and the mean loss of all steps."""
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer(MODELS / "instruct")
    n_rows = options.batch_size * (options.steps + 1)
    examples, _ = training_examples(tokenizer, make_corpus(tokenizer, MEAN_TOKENS, TURNS, n_rows).conversations)
    order = training_order([len(e.input_ids) for e in examples], options.batch_size, n_rows, seed=0)
    rows = [examples[row] for row in order]
    model = random_llama(options.shape, device=options.device)
    if method == "lora":
        model = add_lora(model, lora_dropout=0.0)
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            rows,
            Finetune(
                batch_size=options.batch_size,
                gradient_accumulation=1,
                packing=way == "packed",
                gradient_checkpointing=False,
                save_every=10**6,
            ),
            work_dir=Path(folder),
            pad_id=tokenizer.pad_token_id,
            steps=options.steps + 1,
            seed=42,
        )
        trainer.args.save_strategy = "no"
        if way == "trl":
            trainer = trl_trainer(trainer.args, model, rows, tokenizer)
        trainer.add_callback(clock)
        *_, peak = measured(lambda: train(trainer) if way != "trl" else trainer.train(), options.device)
        memory = model_mib(model) + peak
    lengths = torch.tensor([len(example.input_ids) for example in rows]).view(-1, options.batch_size).sum(1)
    speeds = lengths[1:].double() / torch.tensor(clock.seconds[1:], dtype=torch.double)
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return {"tokens_per_s": speeds.median().item(), "memory_mib": memory, "loss": loss}


def trl_trainer(ours: TrainingArguments, model, rows: list[TrainingExample], tokenizer):
    """TRL's trainer with our arguments; the labels, the batches and their padding are given to it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    given = {name: value for name, value in ours.to_dict().items() if name in same_arguments()}
    settings = SFTConfig(**given, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    columns = {name: [getattr(row, name).tolist() for row in rows] for name in ("input_ids", "labels", "roles")}

    def padded(features):
        return collate(
            [TrainingExample(**{k: torch.tensor(v) for k, v in f.items()}) for f in features], tokenizer.pad_token_id
        )

    trainer = SFTTrainer(
        model, settings, data_collator=padded, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def same_arguments() -> set[str]:
    return {
        "output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "max_grad_norm", "train_sampling_strategy", "logging_steps", "seed",
        "save_strategy", "use_cpu", "bf16", "gradient_checkpointing", "activation_checkpointing", "optim",
        "remove_unused_columns", "report_to", "disable_tqdm", "dataloader_pin_memory",
    }  # fmt: skip


class Clock(TrainerCallback):
    """Seconds of every step, its batch and its optimiser included."""

    def __init__(self, device: str):
        self.device, self.seconds, self.last = device, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


if __name__ == "__main__":
    main()
