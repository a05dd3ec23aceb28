"""SQuAD, QuAC and DROP as questions: official files, the hub's rows, the paper's prompts."""

import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from datasets import Dataset, Features, Sequence, Value

from ctxlib.generate import answer_questions
from ctxlib.metrics import by_dialogue, drop_scores, score_answers
from ctxlib.models import Subject
from ctxlib.params import InputError
from ctxlib.questions.qa import load_questions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
XQUAD, QUAC, DROP = DATA / "squad/xquad.en.json", DATA / "quac/quac_sample.json", DATA / "drop/drop_sample.json"
CONTRAST = DATA / "drop/drop_contrast_sets_test.json"
NO_DATE = {"day": "", "month": "", "year": ""}


def needs(file):
    return pytest.mark.skipif(not file.exists(), reason=f"needs {file.name} in ../shared/data")


def write(folder, content, name="file.json"):
    (folder / name).write_text(json.dumps(content))
    return folder / name


def squad(*qas):
    return {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Ada wrote it.", "qas": list(qas)}]}]}


def squad_qa(answers, id="q1", **more):
    return {"id": id, "question": "Who?", "answers": [{"text": text, "answer_start": 0} for text in answers], **more}


def quac_qa(number, answers, dialogue="C_1"):
    return {
        "id": f"{dialogue}_q#{number}",
        "question": f"Question {number}?",
        "answers": [{"text": text, "answer_start": 0} for text in answers],
        "orig_answer": {"text": f"original {number}", "answer_start": 0},
        "yesno": "x",
        "followup": "y",
    }


def quac(sizes=(3,), **article):
    return {
        "data": [
            {
                "paragraphs": [
                    {
                        "id": f"C_{d}",
                        "context": "Ada wrote it. CANNOTANSWER",
                        "qas": [quac_qa(i, ["Ada", "CANNOTANSWER", "Ada L."], f"C_{d}") for i in range(size)],
                    }
                ],
                **article,
            }
            for d, size in enumerate(sizes, start=1)
        ]
    }


def drop_answer(number="", spans=(), **date):
    return {"number": number, "spans": list(spans), "date": NO_DATE | date}


def drop(answer, validated=()):
    qa = {"query_id": "d1", "question": "How many?", "answer": answer, "validated_answers": list(validated)}
    return {"nfl_1": {"passage": "Two kicks.", "qa_pairs": [qa]}}


def hub(monkeypatch, rows, features=None):
    """Lets the hub hold `rows`; gives the list of what is asked of it."""
    asked = []

    def load_dataset(name, split, **more):
        asked.append((name, split, more))
        return Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_squad_question_holds_its_passage_and_every_distinct_gold_answer(tmp_path):
    (question,) = load_questions(write(tmp_path, squad(squad_qa(["Ada", "Ada", "Ada L."]))))
    assert (question.id, question.family, question.kind) == ("q1", "qa", "squad")
    assert question.answers == ("Ada", "Ada L.")
    assert question.annotations == (("Ada",), ("Ada",), ("Ada L.",))
    (message,) = question.messages
    assert message.role == "user"
    assert message.content == "Ada wrote it.\nAnswer the question according to the above passage: Who?"


def test_the_plain_prompt_is_passage_and_question(tmp_path):
    for content in (squad(squad_qa(["Ada"])), quac([1]), drop(drop_answer("2"))):
        (question,) = load_questions(write(tmp_path, content), prompt="plain", variant="authors_code")
        context, asked = {"C_1_q#0": ("Ada wrote it.", "Question 0?"), "d1": ("Two kicks.", "How many?")}.get(
            question.id, ("Ada wrote it.", "Who?")
        )
        assert question.messages[0].content == f"{context} {asked}"


def test_a_passage_with_braces_is_left_as_it_is(tmp_path):
    content = squad(squad_qa(["Ada"]))
    content["data"][0]["paragraphs"][0]["context"] = "A {context} in {0} braces."
    (question,) = load_questions(write(tmp_path, content))
    assert question.messages[0].content.startswith("A {context} in {0} braces.\nAnswer")


def test_squad_2_is_told_by_its_content_and_its_impossible_questions_by_kind(tmp_path):
    impossible = squad_qa([], "q2", is_impossible=True, plausible_answers=[{"text": "Bob", "answer_start": 0}])
    one, other = load_questions(write(tmp_path, squad(squad_qa(["Ada"], is_impossible=False), impossible)))
    assert (one.kind, one.answers) == ("squad_v2", ("Ada",))
    assert (other.kind, other.answers, other.annotations) == ("squad_v2_no_answer", ("",), ())
    assert load_questions(write(tmp_path, squad(squad_qa([]))))[0].kind == "squad_v2_no_answer"


def test_quac_of_the_paper_is_the_first_question_behind_title_and_background(tmp_path):
    file = write(tmp_path, quac([3, 2], title="Ada", background="A countess."))
    one, other = load_questions(file, variant="authors_code")
    assert (one.id, other.id) == ("C_1_q#0", "C_2_q#0")
    assert (one.kind, one.dialogue) == ("quac", "C_1")
    assert one.messages[0].content == (
        "Title: Ada\nA countess. Ada wrote it. \n"
        "Answer the question with pieces from the the above passage: Question 0?"
    )


def test_quac_asks_every_question_behind_the_dialogue_so_far(tmp_path):
    questions = load_questions(write(tmp_path, quac([3])))
    assert [len(question.messages) for question in questions] == [1, 3, 5]
    last = questions[-1]
    assert [message.role for message in last.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message.content for message in last.messages] == [
        "Ada wrote it. CANNOTANSWER\nAnswer the question with pieces from the above passage: Question 0?",
        "original 0",
        "Question 1?",
        "original 1",
        "Question 2?",
    ]
    assert last.annotations == (("Ada",), ("CANNOTANSWER",), ("Ada L.",))
    assert last.answers == ("Ada", "Ada L.")
    assert {question.dialogue for question in questions} == {"C_1"}


def test_quac_has_no_answer_where_half_of_the_annotators_found_none(tmp_path):
    content = quac([0])
    content["data"][0]["paragraphs"][0]["qas"] = [quac_qa(0, ["Ada", "CANNOTANSWER"]), quac_qa(1, ["Ada"])]
    one, other = load_questions(write(tmp_path, content))
    assert (one.kind, one.answers) == ("quac_no_answer", ("CANNOTANSWER",))
    assert (other.kind, other.answers) == ("quac", ("Ada",))


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        (drop_answer("2"), ("2",)),
        (drop_answer("0"), ("0",)),
        (drop_answer(spans=["red", "blue"]), ("red", "blue")),
        (drop_answer(day="5", month="May", year="1990"), ("5 May 1990",)),
        (drop_answer(month="May", year="1990"), ("May 1990",)),
        ({"number": "", "date": {}, "spans": ["red"]}, ("red",)),
        (drop_answer("2", ["two"]), ("2",)),
        ({"spans": [], "date": {"year": "1990"}}, ("1990",)),
    ],
)
def test_a_drop_answer_is_its_number_else_its_spans_else_its_date(tmp_path, answer, spans):
    (question,) = load_questions(write(tmp_path, drop(answer)))
    assert question.kind == "drop"
    assert question.annotations == (spans,)
    assert question.answers == (", ".join(spans),)
    assert question.messages[0].content.startswith("Two kicks.\nAnswer the question according to")


def test_drop_keeps_its_annotators_apart_and_in_order(tmp_path):
    validated = [drop_answer(spans=["red", "blue"]), drop_answer("2")]
    (question,) = load_questions(write(tmp_path, drop(drop_answer("2"), validated)))
    assert question.annotations == (("2",), ("red", "blue"), ("2",))
    assert question.answers == ("2", "red, blue")


def test_hub_rows_of_squad_are_the_files_questions(tmp_path, monkeypatch):
    features = Features(
        {
            "id": Value("string"),
            "title": Value("string"),
            "context": Value("string"),
            "question": Value("string"),
            "answers": Sequence({"text": Value("string"), "answer_start": Value("int32")}),
        }
    )
    rows = [
        {"id": id, "title": "T", "context": "Ada wrote it.", "question": "Who?", "answers": answers}
        for id, answers in (
            ("q1", {"text": ["Ada", "Ada L."], "answer_start": [0, 0]}),
            ("q2", {"text": [], "answer_start": []}),
        )
    ]
    asked = hub(monkeypatch, rows, features)
    from_hub = load_questions("rajpurkar/squad_v2")
    assert asked == [("rajpurkar/squad_v2", "validation", {"revision": None})]
    assert from_hub == load_questions(write(tmp_path, squad(squad_qa(["Ada", "Ada L."]), squad_qa([], "q2"))))


TEXTS, STARTS = [["Ada", "CANNOTANSWER", "Ada L."]] * 2, [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    "answers",  # `datasets` gives a sequence of objects as an object of lists or as a list of objects
    [
        {"texts": TEXTS, "answer_starts": STARTS},
        [{"texts": texts, "answer_starts": starts} for texts, starts in zip(TEXTS, STARTS, strict=True)],
    ],
    ids=["object of lists", "list of objects"],
)
def test_hub_rows_of_quac_are_the_files_questions(tmp_path, monkeypatch, answers):
    row = {
        "dialogue_id": "C_1",
        "wikipedia_page_title": "Ada",
        "background": "A countess.",
        "section_title": "Life",
        "context": "Ada wrote it. CANNOTANSWER",
        "turn_ids": ["C_1_q#0", "C_1_q#1"],
        "questions": ["Question 0?", "Question 1?"],
        "followups": [0, 2],
        "yesnos": [2, 2],
        "answers": answers,
        "orig_answers": {"texts": ["original 0", "original 1"], "answer_starts": [0, 0]},
    }
    hub(monkeypatch, [row])
    file = write(tmp_path, quac([2], title="Ada", background="A countess."))
    for variant in ("standard", "authors_code"):
        assert load_questions("allenai/quac", variant=variant) == load_questions(file, variant=variant)
    hub(monkeypatch, [row | {"questions": ["Question 0?"]}])
    with pytest.raises(InputError, match=r"allenai/quac, row 1, turn_ids: not as many as questions"):
        load_questions("allenai/quac")
    hub(monkeypatch, [row | {"orig_answers": {"texts": ["original 0"], "answer_starts": [0, 0]}}])
    with pytest.raises(InputError, match=r"row 1, orig_answers\.answer_starts: not as long as texts"):
        load_questions("allenai/quac")


def test_hub_rows_of_drop_are_the_files_questions(tmp_path, monkeypatch):
    date = {part: Value("string") for part in NO_DATE}
    answer = {"number": Value("string"), "date": date, "spans": Sequence(Value("string"))}
    features = Features(
        {
            "section_id": Value("string"),
            "passage": Value("string"),
            "question": Value("string"),
            "query_id": Value("string"),
            "answer": answer,
            "validated_answers": Sequence(answer),
        }
    )
    row = {
        "section_id": "nfl_1",
        "passage": "Two kicks.",
        "question": "How many?",
        "query_id": "d1",
        "answer": drop_answer("2"),
        "validated_answers": {
            "number": ["", ""],
            "date": [NO_DATE, NO_DATE | {"year": "1990"}],
            "spans": [["red", "blue"], []],
        },
    }
    hub(monkeypatch, [row], features)
    validated = [drop_answer(spans=["red", "blue"]), drop_answer(year="1990")]
    assert load_questions("EleutherAI/drop") == load_questions(write(tmp_path, drop(drop_answer("2"), validated)))
    merged = {"query_id": "d1", "passage": "p", "question": "q", "answers_spans": {"spans": ["2"], "types": ["number"]}}
    hub(monkeypatch, [merged])
    with pytest.raises(InputError, match=r"ucinlp/drop, row 1, answers_spans: merges .* use EleutherAI/drop"):
        load_questions("ucinlp/drop")


def test_a_hub_dataset_that_is_a_script_is_read_from_its_conversion(monkeypatch):
    asked, row = [], {"id": "q1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}}

    def load_dataset(name, split, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found squad.py")
        return Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_questions("owner/name", split="test")[0].answers == ("a",)
    assert asked == [None, "refs/convert/parquet"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"line 1: malformed JSON"),
        (json.dumps(squad(squad_qa(["Ada"])))[:60], "malformed JSON .* cut short"),
        ("{}", "in none of the formats"),
        ("[1]", "row 1, row: expected an object"),
        ('{"data": []}', "holds no question"),
        ('{"data": 3}', r"data: expected list, got 3"),
        ('{"data": [{"paragraphs": [{}]}]}', r"data\[0\]\.paragraphs\[0\]\.context: expected str, got None"),
        (squad(squad_qa(["Ada"]) | {"id": None}), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.id: expected"),
        (squad({"id": "q", "question": "?"}), r"qas\[0\]\.answers: expected"),
        (squad(squad_qa(["Ada"]), "x"), r"qas\[1\]\.answers: expected"),
        (squad({"id": "q", "question": "?", "answers": [{}]}), r"qas\[0\]\.answers\.text: expected str"),
        (squad({"id": "q", "answers": []}), r"qas\[0\]\.question: expected str"),
        (quac([1], paragraphs=[{"id": "C", "context": "c", "qas": [quac_qa(0, [])]}]), r"answers: none for 'C_1_q#0'"),
        (drop({}), r"nfl_1\.qa_pairs\[0\]\.answer: expected number, spans or date"),
        (drop(None), r"nfl_1\.qa_pairs\[0\]\.answer: expected dict, got None"),
        ({"a": {"passage": "p", "qa_pairs": []}, "b": 3}, r"b\.qa_pairs: expected list"),
    ],
)
def test_another_format_is_refused_by_file_and_key(tmp_path, content, said):
    file = tmp_path / "bad.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=rf"bad\.json.*{said}.*qa\.source"):
        load_questions(file)


SQUAD_ROW = {
    "id": "r",
    "context": "Ada wrote it.",
    "question": "Who?",
    "answers": {"text": ["Ada"], "answer_start": [0]},
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
def test_a_file_of_rows_is_read_by_the_hubs_columns(tmp_path, name):
    rows = [SQUAD_ROW | {"id": f"r{n}", "title": "T"} for n in range(2)]
    swap = {
        "question": "Who?",
        "org_context": "Ada.",
        "org_answer": ["Ada"],
        "sub_context": "Bo.",
        "sub_answer": ["Bo"],
    }
    for content, kind, answers, memory in ((rows, "squad", ("Ada",), None), ([swap], "nq_swap", ("Bo",), "Ada")):
        path, lines = tmp_path / name, "".join(json.dumps(row) + "\n" for row in content)
        if name.endswith(".parquet"):
            pd.DataFrame(content).to_parquet(path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(json.dumps(content) if name.endswith(".json") else lines)
        questions = load_questions(path)
        assert len(questions) == len(content)
        assert {(q.kind, q.answers, q.memory_answer) for q in questions} == {(kind, answers, memory)}


def test_a_table_of_other_columns_is_refused_by_its_columns(tmp_path):
    pd.DataFrame([{"prompt": "a", "reply": "b"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(
        InputError, match=r"rows\.parquet, row 1, found 'prompt', 'reply'; expected the columns context, "
    ):
        load_questions(tmp_path / "rows.parquet")


def test_a_file_of_quac_is_recognised_by_any_of_its_keys(tmp_path):
    content = quac([2])
    for paragraph in content["data"][0]["paragraphs"]:
        for qa in paragraph["qas"]:
            del qa["orig_answer"]
    one, other = load_questions(write(tmp_path, content))
    assert (one.kind, other.kind) == ("quac", "quac")
    assert other.messages[1].content == content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["text"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (drop(drop_answer() | {"date": "1702"}), r"nfl_1\.qa_pairs\[0\]\.answer\.date: expected day, month and year"),
        (drop(drop_answer() | {"spans": "red"}), r"answer\.spans: expected a list of texts, got 'red'|spans: expected"),
        (drop(drop_answer() | {"number": [3]}), r"answer\.number: expected a number, got \[3\]"),
        ([SQUAD_ROW | {"context": "A \ud83d"}], r"question 'r', context: invalid Unicode"),
        ([SQUAD_ROW | {"id": "\ud83d"}], r"id: invalid Unicode"),
        ([SQUAD_ROW, 3], r"row 2, row: expected an object"),
    ],
)
def test_values_of_the_wrong_kind_are_named_by_question_and_key(tmp_path, content, said):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"bad\.json.*{said}"):
        load_questions(file)


def test_an_unreadable_file_and_an_id_given_twice_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no file or folder '.*none\.json'; .*qa\.source"):
        load_questions(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(InputError, match=r"latin\.json: not UTF-8 at byte 1"):
        load_questions(tmp_path / "latin.json")
    with pytest.raises(InputError, match=r"file\.json: the id 'q1' names more than one question"):
        load_questions(write(tmp_path, squad(squad_qa(["Ada"]), squad_qa(["Bob"]))))


def test_a_sample_of_quac_holds_whole_dialogues(tmp_path):
    file = write(tmp_path, quac([3, 4, 5, 3, 4]))
    sizes = {"C_1": 3, "C_2": 4, "C_3": 5, "C_4": 3, "C_5": 4}
    seen = set()
    for seed in range(20):
        questions = load_questions(file, 9, seed)
        dialogues = [question.dialogue for question in questions]
        assert all(dialogues.count(name) == sizes[name] for name in set(dialogues))
        assert 5 <= len(questions) <= 9  # no dialogue is longer than 5, so that one stops only within the last 4
        seen.add(tuple(dict.fromkeys(dialogues)))
    assert len(seen) > 5
    assert load_questions(file, 9, seed=1) == load_questions(file, 9, seed=1)
    assert len(load_questions(file, 2, variant="authors_code")) == 2
    with pytest.raises(InputError, match=r"ask for n = 5 or more"):
        load_questions(file, 2)


def test_questions_of_all_datasets_are_answered_and_scored_together(tmp_path, model, tokenizer):
    sources = [squad(squad_qa(["Ada"]), squad_qa([], "q2")), quac([2]), drop(drop_answer("2"))]
    questions = [question for source in sources for question in load_questions(write(tmp_path, source))]
    limits = {"max_new_tokens": 4, "batch_size": 8, "use_prefix": False, "progress": False}
    answers = answer_questions(Subject("m", model, tokenizer, "m"), questions, template=True, indicator=None, **limits)
    scored = score_answers(answers, questions, variant="standard")
    assert scored.kind.tolist() == ["squad_v2", "squad_v2_no_answer", "quac", "quac", "drop"]
    assert scored.containment.between(0, 1).all()
    assert scored.human_f1.tolist()[2:4] == [0.0 + 2 / 3] * 2  # "Ada" and "Ada L."
    assert by_dialogue(scored)["dialogue"].tolist() == ["C_1"]
    later = scored.prompt[3]
    assert later.index("Question 0?") < later.index("original 0") < later.index("Question 1?")


@needs(XQUAD)
def test_xquad_gives_all_its_questions_and_a_seed_the_same_sample():
    assert len(load_questions(XQUAD)) == 1190
    one, again, other = (load_questions(XQUAD, 20, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert {question.kind for question in one} == {"squad"}


@needs(QUAC)
def test_the_quac_sample_is_read_once_each_dialogue_is_there_once(tmp_path):
    content = json.loads(QUAC.read_text())
    with pytest.raises(InputError, match="names more than one question"):
        load_questions(QUAC)  # its two articles are the same one
    questions = load_questions(write(tmp_path, {"data": content["data"][:1]}))
    assert [len(question.messages) for question in questions] == [2 * n + 1 for n in range(len(questions))]
    assert questions[1].messages[1].content.startswith("Herc used the record to focus on a short")
    assert all("CANNOTANSWER" in question.messages[0].content for question in questions)
    (first,) = load_questions(write(tmp_path, {"data": content["data"][:1]}), variant="authors_code")
    assert first.messages[0].content.startswith("Title: The break\n")
    assert "CANNOTANSWER" not in first.messages[0].content


@needs(CONTRAST)
def test_every_answer_of_the_real_drop_files_is_read():
    for file, n in ((DROP, 19), (CONTRAST, 947)):
        questions = load_questions(file)
        assert len(questions) == n
        assert all(span.strip() for question in questions for spans in question.annotations for span in spans)
    by_id = {question.id: question for question in questions}
    assert by_id["0d7b1b72-55d4-4071-9220-80b35d25effa_1"].annotations == (("1615",), ("1615",))


@needs(CONTRAST)
def test_on_real_data_a_gold_answer_scores_in_full_and_another_questions_does_not():
    for file in (XQUAD, CONTRAST):
        questions = load_questions(file)
        for shift in (0, 1):
            said = [question.answers[0] for question in questions[shift:] + questions[:shift]]
            frame = pd.DataFrame({"id": [question.id for question in questions], "answer": said})
            scored = score_answers(frame, questions, variant="standard")
            if shift:
                assert scored.exact_match.mean() < 0.2 and scored.token_f1.mean() < 0.25
            else:
                assert (scored.containment == 1).all()
                whole = [len(question.annotations[0]) == 1 for question in questions]
                assert (scored.loc[whole, ["exact_match", "token_f1"]] == 1).all(axis=None)
    assert all(drop_scores(question.annotations[0], question.annotations) == (1, 1) for question in questions)
