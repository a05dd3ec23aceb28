"""The paper's printed tables as tidy frames, to be drawn next to ours. Wang et al. 2024, arXiv 2411.02688.

The tables stand here as they are printed, so that they can be read against the paper; `every_table` gives them all in
one shape, with fractions where the paper has percent.
"""

import io
import math
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

import pandas as pd

THRESHOLD = 0.6  # β of every model in table 3
ALPHA = 0.95  # of all that the paper steers
TOP = 0.1  # the fraction of turns that figure 6 compares between layers
NEEDLES = 400  # tests of an NIH run
KEYWORDS_ASKED = NEEDLES * 7  # keywords of the needle
SQUAD_QUAC_DROP = ("squad", "quac", "drop")
VANILLA, INDICATED = "vanilla", "indicator + [IND]"
PRETRAINED, IN_TEMPLATE, IN_RAW = "pretrained, raw text", "instruct, chat template", "instruct, raw text"
STEERED, WITHOUT_PREFIX = f"{IN_TEMPLATE}, steered", f"{IN_TEMPLATE}, no prefix"

DATASETS = {
    "ucla-cmllab/vicuna_cleaned": "ShareGPT",
    "ucla-cmllab/ultrachat_200k": "UltraChat-200K",
    "yihanwang617/WizardLM_70k_unfiltered": "WizardLM-70K",
}
BASES = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "TinyLlama",
    "meta-llama/Llama-2-7b-hf": "Llama-2-7b",
    "meta-llama/Meta-Llama-3-8B": "Llama-3-8b",
}
OFFICIAL = {  # the models of table 7: before and after their own instruction tuning
    ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"): "Llama-2-7b",
    ("meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf"): "Llama-2-13b",
    ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"): "Llama-3-8b",
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"): "Llama-3.1-8b",
    ("mistral-community/Mistral-7B-v0.2", "mistralai/Mistral-7B-Instruct-v0.2"): "mistral-v0.2",
    ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"): "mistral-v0.3",
    ("google/gemma-2-9b", "google/gemma-2-9b-it"): "gemma-2-9b",
    ("google/gemma-2-27b", "google/gemma-2-27b-it"): "gemma-2-27b",
}

KEYS = ["table", "dataset", "model", "condition", "threshold", "metric"]
PRINTED_COLUMNS = [*KEYS, "value", "sd", "printed"]
_PERCENT = {("1", "quac"), ("1", "drop"), ("7", "nih"), *(("3", metric) for metric in SQUAD_QUAC_DROP)}
_CONDITIONS = {
    "vanilla": VANILLA,
    "+IND": INDICATED,
    "pretrained": PRETRAINED,
    "chat_template": IN_TEMPLATE,
    "steered": STEERED,
    "raw_text": IN_RAW,
    "no_prefix": WITHOUT_PREFIX,
    "official": "official",
}

# by number: what the header's first columns are, what the other columns hold, and the table. "-" is an empty cell
_PRINTED = {
    "1": (
        ["metric", "model"],
        "condition",
        """
        metric model           chat_template steered raw_text
        nih    Llama-2-7b-chat        0.9917  0.9932   0.9975
        nih    Llama-2-13b-chat       0.9207  0.9225   0.9578
        quac   Llama-2-7b-chat         22.20   24.00        -
        quac   Llama-2-13b-chat        18.60   20.00        -
        drop   Llama-2-7b-chat         44.22   43.46        -
        drop   Llama-2-13b-chat        46.20   45.11        -
        """,
    ),
    "2": (
        ["dataset"],
        "metric",
        """
        dataset        tokens_per_conversation conversations instructions
        ShareGPT                      1,567.68        93,645      331,722
        UltraChat-200K                1,437.33       207,865      657,794
        WizardLM-70K                    484.00        57,523       57,523
        """,
    ),
    "3": (
        ["dataset", "model", "condition"],
        "metric",
        """
        dataset        model               condition     nih squad  quac  drop mt_bench
        ShareGPT       TinyLlama           vanilla    0.9846 59.73 15.50 27.39   3.7250
        ShareGPT       TinyLlama           +IND       0.9921 62.05 17.40 27.84   3.7375
        ShareGPT       Llama-2-7b          vanilla    0.3378 76.78 23.60 33.90   6.4875
        ShareGPT       Llama-2-7b          +IND       0.7007 79.09 24.20 33.90   5.7375
        ShareGPT       Llama-3-8b          vanilla    0.8957 83.06 24.80 42.15   7.4375
        ShareGPT       Llama-3-8b          +IND       0.9404 84.80 24.50 43.17   7.1625
        UltraChat-200K TinyLlama           vanilla    1.0000 73.03 22.70 30.96   3.9000
        UltraChat-200K TinyLlama           +IND       1.0000 74.47 23.10 30.96   4.1125
        UltraChat-200K Llama-2-7b          vanilla    0.9850 83.81 24.20 37.91   5.7125
        UltraChat-200K Llama-2-7b          +IND       0.9725 85.76 26.10 37.58   5.8125
        UltraChat-200K Llama-3-8b          vanilla    1.0000 85.12 25.50 50.99   7.2375
        UltraChat-200K Llama-3-8b          +IND       1.0000 86.28 26.40 50.22   6.8500
        WizardLM-70K   TinyLlama           vanilla    0.9250 60.51 13.80 27.53   4.2750
        WizardLM-70K   TinyLlama           +IND       0.9925 63.39 14.60 28.36   4.3000
        WizardLM-70K   Llama-2-7b          vanilla    0.7375 82.89 23.70 34.07   5.7750
        WizardLM-70K   Llama-2-7b          +IND       0.9254 83.13 25.30 34.44   6.2250
        WizardLM-70K   Llama-3-8b          vanilla    0.9846 88.25 24.60 46.87   7.1125
        WizardLM-70K   Llama-3-8b          +IND       0.9871 88.53 26.00 47.85   7.5250
        closed         Llama-2-7b-chat     official  0.8264* 83.28 22.20 44.22   6.9375
        closed         Llama-3-8b-Instruct official     1.0* 86.96 27.40 46.54   8.0750
        """,
    ),
    "7": (
        ["model", "window"],
        "condition",
        """
        model        window pretrained   raw_text     chat_template no_prefix
        Llama-2-7b   4K     98.94±0.33   99.40±0.48   99.17±0.28    92.45±1.24
        Llama-2-13b  4K     98.89±0.34   96.13±0.64   91.50±0.76    92.78±0.24
        Llama-3-8b   8K     99.62±0.26   99.92±0.09   96.10±0.58    95.89±0.62
        Llama-3.1-8b 128K   86.89        98.17        95.64         94.75
        mistral-v0.2 32K    100          99.00        94.14         93.92
        mistral-v0.3 32K    100          99.32        84.71         72.00
        gemma-2-9b   8K     100±0        98.75±0      98.03±0       98.72±0.54
        gemma-2-27b  8K     100          100          99.64         99.25
        """,
    ),
    "9": (
        ["condition", "threshold"],
        "metric",
        """
        condition threshold  squad  quac   drop mt_bench
        vanilla         1.0 0.5918 0.113 0.2739    3.725
        +IND            0.5 0.6207 0.127 0.2872    4.075
        +IND            0.6 0.6144 0.129 0.2784    3.825
        +IND            0.7 0.6160 0.129 0.2786    3.675
        """,
    ),
    "10": (
        ["dataset"],
        "threshold",
        """
        dataset         0.5  0.6  0.7  0.8
        ShareGPT       0.14 0.10 0.07 0.04
        UltraChat-200K 0.22 0.18 0.14 0.11
        WizardLM-70K   0.34 0.23 0.13 0.06
        """,
    ),
}


def paper_layer(depth: int) -> int:
    """The layer (from 0) that stands where the paper's scores were taken: layer 15 of TinyLlama's 22, to scale."""
    return min(round(depth * 15 / 22), depth - 1)


def every_table() -> pd.DataFrame:
    """Every table with numbers: table, dataset, model, condition, threshold, metric, value, sd, printed.

    `value` and `sd` (over four prompts, NaN where none is printed) are fractions in [0, 1] for nih (needle recall),
    squad, quac, drop (containment) and fraction (of instructions over the threshold), a mean rating from 1 to 10 for
    mt_bench, counts in table 2; `printed` is the cell's text. A key that a table does not have is "" (threshold: NaN).
    """
    return pd.concat([table(number) for number in _PRINTED], ignore_index=True)


def table(number: str | int) -> pd.DataFrame:
    """One table of the paper (1, 2, 3, 7, 9 or 10) in the shape of `every_table`; KeyError for any other."""
    keys, across, _ = _PRINTED[str(number)]
    tall = (
        as_printed(number)
        .melt(keys, var_name=across, value_name="printed", ignore_index=False)
        .sort_index(kind="stable")
    )
    tall = tall[tall.printed != "-"].assign(table=str(number))
    constant = {
        "7": {"metric": "nih"},
        "9": {"dataset": "ShareGPT", "model": "TinyLlama"},
        "10": {"metric": "fraction"},
    }
    tall = tall.assign(**constant.get(str(number), {})).reindex(columns=PRINTED_COLUMNS)
    scale = [Decimal(100 if key in _PERCENT else 1) for key in zip(tall.table, tall.metric, strict=True)]
    parts = [text.replace(",", "").rstrip("*").partition("±") for text in tall.printed]
    tall["value"] = [float(Decimal(mean) / by) for (mean, _, _), by in zip(parts, scale, strict=True)]
    tall["sd"] = [float(Decimal(sd or "NaN") / by) for (_, _, sd), by in zip(parts, scale, strict=True)]
    tall["threshold"] = tall.threshold.astype(float)
    tall["condition"] = tall.condition.map(_CONDITIONS)
    named = ["dataset", "model", "condition"]
    return tall.assign(**tall[named].astype(str).fillna("")).reset_index(drop=True)


def as_printed(number: str | int) -> pd.DataFrame:
    """One table of the paper as it is printed, every cell a text; "-" is an empty cell."""
    return pd.read_csv(io.StringIO(_PRINTED[str(number)][2]), sep=r"\s+", dtype=str, keep_default_na=False)


def table_10() -> pd.DataFrame:
    """Fraction of instructions whose score is over β: dataset, threshold, fraction. TinyLlama, layer 15 of 22."""
    return table(10)[["dataset", "threshold", "value"]].rename(columns={"value": "fraction"})


def table_2() -> pd.DataFrame:
    """The datasets: dataset, tokens_per_conversation (mean, TinyLlama's tokenizer), conversations, instructions."""
    wide = table(2).pivot(index="dataset", columns="metric", values="value").reset_index()
    counts = ["conversations", "instructions"]
    return (
        wide[["dataset", "tokens_per_conversation", *counts]]
        .astype(dict.fromkeys(counts, int))
        .rename_axis(columns=None)
    )


def settings(model: str, dataset: str) -> dict[str, Any]:
    """Table 4 and section 3.1 for one row of table 3, by the names of our parameters; `batch` is a step's.

    KeyError for a model or dataset that table 3 does not have.
    """
    of_model = {
        "TinyLlama": {"finetune.method": "full", "finetune.learning_rate": 2e-5, "batch": 128},
        "Llama-2-7b": {"finetune.method": "qlora", "finetune.learning_rate": 2e-4, "batch": 64},
    }
    of_model["Llama-3-8b"] = of_model["Llama-2-7b"]
    adapter = {"finetune.lora_rank": 16, "finetune.lora_alpha": 16.0, "finetune.lora_dropout": 0.05}
    return {
        "seed": 42,
        "conversations.n": None,
        "conversations.max_length": 2048 if model == "TinyLlama" else 4096,
        "scoring.layer": 15,
        "scoring.head_reduction": "max_then_mean",
        "scoring.threshold": THRESHOLD,
        "finetune.steps": None,
        "finetune.epochs": {"ShareGPT": 1.0, "UltraChat-200K": 1.0, "WizardLM-70K": 2.0}[dataset],
        "finetune.schedule": "cosine",
        "finetune.warmup_fraction": 0.1,
        **of_model[model],
        **({} if model == "TinyLlama" else adapter),
    }


CLAIMS = pd.DataFrame(
    [
        ("template_below_pretrained", "Figure 2, Table 7", "NIH: chat template minus pretrained, prefix on", "down"),
        ("template_below_raw", "Figure 2, Table 7", "NIH: chat template minus the same model without it", "down"),
        ("steering_nih", "Table 1", "NIH: steering with α = 0.95", "up"),
        ("steering_quac", "Table 1", "QuAC: steering with α = 0.95", "up"),
        ("shift_user", "Figure 3", "attention to the user under the template, retrieval head", "down"),
        ("shift_assistant", "Figure 3", "attention to the assistant under the template, retrieval head", "up"),
        ("indicator_nih", "Table 3", "NIH: SFT with [IND] minus vanilla", "up"),
        ("indicator_squad", "Table 3", "SQuAD: SFT with [IND] minus vanilla", "up"),
        ("indicator_quac", "Table 3", "QuAC: SFT with [IND] minus vanilla", "up"),
        ("indicator_passages", "Table 3", "passages (SQuAD and QuAC): SFT with [IND] minus vanilla", "up"),
        ("indicator_drop", "Table 3", "DROP: SFT with [IND] minus vanilla", "not down"),
        ("indicator_mt_bench", "Table 3", "instructions (MT-Bench): SFT with [IND] minus vanilla", "not down"),
        (
            "steering_over_sft",
            "Figure 5, left",
            "attention to the user, all heads: steering minus SFT with [IND]",
            "up",
        ),
        ("sft_over_steering", "Figure 5, right", "attention to the user, retrieval head: SFT minus steering", "up"),
        ("middle_layers_agree", "Figure 6", "disagreement of middle layers minus that of all layers", "down"),
    ],
    columns=["key", "where", "claim", "paper_says"],
)


def changes() -> pd.DataFrame:
    """The paper's own changes behind CLAIMS, where it prints numbers: key, dataset, model, value.

    Differences of fractions, in [-1, 1]; of ratings for MT-Bench.
    """
    pairs = [
        ("template_below_pretrained", "7", "nih", IN_TEMPLATE, PRETRAINED),
        ("template_below_raw", "7", "nih", IN_TEMPLATE, IN_RAW),
        *((f"steering_{metric}", "1", metric, STEERED, IN_TEMPLATE) for metric in ("nih", "quac")),
        *((f"indicator_{metric}", "3", metric, INDICATED, VANILLA) for metric in ("nih", *SQUAD_QUAC_DROP, "mt_bench")),
        *(("indicator_passages", "3", metric, INDICATED, VANILLA) for metric in ("squad", "quac")),
    ]
    return pd.concat([_change(*pair) for pair in pairs], ignore_index=True)


def _change(key: str, number: str, metric: str, after: str, before: str) -> pd.DataFrame:
    cells = (
        table(number).query("metric == @metric").pivot(index=["dataset", "model"], columns="condition", values="value")
    )
    change = (cells[after] - cells[before]).dropna().round(6)  # of numbers with four or five digits
    return change.rename("value").reset_index().assign(key=key)[["key", "dataset", "model", "value"]]


def inconsistencies() -> pd.DataFrame:
    """Where the paper's numbers disagree with one another or with its text: tables, says, numbers (computed here)."""
    seven = table(7).pivot(index="model", columns="condition", values="value")
    one = table(1).query("metric == 'nih'").pivot(index="model", columns="condition", values="value")
    official = table(3).query("condition == 'official' and metric == 'nih'").set_index("model")
    moved = {key: part for key, part in changes().groupby("key")}
    consistent = pd.concat(moved[f"indicator_{metric}"].assign(metric=metric) for metric in ("nih", "squad", "quac"))
    exceptions = consistent[consistent.value <= 0]
    falls = moved["indicator_mt_bench"].query("value < 0").sort_values("value")
    better = seven[seven[IN_TEMPLATE] > seven[PRETRAINED]]
    twice = table_9_against_3().query("difference != 0")
    averaged = table(7).groupby("model", sort=False).sd.apply(lambda sds: sds.notna().any())
    counted = every_table().query("metric == 'nih' and sd.isna()").printed.drop_duplicates()
    counted = {how: ", ".join(cells) for how, cells in counted.groupby(counted.map(keywords_found).str[1])}
    ratings = every_table().query("metric == 'mt_bench'").value
    rows = [
        (
            "9, 3",
            "the same two models are printed twice, with other values",
            "; ".join(f"{r.condition}, {r.metric}: {r.table_9:g} and {r.table_3:g}" for r in twice.itertuples()),
        ),
        (
            "3",
            "[IND] is said to be better throughout on NIH, SQuAD and QuAC",
            "; ".join(f"{r.dataset}, {r.model}, {r.metric}: {r.value:+.4f}" for r in exceptions.itertuples()),
        ),
        (
            "3",
            "instruction following is said to be kept; MT-Bench falls",
            "; ".join(f"{r.dataset}, {r.model}: {r.value:+.4f}" for r in falls.itertuples()),
        ),
        (
            "7",
            "Llama-3.1 is called the only outlier; recall in the template is above the pretrained model's for",
            "; ".join(f"{model}: {row[PRETRAINED]:g} to {row[IN_TEMPLATE]:g}" for model, row in better.iterrows()),
        ),
        (
            "7",
            "windows are said to be 4K to 32K",
            ", ".join(f"{r.model}: {r.window}" for r in as_printed(7).itertuples() if int(r.window[:-1]) > 32),
        ),
        (
            "1, 7",
            "table 1 is said to be measured as Figure 2; one prompt there, the mean of four in table 7",
            "; ".join(f"{m}: {one.loc[f'{m}-chat', IN_TEMPLATE]:g} and {seven.loc[m, IN_TEMPLATE]:g}"
                      for m in ("Llama-2-7b", "Llama-2-13b")),
        ),
        (
            "3, 7",
            "Llama-2-7b-chat without a prefix has two values (the asterisk of table 3 is not explained)",
            f"{official.loc['Llama-2-7b-chat', 'printed']} and {seven.loc['Llama-2-7b', WITHOUT_PREFIX]:g}",
        ),
        (
            "7",
            "only some models were asked with four prompts; the others' values have no spread",
            f"four: {', '.join(averaged.index[averaged])}; one: {', '.join(averaged.index[~averaged])}",
        ),
        (
            "1, 3, 7",
            f"NIH counts {KEYWORDS_ASKED:,} keywords (400 × 7); some cells are cut at the last digit, some rounded",
            f"cut: {counted['cut']}; rounded up: {counted['rounded']}",
        ),
        (
            "3, 9",
            "MT-Bench has 80 questions of two turns; ratings are multiples of 1/80, so one turn was judged",
            f"{(ratings * 80 % 1 == 0).sum()} of {len(ratings)} are; {(ratings * 80 % 2 == 1).sum()} are odd ones",
        ),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["tables", "says", "numbers"])


def notes(number: str | int) -> list[str]:
    """The inconsistencies that concern one table, a line each."""
    rows = inconsistencies()
    rows = rows[rows.tables.str.split(", ").map(lambda named: str(number) in named)]
    return [f"table {row.tables}: {row.says}. {row.numbers}" for row in rows.itertuples()]


def table_9_against_3() -> pd.DataFrame:
    """The cells that tables 3 and 9 share, TinyLlama on ShareGPT: condition, metric, table_9, table_3, difference."""
    keys = ["dataset", "model", "condition", "metric"]
    nine = table(9).query("condition == @VANILLA or threshold == @THRESHOLD")
    both = [cells.set_index(keys).value.rename(f"table_{n}") for n, cells in ((9, nine), (3, table(3)))]
    both = pd.concat(both, axis=1, join="inner").reset_index()
    both["difference"] = (both.table_9 - both.table_3).round(6)
    return both.drop(columns=["dataset", "model"])


def keywords_found(printed: str) -> tuple[int, str] | None:
    """How many of the 2,800 keywords give an NIH cell, a fraction ("0.3378") or percent ("86.89"); None if no number.

    With it "cut" or "rounded", where only dropping or only rounding the further digits of the share gives the cell, or
    "either".
    """
    cell = Decimal(printed.rstrip("*"))
    value = cell / 100 if cell > 1 else cell
    for found in (math.floor(value * KEYWORDS_ASKED), math.ceil(value * KEYWORDS_ASKED)):
        share = Decimal(found) / KEYWORDS_ASKED
        cut, rounded = (share.quantize(value, how) == value for how in (ROUND_DOWN, ROUND_HALF_UP))
        if cut or rounded:
            return found, "either" if cut and rounded else "cut" if cut else "rounded"
    return None
