"""Batched answers against one-by-one greedy loops; the response cache against a model that must not be called."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from ctxlib import generate
from ctxlib.attention import record_allocation
from ctxlib.conversations import Message, Question
from ctxlib.generate import RESPONSE_COLUMNS
from ctxlib.models import Subject, add_indicator
from ctxlib.params import InputError
from ctxlib.roles import role_map

TEXTS = (
    "Hi?",
    "What does Mira collect, and where does she keep it?",
    "Ok",
    "Who lives beside the old mill?",
    "Why so?",
)
QUESTIONS = [
    Question(f"q{number}", "facts", "known", (Message("system", "Be brief."), Message("user", text)), "Well,")
    for number, text in enumerate(TEXTS)
]
DECODING = {"max_new_tokens": 12, "batch_size": 2, "model_key": "tiny", "progress": False}
PLAIN = {**DECODING, "template": True, "indicator": None, "use_prefix": False}


def answer_questions(model, tokenizer, questions, *, model_key, **options):
    return generate.answer_questions(Subject("tiny", model, tokenizer, model_key), questions, **options)


def never(*args, **kwargs):
    raise AssertionError("the model was called")


@pytest.mark.parametrize(
    ("template", "use_prefix", "indicator"), [(True, False, None), (True, True, "[IND]"), (False, True, None)]
)
def test_batched_answers_equal_manual_greedy_loops(model, tokenizer, template, use_prefix, indicator, greedy_loop):
    if indicator:
        tokenizer = copy.deepcopy(tokenizer)
        add_indicator(model, tokenizer, indicator)
    frame = answer_questions(
        model, tokenizer, QUESTIONS, template=template, indicator=indicator, use_prefix=use_prefix, **DECODING
    )
    assert tuple(frame.columns) == RESPONSE_COLUMNS
    assert list(frame["id"]) == [question.id for question in QUESTIONS]
    for question, row in zip(QUESTIONS, frame.itertuples(), strict=True):
        system, user = question.messages
        prompt = role_map(
            tokenizer,
            [system, Message("user", user.content, indicated=indicator is not None)],
            template=template,
            generation_prompt=True,
            response_prefix="Well," if use_prefix else "",
            indicator=indicator,
        )
        assert row.prompt == tokenizer.decode(prompt.ids)
        assert row.prompt.count("[IND]") == (indicator is not None)
        assert (row.answer, row.answer_tokens) == greedy_loop(model, tokenizer, prompt, DECODING["max_new_tokens"])


def test_a_models_own_generation_config_changes_nothing(model, tokenizer):
    expected = answer_questions(model, tokenizer, QUESTIONS, **PLAIN)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.max_length = 3
    theirs = model.generation_config
    assert answer_questions(model, tokenizer, QUESTIONS, **PLAIN).equals(expected)
    assert model.generation_config is theirs


def test_an_answer_stops_before_the_stop_text_and_at_every_end_token(model, tokenizer):
    free = answer_questions(model, tokenizer, QUESTIONS, **PLAIN)
    longest = free.loc[free["answer"].str.len().idxmax(), "answer"]
    stop = longest[len(longest) // 2]
    stopped = answer_questions(model, tokenizer, QUESTIONS, stop_text=stop, **PLAIN)
    assert list(stopped["answer"]) == [answer.split(stop)[0].strip() for answer in free["answer"]]
    assert (stopped["answer_tokens"] <= free["answer_tokens"]).all()
    assert stopped["answer_tokens"].sum() < free["answer_tokens"].sum()
    prompt = role_map(tokenizer, QUESTIONS[0].messages, generation_prompt=True)
    with torch.no_grad():
        second_end = int(model(prompt.ids[None]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, second_end]
    assert answer_questions(model, tokenizer, QUESTIONS, **PLAIN)["answer_tokens"][0] == 0


def test_cached_answers_are_taken_without_the_model_and_a_torn_line_is_written_anew(
    model, tokenizer, tmp_path, monkeypatch
):
    expected = answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(QUESTIONS)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:17])  # killed in the middle of the fourth
    called_for = []
    greedy = generate._greedy
    monkeypatch.setattr(generate, "_greedy", lambda *args: called_for.extend(args[2]) or greedy(*args))
    assert answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN).equals(expected)
    assert len(called_for) == 2
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    model.forward = never
    assert answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN).equals(expected)
    with pytest.raises(AssertionError, match="was called"):
        answer_questions(model, tokenizer, QUESTIONS, **PLAIN)


def test_a_killed_run_keeps_the_batches_that_it_had_finished(model, tokenizer, tmp_path):
    forward, prompts_seen = model.forward, []

    def dying(*args, **kwargs):
        ids = kwargs["input_ids"]
        prompts_seen.append(ids.shape) if ids.shape[1] > 1 else None
        if len(prompts_seen) > 1:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.forward = dying
    with pytest.raises(KeyboardInterrupt):
        answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN)
    (file,) = tmp_path.iterdir()
    kept = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert sorted(kept) == ["q1", "q3"]  # the longest prompts go first


def test_a_changed_prompt_under_the_same_id_is_answered_anew(model, tokenizer, tmp_path):
    answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN)
    changed = [Question("q0", "facts", "known", (Message("user", "Something else?"),)), *QUESTIONS[1:]]
    cached = answer_questions(model, tokenizer, changed, cache_dir=tmp_path, **PLAIN)
    assert cached.equals(answer_questions(model, tokenizer, changed, **PLAIN))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_every_condition_has_a_cache_file_of_its_own(model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    add_indicator(model, tokenizer, "[IND]")

    def run(model=model, **changes):
        answer_questions(model, tokenizer, QUESTIONS[:1], cache_dir=tmp_path, **{**PLAIN, **changes})
        return len(list(tmp_path.iterdir()))

    changes = [{}, {"template": False}, {"indicator": "[IND]"}, {"use_prefix": True}, {"max_new_tokens": 3}]
    changes += [{"stop_text": "\n"}, {"model_key": "other"}, {"steering_alpha": 0.5}, {"steering_alpha": 0.1}]
    changes += [{"steering_alpha": 0.1, "steering_options": {"variant": "authors_code"}}]
    assert [run(**change) for change in changes] == list(range(1, len(changes) + 1))
    assert run() == len(changes)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert run(adapted) == len(changes) + 1
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.add_(1.0)
    assert run(adapted) == len(changes) + 2
    assert run(adapted) == len(changes) + 2


def test_steering_with_alpha_one_changes_nothing_and_strong_steering_changes_answers(model, tokenizer):
    plain = answer_questions(model, tokenizer, QUESTIONS, **PLAIN)
    assert answer_questions(model, tokenizer, QUESTIONS, steering_alpha=1, **PLAIN).equals(plain)
    steered = answer_questions(model, tokenizer, QUESTIONS, steering_alpha=1e-4, **PLAIN)
    assert (steered["answer"] != plain["answer"]).any()
    one_by_one = answer_questions(model, tokenizer, QUESTIONS, steering_alpha=1e-4, **{**PLAIN, "batch_size": 1})
    assert one_by_one.equals(steered)


def test_bad_questions_are_named(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="'q1' occurs more than once"):
        answer_questions(model, tokenizer, [QUESTIONS[1], *QUESTIONS], **PLAIN)
    with pytest.raises(InputError, match=r"'q1'.*window of 512"):
        answer_questions(model, tokenizer, QUESTIONS, **{**PLAIN, "max_new_tokens": 500})


def test_a_damaged_line_of_the_cache_is_told_and_its_question_asked_again(model, tokenizer, tmp_path, monkeypatch):
    expected = answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN)
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines()
    lost = json.loads(lines[1])["id"]
    file.write_text("\n".join([lines[0], lines[1][:30], *lines[2:], '{"id": "q9"}']) + "\n")
    asked = []
    greedy = generate._greedy
    monkeypatch.setattr(generate, "_greedy", lambda *args: asked.extend(args[2]) or greedy(*args))
    with pytest.warns(UserWarning, match=rf"{file.name}: lines 2, 6 are damaged and left out"):
        assert answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN).equals(expected)
    assert len(asked) == 1
    with pytest.warns(UserWarning, match="lines 2, 6"):
        assert answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **PLAIN).equals(expected)
    assert len(asked) == 1 and json.loads(file.read_text().splitlines()[-1])["id"] == lost


def test_a_model_that_the_hub_replaced_under_its_name_answers_anew(model, tokenizer, tmp_path):
    for commit, files in ((None, 1), ("1a2b", 2), ("3c4d", 3), ("1a2b", 3), (None, 3)):
        model.config._commit_hash = commit
        answer_questions(model, tokenizer, QUESTIONS[:1], cache_dir=tmp_path, **PLAIN)
        assert len(list(tmp_path.iterdir())) == files


@pytest.mark.parametrize("reuse_prefixes", [False, True])
def test_where_memory_runs_out_the_batch_size_is_named_and_a_smaller_one_goes_on(
    model, tokenizer, tmp_path, reuse_prefixes
):
    settings = {**PLAIN, "reuse_prefixes": reuse_prefixes}
    expected = answer_questions(model, tokenizer, QUESTIONS, **settings)
    forward, seen = model.model.forward, []

    def small(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape[1])
        if len(seen) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    model.model.forward = small
    with pytest.raises(
        InputError, match=r"CUDA out of memory.*set models\.batch_size down .*finished work is kept in (\S+)\.jsonl"
    ):
        answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **settings)
    model.model.forward = forward
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    assert 0 < kept.count(b"\n") < len(QUESTIONS)
    again = answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path, **{**settings, "batch_size": 1})
    assert again.equals(expected) and file.read_bytes().startswith(kept)


def test_a_full_disk_keeps_the_answers_before_and_a_run_with_room_goes_on(model, tokenizer, tmp_path, full_disk):
    expected = answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path / "whole", **PLAIN)
    (whole,) = (tmp_path / "whole").iterdir()
    room = len(b"".join(whole.read_bytes().splitlines(keepends=True)[:3])) + 9
    with pytest.raises(InputError, match=rf"{whole.name}: not written, the disk is full"), full_disk(room):
        answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path / "full", **PLAIN)
    assert answer_questions(model, tokenizer, QUESTIONS, cache_dir=tmp_path / "full", **PLAIN).equals(expected)
    assert (tmp_path / "full" / whole.name).read_bytes() == whole.read_bytes()


def test_no_questions_make_an_empty_frame(model, tokenizer):
    frame = answer_questions(model, tokenizer, [], **PLAIN)
    assert tuple(frame.columns) == RESPONSE_COLUMNS
    assert frame.empty


HAY = [f"Nothing much happened on day {number}." for number in range(6)]
IN_COMMON = [
    Question(f"hay{place}-{ask}", "needle", "text", (Message("user", f"{' '.join(text)}\n{ask}"),), "Well,")
    for place in (0, 3, 6)
    for text in [[*HAY[:place], "Mira collects stamps.", *HAY[place:]]]
    for ask in ("Who?", "What does Mira collect?")
]


def other_architecture(kind, tokenizer):
    """Tiny random models whose keys do not all look back to the beginning, or that keep none."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    configs = {
        "sliding window": lambda: MistralConfig(**shape, sliding_window=40),
        "every other layer sliding": lambda: Gemma2Config(**shape, sliding_window=40),
        "dynamic rope": lambda: LlamaConfig(
            **shape, max_position_embeddings=512,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(configs[kind]()).eval()


def tokens_read(model, counted):
    """Counts the tokens that go through the decoder in passes over more than one of them."""
    decoder = model.get_decoder()
    forward = decoder.forward

    def counting(*args, **kwargs):
        ids = kwargs["input_ids"]
        counted.append(ids.numel() if ids.shape[1] > 1 else 0)
        return forward(*args, **kwargs)

    decoder.forward = counting


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("template", "use_prefix", "indicator"), [(True, False, None), (True, True, "[IND]"), (False, True, None)]
)
def test_prompts_with_a_common_beginning_are_answered_as_one_by_one(
    model, tokenizer, template, use_prefix, indicator, batch_size, greedy_loop
):
    if indicator:
        tokenizer = copy.deepcopy(tokenizer)
        add_indicator(model, tokenizer, indicator)
    asked = [*IN_COMMON, *QUESTIONS]
    conditions = {"template": template, "use_prefix": use_prefix, "indicator": indicator}
    settings = {**DECODING, **conditions, "batch_size": batch_size}
    reused = answer_questions(model, tokenizer, asked, reuse_prefixes=True, **settings)
    assert list(reused["id"]) == [question.id for question in asked]
    for question, row in zip(asked, reused.itertuples(), strict=True):
        prompt = generate.question_prompt(tokenizer, question, template, indicator, use_prefix)
        assert (row.answer, row.answer_tokens) == greedy_loop(model, tokenizer, prompt, DECODING["max_new_tokens"])


def test_keys_read_piece_by_piece_give_the_logits_of_a_whole_prompt(model, tokenizer):
    maps = [generate.question_prompt(tokenizer, question, True, None, False) for question in IN_COMMON]
    maps.sort(key=lambda prompt: prompt.ids.tolist())
    batch = generate.pad_batch(maps, 0)
    with torch.no_grad():
        keys = generate._Prefixes(model).read(maps, max_new_tokens=3)
        places = batch.attention_mask.cumsum(dim=1)[:, -1:] - 1
        logits = model(
            batch.input_ids[:, -1:], attention_mask=batch.attention_mask, position_ids=places, past_key_values=keys
        ).logits[:, -1]
        for row, prompt in enumerate(maps):
            torch.testing.assert_close(logits[row], model(prompt.ids[None]).logits[0, -1], rtol=1e-5, atol=1e-5)


def test_what_prompts_have_in_common_is_read_once(model, tokenizer):
    counted = []
    tokens_read(model, counted)
    answer_questions(model, tokenizer, IN_COMMON, reuse_prefixes=True, **PLAIN)
    maps = [generate.question_prompt(tokenizer, question, True, None, False) for question in IN_COMMON]
    nodes = {tuple(prompt.ids[:end].tolist()) for prompt in maps for end in range(1, len(prompt))}
    last_of_each = sum(len(prompt) for prompt in maps)
    assert sum(counted) == len(nodes) < 0.7 * last_of_each


@pytest.mark.parametrize("kind", ["sliding window", "every other layer sliding", "dynamic rope"])
def test_other_architectures_answer_as_without_reuse(tokenizer, kind):
    model = other_architecture(kind, tokenizer)
    assert generate._keys_can_be_reused(model) == (kind != "dynamic rope")
    expected = answer_questions(model, tokenizer, IN_COMMON, **{**PLAIN, "batch_size": 1})
    assert answer_questions(model, tokenizer, IN_COMMON, reuse_prefixes=True, **PLAIN).equals(expected)


def test_under_steering_and_recording_nothing_is_reused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(generate._Prefixes, "read", never)
    steered = answer_questions(model, tokenizer, IN_COMMON, steering_alpha=0.1, **PLAIN)
    settings = {**PLAIN, "reuse_prefixes": True}
    assert answer_questions(model, tokenizer, IN_COMMON, steering_alpha=0.1, **settings).equals(steered)
    (prompt,) = [generate.question_prompt(tokenizer, IN_COMMON[0], True, None, False)]
    with record_allocation(model, prompt.roles[None]) as recording:
        answer_questions(model, tokenizer, IN_COMMON[:1], **settings)
    assert recording.allocation.shape[1] == 1
    with pytest.raises(AssertionError, match="was called"):
        answer_questions(model, tokenizer, IN_COMMON, **settings)


def test_a_run_that_reuses_prefixes_goes_on_where_it_was_killed(model, tokenizer, tmp_path, monkeypatch):
    expected = answer_questions(model, tokenizer, IN_COMMON, **PLAIN)
    settings = {**PLAIN, "reuse_prefixes": True, "cache_dir": tmp_path}
    answer_questions(model, tokenizer, IN_COMMON[:3], **settings)
    asked = []
    greedy = generate._greedy
    monkeypatch.setattr(generate, "_greedy", lambda *args: asked.extend(args[2]) or greedy(*args))
    assert answer_questions(model, tokenizer, IN_COMMON, **settings).equals(expected)
    assert len(asked) == len(IN_COMMON) - 3
