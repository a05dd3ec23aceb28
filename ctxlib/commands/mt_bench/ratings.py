"""Means, intervals and costs of ratings."""

import math

import pandas as pd

from ctxlib.commands.mt_bench.judgements import NO_RATING, REFUSED
from ctxlib.metrics import bootstrap_interval


def question_ratings(ratings: pd.DataFrame) -> pd.Series:
    """Rating of each question: the mean over its turns of the mean over the repeats.

    NaN if a turn has no rating at all. Two models are compared with `metrics.paired_difference` of these.
    """
    by_turn = ratings.groupby(["question", "turn"], sort=False)["rating"].mean()
    return by_turn.groupby("question", sort=False).agg(lambda turns: turns.mean(skipna=False))


def summarise_ratings(
    ratings: pd.DataFrame, *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Mean rating over all questions, of each turn and of each category: group, name, value, ci_low, ci_high, n, ….

    The interval is a percentile bootstrap over the `n` questions that have a rating for every turn. `judgements` and
    `without_rating` are counts. `judge_variance` is the variance between repeated judgements of the same
    answer (unbiased, pooled over answers; NaN without repeats), and `judge_error` the standard error that it leaves in
    `value`; the interval already includes it, because it is part of the spread between questions.
    """
    groups = [("all", "all", ratings)]
    groups += [("turn", str(turn), part) for turn, part in ratings.groupby("turn", sort=True)]
    groups += [("category", str(name), part) for name, part in ratings.groupby("category", sort=False)]
    rows = []
    for group, name, part in groups:
        values = question_ratings(part).dropna()
        low, high = bootstrap_interval(values, samples, seed, level=level)
        variance, error = _judge_spread(part[part["question"].isin(values.index)])
        mean = float(values.mean()) if len(values) else math.nan
        missing = int(part["rating"].isna().sum())
        rows.append((group, name, mean, low, high, len(values), len(part), missing, variance, error))
    columns = ["group", "name", "value", "ci_low", "ci_high", "n", "judgements", "without_rating"]
    return pd.DataFrame(rows, columns=[*columns, "judge_variance", "judge_error"])


def _judge_spread(part: pd.DataFrame) -> tuple[float, float]:
    """Pooled variance of repeats, and the standard error it leaves in the mean over questions of means over turns."""
    cells = part.dropna(subset=["rating"]).groupby(["question", "turn"])["rating"].agg(["var", "count"])
    repeated = cells.dropna()
    freedom = (repeated["count"] - 1).sum()
    if not freedom:
        return math.nan, math.nan
    variance = float((repeated["var"] * (repeated["count"] - 1)).sum() / freedom)
    turns = cells.groupby("question")["count"].transform("size")
    weights = 1 / (turns * part["question"].nunique())
    return variance, math.sqrt(variance * float((weights**2 / cells["count"]).sum()))


def spent(ratings: pd.DataFrame, prices: tuple[int | float, int | float] | None = None) -> dict[str, int | float]:
    """judgements, attempts, without_rating, refused, prompt_tokens, completion_tokens, and, with `prices`, cost.

    Prices are those of a million prompt and completion tokens; tokens and cost are NaN if the server did not report
    them.
    """
    tokens = [float(ratings[name].sum(skipna=False)) for name in ("prompt_tokens", "completion_tokens")]
    counts = {
        "judgements": len(ratings),
        "attempts": int(ratings["attempts"].sum()),
        "without_rating": int((ratings["problem"] == NO_RATING).sum()),
        "refused": int(ratings["problem"].str.startswith(REFUSED).sum()),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
    }
    return counts | ({"cost": (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6} if prices else {})
