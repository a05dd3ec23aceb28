"""A step of QLoRA on long conversations: seconds, model FLOPs utilisation and the peak of memory, by way of the loss.

    .venv/bin/python benchmarks/qlora.py [--shape llama-3-8b] [--tokens 4096] [--batches 1 4] [--device cuda]

A random Llama quantised to NF4 with LoRA on all linear layers, gradient checkpointing, half of each conversation
supervised. `plain` makes the logits of all tokens, `chunked` those of a chunk of supervised tokens at a time; their
losses must agree. Goals on one H100, for 8B and 4,096 tokens: mfu (6 FLOPs per parameter and token) >= 0.42,
peak_gib <= 10, and a batch of 4 runs.
"""

from contextlib import nullcontext

import bitsandbytes as bnb
import numpy as np
import pandas as pd
import torch
from side_by_side import arguments, in_turns, model_mib, random_llama, report
from torch import nn

from ctxlib.finetune import add_lora
from ctxlib.finetune.labels import IGNORED, TrainingExample, collate
from ctxlib.finetune.loss import chunked_loss

PEAK_FLOPS = 989e12  # of an H100 in bfloat16, dense
VOCABULARY = 32000


def main() -> None:
    parser = arguments(__doc__, dtype="bfloat16", repeats=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=(1,))
    options = parser.parse_args()
    model = random_llama(options.shape, options.dtype, options.device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    quantise(model)
    model = add_lora(model)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    table = pd.DataFrame(
        [row for batch_size in options.batches for row in steps(model, batch_size, n_parameters, options)]
    )
    first = table[(table.loss == "chunked") & (table.batch_size == options.batches[0])].iloc[0]
    report(
        table,
        step_s=first.step_s,
        mfu=first.mfu,
        peak_gib=first.peak_gib,
        largest_batch=float(table.batch_size.max()),
        speed_vs_plain=(table.step_s[table.loss == "plain"].to_numpy() / table.step_s[table.loss == "chunked"]).min(),
    )


def quantise(model: nn.Module) -> None:
    """Every linear layer but the head to NF4 with double quantisation, one at a time."""
    for parent in list(model.get_decoder().modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                device, dtype = linear.weight.device, linear.weight.dtype
                small = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                weight = linear.weight.data.cpu()
                small.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                small.support_avx512bf16_for_cpu = False  # or an eval pass would repack the weights
                setattr(parent, name, small.to(device))
    model.is_loaded_in_4bit = model.is_quantized = True


def steps(model: nn.Module, batch_size: int, n_parameters: int, options) -> list[dict[str, object]]:
    """One row for each way of the loss."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (batch_size, options.tokens))
    half = options.tokens // 2
    labels = torch.cat([torch.full((batch_size, half), IGNORED), ids[:, half:]], dim=1)
    examples = [TrainingExample(*of_one, torch.zeros_like(of_one[0])) for of_one in zip(ids, labels, strict=True)]
    batch = {
        name: tensor.to(options.device) for name, tensor in collate(examples, 0).items() if name != "attention_mask"
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.PagedAdamW32bit(trained) if options.device == "cuda" else torch.optim.AdamW(trained)
    losses: dict[str, float] = {}

    def step(way: str) -> None:
        chunked = chunked_loss(model, batch_size * options.tokens, examples[0]) if way == "chunked" else nullcontext()
        with chunked, torch.autocast(options.device, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.setdefault(way, loss.item())

    ways = {way: lambda way=way: step(way) for way in ("plain", "chunked")}
    times, peaks = in_turns(ways, options.repeats, options.device)
    np.testing.assert_allclose(losses["chunked"], losses["plain"], rtol=0.05)  # one step of training lies between
    tokens = batch_size * options.tokens
    rows = []
    for way in ways:
        seconds = times[way].median()
        row = {"loss": way, "batch_size": batch_size, "step_s": seconds, "tokens_per_s": tokens / seconds}
        row |= {"mfu": 6 * n_parameters * tokens / seconds / PEAK_FLOPS}
        rows.append(row | {"peak_gib": (peaks[way].max() + model_mib(model)) / 1024})
    return rows


if __name__ == "__main__":
    main()
