"""The doctor on healthy models of many families, and on patients whose complaint is known."""

import json
import re
import sys
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers.models.llama import modeling_llama

from ctxlib.commands import cli, doctor
from ctxlib.commands.doctor import CONVERSATIONS, Check, examine, open_patient, print_examination
from ctxlib.commands.doctor.display import role_strip
from ctxlib.commands.doctor.layer import Answer, answer_attention, rank_correlation
from ctxlib.commands.doctor.talk import TALK, with_odd_text
from ctxlib.conversations import Corpus, Message, load_conversations
from ctxlib.paper import paper_layer
from ctxlib.params import InputError, Scoring
from ctxlib.roles import RoleMap, role_map
from ctxlib.scoring import score_corpus

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TINY, "num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": LlamaConfig(**GQA),
    "mistral": MistralConfig(**GQA, sliding_window=64),
    "gemma2": Gemma2Config(**GEMMA),
    "qwen2": Qwen2Config(**GQA),
    "qwen3": Qwen3Config(**GQA, head_dim=8),
    "phi3": Phi3Config(**GQA),
    "gpt-neox": GPTNeoXConfig(**TINY),
    "opt": OPTConfig(**{**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}),
    "gpt2": GPT2Config(**TINY),
    "gpt-oss": GptOssConfig(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "gpt-j": GPTJConfig(**TINY, rotary_dim=8),
    "qwen3-next": Qwen3NextConfig(
        **{**GQA, "num_hidden_layers": 5},
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "mamba": MambaConfig(**TINY, num_heads=4),
    "bert": BertConfig(**TINY),
}
EAGER = ("gemma2", "gpt-oss", "gpt-j", "mamba")
LOOP = "{% for m in messages %}"
ZEPHYR = "{{ bos_token }}" + LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
FOLDED = (
    "{{ bos_token }}{% set ns = namespace(s='') %}" + LOOP + "{% if m.role == 'system' %}{% set ns.s = m.content %}"
    "{% elif m.role == 'user' %}[INST] {% if ns.s and loop.index0 == 1 %}<<SYS>>{{ ns.s }}<</SYS>>{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def build(name):
    torch.manual_seed(0)
    attention = "eager" if name in EAGER else "sdpa"
    return AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation=attention).eval()


def row(frame, check):
    [found] = frame[frame["check"] == check].to_dict("records")
    return found


def few(n=4):
    """The first conversations: enough where the numbers do not matter."""
    corpus = load_conversations(CONVERSATIONS)
    return Corpus(corpus.conversations[:n], corpus.dropped, corpus.source)


@pytest.fixture
def of_bytes(tokenizer):
    """The byte-level tokenizer with any template; its own is put back afterwards."""
    template = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = template


def another(tokenizer):
    """A copy to which tokens may be added."""
    state = tokenizer.backend_tokenizer.to_str()
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    backend = Tokenizer.from_str(state)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **names)


# A healthy model


def test_a_healthy_model_fails_nothing_and_the_worst_stands_first(model, tokenizer):
    frame = examine(model, tokenizer)
    assert list(frame.columns) == ["check", "verdict", "finding", "remedy"]
    assert frame["check"].is_unique and "fail" not in set(frame["verdict"]), frame.iloc[0].to_dict()
    assert frame["verdict"].tolist() == sorted(frame["verdict"], key=doctor.VERDICTS.index)
    for check in ("model", "recording", "steering", "padding", "template: roles", "template: answers", "indicator"):
        assert row(frame, check)["verdict"] == "ok", check
    assert (frame["remedy"] != "").equals(frame["verdict"] != "ok")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2", "qwen3", "phi3", "gpt-neox", "opt", "gpt2"])
def test_families_are_recorded_as_their_eager_attention(name, tokenizer):
    frame = examine(build(name), tokenizer, corpus=few())
    assert row(frame, "recording")["verdict"] == "ok"
    assert row(frame, "steering")["verdict"] == ("note" if name == "gemma2" else "ok")
    assert row(frame, "padding")["verdict"] == ("note" if name == "gpt2" else "ok")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_tolerance(dtype, tokenizer):
    frame = examine(build("llama").to(dtype), tokenizer, corpus=few())
    assert row(frame, "recording")["verdict"] == row(frame, "steering")["verdict"] == "ok"


def test_rounding_that_adds_up_over_layers_is_noted_and_not_taken_for_a_fault(tokenizer):
    torch.manual_seed(0)
    wild = {"num_hidden_layers": 16, "hidden_size": 128, "initializer_range": 0.15}
    model = LlamaForCausalLM(LlamaConfig(**{**GQA, **wild})).eval().to(torch.bfloat16)
    found = row(examine(model, tokenizer, corpus=few()), "recording")
    assert found["verdict"] == "note" and "multiply rounding" in found["remedy"]


@pytest.mark.parametrize("way", ["all", "last"])
def test_both_ways_of_recording_are_compared_with_eager(model, tokenizer, monkeypatch, way):
    record = doctor.attention.record_allocation

    @contextmanager
    def off(model, roles, rows="last"):
        with record(model, roles, rows=rows) as recording:
            kept = SimpleNamespace()
            yield kept
        kept.allocation = recording.allocation + (0.001 if rows == way else 0)

    monkeypatch.setattr(doctor.attention, "record_allocation", off)
    assert row(examine(model, tokenizer, corpus=few()), "recording")["verdict"] == "fail"


def test_the_examination_leaves_the_model_as_it_was(model, tokenizer):
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    examine(model, tokenizer, corpus=few())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


# Patients


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt-oss", "sinks"), ("gpt-j", "registered attention"), ("mamba", "no attention"), ("bert", "later tokens")],
)
def test_a_family_that_cannot_be_recorded_is_told_so(name, said, tokenizer):
    frame = examine(build(name), tokenizer, corpus=few())
    assert row(frame, "recording")["verdict"] == "fail" and said in row(frame, "recording")["finding"]
    assert row(frame, "recording")["remedy"] == "use another model"
    for check in ("steering", "padding", "layer 2"):
        assert "not examined" in row(frame, check)["finding"]


def test_of_a_hybrid_model_the_layers_with_attention_are_examined_and_the_others_named(tokenizer):
    frame = examine(build("qwen3-next"), tokenizer, corpus=few())
    assert row(frame, "recording")["verdict"] == "ok" and "in the same pass" in row(frame, "recording")["finding"]
    assert row(frame, "steering")["verdict"] == "ok" and "in layer 1 " in row(frame, "steering")["finding"]
    assert "shares in layer 1 differ" in row(frame, "padding")["finding"]
    assert row(frame, "layers")["finding"] == "no attention that can be recorded in 0, 2, 3, but in 1, 4"
    assert paper_layer(5) == 3 and "as layer 1:" in row(frame, "layer 4: others")["finding"]
    assert re.search("best layer [14]:", row(frame, "layer 4: separation")["finding"])
    refused = row(examine(build("qwen3-next"), tokenizer, layer=2, corpus=few()), "layer 2")
    assert refused["verdict"] == "fail" and refused["remedy"] == "choose one of 1, 4"


def test_of_a_model_with_attention_in_all_layers_none_is_named(model, tokenizer):
    assert "layers" not in set(examine(model, tokenizer, corpus=few())["check"])


def test_layers_are_told_by_their_numbers_where_some_have_no_attention():
    ranks = np.linspace(0, 1, 20)
    scores = np.stack([ranks, 1 - ranks, ranks, ranks], axis=1)
    found = doctor.layer._beside_other_layers(scores, 15, [3, 7, 11, 15])
    assert "as the mean of layers 7, 11" in found.finding and "least like layer 7: -1.00" in found.finding


def test_a_model_whose_attention_ignores_the_registered_function_fails(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        modeling_llama.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *args: modeling_llama.eager_attention_forward
    )
    assert "llama model has no attention" in row(examine(model, tokenizer, corpus=few()), "recording")["finding"]


def test_a_model_that_computes_another_attention_than_it_tells_fails(model, tokenizer, monkeypatch):
    eager = modeling_llama.eager_attention_forward

    def sharper(*args, scaling, **kwargs):
        return eager(*args, scaling=2 * scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharper)
    found = row(examine(model, tokenizer, corpus=few()), "recording")
    assert found["verdict"] == "fail" and "do not trust it" in found["remedy"]


def test_weights_that_are_not_numbers_fail(model, tokenizer):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    assert row(examine(model, tokenizer, corpus=few()), "recording")["verdict"] == "fail"


def test_steering_by_another_alpha_than_asked_for_fails(model, tokenizer, monkeypatch):
    steer = doctor.attention.steer_attention
    monkeypatch.setattr(doctor.attention, "steer_attention", lambda model, keep, alpha: steer(model, keep, alpha**1.01))
    assert row(examine(model, tokenizer, corpus=few()), "steering")["verdict"] == "fail"


def test_a_window_and_eager_attention_are_noted(tokenizer):
    found = row(examine(build("gemma2"), tokenizer, corpus=few()), "model")
    assert "2 layers see 64 tokens back" in found["finding"] and "attention: eager" in found["remedy"]
    assert "3 layers see 64" in row(examine(build("mistral"), tokenizer, corpus=few()), "model")["finding"]


def test_a_tokenizer_with_more_tokens_than_embeddings_fails(model, tokenizer):
    grown = another(tokenizer)
    grown.add_tokens(["[NEW]"])
    assert row(examine(model, grown, corpus=few()), "tokenizer")["verdict"] == "fail"


def test_conversations_in_an_unknown_language_are_noted(model, tokenizer):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    stranger = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=ZEPHYR, **names)
    found = row(examine(model, stranger, corpus=few()), "tokenizer")
    assert found["verdict"] == "note" and "unknown" in found["finding"]


# Templates

TEMPLATES = {
    "own turn": (ZEPHYR + PROMPT, "system text", "ok", "is outside the user's turn"),
    "folded": (FOLDED, "system text", "ok", "is folded into the first user's turn"),
    "refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + ZEPHYR,
        "system text",
        "note",
        "is refused",
    ),
    "left out": (
        ZEPHYR.replace("in messages", "in messages if m.role != 'system'"), "system text", "note", "is left out",
    ),
    "default": (
        "{% if messages[0].role != 'system' %}<|system|>\nYou help.\n{% endif %}" + ZEPHYR,
        "system text",
        "ok",
        r"without one it writes '<|system|>\nYou help.\n",
    ),
    "trims": (ZEPHYR.replace("m.content", "m.content.strip()"), "contents", "ok", "trims system, user, assistant"),
    "keeps": (ZEPHYR, "contents", "ok", "keeps spaces at the edges, keeps earlier turns, keeps earlier reasoning"),
    "drops turns": (ZEPHYR.replace("in messages", "in messages[-3:]"), "contents", "note", "drops 2 of 5 earlier"),
    "drops reasoning": (
        ZEPHYR.replace("m.content", "m.content.split('</think>')[-1]"), "contents", "note", "drops earlier reasoning",
    ),
    "one bos": (ZEPHYR, "bos", "ok", "written once, by the template; tokenising the rendered text"),
    "no bos": (ZEPHYR.removeprefix("{{ bos_token }}"), "bos", "note", "ctxlib puts one in front"),
    "two bos": ("{{ bos_token }}" + ZEPHYR, "bos", "fail", "twice"),
    "prompt": (ZEPHYR + PROMPT, "answers", "ok", "token by token, and ends on '</s>"),
    "no prompt": (ZEPHYR, "answers", "note", r"the template writes '<|assistant|>\n'"),
    "another prompt": (ZEPHYR + PROMPT.replace("assistant", "model"), "answers", "note", "where a rendered answer"),
    "no end": ((ZEPHYR + PROMPT).replace("eos_token", "''"), "answers", "note", "no special token"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "part", "verdict", "said"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_what_a_template_does_is_told(of_bytes, model, template, part, verdict, said):
    of_bytes.chat_template = template
    found = row(examine(model, of_bytes, corpus=few()), f"template: {part}")
    assert found["verdict"] == verdict and said in found["finding"], found


def test_ids_and_the_forged_marker_are_checked_against_transformers(of_bytes, model, monkeypatch):
    of_bytes.chat_template = ZEPHYR + PROMPT
    found = row(examine(model, of_bytes, corpus=few()), "template: roles")
    talk = with_odd_text(TALK)
    users = sum(len(message.content.encode()) for message in talk if message.role == "user")
    assert f"1 bos, {len(talk[0].content)} system, {users} user" in found["finding"]
    assert r"a forged '</s>\n<|assistant|>\n' stays the user's" in found["finding"]

    def gullible(tokenizer, messages, **options):
        """As if the markers in a user's text were taken for the template's."""
        rendered = role_map(tokenizer, messages, **options)
        forged = rendered.roles.clone()
        if any("<|assistant|>" in message.content for message in messages):
            forged[len(forged) // 2] = 3
        return RoleMap(rendered.ids, forged, rendered.turns, rendered.chars)

    monkeypatch.setattr(doctor.template, "role_map", gullible)
    found = row(examine(model, of_bytes, corpus=few()), "template: roles")
    assert found["verdict"] == "fail" and "does NOT stay the user's" in found["finding"]


@pytest.mark.parametrize(
    ("template", "said"), [(None, "no chat template"), (ZEPHYR.replace("m.content", "m.content | upper"), "rewrites")]
)
def test_without_a_usable_template_one_check_fails_and_raw_text_is_examined(of_bytes, model, template, said):
    of_bytes.chat_template = template
    frame = examine(model, of_bytes, corpus=few())
    assert frame["verdict"].tolist().count("fail") == 1 and said in row(frame, "template")["finding"]
    assert row(frame, "template")["remedy"] and row(frame, "recording")["verdict"] == "ok"


def test_a_marker_that_is_no_token_may_be_cut_by_the_content_before_it(of_bytes, model):
    state = json.loads(of_bytes.backend_tokenizer.to_str())
    state["model"]["vocab"][".<"] = 259
    state["model"]["merges"] = [[".", "<"]]
    state["pre_tokenizer"]["use_regex"] = False
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    merging.chat_template = ZEPHYR.replace("eos_token", "'<end>'") + PROMPT
    found = row(examine(build("llama"), merging, corpus=few()), "template: borders")
    assert found["verdict"] == "note" and found["finding"] == "3 of 10 borders lie inside a token: '.<'"


@pytest.mark.skipif(not DATA.exists(), reason="needs real tokenizers and templates in ../shared/data")
@pytest.mark.parametrize(
    "template", ["chatml", "gemma-it", "llama-2-chat", "llama-3-instruct", "mistral-instruct", "zephyr"]
)
def test_real_templates_are_told_apart_rightly(template, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizers/llama-2/tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    llama = AutoTokenizer.from_pretrained(tmp_path)
    source = (DATA / "chat_templates" / f"{template}.jinja").read_text()
    llama.chat_template = source.replace("    ", "").replace("\n", "")
    found = {part: check(llama)[0] for part, check in doctor.template.TEMPLATE_CHECKS.items()}
    assert "fail" not in {check.verdict for check in found.values()}
    assert ("folded" in found["system text"].finding) == (template in ("gemma-it", "llama-2-chat"))
    assert ("ctxlib puts one in front" in found["bos"].finding) == (template in ("gemma-it", "zephyr"))
    cut = template in ("chatml", "gemma-it", "llama-3-instruct")  # markers that are no tokens of Llama 2
    assert (found["borders"].verdict == found["answers"].verdict == "note") == cut


# The indicator


def test_an_indicator_that_is_free_tells_its_pieces_and_its_room(model, tokenizer):
    found = row(examine(model, tokenizer, corpus=few()), "indicator")
    assert found["verdict"] == "ok" and "is 5 tokens now ([ I N D ])" in found["finding"]
    assert "will be token 259: embeddings grow from 259 to 260 rows, not tied" in found["finding"]
    roomy = LlamaForCausalLM(LlamaConfig(**{**GQA, "vocab_size": 320}, tie_word_embeddings=True)).eval()
    assert "row 259 of 320 is free, tied" in row(examine(roomy, tokenizer, corpus=few()), "indicator")["finding"]


@pytest.mark.parametrize("kind", ["special", "ordinary"])
def test_an_indicator_that_is_a_token_already_fails(model, tokenizer, kind):
    taken = another(tokenizer)
    taken.add_tokens([AddedToken("[IND]", special=kind == "special")], special_tokens=kind == "special")
    model.resize_token_embeddings(260, mean_resizing=False)
    found = row(examine(model, taken, corpus=few()), "indicator")
    assert found["verdict"] == "fail" and f"is token 259 already, added as {kind}" in found["finding"]
    found = row(examine(model, tokenizer, indicator="x", corpus=few()), "indicator")
    assert found["verdict"] == "fail" and "of the vocabulary" in found["finding"]


def test_an_indicator_inside_another_token_is_noted(model, tokenizer):
    holding = another(tokenizer)
    holding.add_tokens(["x[IND]"])
    model.resize_token_embeddings(260, mean_resizing=False)
    found = row(examine(model, holding, corpus=few()), "indicator")
    assert found["verdict"] == "note" and "1 tokens contain it, such as 'x[IND]'" in found["finding"]
    assert row(examine(model, holding, indicator=" ", corpus=few()), "indicator")["verdict"] == "fail"


# The chosen layer


def test_the_built_in_conversations_differ_in_their_questions_only():
    conversations = load_conversations(CONVERSATIONS).conversations
    assert len(conversations) == 24
    for needs, nothing in zip(conversations[::2], conversations[1::2], strict=True):
        truth = [c.messages[1].depends_on_context for c in (needs, nothing)]
        passages = {c.messages[0].content.split("\n\n")[0] for c in (needs, nothing)}
        assert truth == [True, False] and len(passages) == 1


def test_scores_are_those_of_a_scored_corpus(model, tokenizer):
    corpus = few(6)
    answers = answer_attention(model, tokenizer, corpus)
    frame = score_corpus(model, tokenizer, corpus, Scoring(), progress=False)
    expected = frame["score"].to_numpy().reshape(6, 2)  # a row a turn and layer
    found = torch.stack([answer.to_user.amax(1).mean(-1) for answer in answers]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [answer.depends_on_context for answer in answers] == [True, False] * 3


def test_equal_attention_is_the_fraction_of_users_tokens_so_far(model, tokenizer):
    [answer, *_] = answer_attention(model, tokenizer, few(1))
    rendered = role_map(tokenizer, few(1).conversations[0].messages)
    roles = rendered.roles.tolist()
    expected = [roles[: n + 1].count(2) / (n + 1) for n, role in enumerate(roles) if role == 3]
    np.testing.assert_allclose(answer.uniform.numpy(), expected, rtol=1e-6)


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    stacked = rank_correlation(np.stack([a, b], axis=1), b[:, None], axis=0)
    assert stacked == pytest.approx([spearmanr(a, b).statistic, 1])
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0


def test_a_layer_unlike_the_others_is_noted():
    ranks = np.linspace(0, 1, 20)
    scores = np.stack([ranks, ranks**2, ranks, ranks, ranks, 1 - ranks], axis=1)
    like = doctor.layer._beside_other_layers(scores, 1)
    assert like.verdict == "ok" and "the mean of layers 2 to 3: 1.00 (1.00 to 1.00); least like layer 5" in like.finding
    unlike = doctor.layer._beside_other_layers(scores, 5)
    assert unlike.verdict == "note" and "layers 2 to 3: -1.00 (-1.00 to -1.00)" in unlike.finding
    deep = np.tile(ranks[:, None], 9)
    assert "as the mean of layers 3 to 5 but 4: 1.00" in doctor.layer._beside_other_layers(deep, 4).finding
    assert doctor.layer._beside_other_layers(scores[:, :1], 0).finding == "it is the only layer"


def test_a_head_that_is_the_whole_layer_is_noted():
    rng = torch.Generator().manual_seed(0)
    even = [torch.rand(1, 8, generator=rng) + torch.rand(4, 8, generator=rng) / 20 for _ in range(12)]
    assert doctor.layer._heads(even, 0).verdict == "ok"
    greedy = [answer + torch.tensor([[0.0], [1.0], [0.0], [0.0]]) for answer in even]
    found = doctor.layer._heads(greedy, 0)
    assert found.verdict == "note" and "head 1 is the busiest at 100% of 96 answer tokens" in found.finding
    apart = [torch.rand(4, 1, generator=rng).expand(4, 8) for _ in range(12)]
    assert "disagree" in doctor.layer._heads(apart, 0).remedy


def test_separation_is_told_beside_what_lengths_alone_would_give():
    def answer(to_user, uniform, depends):
        return Answer(torch.full((1, 2, 3), to_user), torch.full((3,), uniform), depends)

    answers = [answer(0.5 + 0.01 * n + 0.3 * (n % 2), 0.5, bool(n % 2)) for n in range(20)]
    scores = np.array([[a.to_user[0, 0, 0].item()] for a in answers])
    found = doctor.layer._separation(scores, answers, 0)
    assert found.verdict == "ok"
    assert "AUC 1.00 (1.00 to 1.00), 10 of 20" in found.finding and "equal attention 0.50" in found.finding
    assert doctor.layer._separation(np.full((20, 1), 0.5), answers, 0).verdict == "note"


def test_the_default_layer_is_the_papers_to_scale(model, tokenizer):
    assert [paper_layer(depth) for depth in (22, 32, 6, 2, 1)] == [15, 22, 4, 1, 0]
    assert row(examine(model, tokenizer, corpus=few()), "layer 1: heads")
    assert row(examine(model, tokenizer, layer=0, corpus=few()), "layer 0: heads")
    with pytest.raises(InputError, match="layers 0 to 1"):
        examine(model, tokenizer, layer=2)


def test_conversations_without_a_truth_are_refused_in_the_layers_line(model, tokenizer):
    corpus = few(1)
    [conversation] = corpus.conversations
    bare = [Message(message.role, message.content) for message in conversation.messages]
    unknown = Corpus((type(conversation)("c", tuple(bare)),), corpus.dropped, "here")
    assert "no truth" in row(examine(model, tokenizer, corpus=unknown), "layer 1")["finding"]


# What a reader sees


def shown(frame, tokenizer, **options):
    console = Console(file=StringIO(), highlight=False, width=100, **options)
    print_examination(frame, tokenizer, console)
    return console.file.getvalue()


def test_plain_output_holds_every_finding_and_no_escape_codes(model, tokenizer):
    frame = examine(model, tokenizer, corpus=few())
    plain = shown(frame, tokenizer)
    flat = "".join(plain.split())
    assert "\x1b" not in plain and "user‹Whereisthekestrel?↵↵" in flat
    for text in [*frame["finding"], *frame["remedy"]]:
        assert "".join(text.split()) in flat
    assert "\x1b[" in shown(frame, tokenizer, force_terminal=True, color_system="truecolor")


def test_neither_markup_nor_escape_codes_of_a_text_reach_the_terminal(tokenizer):
    talk = [Message("user", "[red]x[/red] \x1b[31my\n"), Message("assistant", "[/]")]
    for coloured in (True, False):
        strip = role_strip(tokenizer, talk, role_map(tokenizer, talk), coloured)
        assert r"[red]x[/red] \x1b[31my↵" in strip.plain and "[/]" in strip.plain
        Console(file=StringIO(), force_terminal=True).print(strip)
    frame = pd.DataFrame([Check("[bold]c[/bold]", "ok", "[red]f \x1b[31m", "")])
    assert r"[bold]c[/bold]  [red]f \x1b[31m" in shown(frame, tokenizer)


# The command


def called(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ctxlib", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code


def test_the_exit_status_is_1_where_a_check_fails_and_2_for_bad_input(model_folder, capsys):
    assert called(model_folder, "--json") == 0
    printed = capsys.readouterr()
    frame = json.loads(printed.out)
    started = [line for line in printed.err.splitlines() if line.startswith("checking ")]
    assert len(started) >= 6 and started[0] == "checking model …"
    assert set(frame[0]) == {"check", "verdict", "finding", "remedy"}
    assert called(model_folder, "--indicator", "x") == 1
    assert capsys.readouterr().out.startswith("fail  indicator")
    assert called(model_folder / "nowhere") == 2
    assert called(model_folder, "--layer", 9) == 2
    assert "layers 0 to 1" in capsys.readouterr().err


def test_a_model_that_takes_no_sdpa_is_opened_with_eager(tmp_path, tokenizer):
    build("gemma2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _, corpus = open_patient(str(tmp_path))
    assert model.config._attn_implementation == "eager" and len(corpus) == 24


def test_the_miniature_is_examined_in_its_own_language():
    model, tokenizer, corpus = open_patient("miniature:instruct")
    frame = examine(model, tokenizer, corpus=corpus)
    assert corpus.source == "miniature" and "fail" not in set(frame["verdict"])
    with pytest.raises(InputError, match="nobody"):
        open_patient("miniature:nobody")
