"""`ctxlib score` and `ctxlib mark` as a researcher calls them: what a folder holds, survives and refuses."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pandas as pd
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from ctxlib import scoring
from ctxlib.commands import cli
from ctxlib.commands import score as score_folder
from ctxlib.commands.mark import mark_data, read_scores
from ctxlib.commands.score import Settings, parse_layers, parse_share, prepare
from ctxlib.conversations import load_conversations
from ctxlib.files import file_digest
from ctxlib.miniature import MODELS
from ctxlib.models import load_model, load_tokenizer
from ctxlib.params import InputError, Scoring
from ctxlib.scoring import answered_turns, score_corpus

DEPTH = 3


def write_model(folder, tokenizer, model):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seed_model(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
    )  # fmt: skip
    return write_model(tmp_path_factory.mktemp("seed") / "model", tokenizer, LlamaForCausalLM(config))


def rows(n=5):
    talks = [
        ["Who is 1", "Ada.", "And then?", f"It was Bo, {i} times."] if i % 2 else [f"Sum {i}", "3"] for i in range(n)
    ]
    return [
        {
            "id": f"c{i}",
            "conversations": [
                {"from": ("human", "gpt")[j % 2], "value": text} for j, text in enumerate(talk)
            ],
        }
        for i, talk in enumerate(talks)
    ]  # fmt: skip


BAD_ROW = {"id": "bad", "conversations": [{"from": "bot", "value": "x"}]}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def ctxlib(monkeypatch, capsys):
    """Runs the command line; gives its exit status, what it printed, and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ctxlib", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def score(ctxlib, seed_model, data, tmp_path):
    """Runs `ctxlib score` on this model and these data, into the folder scores, unless told otherwise."""

    def run(*more, model=seed_model, data=data, out=tmp_path / "scores"):
        return ctxlib("score", "--model", model, "--data", data, "--out", out, *more)

    return run


def test_the_folder_holds_the_scores_of_score_corpus_and_tells_how_they_were_made(score, seed_model, data, tmp_path):
    status, said, bar = score("--layer", "all", "--variant", "authors_code", "--max-length", "200")
    assert status == 0 and "5/5" in bar and "tokens/s" in bar and "scored 7 of 7 turns" in said

    model, tokenizer, corpus = load_model(seed_model), load_tokenizer(seed_model), load_conversations(data)
    expected = score_corpus(model, tokenizer, corpus, Scoring(variant="authors_code"), max_length=200, progress=False)
    frame, _, manifest = read_scores(tmp_path / "scores")
    pd.testing.assert_frame_equal(frame, expected, check_exact=True)
    last = expected.groupby("conversation")[["context_tokens", "answer_tokens"]].max().to_numpy().sum()
    turns = sum(len(answered_turns(conversation)) for conversation in corpus.conversations)
    assert manifest["counts"] == {"conversations": 5, "turns": turns, "turns_scored": 7, "tokens": last}
    assert manifest["run"]["tokens"] == last and manifest["run"]["tokens_per_second"] > 0
    assert manifest["identity"]["weights"] == frame["seed_model"][0]
    assert manifest["data_sha256"] == {"chats.jsonl": file_digest(data)}
    assert manifest["settings"]["layers"] == [0, 1, 2] and manifest["settings"]["format"] == "sharegpt"
    assert manifest["settings"]["max_length"] == 200 and manifest["versions"]["torch"] == torch.__version__
    assert (tmp_path / "scores" / "dropped_rows.csv").read_text() == "place,key,reason,remedy\n"


def test_without_a_layer_it_takes_the_papers_to_scale_and_says_so(score, tmp_path):
    _, said, _ = score()
    assert (
        "layer 2 (of 0 to 2; the paper's 15 of 22, to scale); standard variant, max_then_mean, up to 256 tokens" in said
    )
    assert set(read_scores(tmp_path / "scores")[0]["layer"]) == {round(DEPTH * 15 / 22)}


def test_the_model_of_the_miniature_has_a_name(score, tmp_path):
    status, said, _ = score(model="miniature:instruct")
    assert status == 0 and "\nminiature:instruct: layer 4 (of 0 to 5" in said
    frame, settings, _ = read_scores(tmp_path / "scores")
    score(model=MODELS / "instruct", out=tmp_path / "by_folder")
    assert settings.model == "miniature:instruct" and frame.equals(read_scores(tmp_path / "by_folder")[0])


DIES_WHILE_WRITING_THE_THIRD_PART = """
import os, signal
import pandas as pd
from ctxlib.commands import cli

calls = []

def to_parquet(frame, path=None, **options):
    calls.append(path)
    if len(calls) == 3:
        open(path, "w").write("half a part")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(frame, path, **options)

write, pd.DataFrame.to_parquet = pd.DataFrame.to_parquet, to_parquet
cli.main()
"""


def test_killed_and_started_again_it_ends_with_the_same_bytes(score, seed_model, data, tmp_path):
    options = ["--conversations-per-part", "1", "--layer", "all"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", DIES_WHILE_WRITING_THE_THIRD_PART, "score", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    died = subprocess.run([*command, "--model", seed_model, "--data", data, "--out", killed], env=environment)
    assert died.returncode == -9
    assert len(list(killed.glob("parts/*/*/part-*.parquet"))) == 2 and not (killed / "scores.json").exists()

    assert score(*options, out=killed)[0] == score(*options, out=whole)[0] == 0
    assert (killed / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()
    resumed, at_once = (json.loads((folder / "scores.json").read_text()) for folder in (killed, whole))
    assert 0 < resumed.pop("run")["tokens"] < at_once.pop("run")["tokens"]
    assert resumed == at_once
    assert "no new tokens" in score(*options, out=killed)[1]
    assert (killed / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()


def test_shares_are_put_together_when_the_last_is_there(score, tmp_path):
    options = ["--conversations-per-part", "1", "--on-bad-row", "drop"]
    status, said, _ = score("--shard", "3/3", *options)
    assert status == 0 and "not complete: still to be run, with the same --out: --shard 1/3, 2/3" in said
    assert len(list(tmp_path.glob("scores/parts/*/*/part-*.parquet"))) == 1
    score("--shard", "1/3", *options)
    assert not (tmp_path / "scores" / "scores.json").exists()
    assert "scored 7 of 7" in score("--shard", "2/3", *options)[1]
    score(*options, out=tmp_path / "whole")
    together, alone = (tmp_path / name / "scores.parquet" for name in ("scores", "whole"))
    assert together.read_bytes() == alone.read_bytes()


def test_where_memory_ran_out_a_smaller_token_budget_goes_on_from_the_parts(score, tmp_path, monkeypatch):
    options, score_batch, calls = ["--conversations-per-part", "1"], scoring.corpus._score_batch, []

    def full(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score_batch(*args)

    monkeypatch.setattr(scoring.corpus, "_score_batch", full)
    status, _, errors = score(*options)
    assert (
        status == 2 and "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): set" in errors.splitlines()[-1]
    )
    assert str(tmp_path / "scores" / "parts") in errors.splitlines()[-1]
    assert score(*options, "--token-budget", "100")[0] == 0
    assert len(calls) == 3 + 3  # two of five parts were there
    assert read_scores(tmp_path / "scores")[1].token_budget == 100


def test_a_share_of_nothing_but_unscorable_turns_does_not_stop_the_others(score, data, tmp_path):
    long, short = rows(2)[1], rows(1)[0]
    long["conversations"][0]["value"] = "long " * 100
    data.write_text(json.dumps(long) + "\n" + json.dumps(short) + "\n")
    options = ["--conversations-per-part", "1"]
    assert "still to be run, with the same --out: --shard 2/2" in score("--shard", "1/2", *options)[1]
    status, said, _ = score("--shard", "2/2", *options)
    assert status == 0 and "scored 1 of 3 turns\n  not scored: 2, the answer ends beyond 256 tokens" in said


@pytest.mark.parametrize(
    "change",
    [["--layer", "1"], ["--variant", "authors_code"], ["--head-reduction", "mean"], ["--max-length", "90"],
     ["--limit", "3"],
     ["--dtype", "bfloat16"], ["--chat-template", "{template}"]],
    ids=lambda change: change[0],
)  # fmt: skip
def test_other_settings_never_share_parts(score, tokenizer, tmp_path, change):
    (tmp_path / "other.jinja").write_text(tokenizer.chat_template.replace("<|", "<||"))
    score()
    status, _, _ = score(*(text.format(template=tmp_path / "other.jinja") for text in change))
    assert status == 0 and len(list(tmp_path.glob("scores/parts/*/*/settings.json"))) == 2
    assert read_scores(tmp_path / "scores")[2]["run"]["tokens"] > 0


def test_old_scores_stay_until_the_new_ones_are_complete(score, tmp_path):
    score("--layer", "0")
    before = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir() if path.is_file()}
    score("--layer", "1", "--shard", "1/2", "--conversations-per-part", "1")
    assert {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir() if path.is_file()} == before
    score("--layer", "1", "--shard", "2/2", "--conversations-per-part", "1")
    assert read_scores(tmp_path / "scores")[1].layers == (1,)


def test_dropped_rows_are_counted_printed_and_listed(score, data, tmp_path):
    data.write_text("{oops\n" + data.read_text() + json.dumps(BAD_ROW) + "\n")
    status, said, _ = score("--on-bad-row", "drop", "--max-bad-rows", "0.5")
    assert status == 0 and "  1 × malformed JSON\n  1 × unknown role\n    line 1: malformed JSON\n" in said
    listed = pd.read_csv(tmp_path / "scores" / "dropped_rows.csv", keep_default_na=False)
    assert listed[["place", "key", "reason"]].to_numpy().tolist() == [
        ["line 1", "", "malformed JSON"],
        ["line 7", "conversations[0].from", "unknown role"],
    ]
    assert read_scores(tmp_path / "scores")[2]["dropped"] == {"malformed JSON": 1, "unknown role": 1}


def test_what_is_wrong_is_one_line_before_the_model_is_loaded(score, data, tmp_path, seed_model, monkeypatch):
    monkeypatch.setattr(score_folder, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    bad, unanswered, empty = (tmp_path / name for name in ("bad.jsonl", "unanswered.jsonl", "empty.jsonl"))
    bad.write_text(data.read_text() + "{oops\n" + json.dumps(BAD_ROW) + "\n")
    unanswered.write_text(json.dumps({"conversations": [{"from": "human", "value": "hello?"}]}))
    empty.write_text("")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(bad, folder)
    cut = shutil.copytree(seed_model, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    untold = shutil.copytree(seed_model, tmp_path / "untold")
    (untold / "chat_template.jinja").unlink()
    drop = ("--on-bad-row", "drop")
    for arguments, changes, said in (
        (["--shard", "0/4"], {}, "shard 0/4: give the share and their number, counted from 1: 1/4"),
        (["--shard", "5/4"], {}, "shard 5/4"),
        (["--shard", "half"], {}, "shard half"),
        (["--layer", "3"], {}, "layer 3 does not exist"),
        (["--layer", "-1"], {}, "layer -1: give a number from 0 on, or 'all' alone"),
        (["--layer", "all", "--layer", "1"], {}, "layer all: give a number"),
        (["--max-length", "0"], {}, "--max-length 0: input should be greater than or equal to 1"),
        (["--limit", "0"], {}, "--limit 0"),
        (["--max-bad-rows", "5"], {}, "--max-bad-rows 5: input should be less than or equal to 1"),
        (["--chat-template", tmp_path / "none.jinja"], {}, "chat template not readable"),
        ([], {"model": tmp_path / "nowhere"}, "no file or folder"),
        ([], {"model": cut}, "model.safetensors: cut short or damaged"),
        ([], {"model": untold}, "no chat template; name a .jinja file"),
        ([], {"data": tmp_path / "nowhere.json"}, f"no file or folder '{tmp_path}/nowhere.json'"),
        ([], {"data": empty}, "holds no rows"),
        ([], {"data": unanswered}, "the 1 conversations hold no user message with an answer"),
        ([], {"data": bad}, "bad.jsonl, line 6: malformed JSON"),
        (drop, {"data": bad}, "bad.jsonl: 2 of 7 rows are bad (28.6%, at most 5.0% may be): line 6: malformed JSON"),
        ([], {"out": data}, "is where the data are; choose another folder"),
        ([], {"out": data / "scores"}, "no folder to write to"),
        ([], {"data": folder, "out": folder}, "folder, bad.jsonl, line 6"),
        ([*drop, "--max-bad-rows", "1"], {"data": folder, "out": folder}, "is where the data are"),
    ):
        status, _, errors = score(*arguments, **changes)
        assert status == 2 and said in errors and errors.count("\n") == 1, errors
    assert not list(tmp_path.glob("**/scores.json"))


def test_bad_settings_of_the_library_are_named(seed_model, data):
    named = {"model": str(seed_model), "data": str(data)}
    for change, said in (
        ({"variant": "clear"}, "variant\n.*'standard' or 'authors_code'"),
        ({"head_reduction": "max"}, "head_reduction\n.*'max_then_mean'"),
        ({"dtype": "int8"}, "dtype\n.*'float32'"),
    ):
        with pytest.raises(ValueError, match=said):
            Settings(**named, **change)
    with pytest.raises(InputError, match=f"layer {DEPTH} does not exist: .* has layers 0 to {DEPTH - 1}"):
        prepare(Settings(**named, layers=(DEPTH,)))


def test_models_without_attention_to_record_are_refused(score, tokenizer, tmp_path, monkeypatch):
    small = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "hidden_size": 16}
    mamba = write_model(tmp_path / "mamba", tokenizer, MambaForCausalLM(MambaConfig(**small, state_size=4)))
    status, _, errors = score(model=mamba)
    assert status == 2 and "a mamba model has no fixed number of positions; use another" in errors
    assert not (tmp_path / "scores" / "scores.json").exists()
    hybrid = write_model(tmp_path / "hybrid", tokenizer, Qwen3NextForCausalLM(Qwen3NextConfig(
        **small, num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )))  # fmt: skip
    without = "recorded in layers [0]; choose one of [1]"
    with monkeypatch.context() as patch:
        patch.setattr(score_folder, "load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
        status, _, errors = score("--layer", "all", model=hybrid)
        assert status == 2 and without in errors.splitlines()[-1]
    with monkeypatch.context() as patch:  # where the configuration does not tell, two tokens do
        patch.setattr(score_folder, "_check_layer_types", lambda *args: None)
        patch.setattr(scoring.corpus, "_score_batch", lambda *args: pytest.fail("a batch was scored"))
        status, _, errors = score("--layer", "all", model=hybrid)
        assert status == 2 and without in errors.splitlines()[-1]
    assert score("--layer", "1", model=hybrid, out=tmp_path / "of_hybrid")[0] == 0
    bert = BertConfig(**small, num_attention_heads=2, intermediate_size=16, max_position_embeddings=256)
    status, _, errors = score(model=write_model(tmp_path / "bert", tokenizer, BertLMHeadModel(bert)))
    assert status == 2 and "bert attends to later tokens" in errors.splitlines()[-1]
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=256)
    status, said, _ = score(model=write_model(tmp_path / "gpt2", tokenizer, GPT2LMHeadModel(gpt2)))
    assert status == 0 and "scored 7 of 7" in said
    gemma = Gemma2Config(**small, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    gemma = write_model(tmp_path / "gemma2", tokenizer, Gemma2ForCausalLM(gemma))
    status, _, errors = score(model=gemma)
    assert status == 2 and "not loadable" in errors and "(--attention eager)" in errors
    status, said, _ = score("--attention", "eager", model=gemma)
    assert status == 0 and "scored 7 of 7" in said


def test_a_score_that_is_not_a_number_is_named_and_finished_parts_stay(score, seed_model, data, tmp_path):
    model = load_model(seed_model)
    with torch.no_grad():
        model.model.embed_tokens.weight[load_tokenizer(seed_model)("B").input_ids[-1]] = float("nan")
    ill = shutil.copytree(seed_model, tmp_path / "ill")
    model.save_pretrained(ill)
    status, _, errors = score("--conversations-per-part", "1", model=ill)
    assert status == 2 and "conversation 'c1'" in (line := errors.splitlines()[-1])
    assert "layer 2: the score is not a number" in line
    assert len(list(tmp_path.glob("scores/parts/*/*/part-*.parquet"))) == 1


def test_an_interrupted_run_says_how_to_go_on(score, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(score_folder, "score_corpus", interrupted)
    status, _, errors = score()
    assert status == 130 and "interrupted; the same command resumes from the parts in" in errors


def test_nothing_that_fits_is_an_error(score):
    status, _, errors = score("--max-length", "3")
    assert status == 2 and "no turn could be scored: the answer ends beyond 3 tokens" in errors.splitlines()[-1]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("format", ["sharegpt", "messages", "instruction"])
def test_marked_data_load_back_with_their_marks_and_scores(score, ctxlib, tmp_path, suffix, format):
    source = {
        "sharegpt": rows(),
        "messages": [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bo."}]}] * 2,
        "instruction": [{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Say x", "output": "x"}],
    }[format]
    data = tmp_path / f"source.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(source).to_parquet(data)
    else:
        lines = [json.dumps(row) for row in source]
        data.write_text(f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines))
    assert score("--layer", "1", data=data)[0] == 0
    scores = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    threshold = sorted(scores["score"])[len(scores) // 2]
    out = tmp_path / f"marked.{suffix}"
    status, said, _ = ctxlib("mark", "--scores", tmp_path / "scores", "--threshold", threshold, "--out", out)
    over = scores[scores["score"] > threshold]
    assert status == 0 and f"marked {len(over)} of {len(scores)} turns (score at layer 1 over" in said
    assert "without a score, so unmarked: 0" in said

    expected = {(row.conversation, row.turn): row.score for row in scores.itertuples()}
    plain, marked = load_conversations(data), load_conversations(out)
    assert [c.id for c in marked.conversations] == [c.id for c in plain.conversations]
    for before, after in zip(plain.conversations, marked.conversations, strict=True):
        assert [(m.role, m.content) for m in after.messages] == [(m.role, m.content) for m in before.messages]
        for turn, user, answer in answered_turns(after):
            assert after.messages[answer].score == expected[after.id, turn]
            assert after.messages[user].indicated == (expected[after.id, turn] > threshold)


def test_the_top_fraction_is_marked_of_the_layer_that_is_named(score, ctxlib, tmp_path):
    score("--layer", "0", "--layer", "2")
    out = tmp_path / "marked.jsonl"
    top = ["mark", "--scores", tmp_path / "scores", "--fraction", "0.43", "--out", out]
    status, _, errors = ctxlib(*top)
    assert status == 2 and "layers 0, 2 were scored; name one (layer)" in errors and not out.exists()
    assert "marked 3 of 7" in ctxlib(*top, "--layer", "2")[1]
    scores = pd.read_parquet(tmp_path / "scores" / "scores.parquet")
    best = scores[scores["layer"] == 2].nlargest(3, "score")
    marked = {
        (conversation.id, turn)
        for conversation in load_conversations(out).conversations
        for turn, user, _ in answered_turns(conversation)
        if conversation.messages[user].indicated
    }
    assert marked == set(zip(best["conversation"], best["turn"], strict=True))


def test_the_reading_of_the_scores_is_that_of_the_marks_unless_told_otherwise(score, ctxlib, tmp_path):
    score("--variant", "authors_code")
    mark = ["mark", "--scores", tmp_path / "scores", "--threshold", "0.5", "--out", tmp_path / "marked.json"]
    for more, expected in (([], "Sum 0."), (["--variant", "standard"], "Sum 0")):
        assert ctxlib(*mark, *more)[0] == 0
        assert load_conversations(tmp_path / "marked.json").conversations[0].messages[0].content == expected


def test_turns_without_a_score_and_dropped_rows_stay_out_of_the_marks(score, ctxlib, data, tmp_path):
    row = rows(2)[1] | {"id": "long"}
    row["conversations"][2]["value"] = "long " * 100
    data.write_text(data.read_text() + "{oops\n" + json.dumps(row) + "\n")
    score("--on-bad-row", "drop", "--max-bad-rows", "0.2")
    _, said, _ = ctxlib("mark", "--scores", tmp_path / "scores", "--threshold", 0, "--out", tmp_path / "m.jsonl")
    assert "marked 8 of 9 turns" in said and "without a score, so unmarked: 1" in said
    assert [c.id for c in load_conversations(tmp_path / "m.jsonl").conversations] == [
        "c0",
        "c1",
        "c2",
        "c3",
        "c4",
        "long",
    ]


def test_marks_are_only_made_from_the_data_that_were_scored(score, ctxlib, data, tmp_path):
    score()
    scores, out = tmp_path / "scores", tmp_path / "marked.jsonl"
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert mark_data(scores, out, threshold=0.5, data=str(moved)).corpus.source == str(moved)
    source = data.read_bytes()
    for arguments, said in (
        (["--threshold", "0.5", "--fraction", "0.5"], "give a threshold or a fraction, one of the two"),
        ([], "give a threshold or a fraction, one of the two"),
        (["--threshold", "60"], "--threshold 60.0: input should be less than or equal to 1"),
        (["--fraction", "60"], "--fraction 60.0: input should be less than or equal to 1"),
        (["--threshold", "0.5", "--layer", "0"], "layer 0 was not scored; there is 2"),
        (["--threshold", "0.5", "--out", tmp_path / "marked.csv"], "expected the name of a .jsonl, .json or .parquet"),
        (["--threshold", "0.5", "--out", data], "the marks are made from this file; choose another name"),
        (["--threshold", "0.5", "--out", scores / "scores.parquet"], "the marks are made from this file"),
        (
            ["--threshold", "0.5", "--data", tmp_path / "gone.jsonl"],
            "holds the scores of these data: give their new place (data)",
        ),
        (["--threshold", "0.5", "--scores", tmp_path / "none"], "no complete scores (scores.json"),
    ):
        status, _, errors = ctxlib("mark", "--scores", scores, "--out", out, *arguments)
        assert status == 2 and said in errors and errors.count("\n") == 1, errors
    assert data.read_bytes() == source
    data.write_text(data.read_text().replace("Ada", "Eve"))
    _, _, errors = ctxlib("mark", "--scores", scores, "--threshold", "0.5", "--out", out)
    assert "not the data that" in errors and "bring these back, or score the new data" in errors
    with (scores / "scores.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"scores\.parquet is not the file that scores\.json describes"):
        read_scores(scores)
    (scores / "scores.json").write_text("{}")
    with pytest.raises(InputError, match="not a manifest of scores"):
        read_scores(scores)


def test_a_dataset_of_the_hub_is_scored_and_marked_like_a_file(score, ctxlib, data, tmp_path, monkeypatch):
    asked, held = [], rows()

    def load_dataset(name, split, revision):
        asked.append((name, split))
        return datasets.Dataset.from_list(held)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert score("--split", "train_sft", data="owner/name")[0] == 0
    score(out=tmp_path / "local")
    assert (tmp_path / "scores/scores.parquet").read_bytes() == (tmp_path / "local/scores.parquet").read_bytes()
    mark = ["mark", "--scores", tmp_path / "scores", "--threshold", "0.5", "--out", tmp_path / "m.json"]
    assert ctxlib(*mark)[0] == 0 and set(asked) == {("owner/name", "train_sft")}
    held[0]["conversations"][0]["value"] = "changed on the hub"
    status, _, errors = ctxlib(*mark)
    assert status == 2 and "owner/name: not the data that" in errors


def test_shares_and_layers_as_they_are_written():
    assert parse_share("1/1") == (1, 1) and parse_share("2/4") == (2, 4)
    for wrong in ("0/2", "3/2", "-1/2", "1", "1/0", "a/b", "1/2/3", ""):
        with pytest.raises(InputError, match="counted from 1"):
            parse_share(wrong)
    assert (parse_layers(None), parse_layers(["all"]), parse_layers(["3", "0"])) == (None, "all", (3, 0))


def test_the_help_tells_every_option(ctxlib, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    status, said, _ = ctxlib("score", "--help")
    said = " ".join(said.replace("│", " ").split())
    assert status == 0 and "the paper's 15 of 22, to scale" in said and "1-based" in said
    for field in Settings.model_fields:
        assert f"--{field.removesuffix('s') if field == 'layers' else field}".replace("_", "-") in said
