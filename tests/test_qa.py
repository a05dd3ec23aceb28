"""Questions from files in SQuAD's format."""

import json
from pathlib import Path

import pytest

from ctxlib.params import InputError
from ctxlib.qa import squad_questions

XQUAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad" / "xquad.en.json"


def squad(path, answers):
    qa = {"id": "q1", "question": "Who?", "answers": answers}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ada wrote it.", "qas": [qa]}]}]}))
    return path


def test_a_question_holds_its_passage_and_every_distinct_gold_answer(tmp_path):
    file = squad(tmp_path / "s.json", [{"text": "Ada"}, {"text": "Ada"}, {"text": "Ada L."}])
    (question,) = squad_questions(file)
    assert question.answers == ("Ada", "Ada L.")
    assert question.messages[-1].content.startswith("Ada wrote it.\nAnswer the question according to")


def test_a_question_without_an_answer_has_the_empty_one(tmp_path):
    assert squad_questions(squad(tmp_path / "s.json", []))[0].answers == ("",)


@pytest.mark.parametrize("content", ["{", "{}", '{"data": []}', '{"data": [{"paragraphs": [{}]}]}'])
def test_another_format_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=r"bad\.json.*qa\.source"):
        squad_questions(tmp_path / "bad.json")


@pytest.mark.skipif(not XQUAD.exists(), reason="needs the XQuAD file in ../shared/data")
def test_xquad_gives_all_its_questions_and_a_seed_the_same_sample():
    assert len(squad_questions(XQUAD)) == 1190
    one, again, other = (squad_questions(XQUAD, 20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
