"""Answer metrics as the official scripts define them, and the intervals that every number carries."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from scipy.stats import t as student_t
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score, roc_curve
from sklearn.metrics import precision_recall_curve as _precision_recall_curve

from ctxlib.conversations import Question
from ctxlib.params import InputError

ANSWER_METRICS = ("exact_match", "token_f1", "containment", "needle_recall", "says_memory")
QUAC_METRICS = ("unfiltered_f1", "human_f1", "human_equivalent")
CANNOTANSWER = "CANNOTANSWER"  # QuAC's answer where the passage holds none
MIN_HUMAN_F1 = 0.4  # below, the official QuAC script leaves a question out
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
    """1.0 where any normalised gold answer is a substring of the normalised answer (paper, section 4; official script).

    `whole_words=True` asks for whole words, so that "3" is not found in "13". A gold answer of which normalising
    leaves nothing is never contained.
    """
    space = " " if whole_words else ""
    inside = f"{space}{normalise_answer(answer)}{space}"
    return float(any(f"{space}{gold}{space}" in inside for gold in map(normalise_answer, golds) if gold))


def needle_recall(answer: str, keywords: Sequence[str], *, reading: Literal["clean", "paper"] = "paper") -> float:
    """Share of the keywords that the answer says, in [0, 1]; the paper's recall error is 1 minus it (section 2.1).

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


def squad_v2_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) in [0, 1] by the official SQuAD v2.0 script.

    Gold answers of which normalising leaves nothing do not count. Where no other is left, the passage holds no answer,
    and right is to say nothing.
    """
    worded = [gold for gold in golds if normalise_answer(gold)]
    if worded:
        return exact_match(answer, worded), token_f1(answer, worded)
    says_nothing = float(not normalise_answer(answer))
    return says_nothing, says_nothing


def quac_references(references: Sequence[str]) -> list[str]:
    """The annotators' answers that count: CANNOTANSWER alone where at least half said so, else the rest (QuAC script).

    Raises InputError where there are none.
    """
    if not references:
        raise InputError("quac_references: no references; give every QuAC question at least one")
    found = [reference for reference in references if reference != CANNOTANSWER]
    return found if 2 * len(found) > len(references) else [CANNOTANSWER]


def quac_f1(answer: str, references: Sequence[str]) -> float:
    """F1 in [0, 1] by the official QuAC script: the mean, over leaving out each reference in turn, of the best F1.

    So the answer meets as many references as a human does in `quac_human_f1`. CANNOTANSWER is met by just that, and by
    nothing else. Raises InputError where there are no references. Reference: Choi et al. 2018, section 4.
    """
    references = quac_references(references)
    f1 = [float(answer == gold) if gold == CANNOTANSWER else token_f1(answer, [gold]) for gold in references]
    return float(np.mean([max(f1[:left] + f1[left + 1 :]) for left in range(len(f1))])) if len(f1) > 1 else f1[0]


def quac_human_f1(references: Sequence[str]) -> float:
    """Mean over the references of the best F1 with another one, in [0, 1]; 1 where there is only one (QuAC script)."""
    references = quac_references(references)
    others = [(gold, [*references[:left], *references[left + 1 :]]) for left, gold in enumerate(references)]
    return float(np.mean([token_f1(gold, rest) for gold, rest in others])) if len(others) > 1 else 1.0


def quac_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """token_f1, unfiltered_f1, human_f1 and human_equivalent of one answer, as the official QuAC script averages them.

    `human_equivalent` is 1 where the answer's F1 is not below the humans'; its mean is HEQ-Q. It and `token_f1` are NaN
    where the humans agree too little (MIN_HUMAN_F1). Raises InputError where there are no references.
    """
    f1, human = quac_f1(answer, references), quac_human_f1(references)
    kept = human >= MIN_HUMAN_F1
    return {
        "token_f1": f1 if kept else np.nan,
        "unfiltered_f1": f1,
        "human_f1": human,
        "human_equivalent": float(f1 >= human - 1e-9) if kept else np.nan,  # both are means of rounded fractions
    }


def by_dialogue(frame: pd.DataFrame, by: str | Sequence[str] = ()) -> pd.DataFrame:
    """One row a dialogue: `by` …, dialogue, human_equivalent; its mean, by `summarise`, is HEQ-D (QuAC script).

    A dialogue is human equivalent (1) if all of its questions are that the script does not leave out, even if it leaves
    out all of them. `frame` comes from `score_answers` and holds whole dialogues.
    """
    turns = frame.dropna(subset=["dialogue"]).groupby([*_names(by), "dialogue"], sort=False, dropna=False)
    return turns["human_equivalent"].min().fillna(1.0).reset_index()


def normalise_drop_span(text: str) -> str:
    """A span as the official DROP script compares it.

    The words between spaces and hyphens, in lower case, numbers as Python's floats ("1,000" is "1000.0"), other words
    without ASCII punctuation and articles.
    """
    return " ".join(" ".join(map(_drop_word, re.split("[ -]", text))).split())


def _drop_word(word: str) -> str:
    word = word.lower()
    if not _is_number(word):
        word = "".join(character for character in word if character not in string.punctuation)
    return str(float(word)) if _is_number(word) else re.sub(r"\b(a|an|the)\b", " ", word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def drop_scores(answer: str | Sequence[str], annotations: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(exact match, F1) in [0, 1] by the official DROP script, each the best over the annotators' lists of spans.

    `answer` is one span or several. F1 is the mean, over the longer of the two lists, of the F1 of the sets of words of
    spans that are paired one to one for the highest sum, rounded to two digits; a gold span with numbers pairs only
    with one that shares a number. An annotation with a blank first span does not count.
    """
    said = [normalise_drop_span(span) for span in ([answer] if isinstance(answer, str) else answer)]
    exact, f1 = [0.0], [0.0]
    for spans in annotations:
        if spans and spans[0].strip():
            golds = [normalise_drop_span(span) for span in spans]
            exact.append(float(set(said) == set(golds) and len(said) == len(golds)))
            pairs = np.array([[_drop_f1(set(one.split()), set(gold.split())) for one in said] for gold in golds])
            best = pairs[linear_sum_assignment(pairs, maximize=True)].sum() if said else 0.0
            f1.append(float(np.round(best / max(len(said), len(golds)), 2)))
    return max(exact), max(f1)


def _drop_f1(said: set[str], gold: set[str]) -> float:
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & said:
        return 0.0
    if not said or not gold:
        return float(said == gold)
    precision, recall = len(said & gold) / len(said), len(said & gold) / len(gold)
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def drop_containment(
    answer: str, annotations: Sequence[Sequence[str]], *, reading: Literal["clean", "paper"] = "clean"
) -> float:
    """1.0 where the answer says what an annotator found, else 0.0.

    `clean`: all spans of any annotator, as whole words, normalised as by the official script. `paper`: any one span of
    the first annotator, as a raw substring, so that "3" is found in "13" (official script).
    """
    if reading == "paper":
        return float(any(span in answer for spans in annotations[:1] for span in spans))
    said = f" {normalise_drop_span(' '.join(answer.split()))} "
    golds = [[normalise_drop_span(span) for span in spans] for spans in annotations]
    return float(any(spans and all(span and f" {span} " in said for span in spans) for spans in golds))


def until_stop(answer: str) -> str:
    """The answer up to its first ". ", where the authors' generation stopped (official script)."""
    return answer.partition(". ")[0]


def score_answers(
    frame: pd.DataFrame, questions: Sequence[Question], *, reading: Literal["clean", "paper"] = "paper"
) -> pd.DataFrame:
    """`frame` (id, answer, …) with a column for each of ANSWER_METRICS, in [0, 1]; NaN where it is not asked for.

    `says_memory` is 1 where the answer contains the memory answer as whole words. On SQuAD, QuAC and DROP (kinds
    `squad`, `squad_v2`, `quac`, `drop`, with or without `_no_answer`) exact_match and token_f1 follow the dataset's own
    script, of which QuAC's has no exact match; where QuAC is among the questions, QUAC_METRICS and `dialogue` are
    further columns. There, `containment` asks in the `clean` reading for whole words, while in the `paper` reading the
    answer ends where the authors' generation stopped, and substrings count (`until_stop`, `drop_containment`).

    Raises InputError for an id without a question.
    """
    known = {question.id: question for question in questions}
    if unknown := sorted(set(frame["id"]) - set(known)):
        raise InputError(f"score_answers: no question has the id {unknown[0]!r}; pass the questions that were answered")
    asked = [known[key] for key in frame["id"]]
    rows = [_scores(answer, question, reading) for answer, question in zip(frame["answer"], asked, strict=True)]
    quac = any(_dataset(question) == "quac" for question in asked)
    columns = [*ANSWER_METRICS, *(QUAC_METRICS if quac else ())]
    scored = frame.assign(**pd.DataFrame(rows, index=frame.index, columns=columns, dtype=float))
    return scored.assign(dialogue=[question.dialogue for question in asked]) if quac else scored


def _dataset(question: Question) -> str:
    return question.kind.removesuffix("_no_answer")


def _scores(answer: str, question: Question, reading: Literal["clean", "paper"]) -> dict[str, float]:
    scores = _gold_scores(answer, question, reading) if question.answers else {}
    if question.keywords:
        scores["needle_recall"] = needle_recall(answer, question.keywords, reading=reading)
    if question.memory_answer:
        scores["says_memory"] = containment(answer, [question.memory_answer], whole_words=True)
    return scores


def _gold_scores(answer: str, question: Question, reading: Literal["clean", "paper"]) -> dict[str, float]:
    golds, annotations, dataset = question.answers, question.annotations, _dataset(question)
    official = dataset in ("squad", "squad_v2", "quac", "drop")
    if official and reading == "paper":
        answer = until_stop(answer)
    contained = containment(answer, golds, whole_words=official and reading == "clean")
    match dataset:
        case "quac":
            return {"containment": contained, **quac_scores(answer, [text for (text,) in annotations])}
        case "drop":
            exact, f1 = drop_scores(answer, annotations)
            contained = drop_containment(answer, annotations, reading=reading)
        case "squad_v2":
            exact, f1 = squad_v2_scores(answer, golds)
            contained = max(contained, exact)  # where nothing is to be said, nothing can be contained
        case _:
            exact, f1 = exact_match(answer, golds), token_f1(answer, golds)
    return {"exact_match": exact, "token_f1": f1, "containment": contained}


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
    return pd.DataFrame(rows, columns=[*_names(by), "metric", "value", "n"])


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
    by = _names(by)
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
    keys = [*_names(by), "seed"]
    sides = {name: part.set_index(keys)["value"] for name, part in frame.groupby("condition", sort=False)}
    seeds = {name: set(side.index.get_level_values("seed")) for name, side in sides.items()}
    if unlike := [name for name in sides if seeds[name] != seeds[before]]:
        raise InputError(f"seed_differences: {unlike[0]!r} was not run at the seeds of {before!r}; run both alike")
    changes = {name: (side - sides[before]).dropna() for name, side in sides.items() if name != before}
    return pd.concat(changes, names=["condition"]).rename("value").reset_index()
