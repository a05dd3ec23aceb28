"""How well scores separate the turns that depend on their context from the others: curves, areas, selections."""

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score, roc_curve
from sklearn.metrics import precision_recall_curve as _precision_recall_curve

from ctxlib.metrics.intervals import CHANGE, Values, column_names, wilson_interval
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


def auc(truth: Values, score: Values, *, level: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve with DeLong's interval: (value, low, high), each in [0, 1].

    The limits are those of logit(AUC), transformed back, so that they stay in (0, 1) and are not symmetric close to 1,
    where the untransformed ones reach beyond it. Two degenerate cases: an AUC of 0 or 1 has an interval of no width,
    as under the bootstrap; a class of one turn has no variance to estimate, so that the interval is (0, 1).

    Raises InputError if `truth` holds one class only.
    Reference: DeLong et al. 1988; Pepe 2003, section 5.2.
    """
    truth, score = _two_classes(truth, score)
    shares = _ranked_right(truth, score)
    area = float(shares[truth].mean())
    if area in (0, 1):
        return area, area, area
    if min(truth.sum(), (~truth).sum()) < 2:
        return area, 0.0, 1.0
    reach = _normal_reach(level) * _delong_error(truth, shares) / (area * (1 - area))  # delta method
    low, high = expit(logit(area) + np.array([-reach, reach]))
    return area, float(low), float(high)


def auc_by(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    *,
    truth: str = "depends_on_context",
    score: str = "score",
) -> pd.DataFrame:
    """`auc` of each group as a tidy frame: `by` …, metric, value, ci_low, ci_high, n.

    A group without known truth, or with one class only, has no row.
    """
    rows = [
        (*key, "auc", *auc(part[truth], part[score]), len(part))
        for key, part in _groups_of_both_classes(frame, by, truth)
    ]
    frame = pd.DataFrame(rows, columns=[*column_names(by), "metric", "value", "ci_low", "ci_high", "n"])
    return frame.astype(dict.fromkeys(("value", "ci_low", "ci_high"), float))  # numbers, also if there are no rows


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

    A group without known truth, or with one class only, has no rows.
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

    Columns: `by`, before, value, ci_low, ci_high (95 %, clipped to [-1, 1]), n (turns); no rows if no truth is known.
    An AUC is a mean over turns (`_ranked_right`), so the difference of two AUCs is a difference of paired means.
    Reference: DeLong et al. 1988.
    """
    turns = ["conversation", "turn"]
    groups = {name: part.set_index(turns) for name, part in frame.dropna(subset=[truth]).groupby(by, sort=False)}
    rows = []
    for name in [name for name in groups if name != before]:
        pairs = groups[before][[truth, score]].join(groups[name][score].rename("after"), how="inner")
        if pairs[truth].nunique() == 2:
            known = pairs[truth].to_numpy(dtype=bool)
            change = _ranked_right(known, pairs["after"]) - _ranked_right(known, pairs[score])
            value, reach = change[known].mean(), _normal_reach(0.95) * _delong_error(known, change)
            rows.append((name, before, value, *np.clip([value - reach, value + reach], *CHANGE), len(pairs)))
    return pd.DataFrame(rows, columns=[by, "before", "value", "ci_low", "ci_high", "n"])


def selection(
    frame: pd.DataFrame,
    thresholds: Sequence[float],
    *,
    truth: str = "depends_on_context",
    score: str = "score",
) -> pd.DataFrame:
    """Precision and recall of selecting score > threshold: threshold, metric, value, ci_low, ci_high (Wilson), n.

    n counts the selected turns for precision and the dependent ones for recall; no rows if no truth is known.
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
    """For each turn the share of the other class on its right side, in [0, 1]; its mean over either class is the AUC.

    Among all scores a turn's midrank counts the scores below it and half of the equal ones; less its midrank within
    its own class, that leaves those of the other class. Two true turns with scores 0.9 and 0.4, and two false ones
    with 0.4 and 0.1: 0.9 beats both, 1; the true 0.4 beats 0.1 and ties with 0.4, 0.75; the AUC is 0.875.
    """
    score = np.asarray(score, dtype=float)
    within = np.empty(len(score))
    for side in (truth, ~truth):
        within[side] = rankdata(score[side])
    below = (rankdata(score) - within) / np.where(truth, (~truth).sum(), truth.sum())
    return np.where(truth, below, 1 - below)


def _delong_error(truth: np.ndarray, shares: np.ndarray) -> float:
    """Standard error of an AUC, from the shares of `_ranked_right`, or of a change of AUC, from their differences."""
    return float(np.sqrt(sum(shares[side].var(ddof=1) / side.sum() for side in (truth, ~truth))))


def _normal_reach(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def _two_classes(truth: Values, score: Values) -> tuple[np.ndarray, np.ndarray]:
    truth, score = np.asarray(truth, dtype=bool), np.asarray(score, dtype=float)
    if truth.all() or not truth.any():
        raise InputError("truth holds one class only; a curve needs dependent and independent turns")
    return truth, score
