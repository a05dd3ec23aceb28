"""MT-Bench against one-by-one answers, and its judge against a local server that speaks the chat protocol."""

import builtins
import copy
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ctxlib.commands import cli, mt_bench
from ctxlib.commands.mt_bench import (
    ANSWER_COLUMNS,
    NO_RATING,
    RATING_COLUMNS,
    Judge,
    Task,
    answer_turns,
    judge_answers,
    judge_prompt,
    load_mt_bench,
    open_judge,
    parse_rating,
    question_ratings,
    spent,
    summarise_ratings,
)
from ctxlib.conversations import Message
from ctxlib.metrics import bootstrap_interval
from ctxlib.models import Subject, add_indicator
from ctxlib.params import InputError
from ctxlib.roles import role_map

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT.parent / "shared" / "data" / "mt_bench"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["What is 2 + 2?", "And twice that?"]},
    {"question_id": 121, "category": "coding", "turns": ["Print 1.", "Print {answer}."]},
]
PROMPTS = [
    ("single-v1", "S1", "Q {question} A {answer}"),
    ("single-math-v1", "S2", "Q {question} R {ref_answer_1} A {answer}"),
    ("single-v1-multi-turn", "S3", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    (
        "single-math-v1-multi-turn",
        "S4",
        "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}",
    ),
]
DECODING = {"max_new_tokens": 8, "batch_size": 2, "progress": False}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reference(key, *turns):
    return {"question_id": key, "choices": [{"index": 0, "turns": list(turns)}]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data" / "mt_bench"
    write_rows(folder / "question.jsonl", QUESTIONS)
    names = ("name", "system_prompt", "prompt_template")
    write_rows(folder / "judge_prompts.jsonl", [dict(zip(names, prompt, strict=True)) for prompt in PROMPTS])
    rows = [reference(111, "4", "9"), reference(121, "print(1)", "print(answer)")]
    write_rows(folder / "reference_answer" / "gpt-4.jsonl", rows)
    return folder


@pytest.fixture
def bench(folder):
    return load_mt_bench(folder)


@pytest.fixture
def answers(bench):
    rows = [
        (task.id, task.category, turn, "", f"answer {task.id}.{turn} {{question}}", 3)
        for turn in (1, 2)
        for task in bench.tasks
    ]
    return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))


def grade(messages):
    """The server's rating: a number from 1 to 10 that hangs on all that it was given to read."""
    return int(hashlib.sha256(json.dumps(messages).encode()).hexdigest(), 16) % 10 + 1


class Server(http.server.ThreadingHTTPServer):
    """Speaks the chat protocol. `behaviour(number, request)` may give a text, (status, body), or None to be graded."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.keys, self.lock = [], [], threading.Lock()
        self.behaviour = lambda number, request: None
        self.usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of ours."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"object": "list", "data": []})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.keys.append(self.headers["Authorization"])
            number = len(self.server.requests)
        told = self.server.behaviour(number, request)
        if isinstance(told, tuple):
            return self.reply(*told)
        text = f"Good. Rating: [[{grade(request['messages'])}]]" if told is None else told
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"], "choices": [choice]}
        return self.reply(200, body | ({"usage": self.server.usage} if self.server.usage else {}))

    def reply(self, status, body):
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai", reason="the extra 'judge' is not installed: pip install -e '.[judge]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def judge(server):
    return Judge("grader", base_url=server.base_url, repeats=2, workers=3, max_retries=2, timeout=20.0)


def expected_ratings(answers, bench, repeats=2):
    """Written from the definition: a prompt by name, filled in with str.format, graded as the server grades."""
    said = answers.set_index(["question", "turn"])["answer"]
    prompts = {name: (system, template) for name, system, template in PROMPTS}
    tasks = {task.id: task for task in bench.tasks}
    rows = []
    for row in answers.itertuples():
        task, first = tasks[row.question], said[row.question, 1]
        math_like = "-math" if task.category in ("math", "reasoning", "coding") else ""
        system, template = prompts[f"single{math_like}-v1{'-multi-turn' if row.turn == 2 else ''}"]
        refs = task.reference or ("", "")
        text = template.format(
            question=task.turns[0], answer=row.answer, question_1=task.turns[0], question_2=task.turns[1],
            answer_1=first, answer_2=row.answer, ref_answer_1=refs[0], ref_answer_2=refs[1],
        )  # fmt: skip
        rating = grade([{"role": "system", "content": system}, {"role": "user", "content": text}])
        rows += [(row.question, row.turn, repeat, rating) for repeat in range(1, repeats + 1)]
    return rows


def rated(ratings):
    return list(ratings[["question", "turn", "repeat", "rating"]].itertuples(index=False, name=None))


# questions, prompts, references


def test_a_folder_of_fastchats_is_read(bench):
    assert bench.tasks[0] == Task("81", "writing", ("Write.", "Shorter."))
    assert bench.tasks[1] == Task("111", "math", ("What is 2 + 2?", "And twice that?"), ("4", "9"))
    assert bench.corrected == ()


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="FastChat's own files are not here")
def test_the_real_benchmark_is_read_and_every_prompt_is_filled_as_str_format_would():
    bench = load_mt_bench(SHIPPED)
    assert len(bench.tasks) == 80
    with_reference = [task.category for task in bench.tasks if task.reference]
    assert len(with_reference) == 30 and set(with_reference) == {"math", "reasoning", "coding"}
    for task in bench.tasks:
        for said in (["one"], ["one", "two {question}"]):
            name = f"single{'-math' if task.reference else ''}-v1{'-multi-turn' if said[1:] else ''}"
            system, template = bench.prompts[name]
            values = {"question": task.turns[0], "question_1": task.turns[0], "question_2": task.turns[1]}
            values |= {"answer": said[0], "answer_1": said[0], "answer_2": said[-1]}
            values |= dict(zip(("ref_answer_1", "ref_answer_2"), task.reference or (), strict=False))
            assert judge_prompt(bench, task, said) == [
                {"role": "system", "content": system},
                {"role": "user", "content": template.format(**values)},
            ]


def test_corrected_references_replace_those_that_they_name_and_no_others(folder, tmp_path, bench):
    corrected = write_rows(tmp_path / "corrected.jsonl", [reference(111, "4", "8")])
    mended = load_mt_bench(folder, corrected_references=corrected)
    assert mended.corrected == ("111",)
    assert [task.reference for task in mended.tasks] == [None, ("4", "8"), bench.tasks[2].reference]
    write_rows(corrected, [reference(999, "4", "8")])
    with pytest.raises(InputError, match=r"question_id 999 is no question of .*question\.jsonl"):
        load_mt_bench(folder, corrected_references=corrected)


def test_fastchats_own_layout_and_a_part_of_the_questions(folder, bench):
    (folder / "judge_prompts.jsonl").rename(folder.parent / "judge_prompts.jsonl")
    (folder / "reference_answer" / "gpt-4.jsonl").rename(folder / "reference_answer_gpt-4.jsonl")
    assert load_mt_bench(folder).tasks == bench.tasks
    assert [task.id for task in load_mt_bench(folder, limit=2).tasks] == ["81", "111"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("question.jsonl", None, r"no file .*question\.jsonl"),
        ("question.jsonl", "version https://git-lfs.github.com/spec/v1\noid", r"question\.jsonl: a Git-LFS pointer"),
        ("judge_prompts.jsonl", "<!DOCTYPE html><html>", r"judge_prompts\.jsonl: a web page"),
        ("question.jsonl", "{", r"question\.jsonl, line 1: malformed JSON"),
        ("question.jsonl", '\n{"question_id": 1, "category": "a"}', r"line 2: no key 'turns'"),
        ("question.jsonl", '{"question_id": 1, "category": "a", "turns": ["x"]}', r"line 1, turns: .*two texts"),
        ("question.jsonl", "", "holds no rows"),
        ("question.jsonl", json.dumps(QUESTIONS[0]) + "\n" + json.dumps(QUESTIONS[0]), r"line 2, question_id: 81 is"),
        ("judge_prompts.jsonl", None, r"judge prompts: no file .* or .*judge_prompts\.jsonl"),
        ("judge_prompts.jsonl", '{"name": "x", "system_prompt": "", "prompt_template": ""}', "no prompt named"),
        ("reference_answer/gpt-4.jsonl", json.dumps(reference(111, "4", "9")), r"question 121 \(coding\)"),
        ("reference_answer/gpt-4.jsonl", '{"question_id": 1, "choices": []}', r"line 1, choices: expected a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named(folder, file, content, message):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_mt_bench(folder)


def test_a_prompt_with_a_name_of_another_kind_of_grading_is_refused(bench):
    pairwise = replace(bench, prompts={**bench.prompts, "single-v1": ("S", "{answer_a}")})
    with pytest.raises(InputError, match=r"'single-v1': unknown name \{answer_a\}"):
        judge_prompt(pairwise, bench.tasks[0], ["x"])


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[ 10 ]]", 10),
        ("First [[3]], and so: [[3]]", 3),
        ("First [[3]], no: [[4]]", None),
        ("Rating: [7]", None),
        ("Rating: 7", None),
        ("[[rating]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("", None),
        ("<think>[[3]] or [[4]]?</think> Rating: [[7]]", 7),
        ("<think>[[3]]</think> I cannot say.", None),
    ],
)
def test_a_rating_is_read_from_double_brackets_or_not_at_all(text, rating):
    assert parse_rating(text) == rating if rating else math.isnan(parse_rating(text))


# answers


@pytest.mark.parametrize("indicator", [None, "[IND]"])
def test_the_second_turn_is_asked_after_the_models_own_first_answer(model, tokenizer, bench, indicator, greedy_loop):
    if indicator:
        tokenizer = copy.deepcopy(tokenizer)
        add_indicator(model, tokenizer, indicator)

    def written_by_hand(messages):
        prompt = role_map(tokenizer, messages, generation_prompt=True, indicator=indicator)
        return greedy_loop(model, tokenizer, prompt, DECODING["max_new_tokens"])[0]

    frame = answer_turns(Subject("tiny", model, tokenizer, "tiny"), bench, indicator=indicator, **DECODING)
    assert tuple(frame.columns) == ANSWER_COLUMNS
    assert list(frame["question"]) == ["81", "111", "121"] * 2
    said = frame.set_index(["question", "turn"])
    for task in bench.tasks:
        messages = [Message("user", task.turns[0], indicated=bool(indicator))]
        first = said.loc[(task.id, 1), "answer"]
        assert first == written_by_hand(messages)
        messages += [Message("assistant", first), Message("user", task.turns[1], indicated=bool(indicator))]
        assert said.loc[(task.id, 2), "answer"] == written_by_hand(messages)
        assert said.loc[(task.id, 2), "prompt"].count("[IND]") == (2 if indicator else 0)


def test_the_papers_reading_asks_the_first_turn_only(model, tokenizer, bench):
    both = answer_turns(Subject("tiny", model, tokenizer, "tiny"), bench, **DECODING)
    first = answer_turns(Subject("tiny", model, tokenizer, "tiny"), bench, variant="authors_code", **DECODING)
    pd.testing.assert_frame_equal(first, both[both["turn"] == 1])


def test_answers_of_both_turns_are_cached(model, tokenizer, bench, tmp_path):
    written = answer_turns(Subject("tiny", model, tokenizer, "tiny"), bench, cache_dir=tmp_path / "cache", **DECODING)

    def never(*args, **kwargs):
        raise AssertionError("the model was called")

    model.forward = never
    pd.testing.assert_frame_equal(
        answer_turns(Subject("tiny", model, tokenizer, "tiny"), bench, cache_dir=tmp_path / "cache", **DECODING),
        written,
    )


def test_two_turns_that_may_not_fit_are_refused_before_the_first_and_the_remedy_fits(model, tokenizer, bench):
    calls = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    subject = Subject("tiny", model, tokenizer, "tiny")
    with pytest.raises(InputError, match=r"question 111: .* window of 512; lower max_new_tokens to (\d+)") as caught:
        answer_turns(subject, bench, **{**DECODING, "max_new_tokens": 300})
    assert not calls
    most = int(str(caught.value).rsplit(" ", 1)[1])
    mt_bench.answers._check_window(subject, bench, most, "standard", None)
    with pytest.raises(InputError):
        mt_bench.answers._check_window(subject, bench, most + 1, "standard", None)


# the judge


def test_the_judge_reads_the_prompt_of_each_turn_and_its_ratings_come_back_in_order(
    server, judge, bench, answers, tmp_path
):
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert tuple(ratings.columns) == RATING_COLUMNS
    assert rated(ratings) == expected_ratings(answers, bench)
    assert set(ratings["problem"]) == {""}
    assert len(server.requests) == 12
    assert all(r["model"] == "grader" and r["temperature"] == 0 and r["max_tokens"] == 2048 for r in server.requests)
    assert spent(ratings, prices=(2.0, 10.0)) == {
        "judgements": 12, "attempts": 12, "without_rating": 0, "refused": 0,
        "prompt_tokens": 1200, "completion_tokens": 120, "cost": pytest.approx((1200 * 2 + 120 * 10) / 1e6),
    }  # fmt: skip


def test_what_is_left_to_the_server_is_not_sent_and_unknown_tokens_are_not_made_up(
    server, judge, bench, answers, tmp_path
):
    server.usage = None
    judge = replace(judge, temperature=None, max_tokens=None)
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert all(set(request) == {"model", "messages"} for request in server.requests)
    assert math.isnan(spent(ratings)["prompt_tokens"])
    assert rated(ratings) == expected_ratings(answers, bench)


def test_a_failing_a_busy_and_a_slow_server_are_asked_again(server, judge, bench, answers, tmp_path):
    def behaviour(number, request):
        if number in (1, 5):
            return 500, {"error": {"message": "out of order"}}
        if number == 3:
            return 429, {"error": {"message": "busy"}}
        if number == 7:
            time.sleep(2.5)
        return None

    server.behaviour = behaviour
    judge = replace(judge, timeout=1.0, workers=1)
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert rated(ratings) == expected_ratings(answers, bench)
    assert len(server.requests) == 12 + 4
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 12


def test_a_judgement_without_a_rating_is_retried_once_counted_and_never_guessed(
    server, judge, bench, answers, tmp_path
):
    seen = {}

    def behaviour(number, request):
        user = request["messages"][1]["content"]
        with server.lock:
            seen[user] = seen.get(user, 0) + 1
        if user.startswith("Q Write."):  # never a rating
            return "I would say 7 of 10, or [7]."
        return "Hm." if user.startswith("Q Print") and seen[user] == 1 else None  # one at the second attempt

    server.behaviour = behaviour
    judge = replace(judge, workers=1)
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    lost = ratings[(ratings["question"] == "81") & (ratings["turn"] == 1)]
    assert lost["rating"].isna().all() and set(lost["problem"]) == {NO_RATING} and set(lost["attempts"]) == {2}
    kept = ratings.drop(lost.index)
    assert rated(kept) == [row for row in expected_ratings(answers, bench) if row[:2] != ("81", 1)]
    assert list(ratings.loc[(ratings["question"] == "121") & (ratings["turn"] == 1), "attempts"]) == [2, 1]
    assert len(server.requests) == 12 + 2 + 1
    told = spent(ratings)
    assert (told["attempts"], told["without_rating"], told["prompt_tokens"]) == (15, 2, 1500)
    whole = summarise_ratings(ratings).iloc[0]
    assert (whole["n"], whole["judgements"], whole["without_rating"]) == (2, 12, 2)
    asked = len(server.requests)
    again = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    pd.testing.assert_frame_equal(again, ratings)
    assert len(server.requests) == asked


def test_what_the_server_refuses_is_counted_with_its_reason_and_asked_for_again(
    server, judge, bench, answers, tmp_path
):
    too_long = 400, {"error": {"message": "context length exceeded"}}
    server.behaviour = lambda number, request: too_long if "Write." in request["messages"][1]["content"] else None
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    refused = ratings[ratings["question"] == "81"]
    assert refused["rating"].isna().all() and refused["problem"].str.contains("refused.*context length").all()
    assert spent(ratings)["refused"] == 4
    server.behaviour = lambda number, request: None
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert rated(ratings) == expected_ratings(answers, bench)
    server.behaviour = lambda number, request: too_long
    with pytest.raises(InputError, match=r"refused every judgement.*context length exceeded"):
        judge_answers(answers, bench, judge, tmp_path / "other.jsonl", progress=False)


def completion(request, content, usage):
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"], "choices": [choice]}
    return 200, body | {"usage": usage}


def test_a_reply_in_parts_is_read_and_an_absent_count_of_tokens_is_unknown(server, judge, bench, answers, tmp_path):
    def behaviour(number, request):
        rating = f" [[{grade(request['messages'])}]]"
        parts = [{"type": "text", "text": "Rating:"}, {"type": "image_url"}, {"type": "text", "text": rating}]
        return completion(request, parts, {"prompt_tokens": 5, "completion_tokens": None})

    server.behaviour = behaviour
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert rated(ratings) == expected_ratings(answers, bench)
    assert spent(ratings)["prompt_tokens"] == 60 and math.isnan(spent(ratings)["completion_tokens"])


@pytest.mark.parametrize(
    ("refused", "asked"),
    [
        (["temperature"], {"max_tokens": 2048}),
        (["max_tokens"], {"temperature": 0.0, "max_completion_tokens": 2048}),
        (["temperature", "max_tokens"], {"max_completion_tokens": 2048}),
    ],
)
def test_a_refused_parameter_is_respelled_or_left_out_once_and_recorded(
    server, judge, bench, answers, tmp_path, refused, asked
):
    def behaviour(number, request):
        named = [name for name in refused if name in request]
        return (400, {"error": {"message": f"Unsupported parameter: '{named[0]}'"}}) if named else None

    server.behaviour = behaviour
    judge = replace(judge, workers=1)
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert rated(ratings) == expected_ratings(answers, bench)
    assert ratings.attrs["asked"] == [asked]
    assert len(server.requests) == 12 + len(refused)
    again = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert again.attrs["asked"] == [asked]


def test_judgements_of_which_none_has_a_rating_are_an_error(server, judge, bench, answers, tmp_path):
    server.behaviour = lambda number, request: "Very good."
    with pytest.raises(InputError, match=r"no rating such as \[\[7\]\] in any of 12 judgements"):
        judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), "bad key.*: check the key in OPENAI_API_KEY"),
        ((404, {"error": {"message": "no such model"}}), "no such model.*: check the judge's name 'grader'"),
        ((200, "<html>welcome</html>"), "the reply is no chat completion: check the server and its base URL"),
        ((500, {"error": {"message": "broken"}}), "broken.*: .*resume from the stored judgements"),
    ],
)
def test_a_server_that_fails_for_good_stops_the_run_with_a_remedy(
    server, judge, bench, answers, tmp_path, reply, message
):
    server.behaviour = lambda number, request: reply if number > 4 else None
    judge = replace(judge, workers=1)
    with pytest.raises(InputError, match=message):
        judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 4
    server.behaviour = lambda number, request: None
    ratings = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert rated(ratings) == expected_ratings(answers, bench)


def test_a_run_that_is_killed_goes_on_at_the_single_judgement_and_ends_with_the_same_table(
    server, judge, bench, answers, folder, tmp_path
):
    whole = judge_answers(answers, bench, judge, tmp_path / "whole.jsonl", progress=False)
    server.requests.clear()
    answers.to_json(tmp_path / "answers.json", orient="records")
    script = (
        "import pandas as pd, sys\n"
        "from ctxlib.mt_bench import *\n"
        f"answers = pd.read_json({str(tmp_path / 'answers.json')!r}, dtype={{'question': str}})\n"
        f"judge = Judge('grader', base_url={server.base_url!r}, repeats=2, workers=1)\n"
        f"bench = load_mt_bench({str(folder)!r})\n"
        f"judge_answers(answers, bench, judge, {str(tmp_path / 'j.jsonl')!r}, progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL)

    def behaviour(number, request):
        if number == 6:
            process.send_signal(signal.SIGKILL)
            time.sleep(0.2)

    server.behaviour = behaviour
    assert process.wait() == -signal.SIGKILL
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 5
    server.behaviour = lambda number, request: None
    server.requests.clear()
    resumed = judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    pd.testing.assert_frame_equal(resumed, whole)
    assert len(server.requests) == 12 - 5


def test_a_torn_line_is_judged_anew_and_a_damaged_one_is_named(server, judge, bench, answers, tmp_path):
    path = tmp_path / "j.jsonl"
    ratings = judge_answers(answers, bench, judge, path, progress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    server.requests.clear()
    pd.testing.assert_frame_equal(judge_answers(answers, bench, judge, path, progress=False), ratings)
    assert len(server.requests) == 1
    server.requests.clear()
    path.write_bytes(b'{"key": "1"}\n' + whole)
    with pytest.warns(UserWarning, match=r"j\.jsonl: line 1 is damaged and left out"):
        pd.testing.assert_frame_equal(judge_answers(answers, bench, judge, path, progress=False), ratings)
    assert not server.requests


def test_judgements_that_were_paid_for_stay_when_the_disk_is_full(server, judge, bench, answers, tmp_path, full_disk):
    path = tmp_path / "j.jsonl"
    with pytest.raises(InputError, match=r"j\.jsonl: not written, the disk is full"), full_disk(500):
        judge_answers(answers, bench, judge, path, progress=False)
    kept = path.read_bytes().rpartition(b"\n")[0].count(b"\n") + 1
    assert kept > 0
    server.requests.clear()
    assert judge_answers(answers, bench, judge, path, progress=False)["rating"].notna().all()
    assert len(server.requests) == 2 * len(answers) - kept  # each is judged twice


def test_another_answer_judge_temperature_or_prompt_is_judged_anew_and_a_further_repeat_adds_to_it(
    server, judge, bench, answers, tmp_path
):
    def asked(answers=answers, judge=judge, bench=bench):
        server.requests.clear()
        judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
        return len(server.requests)

    assert (asked(), asked()) == (12, 0)
    changed = answers.assign(answer=[answers["answer"][0] + "!", *answers["answer"][1:]])
    assert asked(answers=changed) == 4  # the second turn shows the first answer too
    assert asked(judge=replace(judge, repeats=3)) == 6
    assert asked(judge=replace(judge, temperature=1)) == 12
    assert asked(judge=replace(judge, model="other")) == 12
    mended = [replace(t, reference=("4", "8")) if t.id == "111" else t for t in bench.tasks]
    assert asked(bench=replace(bench, tasks=tuple(mended))) == 2  # its first reference is the same
    assert asked() == 0


def test_a_key_is_taken_from_the_named_variable_and_only_far_servers_need_one(
    server, judge, bench, answers, tmp_path, monkeypatch
):
    monkeypatch.setenv("GRADER_KEY", "secret-1")
    judge = replace(judge, api_key_variable="GRADER_KEY")
    judge_answers(answers, bench, judge, tmp_path / "j.jsonl", progress=False)
    assert set(server.keys) == {"Bearer secret-1"}
    assert "secret-1" not in (tmp_path / "j.jsonl").read_text()
    with pytest.raises(InputError, match=r"no API key for https://api\.openai\.com/v1: .* OPENAI_API_KEY"):
        judge_answers(answers, bench, Judge("gpt-4"), tmp_path / "other.jsonl", progress=False)


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://192.168.0.7:8000/v1", True),
        ("https://api.openai.com/v1", False),
        ("https://8.8.8.8/v1", False),
    ],
)
def test_near_servers_are_this_machine_and_private_networks(url, near):
    assert mt_bench.judge._is_near(url) is near


def test_no_server_no_package_and_senseless_numbers_are_told_before_any_work(server, judge, monkeypatch):
    with pytest.raises(InputError, match=r"Connection error.*check the server and its base URL"):
        open_judge(replace(judge, base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(InputError, match=r"judge\.repeats: expected at least 1, got 0"):
        open_judge(replace(judge, repeats=0))
    with pytest.raises(InputError, match=r"judge\.temperature: expected 0 to 2, got 3"):
        open_judge(replace(judge, temperature=3))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'ctxlib\[judge\]'"):
        open_judge(judge)


def test_answers_to_unknown_questions_or_without_their_first_turn_are_refused(judge, bench, answers, tmp_path):
    for wrong, message in (
        (answers.assign(question="999"), "more than once"),
        (answers.assign(question=["999", *answers["question"][1:]]), "'999' is not in the benchmark"),
        (answers[answers["turn"] == 2], "'81' has no answer of turn 1"),
    ):
        with pytest.raises(InputError, match=message):
            judge_answers(wrong, bench, judge, tmp_path / "j.jsonl", client=SimpleNamespace(), progress=False)


# the summary


def ratings_frame(values):
    """values[question, turn, repeat]"""
    rows = [
        (f"q{q}", f"c{q % 2}", t + 1, r + 1, float(value), "", 1, 1.0, 1.0)
        for (q, t, r), value in np.ndenumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(RATING_COLUMNS))


def test_the_summary_by_hand():
    values = np.array([[[8, 6], [4, 4]], [[10, 10], [6, 2]], [[1, 3], [5, 5]]])
    summary = summarise_ratings(ratings_frame(values)).set_index(["group", "name"])
    assert list(summary.index) == [("all", "all"), ("turn", "1"), ("turn", "2"), ("category", "c0"), ("category", "c1")]
    whole = summary.loc[("all", "all")]
    per_question = [(7 + 4) / 2, (10 + 4) / 2, (2 + 5) / 2]
    assert whole["value"] == pytest.approx(np.mean(per_question))
    assert (whole["ci_low"], whole["ci_high"]) == bootstrap_interval(per_question)
    assert (whole["n"], whole["judgements"], whole["without_rating"]) == (3, 12, 0)
    assert whole["judge_variance"] == pytest.approx(np.mean([2, 0, 0, 8, 2, 0]))
    assert whole["judge_error"] == pytest.approx(math.sqrt(2 / 12))
    assert summary.loc[("turn", "2"), "value"] == pytest.approx((4 + 4 + 5) / 3)
    assert summary.loc[("category", "c1"), "value"] == pytest.approx(7)


def test_without_repeats_the_judges_variance_is_unknown():
    whole = summarise_ratings(ratings_frame(np.full((3, 2, 1), 5))).iloc[0]
    assert math.isnan(whole["judge_variance"]) and math.isnan(whole["judge_error"])


def test_a_question_counts_only_with_a_rating_for_every_turn():
    frame = ratings_frame(np.array([[[8, 6], [4, 4]], [[10, 10], [6, 2]]]))
    frame.loc[(frame["question"] == "q1") & (frame["turn"] == 2), "rating"] = np.nan
    frame.loc[(frame["question"] == "q0") & (frame["turn"] == 1) & (frame["repeat"] == 2), "rating"] = np.nan
    assert question_ratings(frame).isna().tolist() == [False, True]
    summary = summarise_ratings(frame).set_index(["group", "name"])
    assert summary.loc[("all", "all"), ["value", "n", "without_rating"]].tolist() == [6.0, 1, 3]
    assert summary.loc[("turn", "1"), ["value", "n"]].tolist() == [9.0, 2]


def test_the_judges_error_is_the_spread_of_means_over_judgements_repeated_many_times():
    rng = np.random.default_rng(0)
    truth, sigma = rng.uniform(3, 8, size=(6, 2, 1)), 1.3
    means, errors = [], []
    for _ in range(300):
        frame = ratings_frame(truth + sigma * rng.standard_normal((6, 2, 3)))
        frame = frame[~((frame["question"] == "q0") & (frame["repeat"] == 3))]  # unequal numbers of repeats
        means.append(question_ratings(frame).mean())
        errors.append(mt_bench.ratings._judge_spread(frame))
    variances, standard_errors = np.array(errors).T
    assert variances.mean() == pytest.approx(sigma**2, rel=0.05)
    assert np.std(means) == pytest.approx(np.mean(standard_errors), rel=0.12)


# the whole of it


def called(monkeypatch, *arguments):
    """The exit status of the command line."""
    monkeypatch.setattr("sys.argv", ["ctxlib", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_runs_without_a_hand_on_the_keyboard_and_a_second_time_without_the_judge(
    server, folder, model_folder, tmp_path, monkeypatch, capsys
):
    def no_keyboard(*args):
        raise AssertionError("asked for a key")

    monkeypatch.setattr(builtins, "input", no_keyboard)
    command = [
        "mt-bench", "--model", model_folder, "--questions", folder, "--judge", "grader", "--base-url", server.base_url,
        "--repeats", "2", "--temperature", "0.7", "--max-new-tokens", "8", "--out", tmp_path / "out",
    ]  # fmt: skip
    assert called(monkeypatch, *command) == 0
    assert "prompt tokens 1,200" in capsys.readouterr().out
    files = ("answers.jsonl", "ratings.csv", "summary.csv", "mt_bench.json")
    written = {name: (tmp_path / "out" / name).read_bytes() for name in files}
    ratings = pd.read_csv(tmp_path / "out" / "ratings.csv")
    assert len(ratings) == 12
    manifest = json.loads(written["mt_bench.json"])
    assert manifest["settings"]["judge"]["temperature"] == 0.7 and manifest["spent"]["judgements"] == 12
    assert (
        manifest["files"][str(folder / "question.jsonl")]
        == hashlib.sha256((folder / "question.jsonl").read_bytes()).hexdigest()
    )
    server.requests.clear()
    assert called(monkeypatch, *command) == 0 and not server.requests
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == written

    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")  # other contents, so another model
    command[2] = other
    capsys.readouterr()
    assert called(monkeypatch, *command) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"out: holds the ratings of another model, \S+model \(hash .*choose another folder", refused)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == written


def test_the_command_looks_for_the_judge_before_it_loads_the_model(folder, tmp_path, server, monkeypatch, capsys):
    command = ["mt-bench", "--model", tmp_path / "none", "--questions", folder, "--judge", "g", "--out", tmp_path / "o"]
    assert called(monkeypatch, *command, "--base-url", "http://127.0.0.1:9/v1") == 2
    assert "judge at http://127.0.0.1:9/v1" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "o")
