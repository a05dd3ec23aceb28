"""What notebooks share: prompts that end where attention is measured, and names of models that follow their files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch

from ctxlib import experiment
from ctxlib.conversations import Message, Question, Rule
from ctxlib.miniature import MODELS, model_source
from ctxlib.models import Subject
from ctxlib.params import InputError, load_params
from ctxlib.roles import Role

SMOKE = Path(__file__).resolve().parents[1] / "params" / "smoke.yaml"


@pytest.fixture(scope="module")
def needles():
    params = load_params(SMOKE)
    tokenizer = experiment.tokenizer(params)
    return tokenizer, experiment.needles(params, tokenizer)


@pytest.mark.parametrize("template", [True, False])
def test_the_first_response_token_is_read_at_the_prompts_end_or_at_the_prefixs(needles, template):
    tokenizer, questions = needles
    at_input = experiment.prompts(tokenizer, questions, template=template, first_response_token="last_input")
    at_prefix = experiment.prompts(tokenizer, questions, template=template, first_response_token="forced_prefix")
    for question, bare, prefixed in zip(questions, at_input, at_prefix, strict=True):
        assert Role.ASSISTANT not in bare.roles and bare.roles[-1] == Role.TEMPLATE
        assert prefixed.ids[: len(bare)].tolist() == bare.ids.tolist()
        assert tokenizer.decode(prefixed.ids[len(bare) :]).strip() == question.response_prefix
        assert set(prefixed.roles[len(bare) :].tolist()) == {Role.ASSISTANT}


def test_without_a_response_prefix_both_first_response_tokens_are_the_same(needles):
    tokenizer, questions = needles
    bare = [replace(question, response_prefix="") for question in questions[:3]]
    variants = [
        experiment.prompts(tokenizer, bare, template=True, first_response_token=token)
        for token in ("last_input", "forced_prefix")
    ]
    for one, other in zip(*variants, strict=True):
        assert one.ids.tolist() == other.ids.tolist()


def test_a_retrained_model_has_another_key_and_a_copy_the_same(tmp_path):
    shutil.copytree(MODELS / "pretrained", tmp_path / "model")
    ours = load_params(SMOKE)
    copied = load_params(SMOKE, {"models.pretrained": str(tmp_path / "model")})
    key = experiment.subject(ours, "pretrained").key
    assert experiment.subject(copied, "pretrained").key == key != experiment.subject(ours, "instruct").key
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert experiment.subject(copied, "pretrained").key != key


def test_a_model_of_the_miniature_is_found_by_its_name_and_any_other_name_is_left_as_it_is():
    assert model_source("miniature:instruct") == str(MODELS / "instruct")
    for name in ("./models/mine", "owner/name", "miniature", "/tmp/miniature:instruct"):
        assert model_source(name) == name
    ours = load_params(SMOKE, {"models.instruct": "miniature:nobody"})
    for wrong in ("miniature:", "miniature:../models/instruct"):
        with pytest.raises(InputError, match="no such model"):
            model_source(wrong)
    there = "miniature:indicator, miniature:instruct, miniature:pretrained, miniature:vanilla"
    with pytest.raises(InputError, match=rf"miniature:nobody: .* it has {there}"):
        experiment.model_path(ours, "instruct")


def test_every_model_is_loaded_at_its_own_revision(monkeypatch, model, tokenizer):
    revisions = {"models.revision": "a", "models.instruct_revision": "b", "models.seed_model_revision": None}
    hub = {f"models.{which}": f"owner/{which}" for which in ("pretrained", "instruct", "seed_model")}
    params = load_params(SMOKE, hub | revisions)
    loaded = {}

    def load_model(path, *, revision, **how):
        loaded[path] = revision
        return model

    monkeypatch.setattr(experiment.models, "load_model", load_model)
    monkeypatch.setattr(experiment.models, "load_tokenizer", lambda path, **how: tokenizer)
    asked = [experiment.subject(params, which) for which in ("pretrained", "instruct", "seed_model")]
    assert loaded == {"owner/pretrained": "a", "owner/instruct": "b", "owner/seed_model": None}
    assert len({subject.key for subject in asked}) == 3


def test_data_of_the_hub_are_read_at_their_split_and_revision(monkeypatch):
    asked = []

    def load_dataset(name, **how):
        asked.append((name, how))
        return datasets.Dataset.from_list([{"id": "a", "conversations": [{"from": "human", "value": "hello"}]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    changes = {"conversations.source": "owner/data", "conversations.split": "s", "conversations.revision": "r"}
    assert len(experiment.conversations(load_params(SMOKE, changes))) == 1
    assert asked == [("owner/data", {"split": "s", "revision": "r"})]


def squad_file(path, id):
    question = {"id": id, "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
    paragraph = {"context": "Ada wrote it.", "qas": [question]}
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    return str(path)


def test_passages_come_from_all_sources_in_the_prompt_and_reading_that_are_named(tmp_path):
    sources = [squad_file(tmp_path / "one.json", "1"), "miniature", squad_file(tmp_path / "two.json", "2")]
    plain = {"qa.sources": sources, "qa.n": 5, "qa.prompt": "plain"}
    asked = experiment.passage_questions(load_params(SMOKE, plain))
    assert [question.id for question in asked][::6] == ["1", "2"] and len(asked) == 7
    assert asked[0].messages[0].content == "Ada wrote it. Who?"
    twice = load_params(SMOKE, {"qa.sources": [sources[0], squad_file(tmp_path / "three.json", "1")]})
    with pytest.raises(InputError, match=r"smoke\.yaml: qa\.sources: two of them hold the question '1'"):
        experiment.passage_questions(twice)


def test_an_instruction_is_followed_when_its_answer_is_given_or_all_its_rules_are_kept(
    monkeypatch, tmp_path, model, tokenizer
):
    params = load_params(SMOKE, {"outputs": str(tmp_path)})
    said = {
        "right": "six seven.",
        "wrong": "seven six.",
        "kept": "no comma here",
        "broken": "a comma, here",
        "fact": "x",
    }
    user = (Message("user", "?"),)
    questions = [
        Question("right", "instructions", "repeat", user, answers=("six seven.",)),
        Question("wrong", "instructions", "repeat", user, answers=("six seven.",)),
        Question(
            "kept", "instructions", "no_commas", user, rules=(Rule("no_commas", 0, ""), Rule("lower_case", 0, ""))
        ),
        Question(
            "broken", "instructions", "no_commas", user, rules=(Rule("no_commas", 0, ""), Rule("lower_case", 0, ""))
        ),
        Question("fact", "facts", "job", user, answers=("x",)),
    ]

    def answers(subject, asked, **how):
        rows = [{"id": question.id, "family": question.family, "answer": said[question.id]} for question in asked]
        return pd.DataFrame(rows)

    monkeypatch.setattr(experiment, "answer_questions", answers)
    subject = Subject("tiny", model, tokenizer, "k")
    scored = experiment.ask(params, subject, questions, condition="c", template=True)
    followed = scored.set_index("id").followed
    assert followed[:4].tolist() == [1, 0, 1, 0] and pd.isna(followed["fact"])


@pytest.mark.parametrize(("method", "quantisation"), [("qlora", "nf4"), ("lora", None)])
def test_an_adapter_lies_over_the_weights_it_was_trained_on(
    tmp_path, monkeypatch, model, tokenizer, method, quantisation
):
    folder = tmp_path / "smoke" / "work" / "models" / "vanilla"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "finetune.json").write_text(json.dumps({"method": method}))
    params = load_params(SMOKE, {"outputs": str(tmp_path), "models.instruct": str(folder), "models.quantisation": None})
    asked = {}
    monkeypatch.setattr(experiment.models, "load_model", lambda path, **how: asked.update({str(path): how}) or model)
    monkeypatch.setattr(experiment.models, "load_tokenizer", lambda path: tokenizer)
    experiment.model(params, "instruct")
    assert asked.pop(str(folder))["quantisation"] == quantisation
    monkeypatch.setattr(experiment.models, "model_hash", lambda path: Path(path).name)
    experiment.subject(params, "vanilla")
    assert asked.pop(str(folder))["quantisation"] == quantisation
    experiment.model(params, "pretrained")
    assert [how["quantisation"] for how in asked.values()] == [None]


@pytest.mark.parametrize("template", [True, False])
def test_a_close_up_gives_the_probabilities_and_the_head_that_eager_attention_gives(needles, template):
    """Oracle: one step at a time, with the attention matrices of transformers."""
    params, (tokenizer, questions) = load_params(SMOKE), needles
    question = next(one for one in questions if one.memory_answer)
    subject = experiment.subject(params, "instruct")
    seen = experiment.close_up(params, subject, question, template=template)

    model = experiment.subject(load_params(SMOKE, {"models.attention": "eager"}), "instruct").model
    at = experiment.prompts(tokenizer, [question], template=template, first_response_token="forced_prefix")[0]
    for name, value in (("p_text", " ".join(question.keywords)), ("p_memory", question.memory_answer)):
        ids, expected = at.ids[None], 1.0
        for token in tokenizer(value, add_special_tokens=False)["input_ids"]:
            expected *= model(ids).logits[0, -1].softmax(-1)[token].item()
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert seen[name] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    looked = model(at.ids[None], output_attentions=True).attentions
    start = question.messages[0].content.index(question.answers[0])
    inside = (at.chars[:, 1] > start) & (at.chars[:, 0] < start + len(question.answers[0]))
    on_needle = torch.stack(looked)[:, 0, :, -1, inside & (at.roles == Role.USER)].sum(-1)
    layer, head = divmod(on_needle.argmax().item(), on_needle.shape[1])
    assert (seen["head"], seen["on_needle"]) == (f"{layer}.{head}", pytest.approx(on_needle.max().item(), abs=1e-5))
