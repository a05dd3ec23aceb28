"""Each word task has the answer that doing it by hand gives; each rule is checked on answers made by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlib.conversations import Message, Question, Rule
from ctxlib.metrics import bootstrap_interval, wilson_interval
from ctxlib.params import InputError
from ctxlib.questions.instructions import (
    RULE_METRICS,
    RULES,
    WORD_TASKS,
    check_answers,
    count_words,
    follows,
    instruction,
    instruction_accuracy,
    score_rules,
    verifiable_questions,
    word_questions,
    word_task,
)

WORDS = ["hats", "kites", "goats", "flutes", "cakes", "wells", "tea"]


def test_repeat_reverse_and_count_by_hand():
    assert word_task("repeat", WORDS[:3]) == ("Repeat these words: hats kites goats.", "hats kites goats.")
    assert word_task("reverse", WORDS[:3]) == ("Reverse these words: hats kites goats.", "goats kites hats.")
    assert word_task("count", WORDS[:3]) == ("Count these words: hats kites goats.", "There are three words.")


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        word_task("sing", WORDS)


def test_tasks_come_in_turn_and_the_seed_decides_their_words():
    questions = word_questions(WORDS, 9, seed=0)
    assert [question.kind for question in questions] == list(WORD_TASKS) * 3
    assert questions == word_questions(WORDS, 9, seed=0) != word_questions(WORDS, 9, seed=1)


# verifiable instructions


@pytest.mark.parametrize(
    ("rule", "followed", "broken"),
    [
        (Rule("words_at_least", 3), ["one two three", "don't - stop, now!"], ["one two", "- - - one two"]),
        (Rule("words_at_most", 2), ["one two", "one"], ["one two three"]),
        (Rule("words_exactly", 2), ["one two", "* one\n* two"], ["one", "one two three"]),
        (Rule("sentences", 2), ['He said "Go!" Then we left.', "It is 3.5 km. Far", "1. Go. Stay"], ["A. B. C."]),
        (Rule("sentences", 1), ["Dr. Hill came, e.g. on foot.", "What?!",], ["Dr. Hill came. I left."]),
        (Rule("paragraphs", 2), ["a\nb\n\nc", "a\n \n\nc\n"], ["a\nb", "a\n\nb\n\nc"]),
        (Rule("bullets", 2), ["So:\n* a\n  - b", "- a\n- b\nDone."], ["* a", "*a*\n**b**", "1. a\n2. b"]),
        (Rule("begins_with", text="So:"), ["So: yes", "  So: yes"], ["so: yes", "Well. So: yes"]),
        (Rule("ends_with", text="The end."), ["Yes. The end.", "The end.\n"], ["The end. Yes.", "the end."]),
        (Rule("includes", text="hive"), ["A hive.", "HIVE!"], ["Many hives.", "archive"]),
        (Rule("includes_times", 2, "hive"), ["Hive, hive", "hive hive hive"], ["hive", "hives hive"]),
        (Rule("excludes", text="hot"), ["A hotel.", "cold"], ["Hot!", "so hot"]),
        (Rule("lower_case"), ["so it is, 3 times"], ["So it is", "123"]),
        (Rule("upper_case"), ["SO IT IS, 3 TIMES"], ["So IT IS", "123"]),
        (Rule("no_commas"), ["So it is."], ["So, it is.", "这,那"]),
        (Rule("repeats_request", text="Say it."), ["Say it. It.", '"say  it." It.'], ["It. Say it.", "It."]),
        (Rule("json"), ['{"a": 1}', '```json\n{"a": [1, 2]}\n```'], ['[1]', '"a"', "{a: 1}", 'So: {"a": 1}']),
        (Rule("json"), ['{"a": {}}'], ['{"a": ' * 99999]),
        (Rule("quoted"), ['"So it is."', "“So it is.”"], ['So "it" is', '"So it is', '""']),
    ],
)  # fmt: skip
def test_each_rule_on_answers_made_by_hand(rule, followed, broken):
    assert [answer for answer in followed if not follows(answer, rule)] == []
    assert [answer for answer in ["", " \n", *broken] if follows(answer, rule)] == []


def test_every_rule_is_tested_by_hand():
    (cases,) = [mark.args[1] for mark in test_each_rule_on_answers_made_by_hand.pytestmark]
    assert {rule.name for rule, _, _ in cases} == set(RULES)


def test_loose_accuracy_forgives_first_and_last_line_and_asterisks_and_nothing_else():
    ends = Rule("ends_with", text="The end.")
    begins = Rule("begins_with", text="So:")
    for answer, rule in (
        ("Sure, here it is!\nSo: yes", begins),
        ("Yes. The end.\nI hope you like it.", ends),
        ("Yes. **The end.**", ends),
        ("Sure!\n**So: yes**\nAnything else?", begins),
        ("Sure!\n**So:** {\nYes. The end.*\nAnything else?", ends),
    ):
        assert not follows(answer, rule) and follows(answer, rule, loose=True)
    assert not follows("Sure!\nWell!\nSo: yes", begins, loose=True)
    assert not follows("_So: yes_", begins, loose=True)
    assert not follows("", Rule("no_commas"), loose=True)


@given(st.text(alphabet="aB ,.*\n-", max_size=30), st.sampled_from(sorted(RULES)), st.integers(1, 4))
def test_what_is_followed_strictly_is_followed_loosely(answer, name, number):
    rule = Rule(name, number, "a")
    assert follows(answer, rule) <= follows(answer, rule, loose=True)


def obedient(question):
    """An answer that follows all rules of a question, put together from the rules one by one."""
    rules = {rule.name: rule for rule in question.rules}
    if "json" in rules:
        said = next((rule.text for rule in question.rules if rule.name.startswith("includes")), "none")
        return json.dumps({"answer": [said] * 4})
    head = next((rules[name].text for name in ("repeats_request", "begins_with") if name in rules), "")
    tail = rules["ends_with"].text if "ends_with" in rules else ""
    words = next(([r.text] * max(1, r.number) for n, r in rules.items() if n.startswith("includes")), ["so"])
    lines = [" ".join(words)]
    separator = "\n"
    if "bullets" in rules:
        lines = ["* " + " ".join(words)] + ["* so"] * (rules["bullets"].number - 1)
    if "paragraphs" in rules:
        separator, lines = "\n\n", [" ".join(words)] + ["so"] * (rules["paragraphs"].number - 1)
    if "sentences" in rules:
        n = rules["sentences"].number - bool(tail)
        lines = [". ".join([" ".join(words), *["so"] * (n - 1)]) + "."]
    lines[0] = f"{head}\n{lines[0]}".strip() if "bullets" in rules else f"{head} {lines[0]}".strip()

    def whole():
        text = separator.join(lines)
        if tail:
            text += ("\n" if "bullets" in rules else " ") + tail
        return f'"\n{text}"' if "quoted" in rules and "bullets" in rules else f'"{text}"' if "quoted" in rules else text

    least = next((rules[n].number for n in ("words_at_least", "words_exactly") if n in rules), 0)
    while count_words(whole()) < least:
        lines[-1] += " so"
    return whole().upper() if "upper_case" in rules else whole()


def test_every_question_can_be_followed_and_its_prompt_says_its_rules():
    questions = verifiable_questions(1500, seed=0)
    for question in questions:
        answer = obedient(question)
        for rule in question.rules:
            assert follows(answer, rule), (question.messages[0].content, answer)
            assert instruction(rule) in question.messages[0].content
            assert rule.name in question.kind
    pairs = {frozenset(rule.name for rule in question.rules) for question in questions}
    possible = {frozenset((a, b)) for a in RULES for b in RULES if not RULES[a].clashes(RULES[b])}
    assert {pair for pair in pairs if len(pair) == 2} == possible
    assert {frozenset((name,)) for name in RULES} <= pairs


def test_rules_come_in_turn_and_the_seed_decides_the_rest():
    questions = verifiable_questions(2 * len(RULES), seed=0)
    assert [question.rules[0].name for question in questions] == list(RULES) * 2
    assert questions == verifiable_questions(2 * len(RULES), seed=0) != verifiable_questions(2 * len(RULES), seed=1)
    assert len({question.id for question in questions}) == len(questions)


@pytest.fixture
def answered():
    """Four questions: two rules both followed, one of two, one loosely only, and one without rules."""
    rules = [
        (Rule("no_commas"), Rule("begins_with", text="So:")),
        (Rule("no_commas"), Rule("lower_case")),
        (Rule("ends_with", text="The end."),),
        (),
    ]
    questions = [
        Question(f"q{i}", "instructions", "k", (Message("user", "?"),), rules=of_it) for i, of_it in enumerate(rules)
    ]
    answers = ["So: yes", "So it is", "**The end.**", "Whatever"]
    return pd.DataFrame({"id": ["q3", "q2", "q0", "q1"], "answer": [answers[i] for i in (3, 2, 0, 1)]}), questions


def test_scores_of_each_question_by_hand(answered):
    frame, questions = answered
    scored = score_rules(frame.set_index(pd.Index([7, 8, 9, 10])), questions)
    assert list(scored.columns) == ["id", "answer", *RULE_METRICS] and list(scored.index) == [7, 8, 9, 10]
    assert scored[list(RULE_METRICS)].iloc[1:].values.tolist() == [[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0.5, 0.5]]
    assert scored[list(RULE_METRICS)].iloc[0].isna().all()
    with pytest.raises(InputError, match="no question has the id 'q9'"):
        score_rules(frame.assign(id="q9"), questions)
    with pytest.raises(InputError, match="rule 'sing': expected one of words_at_least"):
        follows("la", Rule("sing"))


def test_accuracies_of_prompts_and_of_instructions_by_hand(answered):
    accuracy = instruction_accuracy(check_answers(*answered)).set_index(["level", "criterion"])
    expected = [1 / 3, 3 / 5, 2 / 3, 4 / 5]
    assert list(accuracy.index) == [(level, how) for how in ("strict", "loose") for level in ("prompt", "instruction")]
    assert accuracy["value"].tolist() == pytest.approx(expected)
    assert accuracy["n"].tolist() == [3, 5, 3, 5]
    assert accuracy.loc[("prompt", "strict"), ["ci_low", "ci_high"]].tolist() == list(wilson_interval(1, 3))


def test_the_interval_of_instructions_is_that_of_the_mean_where_each_question_has_one():
    rng = np.random.default_rng(0)
    checked = pd.DataFrame({"id": [f"q{i}" for i in range(40)], "rule": "json", "strict": rng.random(40) < 0.6})
    accuracy = instruction_accuracy(checked.assign(loose=checked["strict"])).set_index(["level", "criterion"])
    interval = tuple(accuracy.loc[("instruction", "strict"), ["ci_low", "ci_high"]])
    assert interval == pytest.approx(bootstrap_interval(checked["strict"]))


def test_the_interval_takes_the_rules_of_one_question_together():
    one_by_one = pd.DataFrame({"id": [f"q{i}" for i in range(60)], "rule": "json", "strict": [True, False] * 30})
    together = one_by_one.assign(id=[f"q{i // 2 % 30}" for i in range(60)], strict=[True] * 30 + [False] * 30)
    widths = []
    for checked in (one_by_one, together):
        row = instruction_accuracy(checked.assign(loose=True)).iloc[1]
        widths.append(row["ci_high"] - row["ci_low"])
    assert widths[1] == pytest.approx(widths[0] * math.sqrt(2), rel=0.15)


def test_no_answers_have_no_accuracy():
    accuracy = instruction_accuracy(check_answers(pd.DataFrame({"id": [], "answer": []}), []))
    assert accuracy["value"].isna().all() and (accuracy["n"] == 0).all()
