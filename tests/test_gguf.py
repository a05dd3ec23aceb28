"""A model folder from a GGUF file: the same weights, tokenizer and template, or a clear refusal and nothing written."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from ctxlib.conversations import Message
from ctxlib.models import convert_gguf, load_model, load_tokenizer
from ctxlib.params import InputError
from ctxlib.roles import role_map

HEADS, KEY_HEADS, WIDTH, LAYERS = 4, 2, 64, 2
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
# warnings of transformers while it reads a GGUF file
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def byte_tokens() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "he", "ll"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=256,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def as_llama_cpp(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, transformers halves: rows of q and k are interleaved."""
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-1])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, of: LlamaForCausalLM, quantised: Kind = Kind.F32, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    for add, value in (
        (writer.add_block_count, LAYERS), (writer.add_context_length, 256), (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KEY_HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(TOKENS)), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, TOKENS),
        (writer.add_token_merges, ["h e", "l l"]), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
        (writer.add_token_types, [3, 3, 3, *[1] * (len(TOKENS) - 3)]), (writer.add_chat_template, CHATML),
    ):  # fmt: skip
        add(value)
    weights = {name: tensor.numpy() for name, tensor in of.state_dict().items() if name != "lm_head.weight"}
    for name, weight in weights.items():
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            name, weight = f"blk.{layer}.{NAMES[part]}.weight", as_llama_cpp(part, weight)
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        if weight.ndim == 1 or quantised == Kind.F32:
            writer.add_tensor(name, np.ascontiguousarray(weight))
        elif quantised == Kind.Q8_K:  # a type that only llama.cpp's own arithmetic uses
            size = gguf.GGML_QUANT_SIZES[quantised][1]
            writer.add_tensor(name, np.zeros((len(weight), size), dtype=np.uint8), raw_dtype=quantised)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original():
    return model()


@pytest.fixture
def file(tmp_path, original):
    write_gguf(tmp_path / "tiny.gguf", original)
    return tmp_path / "tiny.gguf"


def test_the_folder_gives_the_logits_of_the_original(file, original, tmp_path):
    convert_gguf(file, tmp_path / "out")
    ids = torch.randint(3, len(TOKENS), (2, 20))
    with torch.inference_mode():
        expected, found = (one(input_ids=ids).logits for one in (original, load_model(tmp_path / "out")))
    assert torch.allclose(found, expected, atol=1e-5)


def test_quantised_weights_are_those_that_gguf_dequantises(original, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", original, Kind.Q8_0)
    said = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    found = load_model(tmp_path / "out")
    weight = original.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, Kind.Q8_0), Kind.Q8_0)
    assert np.array_equal(found.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)
    assert not np.array_equal(expected, weight)
    assert any("Q8_0" in line for line in said)


def test_tokenizer_and_template_are_those_of_the_file(file, tmp_path):
    convert_gguf(file, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.chat_template == CHATML
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert [TOKENS[one] for one in ids] == ["he", "ll", "o"]
    chat = [Message("user", "hello"), Message("assistant", "o")]
    assert tokenizer.decode(role_map(tokenizer, chat, template=True).ids).startswith(
        "<|im_start|>user\nhello<|im_end|>"
    )


def test_the_card_states_the_checksum_the_licence_and_the_loss(original, tmp_path):
    import hashlib

    write_gguf(tmp_path / "tiny.gguf", original, Kind.Q4_1)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest() in card
    assert "apache-2.0" in card and "cannot be had back" in card and "| Q4_1 |" in card and "| 5.00 |" in card


def test_the_card_of_plain_weights_says_that_nothing_was_lost(file, tmp_path):
    convert_gguf(file, tmp_path / "out")
    assert "nothing was lost" in (tmp_path / "out" / "README.md").read_text()


def refused(file, folder, *said, **more):
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(InputError) as error:
        convert_gguf(file, folder, **more)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in (file.name, *said))
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def test_an_architecture_that_transformers_does_not_read_is_named(original, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", original, architecture="rwkv7")
    refused(tmp_path / "tiny.gguf", tmp_path / "out", "'rwkv7'", "llama", "safetensors")


@pytest.mark.parametrize("kept", [10, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(file, kept, tmp_path):
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    refused(file, tmp_path / "out", "cut short")


def test_weights_that_cannot_be_dequantised_are_named(tmp_path):
    torch.manual_seed(0)
    write_gguf(tmp_path / "tiny.gguf", model(), Kind.Q8_K)
    refused(tmp_path / "tiny.gguf", tmp_path / "out", "Q8_K", "cannot be dequantised")


def test_another_file_than_expected_is_refused(file, tmp_path):
    refused(file, tmp_path / "out", "sha256", "expected", sha256="0" * 64)


def test_a_folder_in_use_is_not_touched(file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        convert_gguf(file, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
