"""A base model of another size is trained by the shipped recipe, once, and is whole or not there."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ctxlib.evidence import base_models, trials
from ctxlib.evidence.base_models import SHIPPED, model_table, pretrained, scaled
from ctxlib.miniature import MODELS
from ctxlib.miniature.pretrain import build_model
from ctxlib.miniature.tokenizer import build_tokenizer
from ctxlib.params import InputError, Params, load_params

SMALL = Path(__file__).resolve().parents[1] / "params" / "smoke-evidence.yaml"
TINY = replace(scaled(16, steps=4), layers=1, batch_tokens=128)


@pytest.fixture
def params(tmp_path) -> Params:
    return load_params(SMALL, {"outputs": str(tmp_path)})


def closed_form(width: int, vocabulary: int) -> int:
    """Embeddings, the last norm; per layer q, o, half as wide k, v, three matrices of the MLP, two norms."""
    return 2 * vocabulary * width + width + SHIPPED.layers * (3 * width**2 + 6 * width**2 + 2 * width)


@pytest.fixture(scope="module")
def words():
    """The miniature's tokenizer."""
    return build_tokenizer()


@pytest.mark.parametrize("width", [16, 64, 128, 192])
def test_width_scales_heads_and_mlp_and_leaves_layers_and_heads(width, words):
    tokenizer, recipe = words, scaled(width)
    model = build_model(recipe, tokenizer)
    assert model.num_parameters() == closed_form(width, len(tokenizer))
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (SHIPPED.layers, SHIPPED.heads)
    others = {"width": SHIPPED.width, "head_width": SHIPPED.head_width, "mlp_width": SHIPPED.mlp_width}
    assert replace(recipe, **others) == SHIPPED


def test_the_shipped_width_and_seed_are_the_shipped_model_which_is_not_trained_again(params, words, monkeypatch):
    monkeypatch.setattr(base_models, "pretrain", None)
    assert json.loads((MODELS / "pretrained" / "card.json").read_text())["recipe"] == asdict(scaled(128))
    folder = pretrained(params, scaled(128))
    assert folder == MODELS / "pretrained"
    on_it = trials.Plan(params, trials.Trial({"models.pretrained": str(folder)}))
    assert on_it.description == trials.Plan(params, trials.VANILLA).description
    row = model_table({"shipped": folder}).iloc[0]
    assert (row.width, row.parameters) == (128, closed_form(128, len(words)))
    assert row.lessons == f"{SHIPPED.top_level} of {SHIPPED.top_level}"


def test_a_base_model_is_trained_once_and_each_recipe_has_its_own(params, monkeypatch):
    first = pretrained(params, TINY)
    assert pretrained(params, replace(TINY, seed=1)) != first
    monkeypatch.setattr(base_models, "pretrain", None)
    assert pretrained(params, TINY) == first
    assert list(model_table({"tiny": first}).pretraining_seed) == [0]
    assert not list(first.glob("checkpoint*"))


def test_what_a_kill_leaves_is_no_model_and_is_gone_on_with(params, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)  # trained, and killed before it is in its place
        pretrained(params, TINY)
    (training,) = (params.output_dir / "work" / "pretrainings").glob("*.training")
    assert not training.with_suffix("").exists()
    monkeypatch.setattr(base_models, "pretrain", None)
    assert pretrained(params, TINY) == training.with_suffix("")
    assert not training.exists()


def test_a_width_whose_heads_would_be_odd_is_refused(params):
    with pytest.raises(InputError, match=r"evidence\.widths.*multiple of 8, got 20"):
        params.changed({"evidence.widths": [20, 128]})
