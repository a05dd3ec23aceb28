"""Answer metrics as the official scripts define them, and the intervals that every number carries."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import precision_recall_curve as _precision_recall_curve
from sklearn.metrics import precision_score, recall_score, roc_auc_score, roc_curve

from ctxlib.conversations import Question
from ctxlib.params import InputError

ANSWER_METRICS = ("exact_match", "token_f1", "containment", "needle_recall", "says_memory")
Values = Sequence | np.ndarray | pd.Series  # of numbers or truths
_RESAMPLED_AT_ONCE = 4_000_000  # numbers held by one block of bootstrap samples


def normalise_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces. Official SQuAD v1.1 script."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 where the normalised answer equals any normalised gold answer, else 0.0. Official SQuAD v1.1 script."""
    return float(any(normalise_answer(answer) == normalise_answer(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Best F1 over the gold answers between bags of normalised words, in [0, 1]. Official SQuAD v1.1 script."""
    return max((_f1(normalise_answer(answer).split(), normalise_answer(gold).split()) for gold in golds), default=0.0)


def _f1(answer_words: list[str], gold_words: list[str]) -> float:
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words)) if common else 0.0


def containment(answer: str, golds: Sequence[str], *, whole_words: bool = False) -> float:
    """1.0 where any normalised gold answer is a substring of the normalised answer (paper, section 4; facts.md 4.2).

    `whole_words=True` asks for whole words, so that "3" is not found in "13". A gold answer of which normalising
    leaves nothing is never contained.
    """
    space = " " if whole_words else ""
    inside = f"{space}{normalise_answer(answer)}{space}"
    return float(any(f"{space}{gold}{space}" in inside for gold in map(normalise_answer, golds) if gold))


def needle_recall(answer: str, keywords: Sequence[str], *, reading: Literal["clean", "paper"] = "paper") -> float:
    """Share of the keywords that the answer says, in [0, 1]; the paper's recall error is 1 minus it (facts.md 1.1).

    `paper` is the authors' rule: lower case, ASCII punctuation to spaces, split at spaces and newlines, exact word
    equality. `clean` splits at everything that is no letter, digit or underscore in any script, and a keyword of
    several words counts where these stand side by side. Raises InputError where there are no keywords.
    """
    if not keywords:
        raise InputError("needle_recall: no keywords; give every needle question at least one keyword")
    if reading == "paper":
        words = set(re.split("[ \n]", re.sub(f"[{re.escape(string.punctuation)}]", " ", answer.lower())))
        return sum(keyword.lower() in words for keyword in keywords) / len(keywords)
    said = _words(answer)
    return sum(_words(keyword) in said for keyword in keywords) / len(keywords)


def _words(text: str) -> str:
    """The words of `text`, each between single spaces."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def score_answers(
    frame: pd.DataFrame, questions: Sequence[Question], *, reading: Literal["clean", "paper"] = "paper"
) -> pd.DataFrame:
    """`frame` (id, answer, …) with a column for each of ANSWER_METRICS, in [0, 1]; NaN where it is not asked for.

    `says_memory` is 1 where the answer contains the memory answer as whole words. Raises InputError for an id without
    a question.
    """
    known = {question.id: question for question in questions}
    if unknown := sorted(set(frame["id"]) - set(known)):
        raise InputError(f"score_answers: no question has the id {unknown[0]!r}; pass the questions that were answered")
    rows = [_scores(answer, known[key], reading) for key, answer in zip(frame["id"], frame["answer"], strict=True)]
    return frame.assign(**pd.DataFrame(rows, index=frame.index, columns=list(ANSWER_METRICS), dtype=float))


def _scores(answer: str, question: Question, reading: Literal["clean", "paper"]) -> tuple[float, ...]:
    golds, memory = question.answers, question.memory_answer
    return (
        exact_match(answer, golds) if golds else np.nan,
        token_f1(answer, golds) if golds else np.nan,
        containment(answer, golds) if golds else np.nan,
        needle_recall(answer, question.keywords, reading=reading) if question.keywords else np.nan,
        containment(answer, [memory], whole_words=True) if memory else np.nan,
    )


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
    by = _names(by)
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
    return pd.DataFrame(rows, columns=[*_names(by), "metric", "value", "ci_low", "ci_high", "n"])


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
    parts = [curve(part[truth], part[score]).assign(**dict(zip(_names(by), key, strict=True))) for key, part in groups]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=_names(by))


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
    for key, part in frame.dropna(subset=[truth]).groupby(_names(by), sort=False):
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


def _names(by: str | Sequence[str]) -> list[str]:
    return [by] if isinstance(by, str) else list(by)


def _two_classes(truth: Values, score: Values) -> tuple[np.ndarray, np.ndarray]:
    truth, score = np.asarray(truth, dtype=bool), np.asarray(score, dtype=float)
    if truth.all() or not truth.any():
        raise InputError("truth holds one class only; a curve needs dependent and independent turns")
    return truth, score


def _blocks(samples: int, width: int) -> Iterator[int]:
    """Sizes of the blocks that `samples` bootstrap samples of `width` numbers are drawn in."""
    size = max(1, _RESAMPLED_AT_ONCE // width)
    for start in range(0, samples, size):
        yield min(size, samples - start)


def _percentiles(statistics: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(statistics, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


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
    by = _names(by)
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
