"""What bounds training on the miniature: its speed against the matrix products that this machine can do.

    .venv/bin/python benchmarks/miniature.py [--threads 2] [--steps 30]

Pretraining (the longest lesson's mixture, batches of about 4096 tokens) and fine-tuning by each method, with the
settings of params/evidence.yaml, one step at a time: tokens without padding a second; GFLOP/s, counted by PyTorch's
own counter in one step, padding included; the share of the time in matrix products, in attention, and in all else, by
PyTorch's profiler. The ceiling is the float32 product of a batch of tokens with each of the model's own weights,
and of two square matrices of 1024. The last line: the achieved speed of fine-tuning by these two ceilings.
"""

import argparse
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from side_by_side import report
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from ctxlib import experiment
from ctxlib.finetune import add_lora, make_trainer, train, training_examples, training_order
from ctxlib.miniature.pretrain import Recipe, batches, build_model, supervised_loss
from ctxlib.miniature.town import Town
from ctxlib.models import load_model
from ctxlib.params import Finetune, Params, load_params

PARAMS = Path(__file__).resolve().parents[1] / "params" / "evidence.yaml"
METHODS = ("lora", "qlora", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    params = load_params(PARAMS)
    rows = [pretraining(params, options.steps)]
    rows += [fine_tuning(params.changed({"finetune.method": method}), options.steps) for method in METHODS]
    table = pd.DataFrame(rows)
    own, square = own_shapes(params), product(1024, 1024, 1024)
    print(f"matrix products, GFLOP/s: {own:.1f} at the model's own shapes, {square:.1f} at 1024³")
    tuned = table[table.what == f"fine-tuning, {params.finetune.method}"].gflop_per_s.item()
    report(table, of_own_shapes=tuned / own, of_1024=tuned / square)


def pretraining(params: Params, steps: int) -> dict[str, object]:
    recipe, tokenizer = Recipe(), experiment.tokenizer(params)
    model = build_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    made = [batch for start in range(0, steps + 1, 4) for batch in batches(recipe, Town(), tokenizer, start, 12, True)]

    def step(ids: torch.Tensor, labels: torch.Tensor) -> None:
        loss, _ = supervised_loss(model, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step(*made[0])
    flop = counter.get_total_flops() / made[0][0].numel()
    began = time.perf_counter()
    for batch in made[1 : steps + 1]:
        step(*batch)
    seconds = time.perf_counter() - began
    padded = sum(ids.numel() for ids, _ in made[1 : steps + 1])
    shares = where(lambda: [step(*batch) for batch in made[1:6]])
    return {
        "what": "pretraining",
        "tokens_per_s": padded / seconds,
        "gflop_per_s": flop * padded / seconds / 1e9,
        **shares,
    }


def fine_tuning(params: Params, steps: int) -> dict[str, object]:
    settings, tokenizer = params.finetune, experiment.tokenizer(params)
    conversations = experiment.conversations(params).conversations[: settings.batch_size * (steps + 1)]
    examples, _ = training_examples(tokenizer, conversations, max_length=params.conversations.max_length)
    lengths = [len(example.input_ids) for example in examples]
    order = training_order(lengths, settings.batch_size, len(examples), seed=0)
    model = load_model(
        experiment.model_path(params, "pretrained"), quantisation="nf4" if settings.method == "qlora" else None
    )
    if settings.method != "full":
        model = add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            [examples[row] for row in order],
            Finetune(
                batch_size=settings.batch_size,
                gradient_accumulation=1,
                learning_rate=1e-4,
                packing=settings.packing,
                save_every=10**6,
            ),
            work_dir=Path(folder),
            pad_id=tokenizer.pad_token_id,
            steps=len(examples) // settings.batch_size,
            seed=42,
        )
        trainer.args.save_strategy = "no"
        trainer.add_callback(clock)
        train(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        with FlopCounterMode(display=False) as counter:
            trainer.training_step(model, batch)
        flop = counter.get_total_flops() / batch["input_ids"].numel()
        shares = where(lambda: [trainer.training_step(model, batch) for _ in range(5)])
    chosen = [lengths[row] for row in order[settings.batch_size :]]
    groups = [chosen[i : i + settings.batch_size] for i in range(0, len(chosen), settings.batch_size)]
    padded = sum(len(group) * max(group) for group in groups[: len(clock.seconds) - 1])
    seconds = sum(clock.seconds[1:])
    used = sum(sum(group) for group in groups[: len(clock.seconds) - 1])
    return {
        "what": f"fine-tuning, {settings.method}",
        "tokens_per_s": used / seconds,
        "gflop_per_s": flop * padded / seconds / 1e9,
        **shares,
        "ms_per_step": 1000 * seconds / (len(clock.seconds) - 1),
    }


def where(work: Callable[[], object]) -> dict[str, float]:
    """Shares of the time that operations take themselves: matrix products, attention, the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent = pd.Series({event.key: event.self_cpu_time_total for event in profiled.key_averages()})
    attention = spent.index.str.contains("attention")
    products = spent.index.str.fullmatch(r"aten::(mm|bmm|addmm|linear|matmul|mkldnn_linear\w*)") & ~attention
    total = spent.sum()
    shares = {"products": spent[products].sum() / total, "attention": spent[attention].sum() / total}
    return {**shares, "rest": 1 - sum(shares.values())}


def own_shapes(params: Params, tokens: int = 4096) -> float:
    """GFLOP/s over all weights of the model, each times a batch of tokens."""
    model = load_model(experiment.model_path(params, "pretrained"))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    flop = seconds = 0.0
    for rows, columns in (tuple(weight.shape) for weight in weights):
        flop += 2 * tokens * rows * columns
        seconds += 2 * tokens * rows * columns / product(tokens, columns, rows) / 1e9
    return flop / seconds / 1e9


def product(rows: int, inner: int, columns: int, repeats: int = 20) -> float:
    """GFLOP/s of the best of some float32 products."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    best = min(_seconds(lambda: left @ right) for _ in range(repeats))
    return 2 * rows * inner * columns / best / 1e9


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Clock(TrainerCallback):
    """Seconds of every step, its batch and its optimiser included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


if __name__ == "__main__":
    random.seed(0)
    main()
