"""What the paper printed, as tidy frames to be drawn beside ours. Wang et al. 2024, arXiv 2411.02688."""

import pandas as pd

THRESHOLD = 0.6  # β of every model in table 3
TOP = 0.1  # the fraction of turns that figure 6 compares between layers


def paper_layer(depth: int) -> int:
    """The layer (from 0) that stands where the paper's scores were taken: layer 15 of TinyLlama's 22, to scale."""
    return min(round(depth * 15 / 22), depth - 1)


def table_10() -> pd.DataFrame:
    """Fraction of instructions whose score is over β: dataset, threshold, fraction. TinyLlama, layer 15 of 22."""
    fractions = {
        "ShareGPT": {0.5: 0.14, 0.6: 0.10, 0.7: 0.07, 0.8: 0.04},
        "UltraChat-200K": {0.5: 0.22, 0.6: 0.18, 0.7: 0.14, 0.8: 0.11},
        "WizardLM-70K": {0.5: 0.34, 0.6: 0.23, 0.7: 0.13, 0.8: 0.06},
    }
    rows = [(dataset, threshold, value) for dataset, row in fractions.items() for threshold, value in row.items()]
    return pd.DataFrame(rows, columns=["dataset", "threshold", "fraction"])


def table_2() -> pd.DataFrame:
    """The datasets: dataset, tokens_per_conversation (mean, TinyLlama's tokenizer), conversations, instructions."""
    rows = [
        ("ShareGPT", 1567.68, 93_645, 331_722),
        ("UltraChat-200K", 1437.33, 207_865, 657_794),
        ("WizardLM-70K", 484.00, 57_523, 57_523),
    ]
    return pd.DataFrame(rows, columns=["dataset", "tokens_per_conversation", "conversations", "instructions"])
