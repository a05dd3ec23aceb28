"""The chunked loss against the loss that transformers computes from all logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from ctxlib.finetune import loss
from ctxlib.finetune.labels import IGNORED, TrainingExample, collate, pack
from ctxlib.finetune.loss import chunked_loss

IDS = [list(range(3, 40)), list(range(60, 80))]
EXAMPLES = [
    TrainingExample(torch.tensor(ids), torch.tensor([IGNORED] * 9 + ids[9:]), torch.zeros(len(ids), dtype=torch.long))
    for ids in IDS
]


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    found = model(**batch, use_cache=False, **options).loss
    found.backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def in_small_chunks(monkeypatch, tokenizer):
    """Three tokens at a time."""
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 3 * len(tokenizer))


@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize("batched", ["padded", "packed"])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(model, in_small_chunks, batched, count):
    batch = pack(EXAMPLES) if batched == "packed" else collate(EXAMPLES, 0)
    options = {} if count is None else {"num_items_in_batch": count}
    expected, expected_gradients = loss_and_gradients(model, batch, **options)
    with chunked_loss(model, 100, EXAMPLES[0]):
        found, gradients = loss_and_gradients(model, batch, **options)
        assert model(**batch).logits.shape[-1] == model.config.hidden_size
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-6)
    assert model(**batch).logits.shape[-1] == model.config.vocab_size
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_chunks_give_the_gradients_of_an_adapter(model, in_small_chunks):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected, expected_gradients = loss_and_gradients(adapted, collate(EXAMPLES, 0))
    with chunked_loss(adapted, 100, EXAMPLES[0]):
        found, gradients = loss_and_gradients(adapted, collate(EXAMPLES, 0))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-6, rtol=1e-6)


def test_no_more_logits_are_made_than_a_chunk_holds(model, in_small_chunks):
    made = []
    model.lm_head.weight.requires_grad_(False)
    linear = torch.nn.functional.linear

    def watched(inputs, weight, *rest):
        made.extend([inputs.shape[:-1].numel()] * (weight is model.lm_head.weight))
        return linear(inputs, weight, *rest)

    with pytest.MonkeyPatch.context() as patched, chunked_loss(model, 100, EXAMPLES[0]):
        patched.setattr(torch.nn.functional, "linear", watched)
        model(**collate(EXAMPLES, 0)).loss.backward()
    supervised = sum(int((example.labels[1:] != IGNORED).sum()) for example in EXAMPLES)
    assert max(made) == 3
    assert sum(made) == 2 * supervised  # once forward, once more for the backward pass


def test_small_batches_keep_their_logits_and_every_bit(model):
    expected, expected_gradients = loss_and_gradients(model, collate(EXAMPLES, 0))
    with chunked_loss(model, 100, EXAMPLES[0]):
        found, gradients = loss_and_gradients(model, collate(EXAMPLES, 0))
    assert torch.equal(found, expected)
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


def test_a_model_that_caps_its_logits_keeps_its_own_loss(tokenizer, in_small_chunks):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    batch = collate(EXAMPLES, 0)
    expected = copy.deepcopy(model)(**batch).loss
    with chunked_loss(model, 100, EXAMPLES[0]):
        assert torch.equal(model(**batch).loss, expected)
