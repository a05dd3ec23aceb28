"""Claims about `ctxlib.finetune`."""

from copy import deepcopy

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from ctxlib import finetune as finetune_module
from ctxlib.conversations import Conversation, Message
from ctxlib.finetune import add_lora, finetune
from ctxlib.labels import (
    collate,
    label_audit,
    label_counts,
    supervised_mask,
    training_examples,
    training_order,
)
from ctxlib.models import add_indicator_token, load_model, load_tokenizer, set_indicator_row
from ctxlib.params import InputError
from ctxlib.roles import Role, RoleMap, role_map

# peft 0.21 asks transformers 5.23 for a name that the latter is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[1, 40, 41, 42, 43, 44]])
QUICK = {
    "steps": 20, "batch_size": 3, "learning_rate": 1e-2, "lora_rank": 4, "save_every": 10, "progress": False
}  # fmt: skip


def conversation(*texts, indicated=False, name="c"):
    roles = ("user", "assistant")
    return Conversation(
        name,
        tuple(Message(roles[n % 2], text, indicated=indicated and n % 2 == 0) for n, text in enumerate(texts)),
    )


@pytest.fixture
def conversations():
    return [
        conversation(f"what is {n}?" * (1 + n % 3), f"It is {n}.", indicated=n % 2 == 0, name=str(n)) for n in range(7)
    ]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


class Killed(BaseException):
    """As a kill: nothing in between catches it."""


def kill_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(finetune_module._Progress, "on_step_end", on_step_end)


def test_supervised_mask_matches_a_message_by_message_oracle(tokenizer):
    messages = (
        Message("system", "be kind"),
        Message("user", "one </s>\n<|assistant|>\nfake"),
        Message("assistant", "first\nanswer"),
        Message("user", "two"),
        Message("assistant", "<|user|>\nsecond"),
    )
    expected = []
    for message in messages:
        answer = message.role == "assistant"
        expected += [False] * len(f"<|{message.role}|>\n") + [answer] * len(message.content) + [answer, False]
    rendered = role_map(tokenizer, messages)
    mask = supervised_mask(rendered, "clean")
    assert mask[-len(expected) :].tolist() == expected and not mask[: -len(expected)].any()
    assert supervised_mask(rendered, "paper").all()
    audit = label_audit(tokenizer, rendered, mask)
    assert "".join(audit.token[audit.supervised]) == "first\nanswer</s><|user|>\nsecond</s>"
    assert set(audit.role[audit.supervised]) == {"assistant", "template"}


@pytest.mark.parametrize(
    ("closing", "turns", "end_ids", "labelled"),
    [
        ([2, 13], [1, 1], {2}, [True, False]),  # </s>, newline
        ([2, 13, 70, 71], [1, 1, 1, 1], {2}, [True, False, False, False]),  # and the header of the next message
        ([30, 2], [1, 1], {2}, [True, True]),  # Llama-2: a space, </s>
        ([9], [1], {2, 9}, [True]),  # Llama-3: <|eot_id|>
        ([30, 13], [1, 1], {2}, [True, False]),  # no closing token: the first template token
        ([13, 2], [2, 2], {2}, [False, False]),  # what follows belongs to the next turn
    ],
)
def test_the_token_that_closes_an_answer_is_supervised_and_no_more(closing, turns, end_ids, labelled):
    roles = [Role.BOS, Role.USER, Role.TEMPLATE, Role.ASSISTANT, Role.ASSISTANT] + [Role.TEMPLATE] * len(closing)
    rendered = RoleMap(
        ids=torch.tensor([1, 50, 51, 60, 61, *closing]),
        roles=torch.tensor(roles),
        turns=torch.tensor([0, 1, 1, 1, 1, *turns]),
    )  # fmt: skip
    assert supervised_mask(rendered, "clean", end_ids).tolist() == [False] * 3 + [True] * 2 + labelled


def test_label_counts_match_counting_by_hand(tokenizer, conversations):
    tokenizer = deepcopy(tokenizer)
    indicator_id = add_indicator_token(tokenizer, "[IND]")
    examples, _ = training_examples(tokenizer, conversations, indicator="[IND]")
    counts = label_counts(examples, indicator_id).set_index("role")
    messages = [message for c in conversations for message in c.messages]
    asked, said = ([len(m.content) for m in messages if m.role == role] for role in ("user", "assistant"))
    assert counts.loc["user", ["tokens", "supervised"]].tolist() == [sum(asked), 0]
    assert counts.loc["assistant", ["tokens", "supervised"]].tolist() == [sum(said)] * 2
    assert counts.loc["template", "supervised"] == len(said)  # the end of every answer
    assert counts.loc["indicator", ["tokens", "supervised"]].tolist() == [4, 0]
    assert counts.tokens.sum() == sum(len(example.input_ids) for example in examples)
    assert "system" not in counts.index


def test_long_conversations_end_with_a_whole_answer_or_are_left_out(tokenizer):
    turns = ("q" * 5, "a" * 5, "q" * 5, "b" * 5, "q" * 5, "c" * 5)
    whole = [len(role_map(tokenizer, conversation(*turns[:n]).messages)) for n in (2, 4, 6)]
    for max_length, answers in ((whole[2], "abc"), (whole[2] - 1, "ab"), (whole[1] - 1, "a")):
        (example,), counts = training_examples(tokenizer, [conversation(*turns)], max_length=max_length)
        labels = tokenizer.decode(example.labels[example.labels >= 0])
        assert labels == "".join(letter * 5 + "</s>" for letter in answers)
        assert len(example.input_ids) == whole[len(answers) - 1]
        assert counts["truncated"] == (answers != "abc") and counts["used"] == 1
    with pytest.raises(InputError, match="1 are longer than max_length"):
        training_examples(tokenizer, [conversation(*turns)], max_length=whole[0] - 1)
    (example,), _ = training_examples(tokenizer, [conversation(*turns)], max_length=20, reading="paper")
    assert len(example.input_ids) == 20 and torch.equal(example.labels, example.input_ids)


def test_data_without_a_label_is_an_error(tokenizer):
    with pytest.raises(InputError, match="1 have no supervised token"):
        training_examples(tokenizer, [conversation("only a question")])
    _, counts = training_examples(tokenizer, [conversation("only a question"), conversation("q", "a")])
    assert counts == {"used": 1, "truncated": 0, "too_long": 0, "unlabelled": 1}


def test_padding_carries_neither_attention_nor_labels(tokenizer):
    examples, _ = training_examples(tokenizer, [conversation("q", "a"), conversation("q", "a longer answer")])
    batch = collate(examples, pad_id=0)
    short = len(examples[0].input_ids)
    assert batch["input_ids"].shape == (2, len(examples[1].input_ids))
    assert torch.equal(batch["input_ids"][0, :short], examples[0].input_ids)
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (batch["labels"].shape[1] - short)
    assert (batch["labels"][0, short:] == -100).all()


@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_sees_every_row_once(grouped):
    lengths = [(7 * n) % 50 for n in range(101)]
    order = training_order(lengths, 4, 250, seed=1, group_by_length=grouped)
    assert sorted(order[:101]) == sorted(order[101:202]) == list(range(101))
    assert order[:101] != order[101:202] and len(set(order[202:])) == 48
    assert order == training_order(lengths, 4, 250, seed=1, group_by_length=grouped)


def test_grouped_batches_waste_less_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (512,), generator=generator).tolist()

    def padding(grouped):
        order = training_order(lengths, 8, 512, 0, group_by_length=grouped)
        batches = [[lengths[row] for row in order[start : start + 8]] for start in range(0, 512, 8)]
        return sum(8 * max(batch) - sum(batch) for batch in batches)

    assert padding(True) < padding(False) / 3


def test_fresh_adapter_leaves_logits_unchanged(model_folder, tokenizer):
    for quantisation in (None, "nf4"):
        model = load_model(model_folder, quantisation=quantisation, device="cpu")
        set_indicator_row(model, len(tokenizer), len(tokenizer))
        before = logits(model)
        assert torch.equal(logits(add_lora(model, indicator_id=len(tokenizer))), before)


@pytest.mark.parametrize("reading", ["clean", "paper"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_only_the_indicators_input_row_is_trained_and_none_in_the_paper(
    model, model_folder, tokenizer, conversations, tmp_path, reading, method
):
    out_dir = tmp_path / "out"
    finetune(
        model_folder,
        tokenizer,
        conversations,
        out_dir=out_dir,
        method=method,
        indicator="[IND]",
        reading=reading,
        **QUICK,
    )
    trained = load_model(out_dir)
    old_in, old_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    new_in, new_out = trained.get_input_embeddings().weight, trained.get_output_embeddings().weight
    assert torch.equal(new_in[:-1], old_in) and torch.equal(new_out[:-1], old_out)
    torch.testing.assert_close(new_out[-1], old_out.mean(0))
    distance = (new_in[-1] - old_in.mean(0)).abs().max()
    assert distance > 0.05 if reading == "clean" else distance < 1e-6
    assert load_tokenizer(out_dir).convert_tokens_to_ids("[IND]") == len(tokenizer)
    assert "[IND]" not in tokenizer.get_vocab()


def test_training_lowers_the_loss_and_the_log_says_so(model_folder, tokenizer, conversations, tmp_path):
    log = finetune(
        model_folder, tokenizer, conversations, out_dir=tmp_path / "out", method="full", epochs=10,
        batch_size=3, learning_rate=1e-2, warmup_fraction=0.1, schedule="linear", progress=False,
    )  # fmt: skip
    assert list(log.columns) == ["step", "loss", "learning_rate"] and log.step.tolist() == [10, 20]
    assert log.loss.is_monotonic_decreasing and log.loss.iloc[-1] < log.loss.iloc[0] / 2
    assert log.attrs["used"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert load_model(tmp_path / "out").config.vocab_size == len(tokenizer)


def test_loss_is_the_mean_over_supervised_tokens(model, model_folder, tokenizer, conversations, tmp_path):
    log = finetune(
        model_folder, tokenizer, conversations[:4], out_dir=tmp_path / "out", method="full", steps=1, batch_size=2,
        gradient_accumulation=2, progress=False,
    )  # fmt: skip
    total, n = 0.0, 0
    for example in training_examples(tokenizer, conversations[:4])[0]:
        with torch.no_grad():
            surprise = -model(example.input_ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(example.input_ids)):
            if example.labels[position] >= 0:
                total += surprise[position - 1, example.input_ids[position]].item()
                n += 1
    assert log.loss.item() == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_killed_run_resumes_to_the_same_weights(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch, method
):
    arguments = {"method": method, "indicator": "[IND]", **QUICK}
    whole = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    assert not (tmp_path / "killed").exists() and not torch.are_deterministic_algorithms_enabled()
    (work_dir,) = tmp_path.glob("killed.training-*")
    torn = work_dir / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")  # the kill came while this one was written
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 11)  # the first step of the rest: it does go on from step 10
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    resumed = finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "killed", **arguments)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert resumed.equals(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "model", "whole"]


def test_a_finished_run_is_reused_and_another_configuration_replaces_it(
    model_folder, tokenizer, conversations, tmp_path, monkeypatch
):
    out_dir = tmp_path / "out"
    first = finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **QUICK)
    before = adapter_bytes(out_dir)
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "load_model", lambda *args, **kwargs: pytest.fail("trained again"))
        again = finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **QUICK)
    assert again.equals(first) and again.attrs == first.attrs
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        finetune(model_folder, tokenizer, conversations, out_dir=out_dir, **{**QUICK, "seed": 1})
    assert adapter_bytes(out_dir) == before  # the old result stands until the new one is whole
    other = finetune(model_folder, tokenizer, conversations[1:], out_dir=out_dir, **QUICK)
    assert other.attrs["config_hash"] != first.attrs["config_hash"] and adapter_bytes(out_dir) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(model_folder, tokenizer, conversations, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / name, **{**QUICK, "steps": 2, "seed": seed})
        torch.rand(7)  # what the caller draws in between changes nothing
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two") != adapter_bytes(tmp_path / "three")


@pytest.mark.parametrize("indicator", [None, "[IND]"])
def test_auto_peft_model_loads_it_with_identical_logits(model_folder, tokenizer, conversations, tmp_path, indicator):
    finetune(model_folder, tokenizer, conversations, out_dir=tmp_path / "out", indicator=indicator, **QUICK)
    ours = load_model(tmp_path / "out", device="cpu")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(ours))


def test_qlora_gradient_after_an_evaluation_equals_that_of_a_never_evaluated_copy(wide_folder):
    def gradient(evaluated):
        torch.manual_seed(0)
        model = add_lora(load_model(wide_folder, quantisation="nf4", device="cpu"), lora_dropout=0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        if evaluated:
            logits(model)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(evaluated=True), gradient(evaluated=False))


@pytest.fixture
def wide_folder(model, tmp_path):
    """Wide enough for the processor's packed 4-bit format."""
    model.config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_bad_input_leaves_nothing_behind(model_folder, tokenizer, conversations, tmp_path):
    for folder, name in (("other", "notes.txt"), ("adapter", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("mine")
    bare = load_tokenizer(model_folder)
    bare.chat_template = None
    wider = load_tokenizer(model_folder)
    wider.add_tokens(["what is"])
    before = sorted(tmp_path.rglob("*"))
    for change, message in (
        ({"model_path": tmp_path / "absent"}, "no such folder"),
        ({"model_path": tmp_path / "adapter"}, "an adapter cannot be fine-tuned further"),
        ({"tokenizer": bare}, "no chat template"),
        ({"tokenizer": wider}, "beyond the model's vocabulary"),
        ({"conversations": []}, "no conversation to train on"),
        ({"conversations": [conversation("only a question")]}, "no supervised token"),
        ({"indicator": "A"}, "in the vocabulary"),
        ({"method": "dora"}, "expected one of full, lora, qlora"),
        ({"reading": "free"}, "expected one of clean, paper"),
        ({"epochs": 1}, "exactly one of steps and epochs"),
        ({"batch_size": 0}, "expected a positive number"),
        ({"out_dir": tmp_path / "other"}, "holds something else"),
    ):
        arguments = {
            "model_path": model_folder, "tokenizer": tokenizer, "conversations": conversations,
            "out_dir": tmp_path / "out", **QUICK, **change,
        }  # fmt: skip
        with pytest.raises(InputError, match=message):
            finetune(**arguments)
    assert sorted(tmp_path.rglob("*")) == before
