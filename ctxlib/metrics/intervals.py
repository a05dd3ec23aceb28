"""Means with their intervals, over questions, over pairs and over seeds."""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from ctxlib.params import InputError

Values = Sequence | np.ndarray | pd.Series  # of numbers or truths
_RESAMPLED_AT_ONCE = 4_000_000  # numbers held by one block of bootstrap samples


def wilson_interval(successes: int | float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, within [0, 1]; (0, 1) where n = 0. Reference: Wilson 1927, closed form."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, slack = successes / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * np.sqrt(share * (1 - share) / n + slack / (4 * n))
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return (low if successes else 0.0), (high if successes < n else 1.0)


def bootstrap_interval(
    values: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, in their unit; (nan, nan) where there are none."""
    array = np.asarray(values, dtype=float)
    if not array.size:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    draws = (array[rng.integers(array.size, size=(block, array.size))] for block in _blocks(samples, array.size))
    return _percentiles(np.concatenate([draw.mean(axis=1) for draw in draws]), level)


def paired_difference(
    a: Values, b: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a - b over the same samples, in their order, and its bootstrap interval over pairs: (value, low, high).

    Raises InputError where the two have different lengths.
    """
    if len(a) != len(b):
        raise InputError(f"paired_difference: {len(a)} and {len(b)} values; pair them by id before comparing")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if not differences.size:
        return np.nan, np.nan, np.nan
    return float(differences.mean()), *bootstrap_interval(differences, samples, seed, level=level)


def summarise(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    metric: str,
    *,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean of `metric` in each group as a tidy frame: `by` …, metric, value, ci_low, ci_high, n (rows that have it).

    The intervals are Wilson's where the whole column holds only 0 and 1, and percentile bootstrap otherwise. Rows are
    taken as independent of one another. Groups stand in the order of their first appearance.
    """
    by = column_names(by)
    asked = frame.dropna(subset=[metric])
    binary = asked[metric].isin([0, 1]).all()
    rows = []
    for key, values in asked.groupby(by, sort=False, dropna=False, observed=True)[metric]:
        n = len(values)
        low, high = (
            wilson_interval(float(values.sum()), n, level=level)
            if binary
            else bootstrap_interval(values, samples, seed, level=level)
        )
        rows.append((*key, metric, float(values.mean()), low, high, n))
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "ci_low", "ci_high", "n"])


def paired_changes(
    frame: pd.DataFrame,
    metric: str,
    by: str | Sequence[str],
    *,
    after: str,
    before: Sequence[str],
    samples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Change of `metric` from each condition of `before` to the condition `after`, paired by question id.

    `frame` holds id, condition and the columns `by`; the result has a row a group and earlier condition: `by` …, after,
    before, value (mean difference, in [-1, 1]), ci_low, ci_high, n (pairs). Raises InputError where a group's questions
    differ between two conditions.
    """
    by = column_names(by)
    rows = []
    for key, group in frame.dropna(subset=[metric]).groupby(by, sort=False, dropna=False):
        sides = {name: part.set_index("id")[metric] for name, part in group.groupby("condition", sort=False)}
        for earlier in before:
            a, b = sides[after], sides[earlier]
            if set(a.index) != set(b.index):
                raise InputError(f"{after!r} and {earlier!r} did not answer the same questions; ask both alike")
            difference = paired_difference(a, b.reindex(a.index), samples, seed)
            rows.append((*key, after, earlier, *difference, len(a)))
    return pd.DataFrame(rows, columns=[*by, "after", "before", "value", "ci_low", "ci_high", "n"])


def over_seeds(
    frame: pd.DataFrame, by: str | Sequence[str], *, value: str = "value", level: float = 0.95
) -> pd.DataFrame:
    """Mean over seeds with Student's t interval: `by` …, value, ci_low, ci_high, p_value, n (seeds).

    `frame` has a row a seed and group (InputError for two). The run is the unit: questions of one run share its data
    and its weights, so that more of them do not make the interval narrower than the runs agree. Of so few values a
    bootstrap would be far too narrow; t is exact where they are normal. p_value is that of a mean of zero, two-sided,
    and of use where the values are differences (`seed_differences`: then it is the paired t test). A single seed has
    no interval.
    """
    by = column_names(by)
    if frame.duplicated([*by, "seed"]).any():
        raise InputError("over_seeds: a seed stands twice in a group; take the mean over its questions first")
    rows = []
    for key, values in frame.dropna(subset=[value]).groupby(by, sort=False, dropna=False)[value]:
        n, mean = len(values), float(values.mean())
        error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
        reach = student_t.ppf(0.5 + level / 2, max(n - 1, 1)) * error
        p_value = 2 * student_t.sf(abs(mean) / error, n - 1) if error > 0 else np.nan
        rows.append((*key, mean, mean - reach, mean + reach, p_value, n))
    return pd.DataFrame(rows, columns=[*by, "value", "ci_low", "ci_high", "p_value", "n"])


def seed_differences(frame: pd.DataFrame, by: str | Sequence[str], *, before: str) -> pd.DataFrame:
    """Change of `value` from the condition `before` to every other within each seed: condition, `by` …, seed, value.

    `frame` holds condition, seed, the columns `by` and a row a seed, condition and group; groups that `before` has not
    are left out. Raises InputError where a condition lacks a seed that `before` has, or the other way round.
    """
    keys = [*column_names(by), "seed"]
    sides = {name: part.set_index(keys)["value"] for name, part in frame.groupby("condition", sort=False)}
    seeds = {name: set(side.index.get_level_values("seed")) for name, side in sides.items()}
    if unlike := [name for name in sides if seeds[name] != seeds[before]]:
        raise InputError(f"seed_differences: {unlike[0]!r} was not run at the seeds of {before!r}; run both alike")
    changes = {name: (side - sides[before]).dropna() for name, side in sides.items() if name != before}
    return pd.concat(changes, names=["condition"]).rename("value").reset_index()


def column_names(by: str | Sequence[str]) -> list[str]:
    return [by] if isinstance(by, str) else list(by)


def _blocks(samples: int, width: int) -> Iterator[int]:
    """Sizes of the blocks that `samples` bootstrap samples of `width` numbers are drawn in."""
    size = max(1, _RESAMPLED_AT_ONCE // width)
    for start in range(0, samples, size):
        yield min(size, samples - start)


def _percentiles(statistics: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(statistics, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
