"""What only a GPU can show: the fused kernels' routes, in bfloat16, against eager attention and float32.

`pytest -m gpu`; without CUDA every test is skipped. The same code is tested on a CPU elsewhere, with small shapes.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctxlib.attention import record_allocation, route, steer_attention
from ctxlib.conversations import Conversation, Corpus, Message
from ctxlib.finetune import loss
from ctxlib.finetune.labels import TrainingExample, collate, pack, packs_exactly
from ctxlib.params import Scoring
from ctxlib.scoring import score_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]
SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
}


def llama(dtype=torch.bfloat16, attention="sdpa", **changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE | changes), attn_implementation=attention)
    return model.to("cuda", dtype).eval()


def tokens(batch=1, length=512):
    torch.manual_seed(1)
    ids = torch.randint(3, SHAPE["vocab_size"], (batch, length), device="cuda")
    return ids, torch.randint(0, 5, (batch, length), device="cuda")


@torch.inference_mode()
def recorded(model, ids, roles, **options):
    with record_allocation(model, roles, rows="all", **options) as recording:
        model.get_decoder()(ids, use_cache=False)
    return recording.allocation


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_all_rows_of_a_half_precision_model_are_off_by_no_more_than_stated(head_dim):
    model, (ids, roles) = llama(head_dim=head_dim), tokens(batch=2)
    exact = recorded(model, ids, roles, layers=[0], precision="exact")
    found = recorded(model, ids, roles, layers=[0])
    assert (found - exact).abs().max() <= 0.004, route(model)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), atol=1e-6, rtol=0)


def test_exact_rows_are_those_of_eager_attention_in_float32():
    model, (ids, roles) = llama(torch.float32), tokens()
    found = recorded(model, ids, roles)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        patterns = eager.get_decoder()(ids, use_cache=False, output_attentions=True).attentions
    columns = torch.nn.functional.one_hot(roles, 5).float()[:, None]
    torch.testing.assert_close(found, torch.stack([p @ columns for p in patterns]), atol=1e-4, rtol=0)


def test_recording_all_rows_needs_no_matrix_of_scores():
    model, (ids, roles) = llama(), tokens(length=8192)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    recorded(model, ids, roles)
    one_matrix = 8 * 8192 * 8192 * 2
    assert torch.cuda.max_memory_allocated() - held < one_matrix / 2


def test_the_recorded_call_is_taken_by_a_flash_kernel():
    model, (ids, roles) = llama(), tokens(length=2048)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        recorded(model, ids, roles)


def test_steered_decoding_agrees_with_a_full_pass():
    model, (ids, roles) = llama(torch.float32), tokens(batch=2, length=64)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    keep = (roles == 2) & mask.bool()
    with torch.inference_mode(), steer_attention(model, keep, 0.1):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    longer = torch.nn.functional.pad(keep, (0, 3), value=False)
    with torch.inference_mode(), steer_attention(model, longer, 0.1):
        whole = torch.nn.functional.pad(mask, (0, 3), value=1)
        logits = model(out.sequences[:, :-1], attention_mask=whole, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, -4:], atol=1e-3, rtol=1e-3)


def test_scores_agree_with_those_of_the_cpu(tokenizer):
    model = llama(torch.float32, vocab_size=len(tokenizer))
    words = "the quick brown fox jumps over the lazy dog".split()
    conversations = [
        Conversation(
            str(n), (Message("user", " ".join(words[: 1 + n % 9])), Message("assistant", "It is so. " * (n + 1)))
        )
        for n in range(20)
    ]
    corpus = Corpus(tuple(conversations), None, "a test")
    options = {"conversations_per_part": 6, "progress": False, "seed_model": "random"}
    on_gpu = score_corpus(model, tokenizer, corpus, Scoring(), **options)
    on_cpu = score_corpus(model.cpu(), tokenizer, corpus, Scoring(), **options)
    assert (on_gpu.score - on_cpu.score).abs().max() < 1e-3
    assert on_gpu.drop(columns="score").equals(on_cpu.drop(columns="score"))


def examples(lengths):
    torch.manual_seed(2)
    made = [torch.randint(3, SHAPE["vocab_size"], (length,)) for length in lengths]
    return [TrainingExample(ids, ids, torch.zeros_like(ids)) for ids in made]


def test_chunked_loss_and_gradients_are_those_of_all_logits(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 100 * SHAPE["vocab_size"])
    model, rows = llama(torch.float32), examples([300, 200])
    batch = {name: tensor.to("cuda") for name, tensor in collate(rows, 0).items()}

    def gradients():
        model.zero_grad()
        found = model(**batch, use_cache=False).loss
        found.backward()
        return found.detach(), model.lm_head.weight.grad.clone(), model.model.embed_tokens.weight.grad.clone()

    expected = gradients()
    with loss.chunked_loss(model, 10**6, rows[0]):
        found = gradients()
    for of_chunks, of_all in zip(found, expected, strict=True):
        torch.testing.assert_close(of_chunks, of_all, atol=1e-5, rtol=1e-4)


def test_chunked_loss_does_not_hold_all_logits():
    model, rows = llama(vocab_size=128000), examples([4096])
    batch = {name: tensor.to("cuda") for name, tensor in collate(rows, 0).items()}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with loss.chunked_loss(model, 4096, rows[0]):
        model(**batch, use_cache=False).loss.backward()
    assert torch.cuda.max_memory_allocated() - held < 4096 * 128000 * 4


@pytest.mark.parametrize("packed", [True, False])
def test_four_conversations_of_4096_tokens_train(packed):
    model, rows = llama(), examples([4096] * 4)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = pack(rows) if packed else collate(rows, 0)
    with loss.chunked_loss(model, 4 * 4096, rows[0]):
        found = model(**{name: tensor.to("cuda") for name, tensor in batch.items()}, use_cache=False).loss
        found.backward()
    torch.cuda.synchronize()
    assert found.isfinite()


def test_packed_conversations_stay_apart():
    assert packs_exactly(llama(), examples([40, 30]), tolerance=0.05)
