"""What it costs to record the attention of every layer, head and row by role, while the model runs.

    .venv/bin/python benchmarks/recording.py [--dtype bfloat16] [--shape tinyllama] [--device cuda]

Against a plain sdpa forward of the same model, and against eager attention that returns its patterns. Goals: at most
1.25 times the time and 1.15 times the memory (weights and all) of the plain forward at any length. Eager is run as far
as its patterns fit into memory. The curve over length is drawn to outputs/benchmarks/recording_<shape>_<dtype>.png.
"""

from pathlib import Path

import pandas as pd
import torch
from side_by_side import DTYPES, arguments, device_name, in_turns, model_mib, random_llama, report

from ctxlib.attention import record_allocation
from ctxlib.roles import ROLES

LONGEST_EAGER = 2048
FOLDER = Path(__file__).parents[1] / "outputs" / "benchmarks"


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__, dtype=DTYPES, repeats=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=(512, 1024, 2048, 4096, 8192))
    parser.add_argument("--no-figure", action="store_true", help="needs neither matplotlib nor seaborn")
    options = parser.parse_args()

    rows = []
    for dtype in options.dtype:
        model = random_llama(options.shape, dtype, options.device)
        for length in options.lengths:
            rows.append({"dtype": dtype, "length": length} | measured(model, length, options))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    device = device_name(options.device)
    subtitle = f"{options.shape} Llama, {device}, medians of {options.repeats}"
    if not options.no_figure:
        draw(table, subtitle, FOLDER / f"recording_{options.shape}_{options.device}.png")
    worst = table[["time_ratio", "memory_ratio"]].max()
    with_eager = table.dropna().sort_values("length").iloc[-1]
    report(
        table,
        time_vs_plain=worst.time_ratio,
        memory_vs_plain=worst.memory_ratio,
        eager_time_vs_plain=with_eager.eager_time_ratio,
        eager_memory_vs_plain=with_eager.eager_memory_ratio,
    )


def measured(model, length: int, options) -> dict[str, float]:
    decoder = model.get_decoder()
    input_ids = torch.randint(0, 32000, (1, length), device=options.device)
    roles = torch.randint(0, len(ROLES), (1, length), device=options.device)

    def plain():
        return decoder(input_ids, use_cache=False)

    def recorded():
        with record_allocation(model, roles, rows="all") as recording:
            decoder(input_ids, use_cache=False)
        return recording.allocation

    def eager():
        model.set_attn_implementation("eager")
        patterns = decoder(input_ids, use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        columns = torch.nn.functional.one_hot(roles, len(ROLES)).float()[:, None]
        return torch.stack([pattern.float() @ columns for pattern in patterns])

    ways = {"plain": plain, "recorded": recorded} | ({"eager": eager} if length <= LONGEST_EAGER else {})
    times, peaks = in_turns(ways, options.repeats, options.device)
    memory = peaks.median() + model_mib(model)
    median = times.median()
    found = {"plain_s": median.plain, "plain_mib": memory.plain}
    found |= {
        "time_ratio": (times.recorded / times.plain).median(),
        "memory_ratio": memory.recorded / memory.plain,
    }
    if "eager" in ways:
        found["eager_time_ratio"] = (times.eager / times.plain).median()
        found["eager_memory_ratio"] = memory.eager / memory.plain
    return found


def draw(table: pd.DataFrame, subtitle: str, path: Path) -> None:
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="ticks", context="paper")
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for panel, what, goal in zip(panels, ("time", "memory"), (1.25, 1.15), strict=True):
        for dtype, of_dtype in table.groupby("dtype"):
            line = panel.plot(of_dtype.length, of_dtype[f"{what}_ratio"], "o-", label=f"recorded, {dtype}")[0]
            panel.plot(
                of_dtype.length, of_dtype[f"eager_{what}_ratio"], "x:", color=line.get_color(), label=f"eager, {dtype}"
            )
        panel.axhline(1, color="grey", lw=0.8)
        panel.axhline(goal, color="grey", lw=0.8, ls="--")
        panel.annotate(f"goal {goal}", (table.length.max(), goal), ha="right", va="bottom", color="grey")
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{what}, plain forward = 1")
        panel.set_xticks(*[sorted(table.length.unique())] * 2)
        panel.set_yticks((1, 2, 4), ("1", "2", "4"))
        panel.minorticks_off()
    panels[0].legend(frameon=False)
    figure.suptitle(f"Recording every layer, head and row by role: {subtitle}")
    sns.despine(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
