"""What steering costs in `generate`: tokens a second, steered against plain, side by side.

    .venv/bin/python benchmarks/steering.py [--dtype bfloat16] [--shape tinyllama] [--device cuda]

A batch of left-padded prompts, every layer and head steered to the middle half of each prompt. Goal: >= 0.9.
"""

import pandas as pd
import torch
from side_by_side import DTYPES, arguments, in_turns, random_llama, report

from ctxlib.attention import steer_attention

BATCHES = ("1x1024", "8x256")  # prompts × tokens of the longest


def main() -> None:
    parser = arguments(__doc__, dtype=DTYPES, repeats=7)
    parser.add_argument("--batches", nargs="+", default=BATCHES, metavar="PROMPTSxTOKENS")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()

    rows = []
    for dtype in options.dtype:
        model = random_llama(options.shape, dtype, options.device)
        model.generation_config.pad_token_id = 0
        for prompts, length in (map(int, batch.split("x")) for batch in options.batches):
            rows.append(compare(model, prompts, length, options))
    table = pd.DataFrame(rows)
    report(table, steered_vs_plain=table.steered_vs_plain.min())


def compare(model, prompts: int, length: int, options) -> dict[str, object]:
    lengths = torch.linspace(length, length // 2, prompts).long()
    place = torch.arange(length).expand(prompts, -1)
    mask = (place >= length - lengths[:, None]).to(options.device)
    keep = ((place >= length // 2) & (place < 3 * length // 4)).to(options.device)
    ids = torch.randint(3, 32000, (prompts, length), device=options.device)

    def plain():
        settings = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens, "do_sample": False}
        return model.generate(ids, attention_mask=mask.long(), **settings)

    def steered():
        with steer_attention(model, keep, steering_alpha=0.1):
            return plain()

    times, _ = in_turns({"plain": plain, "steered": steered}, options.repeats, options.device)
    rates = prompts * options.new_tokens / times.median()
    cell = {"dtype": str(model.dtype).removeprefix("torch."), "prompts": prompts, "prompt_tokens": length}
    cell |= {"plain_tokens_per_s": rates.plain, "steered_tokens_per_s": rates.steered}
    return cell | {"steered_vs_plain": (times.plain / times.steered).median()}


if __name__ == "__main__":
    main()
