"""Context-dependency scores against a loop over the eager attention matrix; parts that are kept and found again."""

import copy
import string

import pandas as pd
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from ctxlib import scoring
from ctxlib.conversations import Conversation, Corpus, Message, loading, open_conversations, save_conversations
from ctxlib.files import digest
from ctxlib.metrics import layer_agreement, score_agreement
from ctxlib.params import InputError, Scoring
from ctxlib.roles import Role, RoleMap, role_map
from ctxlib.scoring import answered_turns, encoded_ahead, length_buckets, reduce_heads, rope_borders


def score_corpus(model, tokenizer, corpus, **options):
    """`scoring.score_corpus` with its settings by name."""
    settings = Scoring(**{name: options.pop(name) for name in list(options) if name in Scoring.model_fields})
    return scoring.score_corpus(model, tokenizer, corpus, settings, **options)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def eager(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


def conversation(id, *texts, system=None):
    roles = ("user", "assistant")
    turns = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
    return Conversation(id, (Message("system", system), *turns) if system else turns)


def corpus_of(*conversations):
    return Corpus(tuple(conversations), pd.DataFrame({"reason": [], "n": []}), "a test")


@pytest.fixture(scope="module")
def corpus():
    return corpus_of(
        conversation("b", "Who?\nI ask.", "Ada.", "And\n\nthen, who?", "It was Bo then."),
        conversation("a", "Sum 1 2", "3", system="Be brief."),
        conversation("c", "hello there, you", "hi", "a", "b", "c", "d"),
        conversation("e", "long " * 12, "short"),
        conversation("d", "x", "a rather long answer to a short question", "unanswered"),
    )


def brute_force(eager, tokenizer, conversation, variant):
    """{(turn, layer): score}, one attention weight after the other."""
    tokens = role_map(tokenizer, conversation.messages)
    ids, roles, turns = tokens.ids.tolist(), tokens.roles.tolist(), tokens.turns.tolist()
    with torch.no_grad():
        attentions = eager(torch.tensor([ids]), output_attentions=True).attentions
    newline, eos = tokenizer("\n", add_special_tokens=False).input_ids[0], tokenizer.eos_token_id
    scores = {}
    for turn, _, _ in answered_turns(conversation):
        answer = [i for i in range(len(ids)) if roles[i] == Role.ASSISTANT and turns[i] == turn]
        keys = [i for i in range(answer[0]) if roles[i] == Role.USER]
        if variant == "authors_code":
            assert ids[answer[-1] + 1 : answer[-1] + 3] == [eos, newline]
            answer += [answer[-1] + 1, answer[-1] + 2]
            keys = [i for i in range(answer[0]) if roles[i] in (Role.USER, Role.SYSTEM) and ids[i] != newline]
        for layer, attention in enumerate(attentions):
            best = [max(sum(float(head[y, x]) for x in keys) for head in attention[0]) for y in answer]
            scores[turn, layer] = sum(best) / len(best)
    return scores


@pytest.mark.parametrize("variant", ["standard", "authors_code"])
def test_score_matches_brute_force_loop(model, eager, tokenizer, corpus, variant):
    frame = score_corpus(model, tokenizer, corpus, variant=variant, progress=False)
    for c in corpus.conversations:
        rows = frame[frame.conversation == c.id]
        ours = {(row.turn, row.layer): row.score for row in rows.itertuples()}
        assert ours == pytest.approx(brute_force(eager, tokenizer, c, variant), abs=2e-6)
    assert frame.score.between(0, 1).all() and set(frame.variant) == {variant}
    assert list(frame.conversation.unique()) == ["b", "a", "c", "e", "d"]
    assert frame.equals(frame.sort_values(["turn", "layer"]).iloc[frame.sort_values(["turn", "layer"]).index.argsort()])


@pytest.fixture(scope="module")
def with_lone_spaces():
    """A sentencepiece tokenizer as TinyLlama's: it writes a lone "▁" behind every `</s>`."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *sorted(set(string.printable) - {" "}), "▁a", "▁<", "as"]
    merges = [("▁", "a"), ("▁", "<"), ("a", "s")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\n' + eos_token + '\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    )
    return tokenizer


def by_markers(tokenizer, messages):
    """Ids, keys and rows by turn of the authors' masks: markers are found as ids, and all else is sorted by them."""
    text = tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in messages], tokenize=False)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    newline = tokenizer.get_vocab()["\n"]
    speaker, of_token, at = "system", [], 0
    markers = {
        who: tokenizer(f"{before}<|{who}|>\n", add_special_tokens=False).input_ids[skipped:]
        for who, before, skipped in (("system", "", 0), ("user", "\n", 2), ("assistant", "\n", 2))
    }
    while at < len(ids):
        found = next((who for who, marker in markers.items() if ids[at : at + len(marker)] == marker), None)
        speaker = found or speaker
        length = len(markers[found]) if found else 1
        of_token += ["marker" if found else speaker] * length
        at += length
    assert of_token.count("marker") == sum(len(markers[m.role]) for m in messages) + len(markers["system"])
    left_out = {newline, tokenizer.bos_token_id, tokenizer.eos_token_id}
    keys = [n for n, who in enumerate(of_token) if who in ("system", "user") and ids[n] not in left_out]
    rows, previous = [], None
    for n, who in enumerate(of_token):
        if who == "assistant":
            rows += [[]] * (previous != "assistant")
            rows[-1] = [*rows[-1], n]
        previous = who
    return ids, keys, rows


def test_the_authors_script_counts_the_lone_space_behind_an_end_token(with_lone_spaces):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(with_lone_spaces), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    talk = conversation("x", "Who are you?\nSay", "I am Vicuna, a model.", "as ever", "And a not.")
    frame = score_corpus(model, with_lone_spaces, corpus_of(talk), variant="authors_code", progress=False)
    ids, keys, rows = by_markers(with_lone_spaces, talk.messages)
    lone = [n for n, token in enumerate(ids) if token == with_lone_spaces.get_vocab()["▁"]]
    assert set(lone) & set(keys) and all(set(lone) & set(of_turn) for of_turn in rows)
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    for turn, layer, score in zip(frame.turn, frame.layer, frame.score, strict=True):
        best = [
            max(sum(float(head[y, x]) for x in keys if x <= y) for head in attentions[layer][0]) for y in rows[turn - 1]
        ]
        assert score == pytest.approx(sum(best) / len(best), abs=2e-6)
    assert len(frame) == 4


def test_rows_are_in_the_order_of_corpus_turn_layer(model, tokenizer, corpus):
    frame = score_corpus(model, tokenizer, corpus, layers=[2, 0], token_budget=100, progress=False)
    expected = [
        (c.id, turn, layer) for c in corpus.conversations for turn, _, _ in answered_turns(c) for layer in (0, 2)
    ]
    assert list(zip(frame.conversation, frame.turn, frame.layer, strict=True)) == expected


def test_keys_of_a_later_turn_include_all_earlier_user_turns(model, eager, tokenizer):
    c = conversation("two", "first question", "yes", "second", "no")
    frame = score_corpus(model, tokenizer, corpus_of(c), layers=[1], progress=False)
    tokens = role_map(tokenizer, c.messages)
    with torch.no_grad():
        attention = eager(tokens.ids[None], output_attentions=True).attentions[1][0]
    rows = (tokens.roles == Role.ASSISTANT) & (tokens.turns == 2)
    user = tokens.roles == Role.USER
    assert set(tokens.turns[user].tolist()) == {1, 2}
    by_hand = attention[:, rows][:, :, user].sum(-1).amax(0).mean()
    assert frame.score[frame.turn == 2].item() == pytest.approx(by_hand.item(), abs=2e-6)


@pytest.mark.parametrize("variant", ["standard", "authors_code"])
def test_score_is_invariant_to_padding_batching_and_sharding(model, tokenizer, corpus, variant):
    one_by_one = score_corpus(model, tokenizer, corpus, variant=variant, token_budget=1, progress=False)
    together = score_corpus(model, tokenizer, corpus, variant=variant, token_budget=10**6, progress=False)
    shards = [
        score_corpus(model, tokenizer, corpus, variant=variant, shard=(i, 2), conversations_per_part=1, progress=False)
        for i in range(2)
    ]
    keys = ["conversation", "turn", "layer"]
    sharded = pd.concat(shards).set_index(keys).loc[pd.MultiIndex.from_frame(together[keys])].reset_index()
    for other in (together, sharded):
        pd.testing.assert_frame_equal(one_by_one, other[list(one_by_one)], rtol=0, atol=2e-6)


def test_a_layer_alone_scores_as_it_does_among_all(model, tokenizer, corpus):
    every = score_corpus(model, tokenizer, corpus, progress=False)
    for layer in range(3):
        alone = score_corpus(model, tokenizer, corpus, layers=[layer], progress=False)
        expected = every[every.layer == layer].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, expected, rtol=0, atol=1e-6)


def test_token_counts_are_those_of_the_text(model, tokenizer):
    c = conversation("n", "four", "sixsix", "two\n", "eight888")  # one token a byte
    clean = score_corpus(model, tokenizer, corpus_of(c), layers=[0], progress=False)
    paper = score_corpus(model, tokenizer, corpus_of(c), layers=[0], variant="authors_code", progress=False)
    assert clean.user_tokens.tolist() == [4, 4] and paper.user_tokens.tolist() == [4, 3]
    assert clean.answer_tokens.tolist() == paper.answer_tokens.tolist() == [6, 8]
    first = 1 + len("<|user|>\nfour") + 1 + len("\n<|assistant|>\n")
    assert clean.context_tokens.tolist()[0] == first


def test_head_reductions_are_what_their_names_say():
    attention = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        a = attention[layer].tolist()
        expected = {
            "max_then_mean": sum(max(a[h][y] for h in range(4)) for y in range(5)) / 5,
            "mean_then_max": max(sum(a[h]) / 5 for h in range(4)),
            "mean": sum(map(sum, a)) / 20,
            "first_token": max(a[h][0] for h in range(4)),
        }
        for how, value in expected.items():
            assert reduce_heads(attention, how)[layer].item() == pytest.approx(value, abs=1e-6)


def test_an_answer_that_does_not_fit_is_counted_and_never_cut(model, tokenizer):
    c = conversation("long", "one", "answer one", "two", "answer two " * 3)
    length = len(role_map(tokenizer, c.messages))
    frame = score_corpus(model, tokenizer, corpus_of(c), layers=[0], max_length=length - 3, progress=False)
    assert frame.turn.tolist() == [1] and frame.attrs["skipped"] == {f"the answer ends beyond {length - 3} tokens": 1}
    fitting = score_corpus(model, tokenizer, corpus_of(c), layers=[0], max_length=length - 2, progress=False)
    assert fitting.turn.tolist() == [1, 2] and fitting.attrs["skipped"] == {}
    assert fitting.score[0] == pytest.approx(frame.score[0], abs=1e-6)
    with pytest.raises(InputError, match=r"no turn could be scored.*beyond 20 tokens"):
        score_corpus(model, tokenizer, corpus_of(c), layers=[0], max_length=20, progress=False)
    beyond = conversation("beyond", "x" * 300, "y")
    frame = score_corpus(model, tokenizer, corpus_of(c, beyond), layers=[0], progress=False)
    assert set(frame.conversation) == {"long"} and frame.attrs["skipped"] == {"the answer ends beyond 256 tokens": 1}


def test_conversations_that_cannot_be_scored_are_counted_by_reason(model, tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    mixed = corpus_of(
        conversation("unanswered", "hello?"),
        conversation("forbidden", "a", "b", "c", "d", system="s"),
        conversation("fine", "e", "f"),
    )
    settings = {"layers": [0], "conversations_per_part": 1, "shard_dir": tmp_path, "progress": False}
    for _ in range(2):  # the second time from the parts
        frame = score_corpus(model, strict, mixed, **settings)
        ((reason, n),) = frame.attrs["skipped"].items()
        assert frame.conversation.tolist() == ["fine"] and "no system" in reason and n == 2


def test_progress_tells_tokens_a_second(model, tokenizer, corpus, capsys):
    score_corpus(model, tokenizer, corpus, layers=[0])
    bar = capsys.readouterr().err
    assert "5/5" in bar and "tokens/s" in bar


def test_killed_and_started_again_it_ends_with_the_same_frame(model, tokenizer, corpus, tmp_path, monkeypatch):
    settings = {"layers": [0, 2], "conversations_per_part": 1, "progress": False}
    whole = score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "whole", **settings)
    score_batch, calls = scoring.corpus._score_batch, []

    def dies_after_two(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return score_batch(*args)

    monkeypatch.setattr(scoring.corpus, "_score_batch", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "killed", **settings)
    assert [path.name for path in sorted(tmp_path.glob("killed/*/*.parquet"))] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]

    calls.clear()
    monkeypatch.setattr(scoring.corpus, "_score_batch", lambda *args: calls.append(1) or score_batch(*args))
    resumed = score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "killed", **settings)
    assert len(calls) == 3
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert resumed.attrs == whole.attrs
    unsharded = score_corpus(model, tokenizer, corpus, **settings)
    pd.testing.assert_frame_equal(unsharded, whole, check_exact=True)


def test_a_part_that_is_damaged_is_told_and_scored_again(model, tokenizer, corpus, tmp_path):
    settings = {"layers": [0], "conversations_per_part": 1, "shard_dir": tmp_path, "progress": False}
    whole = score_corpus(model, tokenizer, corpus, **settings)
    part = sorted(tmp_path.glob("*/part-*.parquet"))[1]
    content = part.read_bytes()
    for damaged in (content[:-30], b""):
        part.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"part-00001\.parquet: damaged, its conversations are scored again"):
            again = score_corpus(model, tokenizer, corpus, **settings)
        pd.testing.assert_frame_equal(again, whole, check_exact=True)
        assert part.read_bytes() == content


def test_a_full_disk_keeps_the_parts_before_and_a_run_with_room_goes_on(model, tokenizer, corpus, tmp_path, full_disk):
    settings = {"layers": [0], "conversations_per_part": 1, "progress": False}
    whole = score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "whole", **settings)
    sizes = [part.stat().st_size for part in sorted((tmp_path / "whole").glob("*/part-*.parquet"))]
    full = pytest.raises(InputError, match=r"part-0000\d\.parquet: not written, the disk is full")
    with full, full_disk(max(sizes) - 1):
        score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "full", **settings)
    first_big = sizes.index(max(sizes))
    assert len(list((tmp_path / "full").glob("*/*part-*"))) == first_big
    again = score_corpus(model, tokenizer, corpus, shard_dir=tmp_path / "full", **settings)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


@pytest.mark.parametrize("token_budget, remedy", [(10**6, r"scoring\.token_budget down"), (1, "max_length down")])
def test_where_memory_runs_out_the_setting_is_named_that_helps_and_finished_parts_stay(
    model, tokenizer, corpus, tmp_path, monkeypatch, token_budget, remedy
):
    settings = {"layers": [0], "shard_dir": tmp_path, "conversations_per_part": 3, "progress": False}
    whole = score_corpus(model, tokenizer, corpus, layers=[0], token_budget=1, progress=False)
    score_batch, scored = scoring.corpus._score_batch, []

    def full(*args):
        if len(scored) == (1 if token_budget > 1 else 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        scored.append(1)
        return score_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(scoring.corpus, "_score_batch", full)
        with pytest.raises(InputError, match=rf"out of memory \(CUDA.*: set .*{remedy}.*is kept in {tmp_path}"):
            score_corpus(model, tokenizer, corpus, token_budget=token_budget, **settings)
    assert len(list(tmp_path.glob("*/part-*.parquet"))) == 1
    again = score_corpus(model, tokenizer, corpus, token_budget=1, **settings)
    pd.testing.assert_frame_equal(again, whole, rtol=0, atol=2e-6)


def test_shards_of_several_processes_are_read_as_one(model, tokenizer, corpus, tmp_path, monkeypatch):
    settings = {"layers": [1], "conversations_per_part": 2, "shard_dir": tmp_path, "progress": False}
    parts = [score_corpus(model, tokenizer, corpus, shard=(i, 2), **settings) for i in (1, 0)]
    monkeypatch.setattr(scoring.corpus, "_score_batch", lambda *args: pytest.fail("scored again"))
    frame = score_corpus(model, tokenizer, corpus, **settings)
    assert len(frame) == sum(map(len, parts)) and list(frame.conversation.unique()) == ["b", "a", "c", "e", "d"]


def test_a_streamed_corpus_has_the_hash_the_parts_and_the_scores_of_a_loaded_one(
    model, tokenizer, corpus, tmp_path, monkeypatch
):
    save_conversations(corpus, tmp_path / "talks.jsonl")
    monkeypatch.setattr(loading, "STREAMED_FROM", 1)
    streamed = open_conversations(tmp_path / "talks.jsonl")
    assert not isinstance(streamed.conversations, tuple)
    assert scoring.corpus_hash(streamed) == scoring.corpus_hash(corpus)
    rows = [[c.id, [[m.role, m.content] for m in c.messages]] for c in corpus.conversations]
    assert scoring.corpus_hash(corpus) == digest(rows) and scoring.corpus_hash(corpus_of()) == digest([])
    options = {"conversations_per_part": 2, "progress": False, "shard_dir": tmp_path / "parts"}
    expected = score_corpus(model, tokenizer, corpus, **options)
    with monkeypatch.context() as patch:
        patch.setattr(scoring.corpus, "_score_batch", None)  # not called: the parts are those of the loaded one
        pd.testing.assert_frame_equal(score_corpus(model, tokenizer, streamed, **options), expected)
    anew = score_corpus(model, tokenizer, streamed, conversations_per_part=2, progress=False, shard=(1, 2))
    whole = score_corpus(model, tokenizer, corpus, conversations_per_part=2, progress=False, shard=(1, 2))
    pd.testing.assert_frame_equal(anew, whole)


def test_a_conversation_of_100_000_tokens_is_scored_as_far_as_it_fits(model, tokenizer):
    talk = conversation("long", *(text for n in range(4000) for text in (f"What is {n}?", f"It is {n}.")))
    assert len(role_map(tokenizer, talk.messages)) > 100_000
    frame = score_corpus(model, tokenizer, corpus_of(talk), layers=[0], progress=False)
    first = score_corpus(model, tokenizer, corpus_of(conversation("long", "What is 0?", "It is 0.")), progress=False)
    assert frame.score[0] == pytest.approx(first.score[0], abs=1e-6)
    assert frame.attrs["skipped"] == {"the answer ends beyond 256 tokens": 4000 - len(frame)} and 2 < len(frame) < 20


def test_other_weights_data_or_settings_never_share_parts(model, tokenizer, corpus, tmp_path):
    settings = {"layers": [0], "shard_dir": tmp_path, "progress": False}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    score_corpus(model, tokenizer, corpus, **settings)
    score_corpus(model, tokenizer, corpus, **settings)
    score_corpus(other, tokenizer, corpus, **settings)
    score_corpus(model, tokenizer, corpus_of(*corpus.conversations[:2]), **settings)
    score_corpus(model, tokenizer, corpus, variant="authors_code", **settings)
    score_corpus(model, tokenizer, corpus, head_reduction="mean", **settings)
    score_corpus(model, tokenizer, corpus, **settings | {"layers": [1]})
    assert len(list(tmp_path.iterdir())) == 6


def test_bad_input_is_named(model, tokenizer, corpus, tmp_path):
    with pytest.raises(InputError, match="no conversation"):
        score_corpus(model, tokenizer, corpus_of(), progress=False)
    for layers in ([3], [-1], [0, 99]):
        with pytest.raises(InputError, match="does not exist: the model has layers 0 to 2"):
            score_corpus(model, tokenizer, corpus, layers=layers, progress=False)
    with pytest.raises(InputError, match="'b' occurs more than once"):
        score_corpus(model, tokenizer, corpus_of(corpus.conversations[0], corpus.conversations[0]), progress=False)
    with pytest.raises(InputError, match="shard 2/2"):
        score_corpus(model, tokenizer, corpus, shard=(2, 2), progress=False)


def test_a_score_that_is_not_a_number_names_its_turn_and_keeps_finished_parts(model, tokenizer, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("Z", add_special_tokens=False).input_ids[0]] = float("nan")
    both = corpus_of(conversation("fine", "a", "b"), conversation("ill", "c", "d", "Z", "e"))
    with pytest.raises(InputError, match="'ill', turn 2, layer 0"):
        score_corpus(broken, tokenizer, both, shard_dir=tmp_path, conversations_per_part=1, layers=[0], progress=False)
    assert len(list(tmp_path.glob("*/part-*.parquet"))) == 1


def test_buckets_keep_the_token_budget_and_lose_nobody():
    def example(n):
        zeros = torch.zeros(n, dtype=torch.long)
        return scoring.EncodedConversation(str(n), RoleMap(zeros, zeros, zeros), [], {})

    examples = [example(n) for n in (5, 90, 7, 6, 30, 31, 1)]
    buckets = list(length_buckets(examples, 64))
    assert sorted(int(e.id) for bucket in buckets for e in bucket) == [1, 5, 6, 7, 30, 31, 90]
    assert all(len(b) == 1 or max(len(e.map) for e in b) * len(b) <= 64 for b in buckets)
    assert len(buckets) == 3


def test_a_score_does_not_depend_on_what_shares_its_batch_where_frequencies_change(tokenizer):
    torch.manual_seed(3)
    half = 32 // 4 // 2
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half, "long_factor": [8.0] * half}
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.4, pad_token_id=0,
        original_max_position_embeddings=64, rope_parameters=rope | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    assert rope_borders(model.config) == [64]
    short, long = conversation("short", "Who is it?", "It is Bo."), conversation("long", "a b c " * 20, "Not known.")
    assert len(role_map(tokenizer, short.messages)) < 64 < len(role_map(tokenizer, long.messages))
    alone, beside = (
        score_corpus(model, tokenizer, corpus_of(*talks), token_budget=8192, progress=False)
        for talks in ((short,), (short, long))
    )
    assert torch.allclose(torch.tensor(alone.score), torch.tensor(beside.score[: len(alone)]), atol=1e-7)
    other = copy.deepcopy(model)
    other.model.rotary_emb.config.rope_parameters["original_max_position_embeddings"] = 1
    moved = score_corpus(other, tokenizer, corpus_of(short), token_budget=8192, progress=False)
    assert (moved.score - alone.score).abs().max() > 1e-4  # the other frequencies would have shown


def frame_of(**by_layer):
    rows = [(f"c{i}", 1, int(name[1:]), s) for name, scores in by_layer.items() for i, s in enumerate(scores)]
    return pd.DataFrame(rows, columns=["conversation", "turn", "layer", "score"])


class Letters:
    """A part of a corpus, of letters instead of conversations."""

    def __init__(self, letters):
        self.to_encode = letters


@pytest.mark.parametrize("threads", [0, 2])
def test_parts_are_encoded_in_order_and_one_part_ahead(threads):
    given = []

    def parts():
        for letters in ("abc", "", "de", "f"):
            given.append(letters)
            yield Letters(letters)

    for n, (part, encoded) in enumerate(encoded_ahead(parts(), str.upper, threads), start=1):
        assert encoded == list(part.to_encode.upper())
        assert len(given) == min(n + (threads > 0), 4)
    assert n == 4


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_an_encoder_ends_the_scoring(threads):
    def fails(letter):
        raise InputError(f"cannot read {letter}")

    with pytest.raises(InputError, match="cannot read a"):
        list(encoded_ahead(iter([Letters("ab")]), fails, threads))


def test_threads_that_encode_ahead_change_no_score(model, tokenizer, corpus, monkeypatch):
    options = {"conversations_per_part": 2, "progress": False}
    expected = score_corpus(model, tokenizer, corpus, **options)
    monkeypatch.setattr(scoring.corpus, "encoded_ahead", lambda parts, encode, _: encoded_ahead(parts, encode, 2))
    pd.testing.assert_frame_equal(score_corpus(model, tokenizer, corpus, **options), expected, check_exact=True)


def test_a_layer_that_was_not_scored_is_named():
    frame = frame_of(l0=[0.1, 0.2], l3=[0.3, 0.4])
    assert scoring.at_layer(frame, 3).score.tolist() == [0.3, 0.4]
    with pytest.raises(InputError, match=r"scoring.layer: 2 was not scored; choose one of \[0, 3\]"):
        scoring.at_layer(frame, 2)


def test_layer_agreement_compares_the_top_turns():
    up, down = [i / 20 for i in range(20)], [1 - i / 20 for i in range(20)]
    half = [*up[:18], 0.0, 1.0]  # of the top two, one remains
    table = layer_agreement(frame_of(l0=up, l1=down, l2=half)).set_index(["layer", "other_layer"])
    assert table.overlap.loc[[(0, 0), (0, 1), (0, 2), (2, 0)]].tolist() == [1, 0, 0.5, 0.5]
    assert (table.overlap + table.disagreement == 1).all() and (table.by_chance == 0.1).all()


def test_layer_agreement_as_the_script_had_it_cannot_disagree_much():
    up, down = [i / 20 for i in range(20)], [1 - i / 20 for i in range(20)]
    table = layer_agreement(frame_of(l0=up, l1=down), variant="authors_code")
    assert table.disagreement.max() == pytest.approx(2 / 18)


def test_layer_agreement_wants_the_same_turns_for_all_layers():
    with pytest.raises(InputError, match="same turns"):
        layer_agreement(frame_of(l0=[0.1, 0.2], l1=[0.1]))


def conditions(**by_name):
    rows = [(name, f"c{i}", 1, score) for name, scores in by_name.items() for i, score in enumerate(scores)]
    return pd.DataFrame(rows, columns=["condition", "conversation", "turn", "score"]).assign(seed=3)


def test_agreement_of_scores_is_one_minus_one_and_counted_by_hand_in_between():
    up = [i / 10 for i in range(10)]
    most = [*up[:8], 0.05, 2.0]  # of the top two one stays, c9; c7 comes in
    table = score_agreement(conditions(up=up, twice=[2 * s for s in up], down=up[::-1], most=most), "seed", top=0.2)
    found = table[table.condition == "up"].set_index(["other", "metric"]).value
    assert found.xs("rank correlation", level=1)[["twice", "down"]].tolist() == pytest.approx([1, -1])
    shared = found.xs("top share in common", level=1)
    assert shared[["twice", "down", "most"]].tolist() == pytest.approx([1, 0, 1 / 3])
    assert set(table.n) == {10} and set(table.seed) == {3} and len(table) == 4 * 3 * 2


def test_agreement_of_scores_matches_loops_over_pairs_of_turns():
    generator = torch.Generator().manual_seed(5)
    one, other = (torch.rand(40, generator=generator).tolist() for _ in range(2))
    found = score_agreement(conditions(one=one, other=other), "seed", top=0.3).set_index(["condition", "metric"]).value
    ranks = [[sum(a > b for b in scores) for a in scores] for scores in (one, other)]
    gaps = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    spearman = 1 - 6 * gaps / (40 * (40**2 - 1))
    top = [{i for i, rank in enumerate(of_one) if rank >= 40 - 12} for of_one in ranks]
    for name in ("one", "other"):
        assert found[name, "rank correlation"] == pytest.approx(spearman)
        assert found[name, "top share in common"] == len(top[0] & top[1]) / len(top[0] | top[1])


def test_agreement_of_scores_wants_the_same_turns():
    with pytest.raises(InputError, match="seed 3: the conditions must be scored on the same turns"):
        score_agreement(conditions(one=[0.1, 0.2], other=[0.1]), "seed", top=0.5)
