"""Answer metrics against hand-made cases and loops, intervals against closed forms and slow bootstraps."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest, mannwhitneyu

from ctxlib import metrics
from ctxlib.conversations import Message, Question
from ctxlib.params import InputError


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tpyjamas!", "cats pyjamas"),
        ("An apple, a pear; the end.", "apple pear end"),
        ("theatre another", "theatre another"),
        ("“quoted”", "“quoted”"),  # the official script knows ASCII punctuation only
        ("U.S.A.", "usa"),
        ("The", ""),
    ],
)
def test_normalising_follows_the_official_squad_script(text, normal):
    assert metrics.normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("the green kites", ["Green kites."], 1, 1),
        ("green kites", ["red kites", "green kites"], 1, 1),
        ("green green kites", ["green kites"], 0, 0.8),  # precision 2/3, recall 1
        ("green kites fly", ["kites"], 0, 0.5),
        ("cats", ["dogs"], 0, 0),
        ("", ["dogs"], 0, 0),
        ("the", ["a"], 1, 0),  # both normalise to nothing: equal, with no word in common, as in version 1.1
    ],
)
def test_exact_match_and_f1_take_the_best_gold_answer(answer, golds, exact, f1):
    assert metrics.exact_match(answer, golds) == exact
    assert metrics.token_f1(answer, golds) == pytest.approx(f1)


def test_f1_matches_a_loop_that_crosses_words_out():
    words = ["red", "blue", "cat", "hat"]
    texts = [" ".join(chosen) for size in range(4) for chosen in itertools.product(words[:3], repeat=size)]
    for answer, gold in itertools.islice(itertools.product(texts, texts), 0, None, 7):
        left, common = gold.split(), 0
        for word in answer.split():
            if word in left:
                left.remove(word)
                common += 1
        precision, recall = common / max(1, len(answer.split())), common / max(1, len(gold.split()))
        expected = 2 * precision * recall / (precision + recall) if common else 0
        assert metrics.token_f1(answer, [gold]) == pytest.approx(expected)


def test_containment_is_a_substring_unless_whole_words_are_asked_for():
    assert metrics.containment("She has 13 cats.", ["3"]) == 1
    assert metrics.containment("She has 13 cats.", ["3"], whole_words=True) == 0
    assert metrics.containment("She has 3 cats.", ["3"], whole_words=True) == 1
    assert metrics.containment("The Green, Kites!", ["a green kites"]) == 1
    assert metrics.containment("anything", ["the"]) == 0
    assert metrics.containment("green", []) == 0


def test_needle_recall_of_the_paper_is_exact_word_equality():
    keywords = ("eat", "sandwich", "sit", "dolores", "park", "sunny", "day")
    assert metrics.needle_recall("Eat a sandwich and sit in Dolores Park\non a sunny day.", keywords) == 1
    assert metrics.needle_recall("eating sandwiches in the park", keywords) == pytest.approx(1 / 7)
    assert metrics.needle_recall("", keywords) == 0
    assert metrics.needle_recall("sunny-day", keywords) == pytest.approx(2 / 7)
    assert metrics.needle_recall("a sunny\tday", keywords) == 0  # only spaces and newlines part words
    assert metrics.needle_recall("sit\t", keywords) == pytest.approx(1 / 7)  # at a word's edges a tab is stripped
    with pytest.raises(InputError, match="keyword"):
        metrics.needle_recall("x", [])


def test_clean_needle_recall_splits_in_every_script_and_keeps_phrases_together():
    assert metrics.needle_recall("a “sunny”\tday", ["sunny", "day"], variant="standard") == 1
    assert metrics.needle_recall("green old kites", ["green kites"], variant="standard") == 0
    assert metrics.needle_recall("Green kites!", ["green kites"], variant="standard") == 1
    assert metrics.needle_recall("evergreen", ["green"], variant="standard") == 0


def test_scores_are_nan_where_a_question_does_not_ask_and_keep_the_frames_order():
    asked = (Message("user", "?"),)
    needle = Question("n", "needle", "contradicting", asked, answers=("red",), keywords=("red",), memory_answer="blue")
    task = Question("t", "instructions", "repeat", asked, answers=("tick tock",))
    frame = pd.DataFrame({"id": ["t", "n", "n"], "answer": ["tick tock", "It is blue.", "red"]}, index=[5, 3, 9])
    scored = metrics.score_answers(frame, [needle, task])
    assert list(scored.index) == [5, 3, 9]
    np.testing.assert_array_equal(scored["exact_match"], [1, 0, 1])
    np.testing.assert_array_equal(scored["needle_recall"], [np.nan, 0, 1])
    np.testing.assert_array_equal(scored["says_memory"], [np.nan, 1, 0])
    with pytest.raises(InputError, match="'u'"):
        metrics.score_answers(pd.DataFrame({"id": ["u"], "answer": [""]}), [needle])


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        ("", [""], 1),
        ("The!", [""], 1),  # nothing is left of it
        ("cat", [""], 0),
        ("", ["cat"], 0),
        ("the", ["a", "cat"], 0),  # "a" does not count; by version 1.1 it would match
        ("The cat.", ["the", "a cat"], 1),
    ],
)
def test_squad_2_asks_for_silence_where_no_gold_answer_has_a_word(answer, golds, score):
    assert metrics.squad_v2_scores(answer, golds) == (score, score)


def test_squad_2_is_squad_1_where_every_gold_answer_has_words():
    assert metrics.squad_v2_scores("green green kites", ["green kites", "red"]) == (0, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("references", "counted"),
    [
        (["red", "CANNOTANSWER"], ["CANNOTANSWER"]),  # as many as not
        (["red", "CANNOTANSWER", "CANNOTANSWER"], ["CANNOTANSWER"]),
        (["red", "CANNOTANSWER", "red"], ["red", "red"]),
        (["red"], ["red"]),
    ],
)
def test_quac_counts_no_answer_where_half_of_the_annotators_say_so(references, counted):
    assert metrics.quac_references(references) == counted


@pytest.mark.parametrize(
    ("answer", "references", "f1", "human"),
    [
        ("red cat", ["red cat"], 1, 1),  # one reference: nothing is left out, and humans agree
        ("red", ["red cat"], 2 / 3, 1),
        ("red cat", ["red cat", "red dog"], (1 / 2 + 1) / 2, 1 / 2),
        ("red", ["red cat", "red dog"], 2 / 3, 1 / 2),
        ("blue", ["red cat", "red dog", "blue"], 2 / 3, 1 / 3),  # 1, 1, and 0 without "blue"; humans: 1/2, 1/2, 0
        ("The Cat!", ["cat", "a cat", "CANNOTANSWER"], 1, 1),
        ("CANNOTANSWER", ["red", "CANNOTANSWER"], 1, 1),
        ("cannotanswer", ["CANNOTANSWER"], 0, 1),  # just that, as it stands
        ("red", ["red", "CANNOTANSWER"], 0, 1),
        ("CANNOTANSWER", ["red", "red", "CANNOTANSWER"], 0, 1),
    ],
)
def test_quac_f1_leaves_out_one_reference_at_a_time(answer, references, f1, human):
    assert metrics.quac_f1(answer, references) == pytest.approx(f1)
    assert metrics.quac_human_f1(references) == pytest.approx(human)


@pytest.mark.parametrize(
    ("answer", "references", "kept", "equivalent"),
    [
        ("red bird", ["red cat", "red dog"], 1 / 2, 1),  # 1/2 against 1/2
        ("bird", ["red cat", "red dog"], 0, 0),
        ("red cat", ["red cat", "red dog bird"], (2 / 5 + 1) / 2, 1),  # humans agree by 0.4, and that is enough
        ("blue", ["red cat", "red dog", "blue"], np.nan, np.nan),  # humans agree by 1/3
        ("red cats", ["red cat"], 1 / 2, 0),  # a single human is met by 1 only
    ],
)
def test_quac_leaves_out_what_humans_disagree_on(answer, references, kept, equivalent):
    scores = metrics.quac_scores(answer, references)
    assert scores["token_f1"] == pytest.approx(kept, nan_ok=True)
    assert scores["human_equivalent"] == pytest.approx(equivalent, nan_ok=True)
    assert scores["unfiltered_f1"] == metrics.quac_f1(answer, references)
    with pytest.raises(InputError, match="no references"):
        metrics.quac_scores(answer, [])


def test_heq_d_asks_all_questions_of_a_dialogue_that_are_not_left_out():
    turns = [("a", 1), ("a", 1), ("b", 1), ("b", 0), ("c", np.nan), ("c", 1), ("d", np.nan), (None, 0)]
    frame = pd.DataFrame(turns, columns=["dialogue", "human_equivalent"])
    both = pd.concat([frame.assign(condition="x"), frame.assign(condition="y", human_equivalent=0.0)])
    dialogues = metrics.by_dialogue(both, "condition").set_index(["condition", "dialogue"])["human_equivalent"]
    assert dialogues["x"].to_dict() == {"a": 1, "b": 0, "c": 1, "d": 1}
    assert dialogues["y"].to_dict() == {"a": 0, "b": 0, "c": 0, "d": 0}
    assert metrics.by_dialogue(frame)["human_equivalent"].tolist() == [1, 0, 1, 1]
    (heq_d,) = metrics.summarise(
        metrics.by_dialogue(both[:8], "condition"), "condition", "human_equivalent"
    ).itertuples()
    assert (heq_d.value, heq_d.n) == (0.75, 4)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The 1,000 Men", "1000.0 men"),
        ("a 5-yard run", "5.0 yard run"),
        ("A-Team", "team"),
        ("3.50", "3.5"),
        ("$3.50", "350.0"),  # no number as it stands, so that its point is punctuation
        ("5%", "5.0"),
        ("-5", "5.0"),  # the hyphen parts words
        ("1e3", "1000.0"),
        ("３", "3.0"),  # a digit in any script
        ("U.S.", "us"),
        ("1990–1995", "1990–1995"),  # a dash is neither hyphen nor ASCII punctuation
        ("Café  Zoë", "café zoë"),
        ("one\ntwo", "one two"),
        ("the", ""),
    ],
)
def test_drop_normalises_word_by_word_and_numbers_as_floats(text, normal):
    assert metrics.normalise_drop_span(text) == normal


@pytest.mark.parametrize(
    ("answer", "annotations", "exact", "f1"),
    [
        ("2", [["2"]], 1, 1),
        ("2.0", [["2"]], 1, 1),
        ("two", [["2"]], 0, 0),
        ("2 kicks", [["2"]], 0, 0.67),
        ("3 kicks", [["2 kicks"]], 0, 0),  # the gold span has a number, and the answer another
        ("kicks", [["2 kicks"]], 0, 0),
        ("2 kicks", [["kicks"]], 0, 0.67),  # the gold span has none
        ("May 1990", [["5 May 1990"]], 0, 0.8),  # one shared number is enough
        ("red red red", [["red"]], 0, 1),  # sets of words
        ("red", [["red", "blue"]], 0, 0.5),
        (["blue", "red"], [["red", "blue"]], 1, 1),
        (["red", "blue", "green"], [["red", "blue"]], 0, 0.67),
        (["red cat", "red"], [["red", "cat dog"]], 0, 0.75),  # red-red 1, cat-cat dog 1/2; not red cat-red 2/3
        (["red"], [["blue"], ["red"]], 1, 1),  # the best annotator
        (["red", "red"], [["red"]], 0, 0.5),
        (["red", "red", "blue"], [["red", "blue", "blue"]], 1, 0.67),  # as many spans, and the same set: exact, it says
        ("red cat", [["red", "cat"], ["red dog"]], 0, 0.5),
        ("the", [["a"]], 1, 1),  # nothing is left of either
        ("red", [["the"]], 0, 0),
        ("", [[""]], 0, 0),  # a blank annotation does not count
        ("red", [["", "red"]], 0, 0),
        ([], [["red"]], 0, 0),
    ],
)
def test_drop_pairs_spans_and_asks_for_the_same_numbers(answer, annotations, exact, f1):
    assert metrics.drop_scores(answer, annotations) == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    ("answer", "annotations", "authors_code", "standard"),
    [
        ("13 yards", [["3"]], 1, 0),
        ("a 3-yard run", [["3"]], 1, 1),
        ("3\nyards", [["3.0"]], 0, 1),
        ("1000", [["1,000"]], 0, 1),
        ("Red", [["red"]], 1, 1),
        ("the packers", [["Packers"]], 1, 1),
        ("red", [["red", "blue"]], 1, 0),  # one span of two
        ("blue and red", [["red", "blue"]], 1, 1),
        ("99", [["3"], ["99"]], 0, 1),  # the second annotator's
        ("anything", [["the"]], 0, 0),
        ("anything", [], 0, 0),
    ],
)
def test_drop_containment_of_the_paper_takes_any_piece_of_the_first_annotator(
    answer, annotations, authors_code, standard
):
    assert metrics.drop_containment(answer, annotations, variant="authors_code") == authors_code
    assert metrics.drop_containment(answer, annotations) == standard


@pytest.mark.parametrize(
    ("answer", "references", "authors_code", "standard"),
    [
        ("in 1990", ["CANNOTANSWER", "in 1,990"], 1, 0),  # half of them found no answer
        ("cannotanswer", ["CANNOTANSWER", "1990"], 1, 1),
        ("cannotanswer", ["CANNOTANSWER", "1990", "1990"], 1, 0),
        ("nothing of it", ["the"], 1, 0),  # nothing is left of it, which is in every text
        ("13", ["3"], 1, 0),
        ("three", ["3", "four"], 0, 0),
    ],
)
def test_quac_containment_of_the_authors_takes_every_annotators_text(answer, references, authors_code, standard):
    assert metrics.quac_containment(answer, references, variant="authors_code") == authors_code
    assert metrics.quac_containment(answer, references) == standard


def test_the_authors_generation_stopped_at_a_full_stop_and_a_space():
    cut = {"It is Ada. She did. ": "It is Ada", "Dr. Who": "Dr", "3.5.": "3.5.", "": "", "a.\nb": "a.\nb"}
    assert {answer: metrics.until_stop(answer) for answer in cut} == cut


WORDS = st.lists(st.sampled_from(["red", "Red.", "the", "cat", "cat-red", "3", "3.0", "13", "1,000", "–"]), max_size=4)
TEXTS = WORDS.map(" ".join)


def crossed_out_f1(answer, gold):
    left, common = metrics.normalise_answer(gold).split(), 0
    words, size = metrics.normalise_answer(answer).split(), len(left)
    for word in words:
        if word in left:
            left.remove(word)
            common += 1
    return 2 * common / (len(words) + size) if common else 0.0


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_quac_f1_matches_a_loop_over_who_is_left_out(answer, references):
    def mean_of_best(scores):
        """Over who is left out; where there is one only, nobody is."""
        if len(scores) == 1:
            return scores[0]
        return sum(max(s for j, s in enumerate(scores) if j != i) for i in range(len(scores))) / len(scores)

    assert metrics.quac_f1(answer, references) == pytest.approx(
        mean_of_best([crossed_out_f1(answer, gold) for gold in references])
    )
    if len(references) > 1:
        table = [[crossed_out_f1(a, b) for b in references] for a in references]
        best = [max(score for j, score in enumerate(row) if j != i) for i, row in enumerate(table)]
        assert metrics.quac_human_f1(references) == pytest.approx(sum(best) / len(best))


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=4))
def test_drop_f1_matches_the_best_of_all_pairings(said, golds):
    golds[0] = golds[0] or "red"

    def f1(one, gold):
        one, gold = ({*metrics.normalise_drop_span(span).split()} for span in (one, gold))
        numbers = {word for word in gold if re.fullmatch(r"[\d.]+", word)}
        if numbers and not numbers & one:
            return 0.0
        return 2 * len(one & gold) / (len(one) + len(gold)) if one or gold else 1.0

    longer, shorter, flip = (said, golds, False) if len(said) >= len(golds) else (golds, said, True)
    sums = [
        sum(f1(b, a) if flip else f1(a, b) for a, b in zip(chosen, shorter, strict=True))
        for chosen in itertools.permutations(longer, len(shorter))
    ]
    assert metrics.drop_scores(said, [golds])[1] == pytest.approx(max(sums) / len(longer), abs=0.0051)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_official_scores_are_fractions_that_agree_with_one_another(answer, golds, another):
    spans = [[gold] for gold in golds]
    v1 = metrics.exact_match(answer, golds), metrics.token_f1(answer, golds)
    v2, drop = metrics.squad_v2_scores(answer, golds), metrics.drop_scores(answer, spans)
    contained = metrics.containment(answer, golds, whole_words=True)
    for exact, f1 in (v1, v2, drop):
        assert exact in (0, 1) and 0 <= f1 <= 1
    assert all(0 <= value <= 1 for value in (metrics.quac_f1(answer, golds), metrics.quac_human_f1(golds)))
    assert metrics.token_f1(answer, golds[:1]) == metrics.token_f1(golds[0], [answer])
    if metrics.normalise_answer(answer):  # an exact match has all of its words, and is contained
        assert (v1[1] == 1 and contained == 1) or not v1[0]
        assert v2[1] == 1 or not v2[0]
    if metrics.normalise_drop_span(answer):
        assert (drop[1] == 1 and metrics.drop_containment(answer, spans) == 1) or not drop[0]
    assert contained <= metrics.containment(answer, golds)  # whole words are substrings
    more = metrics.drop_scores(answer, [*spans, [another]])
    assert more[0] >= drop[0] and more[1] >= drop[1]  # one more annotator takes nothing away
    assert metrics.token_f1(answer, [*golds, another]) >= v1[1]


def test_every_dataset_is_scored_by_its_own_script():
    asked = (Message("user", "?"),)

    def question(kind, *annotations, answers=()):
        return Question(kind, "qa", kind, asked, answers=answers, annotations=annotations, dialogue=f"of {kind}")

    questions = [
        question("squad", ("3",), answers=("3",)),
        question("squad_v2_no_answer", answers=("",)),
        question("quac", ("red cat",), ("red dog",), answers=("red cat", "red dog")),
        question("drop", ("3", "red"), answers=("3, red",)),
        question("unknown", answers=("3",)),
    ]
    said = {
        "squad": "It is 13. Or so",
        "squad_v2_no_answer": "",
        "quac": "red",
        "drop": "13",
        "unknown": "So it is. And 13.",
    }
    frame = pd.DataFrame({"id": said.keys(), "answer": said.values()})
    clean = metrics.score_answers(frame, questions, variant="standard").set_index("id")
    paper = metrics.score_answers(frame, questions, variant="authors_code").set_index("id")
    assert clean.containment.to_dict() == {
        "squad": 0, "squad_v2_no_answer": 1, "quac": 0, "drop": 0, "unknown": 1,
    }  # fmt: skip
    assert paper.containment.to_dict() == clean.containment.to_dict() | {"squad": 1, "drop": 1}
    assert clean.token_f1["squad_v2_no_answer"] == clean.exact_match["squad_v2_no_answer"] == 1
    assert (clean.token_f1["quac"], clean.human_f1["quac"]) == (pytest.approx(2 / 3), 0.5)
    assert clean.human_equivalent["quac"] == 1 and np.isnan(clean.exact_match["quac"])
    assert clean.human_equivalent.drop("quac").isna().all()
    assert clean.dialogue["quac"] == "of quac"
    longer = pd.DataFrame({"id": ["squad"], "answer": ["3. Or so"]})
    assert metrics.score_answers(longer, questions, variant="standard").exact_match.item() == 0
    assert (
        metrics.score_answers(longer, questions, variant="authors_code").exact_match.item() == 1
    )  # "3" was all they had


def test_without_quac_there_are_no_columns_for_it():
    question = Question("q", "qa", "squad", (Message("user", "?"),), answers=("3",))
    scored = metrics.score_answers(pd.DataFrame({"id": ["q"], "answer": ["3"]}), [question])
    assert list(scored.columns) == ["id", "answer", *metrics.ANSWER_METRICS]
    empty = metrics.score_answers(pd.DataFrame({"id": [], "answer": []}), [question])
    assert list(empty.columns) == list(scored.columns)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (5, 5), (3, 7), (480, 500), (1, 1000)])
def test_wilson_interval_matches_scipy(successes, n):
    reference = binomtest(successes, n).proportion_ci(method="wilson")
    assert metrics.wilson_interval(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert metrics.wilson_interval(0, 0) == (0, 1)


def test_bootstrap_interval_matches_a_slow_loop_in_distribution(monkeypatch):
    values = np.random.default_rng(1).exponential(size=60)
    rng = np.random.default_rng(2)
    slow = [np.mean([values[rng.integers(60)] for _ in range(60)]) for _ in range(1500)]
    fast = metrics.bootstrap_interval(values, samples=4000, seed=3)
    assert fast == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.05)
    assert fast == metrics.bootstrap_interval(values, samples=4000, seed=3)
    monkeypatch.setattr("ctxlib.metrics.intervals._RESAMPLED_AT_ONCE", 100)
    assert metrics.bootstrap_interval(values, samples=400, seed=3) == pytest.approx(fast, abs=0.1)
    assert np.isnan(metrics.bootstrap_interval([])).all()
    assert metrics.bootstrap_interval([2.0, 2.0]) == (2, 2)
    assert metrics.bootstrap_interval([2.0]) == (2, 2)


@pytest.mark.parametrize("size", [2, 41, 3000])
def test_bootstrap_interval_has_the_numbers_of_a_plain_numpy_loop(size):
    values = np.random.default_rng(1).random(size)
    rng = np.random.default_rng(7)
    means = [values[rng.integers(size, size=size)].mean() for _ in range(500)]
    expected = np.quantile(means, [0.025, 0.975])
    assert metrics.bootstrap_interval(values, samples=500, seed=7) == tuple(expected)


def test_bootstrap_interval_of_a_ratio_has_the_numbers_of_a_plain_numpy_loop():
    rng = np.random.default_rng(1)
    asked = rng.integers(1, 4, 50)
    followed = rng.binomial(asked, 0.6)
    rng = np.random.default_rng(7)
    draws = [rng.integers(50, size=50) for _ in range(500)]
    expected = np.quantile([followed[draw].sum() / asked[draw].sum() for draw in draws], [0.025, 0.975])
    found = metrics.bootstrap_interval(followed, 500, 7, out_of=asked)
    assert found == tuple(expected)


def test_an_estimate_is_the_row_of_the_summary():
    values = np.random.default_rng(1).random(20)
    row = metrics.summarise(pd.DataFrame({"condition": "a", "f1": values}), "condition", "f1", seed=4).iloc[0]
    assert metrics.estimate(values, seed=4) == tuple(row[["value", "ci_low", "ci_high", "n"]])
    assert metrics.estimate([]).n == 0 and np.isnan(metrics.estimate([]).value)


@pytest.mark.parametrize(
    ("low", "high", "threshold", "side", "expected"),
    [
        (0.1, 0.3, 0.0, "above", True),
        (0.0, 0.3, 0.0, "above", False),  # the threshold belongs to the other side
        (-0.3, -0.1, 0.0, "below", True),
        (-0.3, 0.1, 0.0, "below", False),
        (-0.02, 0.1, -0.03, "above", True),  # no worse by more than 0.03
        (-0.04, 0.1, -0.03, "above", False),
        (np.nan, np.nan, 0.0, "above", False),
        (np.nan, np.nan, 0.0, "below", False),
    ],
)
def test_a_claim_holds_if_the_whole_interval_is_on_its_side(low, high, threshold, side, expected):
    assert metrics.holds(low, high, threshold, side) is expected


def test_an_interval_reads_as_a_sentence_needs_it():
    row = metrics.Estimate(0.1234, -0.01, 1, 1200)
    assert metrics.in_words(row) == "+0.12 [-0.01, +1.00]"
    assert metrics.in_words(row, ".1%", of="n") == "12.3% [-1.0%, 100.0%], n = 1,200"
    assert metrics.in_words(pd.Series(row._replace(ci_low=np.nan)._asdict()), of="seeds") == "+0.12, 1,200 seeds"


def test_paired_difference_is_narrower_than_unpaired_where_pairs_agree():
    rng = np.random.default_rng(0)
    easy = rng.random(300)
    a, b = easy + 0.1, easy + rng.normal(0, 0.01, 300)
    value, low, high = metrics.paired_difference(a, b)
    assert low < value < high
    assert value == pytest.approx(np.mean(a) - np.mean(b))
    assert high - low < 0.005
    with pytest.raises(InputError, match="pair them"):
        metrics.paired_difference([1.0], [1.0, 2.0])


def test_summary_takes_wilson_for_binary_metrics_and_bootstrap_for_others():
    frame = pd.DataFrame({"condition": list("bbaab"), "exact_match": [1, 0, 1, np.nan, 1], "f1": [0.5, 0, 1, 1, 0.25]})
    exact = metrics.summarise(frame, "condition", "exact_match").set_index("condition")
    assert list(exact.index) == ["b", "a"]
    assert list(exact["n"]) == [3, 1]
    assert tuple(exact.loc["b", ["ci_low", "ci_high"]]) == pytest.approx(metrics.wilson_interval(2, 3))
    f1 = metrics.summarise(frame, ["condition"], "f1", seed=4).set_index("condition")
    assert tuple(f1.loc["b", ["ci_low", "ci_high"]]) == metrics.bootstrap_interval([0.5, 0, 0.25], seed=4)
    assert list(f1.columns) == ["metric", "value", "ci_low", "ci_high", "n"]


def stratified_bootstrap(truth, score, samples, rng) -> np.ndarray:
    """Limits of the AUC's percentile bootstrap, each class resampled by itself and every pair compared anew."""
    positives, negatives = score[truth], score[~truth]
    areas = []
    for _ in range(samples):
        above = np.sort(rng.choice(positives, positives.size))
        below = np.sort(rng.choice(negatives, negatives.size))
        wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
        areas.append(wins.mean() / 2 / below.size)
    return np.quantile(areas, [0.025, 0.975])


@pytest.mark.parametrize(("n", "shift", "near"), [(120, 0.4, 0.02), (2000, 0.1, 0.005), (2000, 0.7, 0.005)])
def test_auc_is_mann_whitneys_statistic_and_its_interval_a_stratified_bootstraps(n, shift, near):
    rng = np.random.default_rng(0)
    truth = rng.random(n) < 0.3
    score = np.round(rng.random(n) + shift * truth, 1)  # with ties
    value, low, high = metrics.auc(truth, score)
    wins = mannwhitneyu(score[truth], score[~truth]).statistic
    assert value == pytest.approx(wins / truth.sum() / (~truth).sum())
    assert (low, high) == pytest.approx(stratified_bootstrap(truth, score, 2000, rng), abs=near)


def test_an_aucs_interval_stays_within_its_range_however_few_the_turns():
    assert metrics.auc([True, False], [0.9, 0.1]) == (1, 1, 1)
    assert metrics.auc([True, False, False], [0.5, 0.6, 0.1]) == (0.5, 0, 1)  # one turn has no variance
    value, low, high = metrics.auc([True] * 4 + [False] * 4, [5, 6, 7, 3, 1, 2, 4, 0])
    assert 0 < low < value < high < 1
    with pytest.raises(InputError, match="one class"):
        metrics.auc([True, True], [0.9, 0.1])


def scored_turns(n=400, **columns):
    rng = np.random.default_rng(1)
    truth = rng.random(n) < 0.3
    frame = pd.DataFrame({"conversation": [f"c{i}" for i in range(n)], "turn": 1, "depends_on_context": truth})
    frame["score"] = np.round(rng.random(n) + 0.3 * truth, 2) / 1.3  # with ties
    return frame.astype({"depends_on_context": object}).assign(**columns)


def test_auc_and_curves_by_group_leave_out_what_is_not_known():
    known = scored_turns(layer=0)
    one_class = scored_turns(layer=1).assign(depends_on_context=False)
    some = known.assign(layer=2, depends_on_context=known.depends_on_context.where(known.index < 50, None))
    areas = metrics.auc_by(pd.concat([known, one_class, some]), "layer")
    assert list(areas.layer) == [0, 2]
    assert list(areas.n) == [400, 50]
    expected = metrics.auc(known.depends_on_context[:50], known.score[:50])
    assert tuple(areas.iloc[1][["value", "ci_low", "ci_high"]]) == expected
    roc = metrics.curve_by(pd.concat([known, one_class]), ["layer"], metrics.roc_curve_frame)
    assert set(roc.layer) == {0}
    assert np.trapezoid(roc.true_positive_rate, roc.false_positive_rate) == pytest.approx(areas.value[0])


def test_separation_matches_loops_over_pairs_and_over_ranks():
    table = pd.concat([scored_turns(layer=0), scored_turns(layer=1).assign(depends_on_context=False)])
    found = metrics.separation(table, "layer")
    known = table[table.layer == 0].sort_values("score", ascending=False)
    truth, score = known.depends_on_context.astype(bool).to_numpy(), known.score.to_numpy()
    pairs = [(a > b) + (a == b) / 2 for a in score[truth] for b in score[~truth]]
    at_or_over = [score >= here for here in score[truth]]  # precision at the rank of each dependent turn
    precision = [truth[chosen].mean() for chosen in at_or_over]
    assert found.value.tolist() == pytest.approx([np.mean(pairs), np.mean(precision)])
    assert found.metric.tolist() == ["ROC AUC", "average precision"]
    assert found.layer.tolist() == [0, 0] and found.n.tolist() == [len(known)] * 2


def test_where_no_truth_is_known_there_are_no_rows():
    real = scored_turns(layer=0, variant="standard").assign(depends_on_context=None)
    assert metrics.auc_by(real, "layer").empty and metrics.separation(real, "layer").empty
    assert metrics.curve_by(real, "layer", metrics.precision_recall_frame).empty
    assert metrics.auc_changes(real, "variant", "standard").empty
    assert metrics.selection(real, [0.5]).empty


def test_change_of_auc_is_the_difference_and_its_interval_a_slow_paired_bootstrap():
    rng = np.random.default_rng(2)
    one = scored_turns(150, variant="standard")
    two = one.assign(score=np.round(one.score + rng.normal(0, 0.2, len(one)), 2), variant="authors_code").sample(frac=1)
    (change,) = metrics.auc_changes(pd.concat([one, two]), "variant", "standard").itertuples()
    truth, a, b = one.depends_on_context.to_numpy(bool), one.score.to_numpy(), two.sort_index().score.to_numpy()
    assert change.value == pytest.approx(metrics.auc(truth, b)[0] - metrics.auc(truth, a)[0])
    slow = []
    for _ in range(1000):
        drawn = np.concatenate([rng.choice(np.flatnonzero(side), side.sum()) for side in (truth, ~truth)])
        above, below = drawn[truth[drawn]], drawn[~truth[drawn]]
        wins = [np.mean((s[above, None] > s[below]) + (s[above, None] == s[below]) / 2) for s in (b, a)]
        slow.append(wins[0] - wins[1])
    assert (change.ci_low, change.ci_high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)
    assert (change.variant, change.before, change.n) == ("authors_code", "standard", 150)


def test_selection_agrees_with_precision_and_recall():
    frame = scored_turns()
    table = metrics.selection(frame, [0.3, 0.6, 2.0]).set_index(["threshold", "metric"])
    for threshold in (0.3, 0.6):
        expected = metrics.precision_recall(frame.depends_on_context, frame.score, threshold)
        assert tuple(table.value.loc[threshold]) == pytest.approx(expected)
    assert table.n.loc[0.6, "recall"] == frame.depends_on_context.sum()
    assert np.isnan(table.value.loc[2.0, "precision"])
    assert table.value.loc[2.0, "recall"] == 0
    assert (table.ci_low <= table.ci_high).all()


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.1, 0.2, "holds"), (-0.2, -0.1, "does not hold"), (-0.1, 0.1, "not decided"), (0.0, 0.1, "not decided"),
     (np.nan, np.nan, "no interval")],
)  # fmt: skip
def test_a_verdict_is_on_one_side_only_if_the_whole_interval_is(low, high, says):
    assert metrics.verdict(low, high, 0) == says


def test_curves_and_thresholds_agree_with_counting():
    truth = np.array([True, False, True, False, False, True])
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.2, 0.6])
    for row in metrics.roc_curve_frame(truth, score).itertuples():
        selected = score >= row.threshold
        assert row.true_positive_rate == pytest.approx((selected & truth).sum() / 3)
        assert row.false_positive_rate == pytest.approx((selected & ~truth).sum() / 3)
    for row in metrics.precision_recall_frame(truth, score).iloc[:-1].itertuples():
        selected = score >= row.threshold
        assert row.precision == pytest.approx((selected & truth).sum() / selected.sum())
        assert row.recall == pytest.approx((selected & truth).sum() / 3)
    assert metrics.precision_recall(truth, score, 0.6) == pytest.approx((2 / 3, 2 / 3))  # strictly above
    precision, recall = metrics.precision_recall(truth, score, 0.9)
    assert np.isnan(precision)
    assert recall == 0


def test_every_metric_is_a_fraction_whatever_the_text():
    texts = ["", "the", "\n", "日本 red", "$x$ a-b", "A" * 50, "red, red; blue"]
    for answer, gold in itertools.product(texts, texts):
        keywords = re.findall(r"\w+", gold) or ["red"]
        scores = [metrics.exact_match(answer, [gold]), metrics.token_f1(answer, [gold])]
        scores += [metrics.containment(answer, [gold]), metrics.needle_recall(answer, keywords)]
        assert all(0 <= score <= 1 for score in scores)


def seed_values(rng) -> pd.DataFrame:
    frame = pd.MultiIndex.from_product([["a", "b"], [*"xy"], range(5)], names=["condition", "metric", "seed"]).to_frame(
        index=False
    )
    return frame.assign(value=rng.normal(size=20)).sample(frac=1, random_state=0)


def test_intervals_over_seeds_are_students_and_the_paired_test_is_scipys():
    frame = seed_values(np.random.default_rng(1))
    means = metrics.over_seeds(frame, ["condition", "metric"], within=metrics.UNBOUNDED).set_index(
        ["condition", "metric"]
    )
    for key, part in frame.groupby(["condition", "metric"]):
        theirs = stats.ttest_1samp(part.value, 0)
        low, high = theirs.confidence_interval(0.95)
        row = means.loc[key]
        assert [row.value, row.ci_low, row.ci_high] == pytest.approx([part.value.mean(), low, high])
        assert row.p_value == pytest.approx(theirs.pvalue) and row.n == 5
    differences = metrics.seed_differences(frame, "metric", before="a")
    tested = metrics.over_seeds(differences, "metric", within=metrics.UNBOUNDED).set_index("metric")
    for metric, part in frame.groupby("metric"):
        sides = part.pivot(index="seed", columns="condition", values="value")
        theirs = stats.ttest_rel(sides.b, sides.a)
        assert tested.p_value[metric] == pytest.approx(theirs.pvalue)
        assert tested.value[metric] == pytest.approx((sides.b - sides.a).mean())


def test_fewer_than_five_seeds_have_no_interval_and_equal_seeds_no_width():
    one = pd.DataFrame({"metric": ["x"], "seed": [0], "value": [0.5]})
    row = metrics.over_seeds(one, "metric").iloc[0]
    assert row.value == 0.5 and row.n == 1 and np.isnan([row.ci_low, row.ci_high, row.p_value]).all()
    few = pd.DataFrame({"metric": "x", "seed": range(4), "value": [0.1, 0.2, 0.3, 0.4]})
    row = metrics.over_seeds(few, "metric").iloc[0]
    assert row.value == pytest.approx(0.25) and row.n == 4 and np.isnan([row.ci_low, row.ci_high]).all()
    assert row.p_value == pytest.approx(stats.ttest_1samp(few.value, 0).pvalue)
    same = pd.DataFrame({"metric": "x", "seed": range(5), "value": 1.0})
    row = metrics.over_seeds(same, "metric").iloc[0]
    assert (row.ci_low, row.value, row.ci_high) == (1, 1, 1) and np.isnan(row.p_value)


def test_intervals_over_seeds_stay_within_the_range_of_their_quantity():
    values = [0.9, 1.0, 1.0, 1.0, 1.0]
    frame = pd.DataFrame({"metric": "recall", "seed": range(5), "value": values})
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    row = metrics.over_seeds(frame, "metric").iloc[0]
    assert row.ci_low == pytest.approx(theirs.low) and theirs.high > 1 and row.ci_high == 1
    wide = pd.concat([frame, frame.assign(metric="change", value=[-0.9, 0.1, 0, 0, 0])])
    rows = metrics.over_seeds(wide, "metric", within={"recall": metrics.FRACTION, "change": metrics.CHANGE})
    assert rows.ci_high[0] == 1 and -1 <= rows.ci_low[1] < 0 < rows.ci_high[1]
    with pytest.raises(InputError, match=r"change.*outside \[0, 1\]; pass their range"):
        metrics.over_seeds(wide, "metric")


def test_seeds_that_do_not_pair_or_appear_twice_are_rejected():
    frame = seed_values(np.random.default_rng(2)).sort_values(["condition", "metric", "seed"])
    with pytest.raises(InputError, match="'b' was not run at the seeds of 'a'"):
        metrics.seed_differences(frame[(frame.condition == "a") | (frame.seed < 4)], "metric", before="a")
    with pytest.raises(InputError, match="a seed appears twice in a group"):
        metrics.over_seeds(frame, ["condition"])
