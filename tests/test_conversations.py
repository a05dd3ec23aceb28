"""Conversations: three formats in, one out; every bad row is an error with a name, or counted."""

import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxlib.conversations import (
    Conversation,
    Corpus,
    Ledger,
    Message,
    is_hub_dataset,
    iter_conversations,
    load_conversations,
    loading,
    open_conversations,
    save_conversations,
)
from ctxlib.params import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conversations"
NOTHING = pd.DataFrame({"reason": [], "n": []})


def sharegpt(*turns, **more):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], **more}


def write(folder, rows, name="rows.json"):
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def texts(corpus):
    return [[(message.role, message.content) for message in c.messages] for c in corpus.conversations]


def counted(corpus):
    return dict(zip(corpus.dropped["reason"], corpus.dropped["n"], strict=True))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    "rows, expected",
    [
        (
            [sharegpt(("system", "s"), ("human", "a"), ("gpt", " b\n")), sharegpt(("user", "c"), ("chatgpt", "d"))],
            [[("system", "s"), ("user", "a"), ("assistant", " b\n")], [("user", "c"), ("assistant", "d")]],
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            [[("user", "a"), ("assistant", "b")]],
        ),
        (
            [{"instruction": "a", "input": "x", "output": "b"}, {"instruction": "a", "input": "", "output": "b"}],
            [[("user", "a\n\nx"), ("assistant", "b")], [("user", "a"), ("assistant", "b")]],
        ),
    ],
    ids=["sharegpt", "messages", "instruction"],
)
def test_three_formats_in_three_kinds_of_file(tmp_path, name, rows, expected):
    corpus = load_conversations(write(tmp_path, rows, name))
    assert texts(corpus) == expected
    assert [c.id for c in corpus.conversations] == [str(n + 1) for n in range(len(rows))]
    assert corpus.dropped.empty and list(corpus.dropped.columns) == ["reason", "n"]
    assert corpus.source == str(tmp_path / name) and len(corpus) == len(rows)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(lambda drawn: drawn + "x")
answers = st.builds(
    Message,
    st.just("assistant"),
    text,
    kind=st.none() | text,
    depends_on_context=st.none() | st.booleans(),
    score=st.none() | st.floats(0, 1),
)
exchange = st.tuples(st.builds(Message, st.just("user"), text, indicated=st.booleans()), answers)
talks = st.tuples(
    st.lists(st.builds(Message, st.just("system"), text), max_size=1), st.lists(exchange, min_size=1, max_size=3)
).map(lambda drawn: (*drawn[0], *(message for pair in drawn[1] for message in pair)))


@pytest.mark.parametrize("name", ["saved.jsonl", "saved.json", "saved.parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(talks, min_size=1, max_size=3))
def test_what_is_saved_is_read_back_field_by_field(tmp_path, name, drawn):
    corpus = Corpus(tuple(Conversation(f"c{n}", talk) for n, talk in enumerate(drawn)), NOTHING, "here")
    save_conversations(corpus, tmp_path / "folder" / name)
    assert load_conversations(tmp_path / "folder" / name).conversations == corpus.conversations
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]


def test_other_kinds_of_file_are_not_written(tmp_path):
    with pytest.raises(InputError, match=r"saved\.csv: expected the name of a \.jsonl"):
        save_conversations(Corpus((), NOTHING, "here"), tmp_path / "saved.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["saved.jsonl", "saved.json", "saved.parquet"])
def test_a_failed_save_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    unwritable = Conversation("c", (Message("user", "\ud83d"),))
    with pytest.raises(UnicodeEncodeError):
        save_conversations(Corpus((unwritable,), NOTHING, "here"), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


GOOD = sharegpt(("human", "a"), ("gpt", "b"))
BAD = {
    "starts with the assistant": (sharegpt(("gpt", "b"), ("human", "a"), ("gpt", "b")), r"conversations\[0\]"),
    "empty turn": (sharegpt(("human", "a"), ("gpt", " \n")), r"conversations\[1\]"),
    "unknown role": (sharegpt(("human", "a"), ("bot", "b")), r"conversations\[1\]\.from"),
    "same role twice in a row": (sharegpt(("human", "a"), ("gpt", "b"), ("gpt", "c")), r"conversations\[2\]"),
    "system text after the first message": (sharegpt(("human", "a"), ("system", "s")), r"conversations\[1\]"),
    "no user turn": (sharegpt(("system", "s")), "conversations"),
    "not a text": (sharegpt(("human", None)), r"conversations\[0\]\.value"),
    "invalid Unicode": (sharegpt(("human", "\ud83d")), r"conversations\[0\]\.value"),
    "missing turns": ({"conversations": None}, "conversations"),
    "not an object": (["a"], "row"),
    "duplicate id": (GOOD | {"id": "first"}, "id"),
}


@pytest.mark.parametrize("reason, row, key", [(reason, *case) for reason, case in BAD.items()], ids=BAD.keys())
def test_a_bad_row_is_named_or_counted_and_listed(tmp_path, reason, row, key):
    path = write(tmp_path, [GOOD | {"id": "first"}, row, GOOD | {"id": "last"}])
    with pytest.raises(InputError, match=rf"rows\.json, row 2, {key}: {reason}: .+on_bad_row"):
        load_conversations(path)
    corpus = load_conversations(path, on_bad_row="drop")
    if reason == "starts with the assistant":  # this one is mended, as the paper does with chunks
        assert counted(corpus) == {"leading assistant turn removed": 1}
        assert texts(corpus)[1] == texts(corpus)[0]
    else:
        assert counted(corpus) == {reason: 1}
        assert [c.id for c in corpus.conversations] == ["first", "last"]
        (listed,) = corpus.dropped_rows.itertuples(index=False)
        assert (listed.place, listed.reason) == ("row 2", reason) and listed.key == key.replace("\\", "")
        assert listed.remedy


def test_a_line_that_is_no_json_is_a_bad_row_like_others(tmp_path):
    good = [json.dumps(GOOD | {"id": str(n)}).encode() for n in range(3)]
    broken = [b"{oops", b'"\xff"', b"[" * 10**5, b"9" * 5000]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([broken[0], good[0], b"", *broken[1:], *good[1:]]))
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: malformed JSON: .+repair or remove it"):
        load_conversations(path)
    corpus = load_conversations(path, on_bad_row="drop")
    assert [c.id for c in corpus.conversations] == ["0", "1", "2"]
    assert counted(corpus) == {"malformed JSON": 3, "not UTF-8": 1}
    assert corpus.dropped_rows["place"].tolist() == ["line 1", "line 4", "line 5", "line 6"]


def test_more_bad_rows_than_allowed_is_an_error_that_names_the_first(tmp_path):
    path = write(tmp_path, [GOOD, {"conversations": 1}, GOOD, GOOD | {"conversations": []}])
    assert len(load_conversations(path, on_bad_row="drop", max_bad_rows=0.5)) == 2
    with pytest.raises(InputError, match=r"rows\.json: 2 of 4 rows are bad \(50.0%, at most 49.0%.*row 2, conv.*row 4"):
        load_conversations(path, on_bad_row="drop", max_bad_rows=0.49)
    with pytest.raises(InputError, match=r"expected a fraction from 0 to 1, got 5"):
        load_conversations(path, on_bad_row="drop", max_bad_rows=5.0)
    with pytest.raises(InputError, match=r"every row is bad, from the first on: row 1: unknown format: found 'a'"):
        load_conversations(write(tmp_path, [{"a": 1}, {"b": 1}]), on_bad_row="drop")


def test_a_folder_is_its_data_files_one_after_the_other(tmp_path):
    write(tmp_path, [GOOD, GOOD | {"id": "z"}], "b.jsonl")
    write(tmp_path, [GOOD | {"id": "p"}], "a.parquet")
    write(tmp_path, [{"conversations": None}], "c.json")
    (tmp_path / "README.md").write_text("notes")
    corpus = load_conversations(tmp_path, on_bad_row="drop")
    assert [c.id for c in corpus.conversations] == ["p", "2", "z"]
    assert corpus.dropped_rows["place"].tolist() == ["c.json, row 1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no data file in this folder"):
        load_conversations(tmp_path / "empty")


def test_files_count_in_any_case_hidden_ones_do_not_and_packed_ones_do(tmp_path):
    write(tmp_path, [GOOD | {"id": "a"}], "a.jsonl").rename(tmp_path / "A.JSONL")
    (tmp_path / "._A.JSONL").write_bytes(b"\x00\x05")
    packed = "".join(json.dumps(GOOD | {"id": name}) + "\n" for name in "bc")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps([GOOD | {"id": "d"}]).encode()))
    assert [c.id for c in load_conversations(tmp_path).conversations] == ["a", "b", "c", "d"]
    for cut in (5, 30):
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(packed.encode())[:cut])
        with pytest.raises(InputError, match=r"b\.jsonl\.gz: not readable: .*fetch it again"):
            load_conversations(tmp_path)


@pytest.mark.parametrize("name", ["more/part.jsonl", "part.csv", "part.zip", "part.jsonl.zst"])
def test_data_of_a_folder_that_would_not_be_read_is_an_error(tmp_path, name):
    write(tmp_path, [GOOD], "a.jsonl")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("data")
    with pytest.raises(InputError, match=rf"holds also {name.partition('/')[0]}/?, which would not be read"):
        load_conversations(tmp_path)


def test_a_list_of_rows_is_read_also_from_a_file_of_lines(tmp_path):
    rows = [GOOD | {"id": "a"}, GOOD | {"id": "b"}]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n" + json.dumps(rows, indent=1)):
        (tmp_path / "rows.jsonl").write_text(text)
        assert [c.id for c in load_conversations(tmp_path / "rows.jsonl").conversations] == ["a", "b"]


def test_the_format_is_that_of_a_key_that_holds_something(tmp_path):
    for name in ("rows.json", "rows.jsonl", "rows.parquet"):
        path = write(tmp_path, [{"messages": None, **GOOD}, {"messages": None, **GOOD}], name)
        assert len(load_conversations(path)) == 2


def test_rows_without_an_id_get_names_that_no_row_has_as_its_id(tmp_path):
    rows = [GOOD, GOOD | {"id": 1}, GOOD | {"id": "row 1"}, GOOD, GOOD | {"id": None}, GOOD | {"id": "x"}]
    for name in ("rows.json", "rows.jsonl"):
        path = write(tmp_path, rows, name)
        names = [c.id for c in load_conversations(path).conversations]
        assert names == ["row row 1", "1", "row 1", "4", "5", "x"]


def test_a_rows_system_text_is_the_first_message(tmp_path):
    said = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    rows = [
        GOOD | {"system": "Be brief."},
        sharegpt(("system", "Be brief."), ("human", "a"), ("gpt", "b"), system_prompt="Be brief."),
        GOOD | {"system": " ", "system_prompt": None},
    ]
    assert texts(load_conversations(write(tmp_path, rows))) == [said, said, said[1:]]
    path = write(tmp_path, [sharegpt(("system", "Be long."), ("human", "a"), ("gpt", "b"), system="Be brief.")])
    with pytest.raises(InputError, match="row 1, system: key not read: the first turn is another system text"):
        load_conversations(path)


MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        *((GOOD | {key: value}, key) for key, value in (("images", ["a.png"]), ("tools", [{}]), ("chosen", "x"))),
        (MESSAGES | {"context": "A passage."}, "context"),
        (MESSAGES | {"history": [["a", "b"]]}, "history"),
        (MESSAGES | {"label": False}, "label"),
        ({"instruction": "a", "input": "x", "context": "y", "output": "b"}, "context"),
        ({"instruction": "a", "output": "b", "response": "c"}, "response"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history"),
        ({"messages": [MESSAGES["messages"][0], MESSAGES["messages"][1] | {"weight": 0}]}, r"messages\[1\]\.weight"),
        ({"messages": [MESSAGES["messages"][0] | {"images": ["a"]}]}, r"messages\[0\]\.images"),
    ],
)
def test_a_key_that_changes_what_a_row_means_is_never_passed_over(tmp_path, row, key):
    path = write(tmp_path, [row, row | {"id": "2"}])
    with pytest.raises(
        InputError, match=rf"row 1, {key}: key not read: .*; write it into the texts, or remove the key"
    ):
        load_conversations(path)
    good = write(tmp_path, [(GOOD if "conversations" in row else MESSAGES) | {"id": "g"}, row], "mixed.json")
    if "instruction" not in row:
        assert counted(load_conversations(good, on_bad_row="drop")) == {"key not read": 1}


def test_keys_that_say_nothing_are_passed_over(tmp_path):
    nothing = {"images": [], "tools": None, "chosen": "", "context": " ", "source": "here", "label": "news"}
    weighted = [message | {"weight": 1, "tool_calls": []} for message in MESSAGES["messages"]]
    assert len(load_conversations(write(tmp_path, [{"messages": weighted} | nothing]))) == 1


def test_dolly_as_published_gives_kinds_and_what_depends_on_its_passage(tmp_path):
    rows = [
        {"instruction": "q", "context": "p", "response": "a", "category": "closed_qa"},
        {"instruction": "q", "context": "", "response": "a", "category": "brainstorming"},
        {"instruction": "q", "context": "", "response": "a", "category": "news"},
    ]
    corpus = load_conversations(write(tmp_path, rows, "rows.jsonl"))
    assert texts(corpus)[:2] == [[("user", "q\n\np"), ("assistant", "a")], [("user", "q"), ("assistant", "a")]]
    answers = [c.messages[-1] for c in corpus.conversations]
    assert [a.kind for a in answers] == ["closed_qa", "brainstorming", None]
    assert [a.depends_on_context for a in answers] == [True, False, None]


def test_turns_of_mt_bench_101_are_read(tmp_path):
    rows = [{"task": "GR", "id": 1, "history": [{"user": "a", "bot": "b"}, {"user": "c", "bot": "d"}]}]
    corpus = load_conversations(write(tmp_path, rows, "rows.jsonl"))
    assert texts(corpus) == [[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]]
    path = write(tmp_path, [{"id": 1, "history": [{"user": "a", "bot": "b"}, {"user": " ", "bot": "d"}]}])
    with pytest.raises(InputError, match=r"row 1, history\[1\]\.user: empty turn"):
        load_conversations(path)


def test_conversations_are_read_one_at_a_time_as_they_are_whole(tmp_path):
    rows = [GOOD | {"id": str(n)} for n in range(5)] + [{"conversations": 1}, GOOD]
    for name in ("rows.json", "rows.jsonl"):
        path, ledger = write(tmp_path, rows, name), Ledger()
        whole = load_conversations(path, on_bad_row="drop")
        assert tuple(iter_conversations(path, on_bad_row="drop", ledger=ledger)) == whole.conversations
        assert ledger.counts().equals(whole.dropped) and ledger.dropped_rows().equals(whole.dropped_rows)
        assert next(iter_conversations(path)).id == "0"  # before the bad row is reached


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows.json"])
def test_a_large_file_is_the_same_corpus_read_again_and_again(tmp_path, name, monkeypatch):
    rows = [sharegpt(("human", f"q{n}"), ("gpt", "a")) | {"id": None if n % 3 else f"c{n}"} for n in range(40)]
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        write(tmp_path, rows, name)
    whole = load_conversations(tmp_path / name)
    monkeypatch.setattr(loading, "STREAMED_FROM", 1)
    streamed = open_conversations(tmp_path / name)
    assert isinstance(streamed.conversations, tuple) == (name == "rows.json")
    assert len(streamed) == 40 and streamed.format == whole.format
    assert tuple(streamed.conversations) == tuple(streamed.conversations) == whole.conversations


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "STREAMED_FROM", 1)
    path = write(tmp_path, [GOOD | {"id": "a"}], "rows.jsonl")
    corpus = open_conversations(path)
    write(tmp_path, [GOOD | {"id": "a"}, GOOD | {"id": "b"}], "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl: changed while it was read"):
        list(corpus.conversations)


def test_a_limit_looks_no_further_than_it_must(tmp_path):
    path = write(tmp_path, [{"conversations": 0}, GOOD, GOOD, {"conversations": 1}])
    corpus = load_conversations(path, on_bad_row="drop", limit=2)
    assert [c.id for c in corpus.conversations] == ["2", "3"] and len(corpus.dropped_rows) == 1


def test_a_dataset_of_the_hub_passes_the_same_checks(tmp_path, monkeypatch):
    asked, rows = [], [GOOD | {"id": "first"}, sharegpt(("human", "a"), ("bot", "b"), id="x"), GOOD | {"id": "last"}]

    def load_dataset(name, split, revision):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_conversations("owner/name", split="train_sft", on_bad_row="drop")
    assert asked == [("owner/name", "train_sft")] and corpus.source == "owner/name"
    assert corpus.conversations == load_conversations(write(tmp_path, rows), on_bad_row="drop").conversations
    assert corpus.dropped_rows["place"].tolist() == ["row 2"]
    with pytest.raises(InputError, match=r"owner/name, row 2, conversations\[1\]\.from: unknown role"):
        load_conversations("owner/name")


@pytest.mark.parametrize(
    "error, said",
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub."),
            "it is gated: ask for access at https://huggingface.co/datasets/owner/name, .* hf auth login, or name a",
        ),
        (ConnectionError("no route"), "the hub cannot be reached, .*; try again online .*, or name a local"),
        (
            ValueError('Unknown split "x".\nShould be one of train'),
            'Unknown split "x". Should be one of train; see https://.*/owner/name, or name a local',
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer supported"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_a_remedy(monkeypatch, error, said):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=f"owner/name: .*{said}") as refused:
        load_conversations("owner/name")
    assert "\n" not in str(refused.value)


def test_a_name_is_the_hubs_only_if_nothing_here_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    for hub_id in ("owner/name", "owner/name-v1.5", "squad"):
        assert is_hub_dataset(hub_id)
    for local in ("owner/here", "./name", "/owner/name", "~/name", "a/b/c", "name/", "owner/chats.json", Path("a/b")):
        assert not is_hub_dataset(local)


def test_chunks_lose_their_leading_answers_and_nothing_else(tmp_path):
    system, chunk = [("system", "s")], [("gpt", "x"), ("gpt", "y"), ("human", "a"), ("gpt", "b")]
    rows = [sharegpt(*system, *chunk), sharegpt(("gpt", "x")), sharegpt(("system", " "), ("human", "a"))]
    corpus = load_conversations(write(tmp_path, rows), on_bad_row="drop")
    assert texts(corpus) == [[("system", "s"), ("user", "a"), ("assistant", "b")], [("user", "a")]]
    assert counted(corpus) == {
        "leading assistant turn removed": 2,
        "no user turn": 1,
        "empty system text removed": 1,
    }


def test_refusals_are_removed_only_on_request(tmp_path):
    refused = sharegpt(("human", "a"), ("gpt", "I’m sorry, but I can’t do that. As an AI language model"), id="refused")
    asked = sharegpt(("human", "As an AI language model, what are you?"), ("gpt", "b"), id="asked")
    path = write(tmp_path, [refused, asked])
    assert len(load_conversations(path)) == 2
    corpus = load_conversations(path, remove_refusals=True, max_bad_rows=0.0)
    assert [c.id for c in corpus.conversations] == ["asked"] and counted(corpus) == {"refusal": 1}
    assert corpus.dropped_rows[["place", "key", "reason"]].to_numpy().tolist() == [["row 1", "message 2", "refusal"]]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", json.dumps(GOOD) + "\n\n{oops\n", "line 3: malformed JSON"),
        ("a.json", '[\n{"a": 1},\n{]', "line 3: malformed JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"line 2: malformed JSON .*\.jsonl"),
        ("a.json", '{"a": 1}', "expected a list of rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '[{"prompt": "a"}]', "row 1: unknown format: found 'prompt'"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.parquet", "oops", "not a Parquet file, or cut short.*; fetch it again"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "a Git-LFS pointer.*git lfs pull"),
        ("a.parquet", "<!DOCTYPE html><html>", "a web page, not the file itself"),
        ("a.json", "[" * 10**5, "malformed JSON"),
        ("a.csv", "a,b", "expected a .json, .jsonl or .parquet file"),
        ("a.json", json.dumps([{"messages": [{"role": "user", "content": "x", "score": "high"}]}]), "wrong type"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"{name}.*{said}"):
        load_conversations(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_a_file_that_is_cut_short_is_never_taken_for_whole(tmp_path, name):
    path = write(tmp_path, [sharegpt(("human", f"question {n}"), ("gpt", "answer")) for n in range(9)], name)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=rf"{name}.*(cut short|corrupted).*fetch it again") as told:
            load_conversations(path)
        assert "\n" not in str(told.value)


def test_a_line_that_the_end_of_the_file_cuts_is_counted_as_such(tmp_path):
    path = write(tmp_path, [GOOD, GOOD, GOOD], "rows.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    corpus = load_conversations(path, on_bad_row="drop")
    assert len(corpus) == 2 and counted(corpus) == {"cut short": 1}
    assert corpus.dropped_rows["remedy"].tolist() == ["the file ends within this line; fetch it again"]


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "a"}, "row 1: unknown format: found 'text'"),
        ({"instruction": "a", "input": ""}, "row 1, output: missing key: found instruction, input; rename one"),
        ({"instruction": "a", "output": 3}, "row 1, output: not a text: expected a string, got int"),
        ({"messages": "[]"}, "row 1, messages: missing turns: expected a list of turns, got str"),
        ({"messages": [1, 2]}, r"row 1, messages\[0\]: not an object"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            r"row 1, messages\[0\]\.role: missing key: found from, value",
        ),
        ({"id": [1, 2], "instruction": "a", "output": "b"}, "row 1, id: wrong type: expected a text or a number"),
        ({"id": {"a": 1}, "instruction": "a", "output": "b"}, "row 1, id: wrong type"),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_named(tmp_path, name, row, said):
    path = write(tmp_path, [row, row], name)
    with pytest.raises(InputError, match=rf"{name}, {said}"):
        load_conversations(path)
    with pytest.raises(InputError, match=rf"{name}: every row is bad, from the first on: {said}"):
        load_conversations(path, on_bad_row="drop")


def test_numbers_and_texts_are_ids(tmp_path):
    path = write(tmp_path, [GOOD | {"id": 7}, GOOD | {"id": None}, GOOD | {"id": 9}], "rows.parquet")
    assert [c.id for c in load_conversations(path).conversations] == ["7.0", "2", "9.0"]
    path = write(tmp_path, [GOOD | {"id": 7}, GOOD | {"id": "x"}])
    assert [c.id for c in load_conversations(path).conversations] == ["7", "x"]


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    corpus = load_conversations(write(tmp_path, [sharegpt(("human", "a" * 9000), ("gpt", "b"))]))
    for name in ("saved.jsonl", "saved.json", "saved.parquet"):
        path = tmp_path / "out" / name
        save_conversations(Corpus((Conversation("c", (Message("user", "a"),)),), NOTHING, "here"), path)
        before = path.read_bytes()
        with pytest.raises(InputError, match=rf"{name}: not written, the disk is full"), full_disk(1000):
            save_conversations(corpus, path)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
        path.unlink()


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no file or folder '.*absent\.json'"):
        load_conversations(tmp_path / "absent.json")
    with pytest.raises(InputError, match="on_bad_row"):
        load_conversations(tmp_path / "absent.json", on_bad_row="skip")
    with pytest.raises(InputError, match="format: expected one of"):
        load_conversations(tmp_path / "absent.json", format="csv")


def test_a_forced_format_wins(tmp_path):
    row = GOOD | {"instruction": "i", "output": "o"}
    path = write(tmp_path, [row])
    assert texts(load_conversations(path)) == [[("user", "a"), ("assistant", "b")]]
    assert texts(load_conversations(path, format="instruction")) == [[("user", "i"), ("assistant", "o")]]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the sample conversations are not at {DATA}")
@pytest.mark.parametrize("name, key", [("sharegpt_sample", "conversations"), ("instruction_sample", "instruction")])
def test_the_public_samples_load_whole(name, key):
    rows = json.loads((DATA / f"{name}.json").read_text())
    corpus = load_conversations(DATA / f"{name}.json")
    assert len(corpus) == len(rows) and corpus.dropped.empty
    for conversation, row in zip(corpus.conversations, rows, strict=True):
        if key == "conversations":
            assert [message.content for message in conversation.messages] == [turn["value"] for turn in row[key]]
        else:
            assert conversation.messages[0].content.startswith(row[key])
            assert row["input"] in conversation.messages[0].content
            assert conversation.messages[1].content == row["output"]
