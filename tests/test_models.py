"""Claims about `ctxlib.models`."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ctxlib.models import (
    add_indicator,
    embedding_changes,
    is_local,
    load_model,
    load_tokenizer,
    model_hash,
    require_chat_template,
)
from ctxlib.params import InputError

# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def lora(model, folder, **settings):
    """An adapter with weights that are not zero, saved to `folder`."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def test_saved_model_and_tokenizer_come_back_unchanged(model, tokenizer, model_folder):
    loaded = load_model(model_folder, device="cpu")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert load_tokenizer(model_folder).encode("a question") == tokenizer.encode("a question")


def test_padding_token_costs_no_row(tokenizer, model_folder):
    file = model_folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    loaded = load_tokenizer(model_folder)
    assert loaded.pad_token == "<unk>" and len(loaded) == len(tokenizer)


@pytest.mark.parametrize("as_file", [True, False])
def test_chat_template_from_a_file_or_a_string(model_folder, tmp_path, as_file):
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    (tmp_path / "angle.jinja").write_text(template)
    loaded = load_tokenizer(model_folder, chat_template=tmp_path / "angle.jinja" if as_file else template)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"


@pytest.mark.parametrize(
    "name", ["zephyr", "llama-2-chat", "llama-3-instruct", "chatml", "mistral-instruct", "gemma-it"]
)
def test_real_chat_templates_are_accepted(model_folder, name):
    file = SHARED / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"{file} is absent")
    require_chat_template(load_tokenizer(model_folder, chat_template=file))


def test_bad_tokenizers_are_refused_with_the_remedy(model_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jinja").write_text("{% for message in messages %}")
    for path, template, message in (
        (tmp_path / "absent", None, "no such folder"),
        (tmp_path / "empty", None, "no tokenizer there"),
        (model_folder, tmp_path / "absent.jinja", "not readable"),
        (model_folder, tmp_path / "bad.jinja", "template is faulty"),
    ):
        with pytest.raises(InputError, match=message):
            load_tokenizer(path, chat_template=template)
    (model_folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"no chat template; name a \.jinja file"):
        require_chat_template(load_tokenizer(model_folder))


def test_bad_model_folders_are_refused_with_the_remedy(model_folder, tmp_path):
    def broken(name, change):
        folder = shutil.copytree(model_folder, tmp_path / name)
        change(folder)
        return folder

    weights = "model.safetensors"
    for path, message in (
        (tmp_path / "absent", "no such folder"),
        ("./absent", "no such folder"),
        ("models/that/are-absent", "no such folder"),
        (broken("no_config", lambda f: (f / "config.json").unlink()), "config.json is missing"),
        (broken("pickled", lambda f: (f / weights).rename(f / "pytorch_model.bin")), "only pytorch_model.bin"),
        (broken("weightless", lambda f: (f / weights).unlink()), "no weights"),
        (broken("cut", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:900])), "not loadable"),
        (broken("garbled", lambda f: (f / "config.json").write_text("{")), "not loadable"),
        (broken("foreign", lambda f: (f / "config.json").write_text('{"model_type": "nobody"}')), "not loadable"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(path)
    with pytest.raises(InputError, match="expected one of float32"):
        load_model(model_folder, dtype="float8")
    with pytest.raises(InputError, match="expected 'nf4'"):
        load_model(model_folder, quantisation="int8")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load_model(model_folder, adapter=tmp_path)


def test_a_hub_id_is_no_local_folder_and_a_path_is():
    assert not is_local("owner/name") and not is_local("gpt2")
    assert all(is_local(path) for path in ("./x", "/x", "~/x", "a/b/c", Path("owner/name")))


def test_pickled_weights_are_never_read(model, model_folder):
    torch.save(model.state_dict(), model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="can run code"):
        load_model(model_folder)


def test_nf4_quantises_linear_layers_only_and_keeps_the_unpacked_weights(model_folder):
    loaded = load_model(model_folder, quantisation="nf4", device="cpu")
    quantised = [module for module in loaded.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 2 * 7
    assert all(module.weight.quant_state.nested for module in quantised)  # double quantisation
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    before = [module.weight.clone() for module in quantised]
    logits(loaded)
    assert all(torch.equal(module.weight, weight) for module, weight in zip(quantised, before, strict=True))


def test_indicator_rows_are_the_mean_of_the_old_rows(model, tokenizer, model_folder):
    tokenizer, n_tokens = load_tokenizer(model_folder), len(tokenizer)
    old_in, old_out = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    before = logits(model)
    assert add_indicator(model, tokenizer) == n_tokens
    assert tokenizer.encode("why[IND]", add_special_tokens=False)[-1] == n_tokens
    new_in, new_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(new_in[:-1], old_in) and torch.equal(new_out[:-1], old_out)
    torch.testing.assert_close(new_in[-1], old_in.mean(0))
    torch.testing.assert_close(new_out[-1], old_out.mean(0))
    # a product with one more column may round in another order
    torch.testing.assert_close(logits(model)[..., :-1], before)
    assert model.config.vocab_size == n_tokens + 1


def test_indicator_in_a_spare_row_is_the_mean_of_the_used_rows(tokenizer, model_folder):
    tokenizer = load_tokenizer(model_folder)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    used = model.get_input_embeddings().weight[: len(tokenizer)].detach().clone()
    indicator_id = add_indicator(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == 300
    torch.testing.assert_close(model.get_input_embeddings().weight[indicator_id], used.mean(0))


def test_an_indicator_that_is_a_token_already_is_refused(model, model_folder):
    tokenizer = load_tokenizer(model_folder)
    with pytest.raises(InputError, match="'A' is in the vocabulary as token"):
        add_indicator(model, tokenizer, "A")
    add_indicator(model, tokenizer)
    with pytest.raises(InputError, match="was added already as token 259"):
        add_indicator(model, tokenizer)


def test_adapter_with_a_larger_tokenizer_loads_onto_its_base(model, model_folder, tmp_path):
    tokenizer = load_tokenizer(model_folder)
    indicator_id = add_indicator(model, tokenizer)
    model.name_or_path = str(model_folder)
    trained = lora(model, tmp_path / "adapter", trainable_token_indices=[indicator_id])
    tokenizer.save_pretrained(tmp_path / "adapter")
    for loaded in (load_model(model_folder, adapter=tmp_path / "adapter"), load_model(tmp_path / "adapter")):
        torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=1e-6)


def test_a_changed_embedding_row_is_found_also_in_an_adapter(model, model_folder):
    tokenizer = load_tokenizer(model_folder)
    indicator_id = add_indicator(model, tokenizer)
    changes = embedding_changes(model, model, tokenizer)
    assert changes.changed.tolist() == [0, 0] and changes.tokens.tolist() == ["", ""]
    rows = model.get_input_embeddings().weight.detach()
    assert changes.typical[0] == pytest.approx((rows - rows.mean(0)).pow(2).sum(1).sqrt().median().item())
    adapted = deepcopy(model)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [indicator_id]})
    adapted = get_peft_model(adapted, config)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 0.5
    changes = embedding_changes(model, adapted, tokenizer)
    assert changes.rows.tolist() == [indicator_id + 1] * 2
    assert changes.changed.tolist() == [1, 0] and changes.tokens.tolist() == ["[IND]", ""]
    assert changes.distance.tolist() == pytest.approx([0.5 * 32**0.5, 0])


def test_hash_names_contents_not_places(model, model_folder, tmp_path):
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert model_hash(moved) == model_hash(model_folder) and len(model_hash(moved)) == 12
    for base, name in ((model_folder, "one"), (moved, "two")):
        torch.manual_seed(0)
        model = load_model(base)
        lora(model, tmp_path / name)
    assert model_hash(tmp_path / "one") == model_hash(tmp_path / "two") != model_hash(moved)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert model_hash(moved) != model_hash(model_folder)
    assert model_hash(tmp_path / "two") != model_hash(tmp_path / "one")  # its base has changed
    assert model_hash("owner/name") != model_hash("owner/name", revision="v2")
