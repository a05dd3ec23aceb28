"""The doctor looks at a folder of chat templates: supported, refused with a reason, or wrong."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import Phi3Config, Phi3ForCausalLM

from ctxlib.commands import cli
from ctxlib.commands.doctor import CONVERSATIONS, examine_template, examine_templates, templates
from ctxlib.commands.doctor.model import check_model, check_tokenizer
from ctxlib.conversations import Message, load_conversations
from ctxlib.miniature import model_source
from ctxlib.models import load_model, load_tokenizer
from ctxlib.params import InputError
from ctxlib.roles import Role, role_map

PUBLIC = Path(__file__).resolve().parents[2] / "shared" / "data" / "chat_templates"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKS = TURNS.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
TRIED = {
    "turns": (TURNS, "supported", "expresses all conversations"),
    "thinks": (THINKS, "supported", "expresses all conversations"),
    "alternates": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system text') }}{% endif %}" + TURNS,
        "supported",
        "refuses a system text",
    ),
    "drops": (
        TURNS.replace("messages %}", "messages if m.role != 'system' %}"),
        "supported",
        "leaves out messages of a",
    ),
    "guard": (
        "{% for m in messages if m.role == 'user' %}[INST] Is this safe? {{ m.content }} [/INST]{% endfor %}",
        "refused",
        "guard leaves out the last message",
    ),
    "tools": ("{% for t in tools %}{{ t.name }}{% endfor %}" + TURNS, "refused", "it asks for tools, of which"),
    "parts": (
        TURNS.replace("{{ m.content }}", "{% for p in m.content if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"),
        "refused",
        r"leaves out the last message; it asks for contents as parts \(type, text\)",
    ),
    "first part": (TURNS.replace("m.content", "m.content[0]['text']"), "refused", "first part"),
    "upper": (TURNS.replace("m.content", "m.content | upper"), "refused", "rewrites contents"),
    "random": (TURNS.replace("{{ m.role }}", "{{ range(10**6) | random }}"), "refused", "random"),
    "faulty": ("{% for m in messages %}", "refused", "is faulty"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "refused",
        "is refused",
    ),
}


@pytest.fixture(scope="module")
def small():
    return load_tokenizer(model_source("miniature:instruct"))


@pytest.mark.parametrize("name", TRIED)
def test_templates_are_supported_or_refused_with_the_reason(small, name):
    template, verdict, said = TRIED[name]
    found, finding = examine_template(template, small, name)
    assert found == verdict
    assert re.search(said, finding), finding
    assert small.chat_template != template  # the tokenizer is not changed


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="needs the templates in ../shared/data")
def test_the_public_templates_are_supported(small):
    frame = examine_templates(PUBLIC, small)
    assert list(frame.template) == sorted(path.name for path in PUBLIC.glob("*.jinja"))
    assert set(frame.verdict) == {"supported"}


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (
            lambda of: dataclasses.replace(of, roles=of.roles.where(of.roles != Role.ASSISTANT, Role.USER)),
            "tokens of user",
        ),
        (
            lambda of: dataclasses.replace(of, roles=of.roles.where(of.roles != Role.USER, Role.TEMPLATE)),
            "tokens of user",
        ),
        (lambda of: dataclasses.replace(of, roles=of.roles.roll(1)), "spell"),
        (lambda of: dataclasses.replace(of, ids=of.ids.flip(0)), "not those of apply_chat_template"),
    ],
    ids=["leak", "lost", "shifted", "other ids"],
)
def test_a_map_that_leaks_or_loses_characters_is_wrong(small, monkeypatch, forged, said):
    monkeypatch.setattr(templates, "role_map", lambda *args, **options: forged(role_map(*args, **options)))
    verdict, finding = examine_template(TURNS, small)
    assert verdict == "wrong" and said in finding


def test_a_think_block_that_the_template_writes_is_the_templates(small):
    small = load_tokenizer(model_source("miniature:instruct"), chat_template=THINKS)
    role_of = role_map(small, [Message("user", "Is it so?"), Message("assistant", "It is.")])
    spelled = small.decode(role_of.ids[role_of.roles == Role.TEMPLATE])
    assert "<think>" in spelled.replace(" ", "") and "</think>" in spelled.replace(" ", "")
    assert small.decode(role_of.ids[role_of.roles == Role.ASSISTANT]).strip() == "It is."


@pytest.mark.parametrize("text", ["a</s>b", "<s>", "so <s>it</s> is", "</s>"])
def test_text_that_spells_an_end_token_stays_its_authors(small, text):
    role_of = role_map(small, [Message("user", text), Message("assistant", text)])
    special = set(small.all_special_ids) - {small.unk_token_id}
    for role in (Role.USER, Role.ASSISTANT):
        ids = role_of.ids[role_of.roles == role].tolist()
        assert not special & set(ids)
        assert small.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_the_command_prints_a_verdict_per_file_and_their_counts(tmp_path, capsys):
    (tmp_path / "a.jinja").write_text(TURNS)
    (tmp_path / "b.JINJA").write_text(TRIED["upper"][0])
    with pytest.raises(SystemExit) as ended:
        cli.app(["doctor", "--templates", str(tmp_path)])
    out = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "supported  a.jinja" in out
        and "refused    b.JINJA: the chat template of b.JINJA" in out
    )
    assert out.endswith("1 supported, 1 refused, 0 wrong\n")
    with pytest.raises(SystemExit):
        cli.app(["doctor", "--templates", str(tmp_path), "--json"])
    assert [row["verdict"] for row in json.loads(capsys.readouterr().out)] == ["supported", "refused"]


def test_a_folder_without_templates_is_named(tmp_path, small):
    with pytest.raises(InputError, match=r"no \.jinja file in this folder"):
        examine_templates(tmp_path, small)


def test_a_tokenizer_that_gives_other_ids_than_its_file_fails(small):
    model, corpus = load_model(model_source("miniature:instruct"), device="cpu"), load_conversations(CONVERSATIONS)
    assert check_tokenizer(model, small, corpus)[0].verdict != "fail"
    other = load_tokenizer(model_source("miniature:instruct"))
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    (check,) = check_tokenizer(model, other, corpus)
    assert check.verdict == "fail" and "other ids than its tokenizer.json" in check.finding


def test_a_model_whose_frequencies_change_with_the_length_gets_a_note():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        num_key_value_heads=4, max_position_embeddings=256, original_max_position_embeddings=64,
        rope_parameters=rope | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    (check,) = check_model(Phi3ForCausalLM(config))
    assert check.verdict == "note" and "other rotary frequencies beyond 64 tokens" in check.finding
