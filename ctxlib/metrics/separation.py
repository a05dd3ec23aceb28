"""How well scores separate the turns that depend on their context from the others: curves, areas, selections."""

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score, roc_curve
from sklearn.metrics import precision_recall_curve as _precision_recall_curve

from ctxlib.metrics.intervals import Values, _blocks, _percentiles, column_names, wilson_interval
from ctxlib.params import InputError


def roc_curve_frame(truth: Values, score: Values) -> pd.DataFrame:
    """Receiver operating characteristic: false_positive_rate, true_positive_rate, threshold (scikit-learn)."""
    truth, score = _two_classes(truth, score)
    false_positive_rate, true_positive_rate, threshold = roc_curve(truth, score)
    return pd.DataFrame(
        {"false_positive_rate": false_positive_rate, "true_positive_rate": true_positive_rate, "threshold": threshold}
    )


def precision_recall_frame(truth: Values, score: Values) -> pd.DataFrame:
    """Precision and recall at every threshold: recall, precision, threshold, the last being inf (scikit-learn)."""
    precision, recall, threshold = _precision_recall_curve(*_two_classes(truth, score))
    return pd.DataFrame({"recall": recall, "precision": precision, "threshold": np.append(threshold, np.inf)})


def precision_recall(truth: Values, score: Values, threshold: int | float) -> tuple[float, float]:
    """(precision, recall) of selecting score > threshold, strictly as in the paper; precision is nan if none is."""
    truth, score = _two_classes(truth, score)
    selected = score > threshold
    return (
        float(precision_score(truth, selected, zero_division=np.nan)),
        float(recall_score(truth, selected)),
    )


def auc(
    truth: Values, score: Values, samples: int = 2000, seed: int = 0, *, level: float = 0.95
) -> tuple[float, float, float]:
    """Area under the ROC curve with a bootstrap interval stratified by truth: (value, low, high), each in [0, 1].

    Resampling each class with replacement is a multinomial draw over the distinct scores, so that a bootstrap sample
    costs no sorting. Raises InputError where `truth` holds one class only.
    """
    truth, score = _two_classes(truth, score)
    distinct, place = np.unique(score, return_inverse=True)
    rng = np.random.default_rng(seed)
    positives, negatives = (np.bincount(place[truth == side], minlength=distinct.size) for side in (True, False))

    def redraw(counts: np.ndarray, block: int) -> np.ndarray:
        return rng.multinomial(counts.sum(), counts / counts.sum(), size=block) / counts.sum()

    areas = []
    for block in _blocks(samples, distinct.size):
        above, below = redraw(positives, block), redraw(negatives, block)
        areas.append((above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1))
    return float(roc_auc_score(truth, score)), *_percentiles(np.concatenate(areas), level)


def auc_by(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    *,
    truth: str = "depends_on_context",
    score: str = "score",
    samples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """`auc` of each group as a tidy frame: `by` …, metric, value, ci_low, ci_high, n.

    A group of which no truth is known, or that holds one class only, has no row.
    """
    rows = [
        (*key, "auc", *auc(part[truth], part[score], samples, seed), len(part))
        for key, part in _groups_of_both_classes(frame, by, truth)
    ]
    return pd.DataFrame(rows, columns=[*column_names(by), "metric", "value", "ci_low", "ci_high", "n"])


def separation(
    frame: pd.DataFrame, by: str | Sequence[str], *, truth: str = "depends_on_context", score: str = "score"
) -> pd.DataFrame:
    """How well the score separates the two classes, by group and without intervals: `by` …, metric, value, n.

    The metrics are `ROC AUC`, of which chance is 0.5, and `average precision`, of which chance is the share of the
    dependent turns; both in [0, 1] (scikit-learn). A group without both classes has no rows. With a row a seed and
    group the intervals are those of `over_seeds`.
    """
    rows = [
        (*key, metric, float(measure(part[truth].astype(bool), part[score])), len(part))
        for key, part in _groups_of_both_classes(frame, by, truth)
        for metric, measure in (("ROC AUC", roc_auc_score), ("average precision", average_precision_score))
    ]
    return pd.DataFrame(rows, columns=[*column_names(by), "metric", "value", "n"])


def curve_by(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    curve: Callable[[Values, Values], pd.DataFrame],
    *,
    truth: str = "depends_on_context",
    score: str = "score",
) -> pd.DataFrame:
    """`roc_curve_frame` or `precision_recall_frame` of each group, one below the other, with the columns `by`.

    A group of which no truth is known, or that holds one class only, has no rows.
    """
    groups = _groups_of_both_classes(frame, by, truth)
    parts = [
        curve(part[truth], part[score]).assign(**dict(zip(column_names(by), key, strict=True))) for key, part in groups
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=column_names(by))


def auc_changes(
    frame: pd.DataFrame,
    by: str,
    before: str,
    *,
    truth: str = "depends_on_context",
    score: str = "score",
) -> pd.DataFrame:
    """Change of the AUC from the scores of the group `before` to those of every other, on the turns that both scored.

    Columns: `by`, before, value, ci_low, ci_high (95 %), n (turns); no rows where no truth is known. With the share of
    the other class that a turn is ranked right against, averaged within each class, as AUC, the difference of two AUCs
    is a difference of paired means. Reference: DeLong et al. 1988.
    """
    turns = ["conversation", "turn"]
    groups = {name: part.set_index(turns) for name, part in frame.dropna(subset=[truth]).groupby(by, sort=False)}
    rows = []
    for name in [name for name in groups if name != before]:
        pairs = groups[before][[truth, score]].join(groups[name][score].rename("after"), how="inner")
        if pairs[truth].nunique() == 2:
            known = pairs[truth].to_numpy(dtype=bool)
            change = _ranked_right(known, pairs["after"]) - _ranked_right(known, pairs[score])
            value = change[known].mean()
            error = np.sqrt(sum(change[side].var(ddof=1) / side.sum() for side in (known, ~known)))
            reach = NormalDist().inv_cdf(0.975) * error
            rows.append((name, before, value, value - reach, value + reach, len(pairs)))
    return pd.DataFrame(rows, columns=[by, "before", "value", "ci_low", "ci_high", "n"])


def selection(
    frame: pd.DataFrame,
    thresholds: Sequence[float],
    *,
    truth: str = "depends_on_context",
    score: str = "score",
) -> pd.DataFrame:
    """Precision and recall of selecting score > threshold: threshold, metric, value, ci_low, ci_high (Wilson), n.

    n counts the selected turns for precision and the dependent ones for recall; no rows where no truth is known.
    """
    known = frame.dropna(subset=[truth])
    dependent, rows = known[truth].astype(bool), []
    for threshold in thresholds if len(known) else ():
        selected = known[score] > threshold
        hits = int((selected & dependent).sum())
        for metric, n in (("precision", int(selected.sum())), ("recall", int(dependent.sum()))):
            rows.append((threshold, metric, hits / n if n else np.nan, *wilson_interval(hits, n), n))
    return pd.DataFrame(rows, columns=["threshold", "metric", "value", "ci_low", "ci_high", "n"])


def _groups_of_both_classes(
    frame: pd.DataFrame, by: str | Sequence[str], truth: str
) -> Iterator[tuple[tuple, pd.DataFrame]]:
    for key, part in frame.dropna(subset=[truth]).groupby(column_names(by), sort=False):
        if part[truth].nunique() == 2:
            yield key, part


def _ranked_right(truth: np.ndarray, score: Values) -> np.ndarray:
    """For each sample the share of the other class on its right side, ties half; its mean over a class is the AUC."""
    score = np.asarray(score, dtype=float)
    within = np.empty(len(score))
    for side in (truth, ~truth):
        within[side] = rankdata(score[side])
    below = (rankdata(score) - within) / np.where(truth, (~truth).sum(), truth.sum())
    return np.where(truth, below, 1 - below)


def _two_classes(truth: Values, score: Values) -> tuple[np.ndarray, np.ndarray]:
    truth, score = np.asarray(truth, dtype=bool), np.asarray(score, dtype=float)
    if truth.all() or not truth.any():
        raise InputError("truth holds one class only; a curve needs dependent and independent turns")
    return truth, score
