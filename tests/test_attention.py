"""The recorder against eager `output_attentions`; the steering against patterns reweighted one by one."""

import copy
import math
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from jaxtyping import TypeCheckError
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ctxlib.attention import patch_outputs, record_allocation, record_outputs, route, steer_attention, verify_recording
from ctxlib.attention.record import _grouped_pattern
from ctxlib.params import InputError
from ctxlib.roles import ROLES

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TINY, "num_key_value_heads": 2}
ALPHA = 0.3


GEMMA = {**GQA, "head_dim": 8, "attn_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8}
HYBRID = {
    **GQA,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GQA), "sdpa"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GQA), "sdpa"),
    "mistral": (MistralForCausalLM, MistralConfig(**GQA, sliding_window=None), "sdpa"),
    "mistral-window": (MistralForCausalLM, MistralConfig(**GQA, sliding_window=4), "sdpa"),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**TINY), "sdpa"),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**GEMMA), "eager"),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "eager",
    ),
    "qwen3-next": (Qwen3NextForCausalLM, Qwen3NextConfig(**HYBRID), "sdpa"),
    "mamba": (MambaForCausalLM, MambaConfig(**TINY, state_size=4), "eager"),
    "bert": (BertLMHeadModel, BertConfig(**TINY), "sdpa"),
}


def build(name):
    torch.manual_seed(0)
    kind, config, attention = MODELS[name]
    return kind._from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def llama():
    return build("llama")


def batch(side="right", lengths=(12, 7), seed=1):
    """Random tokens with random roles, padded on one side: ids, roles, attention mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids, roles = torch.zeros(len(lengths), longest, dtype=torch.long), torch.full((len(lengths), longest), -1)
    for i, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[i, where] = torch.randint(3, TINY["vocab_size"], (length,), generator=generator)
        roles[i, where] = torch.randint(0, len(ROLES), (length,), generator=generator)
    return ids, roles, (roles >= 0).long()


def sum_by_role(pattern, roles):
    """A loop over roles and keys; pattern: batch head query key."""
    shares = torch.zeros(*pattern.shape[:3], len(ROLES))
    for example in range(len(roles)):
        for position, role in enumerate(roles[example].tolist()):
            if role >= 0:
                shares[example, :, :, role] += pattern[example, :, :, position].float()
    return shares


@torch.no_grad()
def eager_patterns(model, ids, mask):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    patterns = model(ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return patterns


@torch.no_grad()
def eager_allocation(model, ids, roles, mask):
    return torch.stack([sum_by_role(pattern, roles) for pattern in eager_patterns(model, ids, mask)])


@torch.no_grad()
def recorded(model, ids, roles, mask, **options):
    with record_allocation(model, roles, **options) as recording:
        model(ids, attention_mask=mask)
    return recording.allocation


def install_reweighting(model, keep, weights_by_layer, heads=None, queries=None):
    """From now on the eager pattern is multiplied by a weight a key and divided by its sum, head by head.

    Of some (layer, head) and some queries only; where a sum is zero the pattern stays.
    """

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        eager = sys.modules[type(module).__module__].eager_attention_forward
        _, pattern = eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        pattern = pattern.double()
        layer = module.layer_idx
        for example in range(pattern.shape[0]):
            for head in range(pattern.shape[1]):
                if heads is not None and (layer, head) not in heads:
                    continue
                for row in range(pattern.shape[2]):
                    if queries is not None and not queries[example, row]:
                        continue
                    weights = torch.where(keep[example], 1.0, weights_by_layer[layer]).double()
                    weighted = pattern[example, head, row] * weights
                    if weighted.sum() > 0:
                        pattern[example, head, row] = weighted / weighted.sum()
        pattern = pattern.to(query.dtype)
        values = value.repeat_interleave(module.num_key_value_groups, dim=1)
        return (pattern @ values).transpose(1, 2).contiguous(), pattern

    AttentionInterface.register("reweighted", attention)
    AttentionMaskInterface.register("reweighted", eager_mask)
    model.set_attn_implementation("reweighted")


@torch.no_grad()
def reweighted_logits(model, ids, mask, keep, weights_by_layer, heads=None, queries=None):
    install_reweighting(model, keep, weights_by_layer, heads, queries)
    logits = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    return logits


@torch.no_grad()
def logits_of(model, ids, mask, context=None):
    with context or nullcontext():
        return model(ids, attention_mask=mask).logits


def real(tensor, mask):
    return tensor[mask.bool()]


def with_the_next(keep):
    """The span of the authors' code: each kept token, and the one behind it."""
    wider = keep.clone()
    for row, pos in keep[:, :-1].nonzero().tolist():
        wider[row, pos + 1] = True
    return wider


# --- recording -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["riding", "beside"])
def way(request, monkeypatch):
    """The two ways to record: as columns of the values, or beside the model's own attention."""
    monkeypatch.setattr("ctxlib.attention.record._Wanted.rides", lambda *_: request.param == "riding")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "mistral-window", "gpt-neox", "gemma2"])
def test_recorder_matches_output_attentions(name, side, way):
    model = build(name)
    ids, roles, mask = batch(side)
    expected = eager_allocation(model, ids, roles, mask)
    found = recorded(model, ids, roles, mask, rows="all")
    assert found.dtype == torch.float32
    for example in range(len(ids)):
        kept = mask[example].bool()
        torch.testing.assert_close(found[:, example][:, :, kept], expected[:, example][:, :, kept], atol=5e-6, rtol=0)
    last = [int(torch.nonzero(row).max()) for row in mask]
    only_last = recorded(model, ids, roles, mask)
    for example, position in enumerate(last):
        torch.testing.assert_close(only_last[:, example, :, 0], expected[:, example, :, position], atol=5e-6, rtol=0)


def test_recorder_matches_output_attentions_without_padding():
    model = llama()
    ids, roles, mask = batch(lengths=(9, 9))
    expected = eager_allocation(model, ids, roles, mask)
    torch.testing.assert_close(recorded(model, ids, roles, None, rows="all"), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "registered"])
def test_model_computes_the_same_bits_with_the_recorder(attention):
    model = llama()
    AttentionInterface.register("registered", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("registered", sdpa_mask)
    model.set_attn_implementation(attention)
    ids, roles, mask = batch("left")
    plain = logits_of(model, ids, mask)
    assert torch.equal(real(plain, mask), real(logits_of(model, ids, mask, record_allocation(model, roles)), mask))
    assert model.config._attn_implementation == attention


def test_recording_all_rows_changes_the_output_by_rounding_only():
    ids, roles, mask = batch("left")
    exact, half = llama(), llama().to(torch.bfloat16)
    plain, rounded = (real(logits_of(model, ids, mask), mask) for model in (exact, half))
    recorder = partial(record_allocation, roles=roles, rows="all")
    torch.testing.assert_close(real(logits_of(exact, ids, mask, recorder(exact)), mask), plain, atol=1e-5, rtol=0)
    found = real(logits_of(half, ids, mask, recorder(half)), mask)
    assert found.dtype == torch.bfloat16
    assert (found - plain).abs().mean() < 1.1 * (rounded - plain).abs().mean()


def test_many_groups_are_not_made_columns():
    model = llama()
    ids, roles, mask = batch()
    turns = torch.arange(12).expand(2, 12)
    assert roles.unique().numel() * 12 > model.config.hidden_size // model.config.num_attention_heads
    plain = logits_of(model, ids, mask)
    assert torch.equal(logits_of(model, ids, mask, record_allocation(model, roles, rows="all", turns=turns)), plain)


def test_a_layer_to_stop_after_need_not_be_recorded():
    model = llama()
    ids, roles, _ = batch()
    found = []
    model.get_decoder().layers[2].register_forward_hook(lambda *_: found.append(1))
    with torch.no_grad(), record_allocation(model, roles, layers=[0], stop_after=1) as recording:
        model(ids)
    assert not found
    assert torch.equal(recording.allocation, recorded(model, ids, roles, None, layers=[0]))


def test_rows_of_tokens_sum_to_one_and_rows_of_padding_are_zero():
    model = llama()
    ids, roles, mask = batch("left")
    sums = recorded(model, ids, roles, mask, rows="all").sum(-1)
    expected = mask.float()[None, :, None, :].expand_as(sums)
    torch.testing.assert_close(sums, expected, atol=1e-6, rtol=0)


def test_recording_is_invariant_to_padding_and_batching():
    model = llama()
    right_ids, right_roles, right_mask = batch("right")
    left_ids, left_roles, left_mask = batch("left")
    right, left = recorded(model, right_ids, right_roles, right_mask), recorded(model, left_ids, left_roles, left_mask)
    unmasked = recorded(model, right_ids, right_roles, None)
    for example, length in enumerate((12, 7)):
        one = slice(example, example + 1), slice(0, length)
        alone = recorded(model, right_ids[one], right_roles[one], None)
        for found in (right, left, unmasked):
            torch.testing.assert_close(found[:, example], alone[:, 0], atol=5e-6, rtol=0)


def test_chosen_rows_are_those_rows_of_all():
    model = llama()
    ids, roles, mask = batch("right")
    every = recorded(model, ids, roles, mask, rows="all")
    chosen = recorded(model, ids, roles, mask, rows=torch.tensor([[3, 0, 11], [6, 2, -1]]))
    assert torch.allclose(chosen[:, 0], every[:, 0][:, :, [3, 0, 11]], atol=1e-6)
    assert torch.allclose(chosen[:, 1, :, :2], every[:, 1][:, :, [6, 2]], atol=1e-6)
    assert (chosen[:, 1, :, 2] == 0).all()


def test_block_size_does_not_matter(monkeypatch):
    monkeypatch.setattr("ctxlib.attention.record._Wanted.rides", lambda *_: False)
    model = llama()
    ids, roles, mask = batch("left")
    whole = [recorded(model, ids, roles, m, rows="all") for m in (mask, None)]
    monkeypatch.setattr("ctxlib.attention.record._BLOCK_ELEMENTS", 4 * 2 * 12 * 5)
    for found, m in zip(whole, (mask, None), strict=True):
        torch.testing.assert_close(recorded(model, ids, roles, m, rows="all"), found, atol=1e-6, rtol=0)


def test_chosen_layers_are_those_layers_of_all():
    model = llama()
    ids, roles, mask = batch()
    every = recorded(model, ids, roles, mask)
    assert torch.equal(recorded(model, ids, roles, mask, layers=[2, 0]), every[[0, 2]])


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_stopping_early_records_what_a_full_run_records(name, part):
    model = build(name)
    ids, roles, mask = batch()
    full = recorded(model, ids, roles, mask, rows="all")[:2]
    ran = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), record_allocation(model, roles, rows="all", stop_after=1) as recording:
        called = model if part == "model" else model.get_decoder()
        called(ids, attention_mask=mask)
    torch.testing.assert_close(recording.allocation, full, atol=1e-6, rtol=0)
    assert len(ran) == 1
    assert "forward" not in vars(model) and "forward" not in vars(model.get_decoder())
    assert logits_of(model, ids, mask) is not None


def test_turns_split_the_roles():
    model = llama()
    ids, roles, mask = batch("left")
    turns = (torch.arange(12) // 5).expand(2, 12)
    with torch.no_grad(), record_allocation(model, roles, rows="all", turns=turns) as recording:
        model(ids, attention_mask=mask)
    torch.testing.assert_close(recording.allocation, recorded(model, ids, roles, mask, rows="all"), atol=1e-6, rtol=0)
    for turn in range(3):
        of_turn = roles.where(turns == turn, -1)
        expected = torch.stack([sum_by_role(pattern, of_turn) for pattern in eager_patterns(model, ids, mask)])
        expected = expected * mask[None, :, None, :, None]
        torch.testing.assert_close(recording.by_turn[..., turn, :], expected, atol=5e-6, rtol=0)


def test_bfloat16_is_recorded_in_float32(way):
    exact, rounded = llama(), llama().to(torch.bfloat16)
    ids, roles, mask = batch()
    found = recorded(rounded, ids, roles, mask, rows="all", layers=[0])
    sums = found.sum(-1)[:, mask.bool()[:, None].expand(2, 4, 12)]
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, recorded(exact, ids, roles, mask, rows="all", layers=[0]), atol=0.05, rtol=0)


def first_layer(model, ids, roles, **options):
    """What is recorded of layer 0 with these options, and with exact sums."""
    exact = recorded(model, ids, roles, None, rows="all", layers=[0], precision="exact")
    return recorded(model, ids, roles, None, rows="all", layers=[0], **options), exact


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0), (torch.bfloat16, 0.004), (torch.float16, 0.0005)])
def test_sums_in_the_models_dtype_are_off_by_no_more_than_stated(dtype, error):
    ids, roles, _ = batch(lengths=(64, 64))
    found, exact = first_layer(llama().to(dtype), ids, roles)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= error
    assert (found - exact).abs().mean() <= error / 8
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), atol=1e-6, rtol=0)


def test_exact_sums_of_a_half_precision_model_are_those_of_single_rows():
    model = llama().to(torch.bfloat16)
    ids, roles, mask = batch()
    every = recorded(model, ids, roles, mask, rows="all", precision="exact")
    for row in range(12):
        alone = recorded(model, ids, roles, mask, rows=torch.tensor([[row], [row if row < 7 else -1]]))
        torch.testing.assert_close(every[:, :, :, row], alone[:, :, :, 0], atol=1e-5, rtol=0)


def test_exact_sums_leave_the_output_of_a_half_precision_model_as_it_is():
    model = llama().to(torch.bfloat16)
    ids, roles, mask = batch()
    recorder = record_allocation(model, roles, rows="all", precision="exact")
    assert torch.equal(logits_of(model, ids, mask), logits_of(model, ids, mask, recorder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 248, 256])
def test_heads_of_any_width_are_recorded_as_eager_does(head_dim, dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GQA, "num_hidden_layers": 1, "head_dim": head_dim})).eval().to(dtype)
    ids, roles, _ = batch(lengths=(12, 12))
    found = recorded(model, ids, roles, None, rows="all")
    tolerance = 5e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, eager_allocation(model, ids, roles, None), atol=tolerance, rtol=0)
    assert ("two fused calls" in route(model)) == (head_dim == 256)


def test_no_mask_is_made_of_a_batch_without_one_and_grouped_queries_stay_grouped(monkeypatch):
    seen = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, query.shape[1], key.shape[1], {t.dtype for t in (query, key, value)}))
        return plain(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", watched)
    model = llama().to(torch.bfloat16)
    ids, roles, _ = batch("right")
    recorded(model, ids, roles, None, rows="all")
    assert seen == [(None, 4, 2, {torch.bfloat16})] * 3


def test_tokens_without_a_group_keep_their_share_in_half_precision():
    model = llama().to(torch.bfloat16)
    ids, roles, _ = batch(lengths=(12, 12))
    turns = torch.zeros_like(roles)
    some = roles.where(roles != 2, -1)
    found = recorded(model, ids, some, None, rows="all", turns=turns)
    every = recorded(model, ids, roles, None, rows="all", precision="exact")
    real = (some >= 0)[None, :, None, :, None].expand_as(found)
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(
        found[real].view(-1, 5)[:, others], every[real].view(-1, 5)[:, others], atol=0.02, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "groups", "words"),
    [
        ("llama", 5, "one fused call in float32, heads of 8 widened to 16 by 5 groups"),
        ("llama", 10, "10 groups are more than the 8 columns of a head"),
        ("gemma2", 5, "eager attention, which holds tokens × tokens per head"),
    ],
)
def test_the_route_of_a_model_is_one_line(name, groups, words):
    said = route(build(name), groups)
    assert words in said
    assert "\n" not in said


def test_an_unknown_precision_is_refused():
    recorder = partial(record_allocation, llama(), batch()[1], precision="high")
    with pytest.raises((InputError, TypeCheckError), match="exact"), recorder():
        pass


def test_pattern_of_half_precision_scores_is_exact_in_float32():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 9, 8, generator=generator).bfloat16() for heads in (4, 2))
    columns = torch.eye(9)[None]
    found = _grouped_pattern(query, key, None, torch.arange(9)[None], columns, 0.5, None)
    scores = query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2) * 0.5
    expected = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_appends_a_row_for_every_decoding_step(side):
    model = llama()
    ids, roles, mask = batch(side, lengths=(8, 8) if side == "right" else (8, 5))
    with record_allocation(model, roles) as recording:
        written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, eos_token_id=None)
    roles = torch.cat([roles, torch.full((2, 4), 3)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    expected = eager_allocation(model, written[:, :-1], roles[:, :-1], mask[:, :-1])[:, :, :, 7:]
    torch.testing.assert_close(recording.allocation, expected, atol=5e-6, rtol=0)


def test_a_second_pass_replaces_the_first():
    model = llama()
    ids, roles, mask = batch()
    with torch.no_grad(), record_allocation(model, roles) as recording:
        model(ids.flip(0), attention_mask=mask)
        model(ids, attention_mask=mask)
    assert torch.equal(recording.allocation, recorded(model, ids, roles, mask))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_verification_finds_no_difference(name):
    model = build(name)
    ids, roles, _ = batch("left")
    assert verify_recording(model, ids, roles) < 5e-6
    assert model.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")


def test_four_bit_models_are_recorded(tmp_path):
    LlamaForCausalLM(LlamaConfig(**{**GQA, "hidden_size": 64, "intermediate_size": 64})).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32).eval()
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    ids, roles, _ = batch("left")
    assert verify_recording(model, ids, roles) < 5e-6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_models_are_recorded_and_steered_like_their_merged_model():
    torch.manual_seed(3)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    ids, roles, mask = batch("left")
    with steer_attention(adapted, roles == 2, ALPHA):
        found = recorded(adapted, ids, roles, mask, stop_after=2)
    merged = adapted.merge_and_unload()
    with steer_attention(merged, roles == 2, ALPHA):
        expected = recorded(merged, ids, roles, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# --- nothing left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_contexts_leave_nothing_behind_after_an_exception(attention):
    model = llama()
    model.set_attn_implementation(attention)
    ids, roles, mask = batch()
    before = logits_of(model, ids, mask)
    names = set(AttentionInterface()), set(AttentionMaskInterface())
    steering, recorder = steer_attention(model, roles == 2, ALPHA), record_allocation(model, roles, stop_after=1)
    with pytest.raises(ZeroDivisionError), steering, recorder:
        raise ZeroDivisionError
    with pytest.raises(InputError, match="positions"), record_allocation(model, roles):
        model(ids[:, :5])
    assert model.config._attn_implementation == attention
    assert (set(AttentionInterface()), set(AttentionMaskInterface())) == names
    assert "forward" not in vars(model)
    assert torch.equal(real(logits_of(model, ids, mask), mask), real(before, mask))


def test_inner_context_leaves_the_outer_one_in_place():
    model = llama()
    ids, roles, mask = batch()
    steered = logits_of(model, ids, mask, steer_attention(model, roles == 2, ALPHA))
    with torch.no_grad(), steer_attention(model, roles == 2, ALPHA):
        with pytest.raises(ZeroDivisionError), record_allocation(model, roles):
            raise ZeroDivisionError
        assert torch.equal(real(model(ids, attention_mask=mask).logits, mask), real(steered, mask))


# --- steering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "mistral-window", "gpt-neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steered_pattern_is_reweighted_and_renormalised(name, side):
    model = build(name)
    if name == "gpt-neox":
        for layer in model.get_decoder().layers:
            layer.attention.num_key_value_groups = 1
    ids, roles, mask = batch(side)
    keep = roles == 2
    expected = reweighted_logits(model, ids, mask, keep, [ALPHA] * 3)
    found = logits_of(model, ids, mask, steer_attention(model, keep, ALPHA))
    torch.testing.assert_close(real(found, mask), real(expected, mask), atol=2e-5, rtol=1e-4)
    assert (real(found, mask) - real(logits_of(model, ids, mask), mask)).abs().max() > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steering_without_a_mask_stays_causal(attention):
    model = llama()
    ids, roles, _ = batch(lengths=(10, 10))
    expected = reweighted_logits(model, ids, None, roles == 2, [ALPHA] * 3)
    model.set_attn_implementation(attention)
    found = logits_of(model, ids, None, steer_attention(model, roles == 2, ALPHA))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_authors_variant_compounds_over_layers_and_keeps_one_token_more():
    model = llama()
    ids, roles, mask = batch("left")
    expected = reweighted_logits(model, ids, mask, with_the_next(roles == 2), [0.8, 0.8**2, 0.8**3])
    found = logits_of(model, ids, mask, steer_attention(model, roles == 2, 0.8, variant="authors_code"))
    torch.testing.assert_close(real(found, mask), real(expected, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("steering_alpha", [ALPHA, 0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_steering_is_restricted_to_heads_and_queries(side, steering_alpha):
    model = llama()
    ids, roles, mask = batch(side)
    heads, queries = [(1, 0), (1, 3), (2, 1)], roles == 3
    keep = roles != 1
    restricted = {"heads": heads, "queries": queries}
    expected = reweighted_logits(model, ids, mask, keep, [steering_alpha] * 3, **restricted)
    found = logits_of(model, ids, mask, steer_attention(model, keep, steering_alpha, **restricted))
    torch.testing.assert_close(real(found, mask), real(expected, mask), atol=2e-5, rtol=1e-4)
    assert (real(found, mask) - real(logits_of(model, ids, mask), mask)).abs().max() > 1e-3


@pytest.mark.parametrize("steering_alpha", [ALPHA, 0])
def test_heads_that_are_not_steered_keep_their_attention_to_the_bit(steering_alpha):
    model = llama()
    ids, roles, mask = batch("left")
    plain = recorded(model, ids, roles, mask, rows="all", layers=[0, 1])
    with steer_attention(model, roles == 2, steering_alpha, heads=[(1, 2)]):
        steered = recorded(model, ids, roles, mask, rows="all", layers=[0, 1])
    others = [0, 1, 3]
    assert torch.equal(steered[0], plain[0]) and torch.equal(steered[1][:, others], plain[1][:, others])
    assert not torch.equal(steered[1][:, 2], plain[1][:, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alpha_zero_leaves_no_attention_where_a_key_to_keep_is_seen(dtype):
    model = llama().to(dtype)
    ids, roles, mask = batch()
    for variant in ("standard", "authors_code"):
        kept = with_the_next(roles != 2) if variant == "authors_code" else roles != 2
        with steer_attention(model, roles != 2, 0, variant=variant):
            forbidden = recorded(model, ids, roles.where((roles != 2) | ~kept, 3), mask, rows="all")[..., 2]
        seen = ((roles != 2) & (roles >= 0)).cumsum(dim=1) > 0
        assert (forbidden.transpose(2, 3)[:, seen] == 0).all()


def test_alpha_zero_is_the_limit_of_small_alphas():
    model = llama()
    ids, roles, mask = batch()
    zero, small = (logits_of(model, ids, mask, steer_attention(model, roles != 2, a)) for a in (0, 1e-12))
    kept = mask.bool() & ((roles != 2).cumsum(dim=1) > 0)
    torch.testing.assert_close(zero[kept], small[kept], atol=1e-5, rtol=1e-4)


def test_queries_of_generated_tokens_are_steered():
    model = llama()
    ids, roles, mask = batch("left", lengths=(8, 5))
    keep, queries, heads = roles != 2, torch.zeros_like(roles).bool(), [(0, 1), (2, 3)]
    queries[:, -1] = True
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with steer_attention(model, keep, 0, heads=heads, queries=queries, steer_generated=False):
        out = model.generate(ids, attention_mask=mask, **options)
    for step in range(5):
        logits = reweighted_logits(model, ids, mask, keep, [0.0] * 3, heads, queries)[:, -1]
        torch.testing.assert_close(out.logits[step], logits, atol=3e-5, rtol=1e-4)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask, keep, queries = (torch.nn.functional.pad(of_token, (0, 1), value=1) for of_token in (mask, keep, queries))


def test_alpha_one_changes_nothing():
    model = llama()
    ids, roles, mask = batch("left")
    for variant in ("standard", "authors_code"):
        steered = logits_of(model, ids, mask, steer_attention(model, roles == 2, 1.0, variant=variant))
        assert torch.equal(real(steered, mask), real(logits_of(model, ids, mask), mask))


def test_keeping_every_key_changes_nothing():
    model = llama()
    ids, roles, mask = batch("left")
    steered = logits_of(model, ids, mask, steer_attention(model, roles >= 0, ALPHA))
    torch.testing.assert_close(real(steered, mask), real(logits_of(model, ids, mask), mask), atol=1e-5, rtol=1e-4)


def test_nested_steering_multiplies_the_weights():
    model = llama()
    ids, roles, mask = batch("left")
    once = logits_of(model, ids, mask, steer_attention(model, roles == 2, 0.24))
    with steer_attention(model, roles == 2, 0.6):
        twice = logits_of(model, ids, mask, steer_attention(model, roles == 2, 0.4))
    torch.testing.assert_close(real(twice, mask), real(once, mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("recorder_outside", [True, False])
def test_recording_sees_the_steered_attention(recorder_outside):
    model = llama()
    ids, roles, mask = batch("left")
    contexts = [steer_attention(model, roles == 2, ALPHA), record_allocation(model, roles, rows="all")]
    outer, inner = reversed(contexts) if recorder_outside else contexts
    with torch.no_grad(), outer as first, inner as second:
        model(ids, attention_mask=mask)
    install_reweighting(model, roles == 2, [ALPHA] * 3)
    patterns = model(ids, attention_mask=mask, output_attentions=True).attentions
    expected = torch.stack([sum_by_role(pattern, roles) for pattern in patterns]) * mask[None, :, None, :, None]
    torch.testing.assert_close((first or second).allocation, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("variant", "steer_generated"), [("standard", None), ("standard", False), ("authors_code", None)]
)
def test_steered_generation_is_the_greedy_loop_with_full_recompute(variant, steer_generated):
    model = llama()
    ids, roles, mask = batch("left", lengths=(8, 5))
    keep, weights = roles == 2, [ALPHA] * 3 if variant == "standard" else [ALPHA, ALPHA**2, ALPHA**3]
    with steer_attention(model, keep, ALPHA, variant=variant, steer_generated=steer_generated):
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
        out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    generated_kept = variant == "authors_code" or steer_generated is False
    keep = with_the_next(keep) if variant == "authors_code" else keep
    for step in range(6):
        logits = reweighted_logits(model, ids, mask, keep, weights)[:, -1]
        torch.testing.assert_close(out.logits[step], logits, atol=3e-5, rtol=1e-4)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        keep = torch.nn.functional.pad(keep, (0, 1), value=generated_kept)
    assert torch.equal(out.sequences, ids)


def test_half_precision_holds_the_bias_to_twice_its_digits():
    model = llama().to(torch.bfloat16)
    ids, roles, mask = batch()
    exact = {"layers": [0], "rows": "all", "precision": "exact"}
    with steer_attention(model, roles == 2, 0.95):
        found = recorded(model, ids, roles, mask, **exact)
    plain = recorded(model, ids, roles, mask, **exact).double()
    weighted = plain * torch.tensor([0.95, 0.95, 1, 0.95, 0.95], dtype=torch.float64)
    expected = (weighted / weighted.sum(-1, keepdim=True)).nan_to_num()
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
def test_chosen_heads_are_steered_in_decoding(padded):
    model = llama()
    ids, roles, mask = batch("left", lengths=(8, 5) if padded else (8, 8))
    keep, heads = roles == 2, {(0, 1), (0, 2), (2, 3)}
    with steer_attention(model, keep, ALPHA, heads=heads):
        options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
        out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    for step in range(5):
        logits = reweighted_logits(model, ids, mask, keep, [ALPHA] * 3, heads=heads)[:, -1]
        torch.testing.assert_close(out.logits[step], logits, atol=3e-5, rtol=1e-4)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask, keep = (torch.nn.functional.pad(of, (0, 1), value=value) for of, value in ((mask, 1), (keep, False)))


def test_a_bias_in_decoding_has_twice_the_digits_of_half_precision():
    model = llama().to(torch.bfloat16)
    ids, roles, _ = batch(lengths=(12, 12))

    def last_row(alpha):
        prompt = roles[:, :11]
        steering, recorder = steer_attention(model, prompt == 2, alpha), record_allocation(model, prompt, layers=[0])
        with torch.no_grad(), steering, recorder as recording:
            cache = model(ids[:, :11], use_cache=True).past_key_values
            model(ids[:, 11:], past_key_values=cache)
        return recording.allocation[:, :, :, 1].double()

    weighted = last_row(1) * torch.tensor([0.02, 0.02, 1, 0.02, 0.02], dtype=torch.float64)
    expected = weighted / weighted.sum(-1, keepdim=True)
    torch.testing.assert_close(last_row(0.02), expected, atol=2e-5, rtol=1e-3)


def test_steering_copies_no_cached_keys_in_decoding(monkeypatch):
    seen, plain = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == 1:
            seen.append((module.layer_idx, key.shape, key.data_ptr(), attention_mask))
        return plain(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", watched)
    model = llama()
    ids, roles, mask = batch("left")
    with torch.no_grad(), steer_attention(model, roles == 2, ALPHA):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(ids[:, :1], attention_mask=longer, past_key_values=cache)
    for layer, shape, pointer, _ in seen:
        assert (shape, pointer) == (cache.layers[layer].keys.shape, cache.layers[layer].keys.data_ptr())
    assert len(seen) == 3
    assert all(attention_mask is seen[0][3] for *_, attention_mask in seen)


# --- the output of single heads --------------------------------------------------------------------------------------

ROWS = torch.tensor([[4, 11, -1], [-1, 6, 5]])


def outputs_of(model, ids, mask, rows, context=None):
    with torch.no_grad(), context or nullcontext(), record_outputs(model, rows) as recording:
        logits = model(ids, attention_mask=mask).logits
    return recording.outputs, logits


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox", "gemma2"])
def test_recorded_outputs_are_what_the_output_projection_reads(name):
    model = build(name)
    ids, _, mask = batch()
    plain, read = logits_of(model, ids, mask), []
    for layer in model.get_decoder().layers:
        projection = layer.attention.dense if name == "gpt-neox" else layer.self_attn.o_proj
        projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    found, logits = outputs_of(model, ids, mask, ROWS)
    assert torch.equal(logits, plain)
    for example in range(2):
        for place, row in enumerate(ROWS[example].tolist()):
            expected = torch.stack([of_layer[example, row] for of_layer in read]).unflatten(-1, (4, -1))
            assert torch.equal(found[:, example, place], expected if row >= 0 else torch.zeros_like(expected))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_patched_outputs_are_put_before_the_projection_for_these_heads_and_rows_only(attention):
    model, other = llama(), llama()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    ids, _, mask = batch()
    source, _ = outputs_of(other, ids.flip(1), mask, ROWS)
    heads, width, handles = [(0, 1), (2, 0), (2, 3)], 8, []
    found = logits_of(model, ids, mask, patch_outputs(model, source, ROWS, heads))

    def overwrite(layer):
        def hook(_, inputs):
            changed = inputs[0].clone()
            for of_layer, head in heads:
                for example, place in ((0, 0), (0, 1), (1, 1), (1, 2)):
                    if of_layer == layer:
                        mine = slice(head * width, (head + 1) * width)
                        changed[example, ROWS[example, place], mine] = source[layer, example, place, head]
            return (changed,)

        return hook

    for layer, block in enumerate(model.get_decoder().layers):
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(overwrite(layer)))
    expected = logits_of(model, ids, mask)
    for handle in handles:
        handle.remove()
    assert torch.equal(real(found, mask), real(expected, mask))
    assert not torch.equal(real(found, mask), real(logits_of(model, ids, mask), mask))


def test_patching_a_models_own_outputs_or_no_head_changes_nothing():
    model = llama()
    ids, _, mask = batch()
    source, plain = outputs_of(model, ids, mask, ROWS)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    for outputs, heads in ((source, every), (source + 1, [])):
        patched = logits_of(model, ids, mask, patch_outputs(model, outputs, ROWS, heads))
        assert torch.equal(real(patched, mask), real(plain, mask))


def test_patching_every_row_and_head_by_a_steered_pass_gives_what_steering_gives():
    model = llama()
    ids, roles, mask = batch(lengths=(12, 12))
    rows = torch.arange(12).expand(2, -1)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    with torch.no_grad(), steer_attention(model, roles == 2, ALPHA), record_outputs(model, rows) as recording:
        steered = model(ids, attention_mask=mask).logits
    patched = logits_of(model, ids, mask, patch_outputs(model, recording.outputs, rows, every))
    torch.testing.assert_close(patched, steered, atol=1e-6, rtol=1e-5)
    assert (steered - logits_of(model, ids, mask)).abs().max() > 0.01


def test_outputs_are_not_recorded_or_patched_in_generation():
    model = llama()
    ids, _, mask = batch("left")
    source, _ = outputs_of(model, ids, mask, ROWS)
    for context in (record_outputs(model, ROWS), patch_outputs(model, source, ROWS, [(0, 0)])):
        with pytest.raises(InputError, match="do not generate"), context:
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with pytest.raises(InputError, match="nothing was recorded"), record_outputs(model, ROWS) as recording:
        _ = recording.outputs
    with pytest.raises(InputError, match="record both alike"), patch_outputs(model, source[:2], ROWS, [(0, 0)]):
        pass


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steering_alpha", [-0.1, 1.01, math.nan])
def test_alpha_outside_its_range_is_refused(steering_alpha):
    keep = torch.ones(1, 3).bool()
    with pytest.raises(InputError, match="steering_alpha"), steer_attention(llama(), keep, steering_alpha):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "first"}, "rows"),
        ({"rows": torch.tensor([[12], [0]])}, "rows"),
        ({"layers": [3]}, "layer 3"),
        ({"layers": [2], "stop_after": 1}, "layer 2"),
        ({"stop_after": 3}, "stop_after 3"),
        ({"turns": torch.zeros(2, 5, dtype=torch.long)}, "turns"),
    ],
)
def test_bad_recording_options_are_refused(options, message):
    model = llama()
    with pytest.raises((InputError, TypeCheckError), match=message), record_allocation(model, batch()[1], **options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [(3, 0)]}, "layer 3 does not exist"),
        ({"heads": [(0, 4)]}, "head 4 does not exist"),
        ({"queries": torch.ones(2, 5).bool()}, "queries"),
    ],
)
def test_bad_steering_options_are_refused(options, message):
    model = llama()
    with (
        pytest.raises((InputError, TypeCheckError), match=message),
        steer_attention(model, batch()[1] == 2, ALPHA, **options),
    ):
        pass


def test_an_empty_recording_is_refused():
    model = llama()
    with record_allocation(model, batch()[1]) as recording:
        pass
    with pytest.raises(InputError, match="nothing was recorded"):
        _ = recording.allocation


def test_layers_without_attention_are_named_and_the_others_recorded():
    model = build("qwen3-next")
    ids, roles, mask = batch("left")
    [pattern] = eager_patterns(model, ids, mask)
    expected = sum_by_role(pattern, roles) * mask[:, None, :, None]
    found = recorded(model, ids, roles, mask, rows="all", layers=[1], stop_after=1)
    torch.testing.assert_close(found[0], expected, atol=5e-6, rtol=0)
    said = "this qwen3_next model has no attention that can be recorded in layers"
    for refused in (recorded, lambda model, ids, roles, _: verify_recording(model, ids, roles)):
        with pytest.raises(InputError, match=rf"{said} \[0, 2\]; choose one of \[1\]"):
            refused(model, ids, roles, mask)
    with pytest.raises(InputError, match=rf"{said} \[0\]; choose one of \[1\]"):
        recorded(model, ids, roles, mask, layers=[0], stop_after=0)
    assert model.config._attn_implementation == "sdpa" and not model.get_decoder()._forward_pre_hooks


def test_a_model_without_attention_is_told_from_one_that_was_not_called():
    model = build("mamba")
    ids, roles, _ = batch()
    with pytest.raises(InputError, match="this mamba model has no attention that can be recorded; use another"):
        verify_recording(model, ids, roles)
    with record_allocation(model, roles) as recording:
        pass
    with pytest.raises(InputError, match="nothing was recorded; call the model"):
        _ = recording.by_turn


def test_a_model_that_returns_no_patterns_cannot_be_verified():
    model = llama()
    ids, roles, _ = batch()
    model.register_forward_hook(lambda model, inputs, output: CausalLMOutputWithPast(logits=output.logits))
    with pytest.raises(InputError, match="llama model returns 0 eager patterns for 3 layers"):
        verify_recording(model, ids, roles)
    assert model.config._attn_implementation == "sdpa"


def test_attention_to_later_tokens_is_refused():
    model = build("bert")
    ids, roles, mask = batch()
    for context in (record_allocation(model, roles), steer_attention(model, roles == 2, ALPHA)):
        with pytest.raises(InputError, match="bert attends to later tokens"), context:
            model(ids, attention_mask=mask)
    model = BertLMHeadModel(BertConfig(**TINY, is_decoder=True)).eval()
    assert verify_recording(model, ids, roles) < 5e-6


def test_steering_soft_capped_scores_is_refused():
    model = build("gemma2")
    ids, roles, mask = batch()
    with pytest.raises(InputError, match="gemma2"), steer_attention(model, roles == 2, ALPHA):
        model(ids, attention_mask=mask)


def test_attention_sinks_are_refused():
    model = build("gpt-oss")
    ids, roles, mask = batch()
    with pytest.raises(InputError, match="gpt_oss has attention sinks"), record_allocation(model, roles):
        model(ids, attention_mask=mask)


def test_a_window_that_drops_keys_is_refused():
    model = build("mistral-window")
    ids, roles, mask = batch(lengths=(9, 9))
    with pytest.raises(InputError, match="mistral: its sliding window"), steer_attention(model, roles == 2, ALPHA):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)


def test_generation_cannot_stop_early():
    model = llama()
    ids, roles, mask = batch("left")
    with pytest.raises(InputError, match="stop_after"), record_allocation(model, roles, stop_after=0):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def test_beams_are_refused():
    model = llama()
    ids, roles, mask = batch("left")
    with pytest.raises(InputError, match="beams"), steer_attention(model, roles == 2, ALPHA):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, do_sample=False)
