"""Each word task has the answer that doing it by hand gives."""

import pytest

from ctxlib.instructions import WORD_TASKS, word_questions, word_task

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
