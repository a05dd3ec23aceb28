"""Means with their intervals, over questions, over pairs and over seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap
from scipy.stats import t as student_t

from ctxlib.params import InputError

Values = Sequence | np.ndarray | pd.Series  # of numbers or truths
Side = Literal["above", "below"]
Range = tuple[int | float, int | float]
FRACTION, CHANGE, UNBOUNDED = (0.0, 1.0), (-1.0, 1.0), (-math.inf, math.inf)  # ranges of a fraction, a difference, any
FEWEST_SEEDS = 5  # with fewer, single seeds are shown and no interval
_RESAMPLED_AT_ONCE = 200_000  # numbers in one batch of bootstrap samples: they fit into a cache


class Estimate(NamedTuple):
    """A mean with its interval, like a row of `summarise`."""

    value: float
    ci_low: float
    ci_high: float
    n: int


def holds(low: int | float, high: int | float, threshold: int | float, side: Side = "above") -> bool:
    """Whether the whole interval [low, high] lies on the claimed side of the threshold; False without an interval.

    The one rule for claims. "No worse by more than m" is a non-inferiority test: threshold -m, side "above".
    Reference: Piaggio et al. 2012 (CONSORT extension for non-inferiority), figure 1.
    """
    return bool(low > threshold if side == "above" else high < threshold)


def verdict(low: int | float, high: int | float, threshold: int | float) -> str:
    """What an interval says of a claim that the value lies above the threshold, in the words of tables and figures.

    "holds" (`holds`), "does not hold" (all of it below), "not decided" (the threshold in it), or "no interval".
    """
    if pd.isna(low):
        return "no interval"
    if holds(low, high, threshold):
        return "holds"
    return "does not hold" if holds(low, high, threshold, "below") else "not decided"


def in_words(row: Any, spec: str = "+.2f", *, of: str | None = None, p: bool = False) -> str:
    """A mean and its interval for a sentence: "+0.12 [+0.08, +0.16]"; without the brackets if there is no interval.

    row: anything with value, ci_low and ci_high, such as a row of `itertuples()`. `spec` formats all three numbers.
    `p` adds the row's p_value: ", p = 0.02". `of` adds its n: "n" gives ", n = 40", any other word follows the number,
    as in ", 5 seeds".
    """
    text = format(row.value, spec)
    if not pd.isna(row.ci_low):
        text += f" [{format(row.ci_low, spec)}, {format(row.ci_high, spec)}]"
    if p and not pd.isna(row.p_value):
        text += f", p = {row.p_value:.2g}"
    if of is None:
        return text
    n = f"{int(row.n):,}"
    return f"{text}, n = {n}" if of == "n" else f"{text}, {n} {of}"


def wilson_interval(successes: int | float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, within [0, 1]; (0, 1) if n = 0. Reference: Wilson 1927, closed form."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, slack = successes / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * np.sqrt(share * (1 - share) / n + slack / (4 * n))
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return (low if successes else 0.0), (high if successes < n else 1.0)


def bootstrap_interval(
    values: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95, out_of: Values | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, in their unit; (nan, nan) if there are none.

    With `out_of` that of the ratio sum(values) / sum(out_of), both resampled together. Limits never leave the range
    of the values. Reference: Efron and Tibshirani 1993, chapter 13; `scipy.stats.bootstrap`.
    """
    array = np.asarray(values, dtype=float)
    if array.size < 2:  # nothing to resample
        return (np.nan, np.nan) if not array.size else (float(array[0]), float(array[0]))
    data, statistic = ((array,), np.mean) if out_of is None else ((array, np.asarray(out_of, dtype=float)), _ratio)
    means = bootstrap(
        data,
        statistic,
        n_resamples=samples,
        batch=max(1, _RESAMPLED_AT_ONCE // array.size),
        vectorized=True,
        paired=out_of is not None,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])  # scipy's own limits differ in the last bit
    return float(low), float(high)


def _ratio(part: np.ndarray, whole: np.ndarray, axis: int) -> np.ndarray:
    return part.sum(axis=axis) / whole.sum(axis=axis)


def estimate(values: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95) -> Estimate:
    """Mean of `values` with its bootstrap interval and their number."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean()) if array.size else np.nan
    return Estimate(mean, *bootstrap_interval(array, samples, seed, level=level), array.size)


def paired_difference(
    a: Values, b: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a - b over the same samples, in their order, and its bootstrap interval over pairs: (value, low, high).

    Raises InputError if the two have different lengths.
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
    cluster: str | None = None,
) -> pd.DataFrame:
    """Mean of `metric` in each group as a tidy frame: `by` …, metric, value, ci_low, ci_high, n (rows that have it).

    The intervals are Wilson's if the whole column holds only 0 and 1, and percentile bootstrap otherwise. Rows are
    treated as independent of one another unless a column `cluster` names those that are not (one question about
    several passages): then whole clusters are resampled. Groups appear in the order of their first row.
    """
    by = column_names(by)
    asked = frame.dropna(subset=[metric])
    binary = asked[metric].isin([0, 1]).all()
    rows = []
    for key, group in asked.groupby(by, sort=False, dropna=False, observed=True):
        values = group[metric]
        n = len(values)
        if cluster is not None and group[cluster].nunique() < n:
            sums = values.groupby(group[cluster], sort=False).agg(["sum", "size"])
            low, high = bootstrap_interval(sums["sum"], samples, seed, level=level, out_of=sums["size"])
        elif binary:
            low, high = wilson_interval(float(values.sum()), n, level=level)
        else:
            low, high = bootstrap_interval(values, samples, seed, level=level)
        rows.append((*key, metric, float(values.mean()), low, high, n))
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "ci_low", "ci_high", "n"])


def summarise_each(
    frames: Mapping[str, pd.DataFrame], by: str | Sequence[str], metric: str, *, samples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """`summarise` of every frame, one below the other, with the name of each in the last column, `condition`."""
    parts = [
        summarise(frame, by, metric, samples=samples, seed=seed).assign(condition=name)
        for name, frame in frames.items()
    ]
    return pd.concat(parts)


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

    frame: id, condition and the columns `by`. One row per group and earlier condition: `by` …, after, before, value
    (mean difference, in [-1, 1]), ci_low, ci_high, n (pairs). Raises InputError if a group's questions differ between
    two conditions.
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
    frame: pd.DataFrame,
    by: str | Sequence[str],
    *,
    within: Range | Mapping[str, Range] = FRACTION,
    value: str = "value",
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean over seeds with Student's t interval: `by` …, value, ci_low, ci_high, p_value, n (seeds).

    frame: one row per seed and group.
    within: the range of the quantity: FRACTION, CHANGE (a difference of fractions) or UNBOUNDED; or a range for each
        value of the column `metric`, which then is one of `by`. Limits are clipped to it: the mean itself lies in the
        range, so clipping loses no coverage, and the interval still contains zero exactly if p_value > 1 - level.

    The run is the unit: questions of one run share its data and weights, so more questions do not make the interval
    narrower than the agreement of the runs. For so few values a bootstrap would be far too narrow; t is exact if they
    are normal. With fewer than FEWEST_SEEDS seeds the limits are NaN: show the single runs instead. p_value is that of
    a mean of zero, two-sided, and only useful for differences (`seed_differences`: then it is the paired t test).

    Raises InputError if a seed appears twice in a group, or if a value lies outside the range.
    """
    by = column_names(by)
    if frame.duplicated([*by, "seed"]).any():
        raise InputError("over_seeds: a seed appears twice in a group; take the mean over its questions first")
    rows = []
    for key, values in frame.dropna(subset=[value]).groupby(by, sort=False, dropna=False)[value]:
        lowest, highest = within[dict(zip(by, key, strict=True))["metric"]] if isinstance(within, Mapping) else within
        if not values.between(lowest - 1e-9, highest + 1e-9).all():
            raise InputError(f"over_seeds: {key}: values outside [{lowest:g}, {highest:g}]; pass their range as within")
        n, mean = len(values), float(values.mean())
        error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
        reach = student_t.ppf(0.5 + level / 2, n - 1) * error if n >= FEWEST_SEEDS else np.nan
        low, high = np.clip([mean - reach, mean + reach], lowest, highest)
        p_value = 2 * student_t.sf(abs(mean) / error, n - 1) if error > 0 else np.nan
        rows.append((*key, mean, low, high, p_value, n))
    return pd.DataFrame(rows, columns=[*by, "value", "ci_low", "ci_high", "p_value", "n"])


def holm(p_values: Values) -> np.ndarray:
    r"""P values adjusted for testing all of them, in [0, 1]; NaN stay NaN and are not counted.

    $$\tilde p_{(i)} = \max_{j \le i} \min\left(1, (m - j + 1)\, p_{(j)}\right)$$

    over the m values in ascending order. Rejecting where the adjusted value is at most α keeps the probability of any
    false rejection at or below α, whatever the dependence. Reference: Holm 1979.
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    given = np.flatnonzero(~np.isnan(values))
    order = given[np.argsort(values[given], kind="stable")]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def seed_differences(frame: pd.DataFrame, by: str | Sequence[str], *, before: str) -> pd.DataFrame:
    """Change of `value` from the condition `before` to every other within each seed: condition, `by` …, seed, value.

    frame: condition, seed, value and the columns `by`, one row per seed, condition and group. Groups that `before`
    lacks are left out. Raises InputError if a condition lacks a seed that `before` has, or the other way round.
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
