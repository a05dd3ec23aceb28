"""Marking: strict thresholds, text that stays text, and the two controls."""

import copy

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlib.conversations import Conversation, Corpus, Message
from ctxlib.indicator import (
    NOT_SCORED,
    fractions_over,
    mark,
    mark_oracle,
    mark_random,
    marked_example,
    threshold_for_fraction,
    turn_table,
)
from ctxlib.params import InputError, Scoring
from ctxlib.roles import Role, role_map
from ctxlib.scoring import score_corpus


def turn(user, answer, depends=None):
    return Message("user", user), Message("assistant", answer, depends_on_context=depends)


@pytest.fixture
def corpus():
    return Corpus(
        (
            Conversation("p", (Message("system", "s"), *turn("one", "1", True), *turn("two?", "2", False))),
            Conversation("q", (*turn("three", "3", True), Message("user", "and?"))),
            Conversation("r", (*turn("[IND]", "4", False),)),
        ),
        pd.DataFrame({"reason": ["refusal"], "n": [7]}),
        "a test",
    )


def scores_of(*rows, layer=2):
    frame = pd.DataFrame(rows, columns=["conversation", "turn", "score"])
    return frame.assign(layer=layer, variant="standard", seed_model="m")


SCORES = scores_of(("p", 1, 0.6), ("p", 2, 0.61), ("q", 1, 0.9), ("r", 1, 0.1))


def users(corpus):
    return [(m.content, m.indicated) for c in corpus.conversations for m in c.messages if m.role == "user"]


def test_threshold_is_strict_and_scores_stay_out_of_the_text(corpus):
    marked = mark(corpus, SCORES, 0.6, layer=2)
    assert users(marked) == [("one", False), ("two?", True), ("three", True), ("and?", False), ("[IND]", False)]
    answers = [m for c in marked.conversations for m in c.messages if m.role == "assistant"]
    assert [m.score for m in answers] == [0.6, 0.61, 0.9, 0.1]
    assert [m.content for m in answers] == ["1", "2", "3", "4"]
    assert marked.dropped.equals(corpus.dropped)


def test_marking_again_replaces_the_marks(corpus):
    again = mark(mark(corpus, SCORES, 0.0, layer=2), SCORES, 0.7, layer=2)
    assert again == mark(corpus, SCORES, 0.7, layer=2) or users(again) == users(mark(corpus, SCORES, 0.7, layer=2))


def test_the_turn_table_has_a_row_an_answered_turn_with_score_and_truth(corpus):
    frame = turn_table(mark(corpus, SCORES, 0.6, layer=2))
    assert list(zip(frame.conversation, frame.turn, strict=True)) == [("p", 1), ("p", 2), ("q", 1), ("r", 1)]
    assert list(frame.indicated) == [False, True, True, False]
    assert list(frame.score) == [0.6, 0.61, 0.9, 0.1]
    assert list(frame.depends_on_context) == [True, False, True, False]
    assert set(frame.kind) == {"unknown"} and set(frame.words) == {1}


def test_the_turn_table_says_where_nothing_is_known():
    known = (Message("user", "a b"), Message("assistant", "c d e", kind="passage", depends_on_context=False))
    unknown = (Message("user", "f"), Message("assistant", "g"))
    made = Corpus((Conversation("x", (*known, *unknown)),), pd.DataFrame({"reason": [], "n": []}), "a test")
    told, untold = turn_table(made).itertuples(index=False)
    assert told[:4] == ("x", 1, "passage", False) and told.words == 3
    assert untold[:4] == ("x", 2, "unknown", None)
    assert turn_table(made).score.isna().all() and not turn_table(made).indicated.any()


def test_the_turn_table_has_the_rows_of_the_scores(model, tokenizer, corpus):
    scores = score_corpus(model, tokenizer, corpus, Scoring(), layers=[1], progress=False)
    assert scores[["conversation", "turn"]].equals(turn_table(corpus)[["conversation", "turn"]])


def test_the_example_shows_marked_and_unmarked_turns_if_there_are_such(corpus):
    assert marked_example(mark(corpus, SCORES, 0.6, layer=2)).id == "p"
    assert marked_example(mark(corpus, SCORES, 0.7, layer=2)).id == "q"
    assert marked_example(mark(corpus, SCORES, 1.0, layer=2)).id == "r"  # none is marked: the shortest


def test_paper_reading_ends_every_scored_turn_with_a_full_stop(corpus):
    marked = mark(corpus, SCORES[SCORES.conversation != "q"], 0.6, layer=2, variant="authors_code")
    assert users(marked) == [("one.", False), ("two?", True), ("three", False), ("and?", False), ("[IND]", False)]


def test_turns_without_a_score_are_left_unmarked_and_counted(corpus):
    marked = mark(corpus, SCORES[:1], 0.1, layer=2)
    assert users(marked)[0] == ("one", True) and sum(indicated for _, indicated in users(marked)) == 1
    assert dict(zip(marked.dropped.reason, marked.dropped.n, strict=True)) == {"refusal": 7, NOT_SCORED: 3}
    assert [m.score for m in marked.conversations[1].messages] == [None, None, None]


def test_user_text_that_equals_the_indicator_stays_text(corpus, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["[IND]"], special_tokens=True)
    indicator = tokenizer.convert_tokens_to_ids("[IND]")
    for threshold, expected in ((0.6, 0), (0.05, 1)):
        message = mark(corpus, SCORES, threshold, layer=2).conversations[2].messages
        tokens = role_map(tokenizer, message, indicator="[IND]")
        assert (tokens.ids == indicator).sum() == expected
        assert tokenizer.decode(tokens.ids[tokens.roles == Role.USER]) == "[IND]"


def test_oracle_marks_what_depends_on_its_context(corpus):
    assert [indicated for _, indicated in users(mark_oracle(corpus))] == [True, False, True, False, False]
    unknown = Corpus((Conversation("u", turn("x", "y")),), corpus.dropped, "a test")
    with pytest.raises(InputError, match="'u', turn 1"):
        mark_oracle(unknown)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 4), seed=st.integers(0, 2**16))
def test_random_marks_exactly_n_answered_turns_reproducibly(n, seed):
    plain = Corpus(
        (
            Conversation("a", (*turn("1", "2"), *turn("3", "4"), *turn("5", "6"))),
            Conversation("b", (*turn("7", "8"), Message("user", "9"))),
        ),
        pd.DataFrame({"reason": [], "n": []}),
        "a test",
    )
    marked = users(mark_random(plain, n, seed))
    assert sum(indicated for _, indicated in marked) == n and marked[-1] == ("9", False)
    assert marked == users(mark_random(plain, n, seed))


def test_random_cannot_mark_more_turns_than_there_are(corpus):
    with pytest.raises(InputError, match="cannot mark 5 turns: a test has 4"):
        mark_random(corpus, 5, 0)


def test_fractions_are_strict_counts_with_wilson_intervals():
    table = fractions_over(SCORES, [0.6, 0.0, 1.0]).set_index("threshold")
    assert table.fraction.tolist() == [0.5, 1.0, 0.0] and table.n_over.tolist() == [2, 4, 0] and set(table.n) == {4}
    z, p, n = 1.959964, 0.5, 4  # Wilson 1927, closed form
    centre, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
    assert table.loc[0.6, ["low", "high"]].tolist() == pytest.approx([centre - half, centre + half], abs=1e-5)


def test_fractions_are_counted_layer_by_layer():
    both = pd.concat([SCORES, scores_of(("p", 1, 0.9), layer=3)])
    table = fractions_over(both, [0.6]).set_index("layer")
    assert table.fraction.to_dict() == {2: 0.5, 3: 1.0} and table.n.to_dict() == {2: 4, 3: 1}


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30, unique=True), fraction=st.floats(0, 1))
def test_threshold_for_fraction_selects_that_fraction(values, fraction):
    scores = scores_of(*[(f"c{i}", 1, value) for i, value in enumerate(values)])
    threshold = threshold_for_fraction(scores, fraction)
    assert sum(value > threshold for value in values) == round(fraction * len(values))


def test_bad_scores_are_named(corpus):
    with pytest.raises(InputError, match=r"none for layer 7; there are layers \[2\]"):
        mark(corpus, SCORES, 0.6, layer=7)
    with pytest.raises(InputError, match="more than one at layer 2"):
        mark(corpus, pd.concat([SCORES, SCORES]), 0.6, layer=2)
    with pytest.raises(InputError, match="other data"):
        mark(corpus, SCORES.assign(conversation="x" + SCORES.conversation), 0.6, layer=2)
    with pytest.raises(InputError, match="'r', turn 1: the score is not a number"):
        mark(corpus, SCORES.replace({"score": {0.1: float("nan")}}), 0.6, layer=2)
    with pytest.raises(InputError, match="the frame is empty"):
        fractions_over(SCORES[:0], [0.5])
    with pytest.raises(InputError, match="several layers"):
        threshold_for_fraction(pd.concat([SCORES, SCORES.assign(layer=3)]), 0.5)
    with pytest.raises(InputError, match="fraction 2"):
        threshold_for_fraction(SCORES, 2.0)
