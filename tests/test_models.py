"""Claims about `ctxlib.models`."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ctxlib.models import (
    add_indicator,
    embedding_changes,
    is_local,
    load_config,
    load_model,
    load_tokenizer,
    memory_advice,
    model_hash,
    require_chat_template,
)
from ctxlib.params import InputError

# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><body>503</body></html>"


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, content):
    return lambda folder: (folder / name).write_text(content)


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


def test_the_pipeline_of_the_file_is_kept_where_the_loader_rebuilds_another(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "x"]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    texts = ["a x</s>\nx a</s>\n", "</s>\n<|user|>\nA </s>\n", "x", " a", "a  x"]
    expected = [made.encode(text, add_special_tokens=False).ids for text in texts]
    loaded = load_tokenizer(tmp_path)
    assert [loaded(text, add_special_tokens=False).input_ids for text in texts] == expected
    loaded.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert [again(text, add_special_tokens=False).input_ids for text in texts] == expected


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
    (tmp_path / "pointer.jinja").write_text(POINTER)
    for path, template, message in (
        (tmp_path / "absent", None, "no file or folder '.*absent'"),
        (tmp_path / "empty", None, "no tokenizer there"),
        (model_folder, tmp_path / "absent.jinja", "not readable"),
        (model_folder, tmp_path / "pointer.jinja", r"not readable: .*pointer\.jinja: a Git-LFS pointer"),
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
        (tmp_path / "absent", "no file or folder '.*absent'"),
        ("./absent", "no file or folder '.*absent'"),
        ("models/that/are-absent", "no file or folder '.*absent'"),
        (broken("no_config", lambda f: (f / "config.json").unlink()), "config.json is missing"),
        (broken("pickled", lambda f: (f / weights).rename(f / "pytorch_model.bin")), "only pytorch_model.bin"),
        (broken("weightless", lambda f: (f / weights).unlink()), "no weights"),
        (broken("cut", cut(weights, 900)), r"model\.safetensors: cut short or damaged, 900 bytes .*; fetch it again"),
        (broken("pointer", put(weights, POINTER)), r"model\.safetensors: a Git-LFS pointer.*git lfs pull"),
        (broken("page", put("config.json", PAGE)), r"config\.json: a web page, not the file itself"),
        (broken("garbled", put("config.json", "{")), r"config\.json, line 1: malformed JSON .* cut short"),
        (broken("half", cut("generation_config.json", 40)), r"generation_config\.json, line \d: malformed JSON"),
        (broken("foreign", lambda f: (f / "config.json").write_text('{"model_type": "nobody"}')), "not loadable"),
    ):
        for load in (load_config, load_model):
            with pytest.raises(InputError, match=message):
                load(path)
    with pytest.raises(InputError, match="expected one of float32"):
        load_model(model_folder, dtype="float8")
    with pytest.raises(InputError, match="expected 'nf4'"):
        load_model(model_folder, quantisation="int8")
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load_model(model_folder, adapter=tmp_path)


@pytest.mark.parametrize("load", [load_config, load_model])
def test_shards_that_are_missing_cut_or_without_their_index_are_named(model, tmp_path, load):
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    load(tmp_path / "whole")
    index, shard = "model.safetensors.index.json", "model-00002-of-00004.safetensors"
    for name, change, message in (
        ("missing", lambda f: (f / shard).unlink(), f"{shard}: this file of the weights is missing; fetch it again"),
        ("cut", cut(shard, 9000), f"{shard}: cut short or damaged, 9,000 bytes"),
        ("pointer", put(shard, POINTER), f"{shard}: a Git-LFS pointer"),
        ("page", put(index, PAGE), f"{index}: a web page"),
        ("half", cut(index, 700), f"{index}, line .* cut short"),
        ("empty", put(index, "{}"), f"{index}: names no files of weights"),
        ("without", lambda f: (f / index).unlink(), f"{index}: missing, though its shards are there"),
    ):
        change(shutil.copytree(tmp_path / "whole", tmp_path / name))
        with pytest.raises(InputError, match=message):
            load(tmp_path / name)


def test_tokenizers_that_are_cut_short_or_something_else_are_named(model_folder, tmp_path):
    for name, content, message in (
        ("tokenizer.json", None, r"tokenizer\.json, line \d+: malformed JSON .* cut short; fetch it again"),
        ("tokenizer.json", POINTER, r"tokenizer\.json: a Git-LFS pointer"),
        ("tokenizer.json", PAGE, r"tokenizer\.json: a web page"),
        ("tokenizer.json", "[]", r"tokenizer\.json: expected keys and values"),
        ("tokenizer_config.json", None, r"tokenizer_config\.json, line \d+: malformed JSON"),
        ("tokenizer.model", POINTER, r"tokenizer\.model: a Git-LFS pointer"),
        ("chat_template.jinja", POINTER, r"chat_template\.jinja: a Git-LFS pointer"),
    ):
        folder = shutil.copytree(model_folder, tmp_path / "broken")
        (cut(name, 200) if content is None else put(name, content))(folder)
        with pytest.raises(InputError, match=message):
            load_tokenizer(folder)
        shutil.rmtree(folder)


def test_broken_adapters_are_named_before_the_base_is_loaded(model, model_folder, tmp_path, monkeypatch):
    model.name_or_path = str(model_folder)
    lora(model, tmp_path / "adapter")
    never = lambda *args, **kwargs: pytest.fail("the base was loaded")  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for change, message in (
        (cut(weights, 300), f"{weights}: cut short or damaged, 300 bytes"),
        (put(weights, POINTER), f"{weights}: a Git-LFS pointer"),
        (lambda f: (f / weights).unlink(), f"{weights}: this file of the weights is missing"),
        (put(config, PAGE), f"{config}: a web page"),
        (cut(config, 300), f"{config}, line .*: malformed JSON"),
        (put(config, "[]"), f"{config}: expected keys and values"),
        (put(config, "{}"), f"{config}: not the configuration of an adapter: it names no base_model_name_or_path"),
        (
            put(config, '{"base_model_name_or_path": "/moved/model"}'),
            f"{config}: base_model_name_or_path: no file or folder '/moved/model'; the adapter was trained on it",
        ),
    ):
        folder = shutil.copytree(tmp_path / "adapter", tmp_path / "broken")
        change(folder)
        for load in (load_config, load_model, *([model_hash] if config in message else [])):
            with pytest.raises(InputError, match=message):
                load(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError(),
    ],
)
def test_where_memory_runs_out_the_settings_are_named_and_what_is_kept(error):
    full = pytest.raises(InputError, match=r"^out of memory \(.+\): set x down; finished work is kept in /here, ")
    with full as told, memory_advice("x down", "/here"):
        raise error
    assert "\n" not in str(told.value)
    for other in (RuntimeError("shapes differ"), KeyError("x"), InputError("bad")):
        with pytest.raises(type(other)) as left_alone, memory_advice("x down"):
            raise other
        assert left_alone.value is other


def test_a_model_that_does_not_fit_says_how_it_would(model_folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(
        InputError, match=r"out of memory .*: set models\.dtype to bfloat16, or models\.quantisation to nf4"
    ):
        load_model(model_folder)


def test_a_hub_id_is_no_local_folder_and_a_path_is():
    assert not is_local("owner/name") and not is_local("gpt2") and not is_local("owner/name-1.5_x")
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
