"""Answer metrics as the official scripts define them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from ctxlib.conversations import Question
from ctxlib.metrics.intervals import column_names
from ctxlib.params import InputError, Variant

ANSWER_METRICS = ("exact_match", "token_f1", "containment", "needle_recall", "says_memory")
QUAC_METRICS = ("unfiltered_f1", "human_f1", "human_equivalent")
CANNOTANSWER = "CANNOTANSWER"  # the answer in QuAC if the passage contains none
MIN_HUMAN_F1 = 0.4  # below, the official QuAC script leaves a question out


def normalise_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces. Official SQuAD v1.1 script."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 if the normalised answer equals any normalised gold answer, else 0.0. Official SQuAD v1.1 script."""
    return float(any(normalise_answer(answer) == normalise_answer(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Best F1 over the gold answers between bags of normalised words, in [0, 1]. Official SQuAD v1.1 script."""
    return max((_f1(normalise_answer(answer).split(), normalise_answer(gold).split()) for gold in golds), default=0.0)


def _f1(answer_words: list[str], gold_words: list[str]) -> float:
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    return 2 * common / (len(answer_words) + len(gold_words)) if common else 0.0


def containment(answer: str, golds: Sequence[str], *, whole_words: bool = False) -> float:
    """1.0 if any normalised gold answer is a substring of the normalised answer (paper, section 4; official script).

    `whole_words=True` asks for whole words, so that "3" is not found in "13". A gold answer that
    normalises to nothing is never contained.
    """
    space = " " if whole_words else ""
    inside = f"{space}{normalise_answer(answer)}{space}"
    return float(any(f"{space}{gold}{space}" in inside for gold in map(normalise_answer, golds) if gold))


def needle_recall(answer: str, keywords: Sequence[str], *, variant: Variant = "authors_code") -> float:
    """Share of the keywords that the answer says, in [0, 1]; the paper's recall error is 1 minus it (section 2.1).

    `authors_code` is the authors' rule: lower case, ASCII punctuation to spaces, split at spaces and newlines alone (a
    tab inside a word stays, at its edges it is stripped), exact word equality. `standard` splits at everything that is
    no letter, digit or underscore in any script, and a keyword of several words counts if these are adjacent. Raises
    InputError if there are no keywords.
    """
    if not keywords:
        raise InputError("needle_recall: no keywords; give every needle question at least one keyword")
    if variant == "authors_code":
        bare = re.sub(f"[{re.escape(string.punctuation)}]", " ", answer.lower())
        words = {word.strip() for word in re.split("[ \n]", bare)}
        return sum(keyword.lower() in words for keyword in keywords) / len(keywords)
    said = _words(answer)
    return sum(_words(keyword) in said for keyword in keywords) / len(keywords)


def _words(text: str) -> str:
    """The words of `text`, each between single spaces."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def squad_v2_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) in [0, 1] by the official SQuAD v2.0 script.

    Gold answers that normalise to nothing do not count. If no other is left, the passage holds no answer, and an empty
    answer is right.
    """
    worded = [gold for gold in golds if normalise_answer(gold)]
    if worded:
        return exact_match(answer, worded), token_f1(answer, worded)
    says_nothing = float(not normalise_answer(answer))
    return says_nothing, says_nothing


def quac_references(references: Sequence[str]) -> list[str]:
    """The annotators' answers that count: CANNOTANSWER alone if at least half said so, else the rest (QuAC script).

    Raises InputError if there are none.
    """
    if not references:
        raise InputError("quac_references: no references; give every QuAC question at least one")
    found = [reference for reference in references if reference != CANNOTANSWER]
    return found if 2 * len(found) > len(references) else [CANNOTANSWER]


def quac_f1(answer: str, references: Sequence[str]) -> float:
    """F1 in [0, 1] by the official QuAC script: the mean, over leaving out each reference in turn, of the best F1.

    So the answer meets as many references as a human does in `quac_human_f1`. CANNOTANSWER is met by just that, and by
    nothing else. Raises InputError if there are no references. Reference: Choi et al. 2018, section 4.
    """
    references = quac_references(references)
    f1 = [float(answer == gold) if gold == CANNOTANSWER else token_f1(answer, [gold]) for gold in references]
    return float(np.mean([max(f1[:left] + f1[left + 1 :]) for left in range(len(f1))])) if len(f1) > 1 else f1[0]


def quac_human_f1(references: Sequence[str]) -> float:
    """Mean over the references of the best F1 with another one, in [0, 1]; 1 if there is only one (QuAC script)."""
    references = quac_references(references)
    others = [(gold, [*references[:left], *references[left + 1 :]]) for left, gold in enumerate(references)]
    return float(np.mean([token_f1(gold, rest) for gold, rest in others])) if len(others) > 1 else 1.0


def quac_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """token_f1, unfiltered_f1, human_f1 and human_equivalent of one answer, as the official QuAC script averages them.

    `human_equivalent` is 1 if the answer's F1 is not below the humans'; its mean is HEQ-Q. It and `token_f1` are NaN
    if the humans agree too little (MIN_HUMAN_F1). Raises InputError if there are no references.
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
    """One row per dialogue: `by` …, dialogue, human_equivalent; its mean, by `summarise`, is HEQ-D (QuAC script).

    A dialogue is human equivalent (1) if all of its questions are that the script does not leave out, even if it leaves
    out all of them. `frame` comes from `score_answers` and holds whole dialogues.
    """
    turns = frame.dropna(subset=["dialogue"]).groupby([*column_names(by), "dialogue"], sort=False, dropna=False)
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


def drop_containment(answer: str, annotations: Sequence[Sequence[str]], *, variant: Variant = "standard") -> float:
    """1.0 if the answer says what an annotator found, else 0.0.

    `standard`: all spans of any annotator, as whole words, normalised as by the official script. `authors_code`: any
    one span of the first annotator, as a substring in any case, so that "3" is found in "13" (official script).
    """
    if variant == "authors_code":
        said = answer.lower()
        return float(any(span.lower() in said for spans in annotations[:1] for span in spans))
    said = f" {normalise_drop_span(' '.join(answer.split()))} "
    golds = [[normalise_drop_span(span) for span in spans] for spans in annotations]
    return float(any(spans and all(span and f" {span} " in said for span in spans) for spans in golds))


def quac_containment(answer: str, references: Sequence[str], *, variant: Variant = "standard") -> float:
    """1.0 if the answer says what an annotator of QuAC answered, else 0.0.

    `standard`: the answers that count by the official script (`quac_references`), as whole words. `authors_code`: those
    of every annotator, CANNOTANSWER included, as substrings; one that normalises to nothing ("the") is contained in
    any answer. Both normalise as the SQuAD script does.
    """
    if variant == "standard":
        return containment(answer, quac_references(references), whole_words=True)
    said = normalise_answer(answer)
    return float(any(normalise_answer(reference) in said for reference in references))


def until_stop(answer: str) -> str:
    """The answer up to its first ". ", where the authors' generation stopped (official script)."""
    return answer.partition(". ")[0]


def score_answers(
    frame: pd.DataFrame, questions: Sequence[Question], *, variant: Variant = "authors_code"
) -> pd.DataFrame:
    """`frame` (id, answer, …) with a column for each of ANSWER_METRICS, in [0, 1]; NaN if it is not asked for.

    `says_memory` is 1 if the answer contains the memory answer as whole words. On SQuAD, QuAC and DROP (kinds
    `squad`, `squad_v2`, `quac`, `drop`, with or without `_no_answer`) exact_match and token_f1 follow the dataset's own
    script, of which QuAC's has no exact match; where QuAC is among the questions, QUAC_METRICS and `dialogue` are
    further columns. There, `containment` asks in the `standard` variant for whole words, while in the `authors_code`
    variant the answer ends where the authors' generation stopped, and substrings count (`until_stop`,
    `quac_containment`, `drop_containment`). Family `contexts` always asks for whole words.

    Raises InputError for an id without a question.
    """
    known = {question.id: question for question in questions}
    if unknown := sorted(set(frame["id"]) - set(known)):
        raise InputError(f"score_answers: no question has the id {unknown[0]!r}; pass the questions that were answered")
    asked = [known[key] for key in frame["id"]]
    rows = [_scores(answer, question, variant) for answer, question in zip(frame["answer"], asked, strict=True)]
    quac = any(_dataset(question) == "quac" for question in asked)
    columns = [*ANSWER_METRICS, *(QUAC_METRICS if quac else ())]
    scored = frame.assign(**pd.DataFrame(rows, index=frame.index, columns=columns, dtype=float))
    return scored.assign(dialogue=[question.dialogue for question in asked]) if quac else scored


def _dataset(question: Question) -> str:
    return question.kind.removesuffix("_no_answer")


def _scores(answer: str, question: Question, variant: Variant) -> dict[str, float]:
    scores = _gold_scores(answer, question, variant) if question.answers else {}
    if question.keywords:
        scores["needle_recall"] = needle_recall(answer, question.keywords, variant=variant)
    if question.memory_answer:
        scores["says_memory"] = containment(answer, [question.memory_answer], whole_words=True)
    return scores


def _gold_scores(answer: str, question: Question, variant: Variant) -> dict[str, float]:
    golds, annotations, dataset = question.answers, question.annotations, _dataset(question)
    official = dataset in ("squad", "squad_v2", "quac", "drop")
    whole_words = question.family == "contexts" or (official and variant == "standard")
    if official and variant == "authors_code":
        answer = until_stop(answer)
    contained = containment(answer, golds, whole_words=whole_words)
    match dataset:
        case "quac":
            references = [text for (text,) in annotations]
            contained = quac_containment(answer, references, variant=variant)
            return {"containment": contained, **quac_scores(answer, references)}
        case "drop":
            exact, f1 = drop_scores(answer, annotations)
            contained = drop_containment(answer, annotations, variant=variant)
        case "squad_v2":
            exact, f1 = squad_v2_scores(answer, golds)
            contained = max(contained, exact)  # where nothing is to be said, nothing can be contained
        case _:
            exact, f1 = exact_match(answer, golds), token_f1(answer, golds)
    return {"exact_match": exact, "token_f1": f1, "containment": contained}
