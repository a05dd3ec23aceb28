"""One question under four contexts, and what a model knows without any."""

from dataclasses import replace

import pandas as pd
import pytest

from ctxlib.conversations import Question
from ctxlib.metrics import score_answers
from ctxlib.miniature import texts
from ctxlib.miniature.town import Town
from ctxlib.params import InputError
from ctxlib.questions import contexts, qa

TOWN = texts.context_questions(Town(), 20, 0)
BY_KIND = {kind: [q for q in TOWN if q.kind == kind] for kind in contexts.KINDS}


@pytest.fixture
def nq_swap(tmp_path):
    def row(question, truth, other):
        said = "{} wrote it, they say."
        return {
            "question": question, "org_context": f"{question}: {said.format(truth)}", "org_answer": [truth],
            "sub_context": f"{question}: {said.format(other)}", "sub_answer": [other],
        }  # fmt: skip

    rows = [row("who wrote a", "Ada", "Bo"), row("who wrote a", "Lady Ada", "Cy"), row("who wrote b", "Dee", "Eve")]
    path = tmp_path / "swap.jsonl"
    path.write_text(pd.DataFrame(rows).to_json(orient="records", lines=True), encoding="utf-8")
    return path


def test_each_fact_is_asked_in_every_kind_with_the_same_question():
    assert [len(made) for made in BY_KIND.values()] == [20] * 4
    for four in zip(*BY_KIND.values(), strict=True):
        assert len({q.question for q in four}) == len({q.cluster for q in four}) == 1


def test_only_the_gold_passage_says_the_truth_and_only_the_contradicting_one_its_answer():
    for gold, contradicting, irrelevant, bare in zip(*BY_KIND.values(), strict=True):
        truth, swapped = gold.answers[0], contradicting.answers[0]
        assert truth in gold.context and swapped in contradicting.context and truth != swapped
        assert truth not in contradicting.context and gold.question.split()[-2] not in irrelevant.context.split()
        assert bare.context is None and bare.messages[0].content == bare.question
        assert {q.memory_answer for q in (gold, contradicting, irrelevant, bare)} == {truth}


def test_gold_and_contradicting_prompts_differ_in_nothing_but_the_answer():
    for gold, contradicting in zip(BY_KIND["gold"], BY_KIND["contradicting"], strict=True):
        swapped = contradicting.messages[0].content.replace(contradicting.answers[0], gold.answers[0])
        assert swapped == gold.messages[0].content


@pytest.mark.parametrize("made", [texts.needles, texts.passage_questions, texts.domain_questions])
def test_a_question_without_its_context_is_the_bare_question(made):
    cells = {"lengths": [80], "depths": [50], "per_cell": 2} if made is texts.needles else {"n": 4}
    cells |= {"domain": "code"} if made is texts.domain_questions else {}
    for question in made(Town(), seed=0, **cells):
        text = question.messages[0].content
        assert question.context in text and text == f"{question.context}\n{question.question}"
        bare = contexts.without_context(question)
        assert [m.content for m in bare.messages] == [question.question] and bare.context is None
        assert (bare.answers, bare.memory_answer, bare.id) == (question.answers, question.memory_answer, question.id)


def test_a_question_without_a_passage_has_none_to_leave_out():
    with pytest.raises(InputError, match="has no passage"):
        contexts.without_context(texts.known_fact_questions(Town(), 1, 0)[0])


def test_rows_about_one_question_are_one_cluster_with_one_question_without_a_passage(nq_swap):
    made = contexts.load_contexts(nq_swap)
    assert [q.kind for q in made].count("no_passage") == 2
    assert [q.kind for q in made].count("gold") == [q.kind for q in made].count("contradicting") == 3
    (bare,) = (q for q in made if q.id == "no_passage-who wrote a")
    assert bare.answers == ("Ada", "Lady Ada")


def test_an_irrelevant_passage_is_about_another_question_and_says_neither_answer(nq_swap):
    for question in contexts.load_contexts(nq_swap):
        if question.kind == "irrelevant":
            assert not question.context.startswith(question.question) and question.answers[0] not in question.context


def test_the_passages_of_nq_swap_are_found_in_the_prompts_of_load_questions(nq_swap):
    for question in qa.load_questions(nq_swap):
        assert question.context in question.messages[0].content and question.cluster == question.question


def test_known_is_what_was_answered_without_a_passage(nq_swap):
    made = contexts.load_contexts(nq_swap)
    answers = pd.DataFrame({"id": [q.id for q in made], "answer": ["Bo"] * len(made)})
    answers.loc[answers.id == "no_passage-who wrote b", "answer"] = "It was Dee."
    scored = score_answers(answers, made)
    asked = {q.id: q for q in made}
    expected = [asked[key].cluster == "who wrote b" for key in scored.id]
    assert contexts.known(scored, made).tolist() == expected


def test_known_refuses_answers_without_their_closed_book_twin():
    gold = BY_KIND["gold"][:1]
    scored = score_answers(pd.DataFrame({"id": [gold[0].id], "answer": ["x"]}), gold)
    with pytest.raises(InputError, match="not asked without a passage"):
        contexts.known(scored, gold)


def test_an_answer_inside_a_longer_word_is_not_said():
    question = replace(BY_KIND["gold"][0], answers=("23",))
    assert isinstance(question, Question)
    scored = score_answers(pd.DataFrame({"id": [question.id] * 1, "answer": ["1234"]}), [question])
    assert scored.containment.tolist() == [0.0]


def test_squad_has_no_swapped_passages(tmp_path):
    path = tmp_path / "squad.jsonl"
    path.write_text('{"id": "a", "context": "Ada.", "question": "Who?", "answers": {"text": ["Ada"]}}\n')
    with pytest.raises(InputError, match="org_context"):
        contexts.load_contexts(path)


def test_memo_traps_answer_is_the_ending_that_was_asked_for_and_its_memory_the_other(tmp_path):
    path = tmp_path / "trap.csv"
    path.write_text('prompt,classes,answer_index\n"End in ""heavy"": Absence","[\' heavy.\', \' fonder.\']",0\n')
    (question,) = contexts.load_memo_trap(path)
    assert (question.answers, question.memory_answer) == (("heavy.",), "fonder.")
    answers = pd.DataFrame({"id": [question.id], "answer": ["It grows fonder."]})
    scored = score_answers(answers, [question]).iloc[0]
    assert (scored.containment, scored.says_memory) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,answer\na,b\n", "no column classes (found prompt, answer)"),
        ("", "no column prompt (found none)"),
        ("prompt,classes,answer_index\na,b,0\n", "line 2: classes"),
        ("prompt,classes,answer_index\na,\"[' A', ' B']\",0\n", "letters to choose"),
        ("prompt,classes,answer_index\na,\"['x', 'y']\",5\n", "line 2: classes"),
    ],
)
def test_a_file_that_is_no_memo_trap_is_refused_by_line_and_column(text, said, tmp_path):
    (tmp_path / "trap.csv").write_text(text)
    with pytest.raises(InputError) as error:
        contexts.load_memo_trap(tmp_path / "trap.csv")
    assert said in str(error.value)
