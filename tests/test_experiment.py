"""What notebooks share: prompts that end where attention is measured, and names of models that follow their files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from ctxlib import experiment
from ctxlib.miniature import MODELS, model_source
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
    readings = [
        experiment.prompts(tokenizer, bare, template=True, first_response_token=token)
        for token in ("last_input", "forced_prefix")
    ]
    for one, other in zip(*readings, strict=True):
        assert one.ids.tolist() == other.ids.tolist()


def test_a_retrained_model_has_another_key_and_a_copy_the_same(tmp_path):
    shutil.copytree(MODELS / "pretrained", tmp_path / "model")
    ours = load_params(SMOKE)
    copied = load_params(SMOKE, {"models.pretrained": str(tmp_path / "model")})
    assert experiment.model_key(copied, "pretrained") == experiment.model_key(ours, "pretrained")
    assert experiment.model_key(ours, "instruct") != experiment.model_key(ours, "pretrained")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert experiment.model_key(copied, "pretrained") != experiment.model_key(ours, "pretrained")


def test_a_model_of_the_miniature_is_found_by_its_name_and_any_other_name_is_left_as_it_is():
    assert model_source("miniature:instruct") == str(MODELS / "instruct")
    for name in ("./models/mine", "owner/name", "miniature", "/tmp/miniature:instruct"):
        assert model_source(name) == name
    ours = load_params(SMOKE, {"models.instruct": "miniature:nobody"})
    for wrong in ("miniature:", "miniature:../models/instruct"):
        with pytest.raises(InputError, match="no such model"):
            model_source(wrong)
    with pytest.raises(InputError, match=r"miniature:nobody: .* it has miniature:instruct and miniature:pretrained"):
        experiment.model_path(ours, "instruct")


def test_every_model_is_loaded_at_its_own_revision(monkeypatch, model):
    revisions = {"models.revision": "a", "models.instruct_revision": "b", "models.seed_model_revision": None}
    hub = {f"models.{which}": f"owner/{which}" for which in ("pretrained", "instruct", "seed_model")}
    params = load_params(SMOKE, hub | revisions)
    loaded = {}

    def load_model(path, *, revision, **how):
        loaded[path] = revision
        return model

    monkeypatch.setattr(experiment.models, "load_model", load_model)
    for which in ("pretrained", "instruct", "seed_model"):
        experiment.model(params, which)
    assert loaded == {"owner/pretrained": "a", "owner/instruct": "b", "owner/seed_model": None}
    keys = {experiment.model_key(params, which) for which in ("pretrained", "instruct", "seed_model")}
    assert len(keys) == 3


def test_data_of_the_hub_are_read_at_their_split_and_revision(monkeypatch):
    asked = []

    def load_dataset(name, **how):
        asked.append((name, how))
        return datasets.Dataset.from_list([{"id": "a", "conversations": [{"from": "human", "value": "hello"}]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    changes = {"conversations.source": "owner/data", "conversations.split": "s", "conversations.revision": "r"}
    assert len(experiment.conversations(load_params(SMOKE, changes))) == 1
    assert asked == [("owner/data", {"split": "s", "revision": "r"})]
