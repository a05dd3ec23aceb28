"""The needle stands where it should, in a context as long as reported."""

import pytest

from ctxlib.needle import place_needle, read_haystack, text_needles
from ctxlib.params import InputError

SENTENCES = [f"Sentence number {n} says nothing." for n in range(30)]
NEEDLE = "The best thing to do is to eat a sandwich."


@pytest.fixture
def haystack(tmp_path):
    (tmp_path / "b.txt").write_text("\n".join(SENTENCES[15:]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(SENTENCES[:15]), encoding="utf-8")
    return tmp_path


def ask(sentences, tokenizer, **changes):
    cells = {"lengths": [120, 200], "depths": [0, 50, 100], "per_cell": 2, "seed": 0}
    return text_needles(
        sentences, tokenizer, needle=NEEDLE, question="What is best?", keywords=["eat", "sandwich"], **cells | changes
    )


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (50, 2), (100, 4)])
def test_depth_is_the_share_of_sentences_before_the_needle(depth, place):
    text = place_needle(["A.", "B.", "C.", "D."], "N.", depth)
    assert text.split().index("N.") == place


def test_a_haystack_is_read_in_the_order_of_names_and_without_newlines(haystack):
    assert read_haystack(haystack) == SENTENCES


def test_a_context_is_never_longer_than_reported_and_at_most_one_sentence_shorter(haystack, tokenizer):
    sentence = max(len(tokenizer(f" {s}", add_special_tokens=False)["input_ids"]) for s in SENTENCES)
    questions = ask(read_haystack(haystack), tokenizer, lengths=[300, 400])
    assert len(questions) == 2 * 3 * 2
    for question in questions:
        context = question.messages[0].content.split(": \n", 1)[1].rpartition("\n\nQuestion:")[0]
        tokens = len(tokenizer(f" {context}", add_special_tokens=False)["input_ids"])
        assert question.context_length_tokens - sentence <= tokens <= question.context_length_tokens
        assert context.count(NEEDLE) == 1


def test_repetitions_of_a_cell_are_other_stretches_and_a_seed_gives_the_same(haystack, tokenizer):
    first, second = ask(SENTENCES, tokenizer, lengths=[300], depths=[50])
    assert first.messages != second.messages
    assert ask(SENTENCES, tokenizer, lengths=[300], depths=[50]) == [first, second]


def test_too_short_a_haystack_and_an_empty_folder_are_said(haystack, tmp_path, tokenizer):
    with pytest.raises(InputError, match="asks for 100000"):
        ask(SENTENCES, tokenizer, lengths=[100_000])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_haystack(tmp_path / "empty")
