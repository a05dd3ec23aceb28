"""Claims about `ctxlib.labels`."""

from copy import deepcopy

import pytest
import torch
from rich.console import Console

from ctxlib.conversations import Message
from ctxlib.finetune import (
    audit,
    collate,
    label_audit,
    label_counts,
    pack,
    packs_exactly,
    show_labels,
    supervised_mask,
    training_examples,
    training_order,
)
from ctxlib.models import add_indicator_token
from ctxlib.params import InputError
from ctxlib.roles import Role, RoleMap, role_map


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
    mask = supervised_mask(rendered, "standard")
    assert mask[-len(expected) :].tolist() == expected and not mask[: -len(expected)].any()
    assert supervised_mask(rendered, "authors_code").all()
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
    assert supervised_mask(rendered, "standard", end_ids).tolist() == [False] * 3 + [True] * 2 + labelled


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


def test_long_conversations_end_with_a_whole_answer_or_are_left_out(tokenizer, conversation):
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
    (example,), _ = training_examples(tokenizer, [conversation(*turns)], max_length=20, variant="authors_code")
    assert len(example.input_ids) == 20 and torch.equal(example.labels, example.input_ids)


def test_data_without_a_label_is_an_error(tokenizer, conversation):
    with pytest.raises(InputError, match="1 have no supervised token"):
        training_examples(tokenizer, [conversation("only a question")])
    _, counts = training_examples(tokenizer, [conversation("only a question"), conversation("q", "a")])
    assert counts == {"used": 1, "truncated": 0, "too_long": 0, "unlabelled": 1}


def test_padding_carries_neither_attention_nor_labels(tokenizer, conversation):
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


def test_a_token_without_a_label_has_no_gradient(model, tokenizer, conversations):
    examples, _ = training_examples(tokenizer, conversations[:3])
    batch = collate(examples, pad_id=0)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach().requires_grad_()
    model.loss_function(logits, batch["labels"], vocab_size=len(tokenizer)).backward()
    following = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    assert (logits.grad[following == -100] == 0).all()
    assert (logits.grad[following != -100] != 0).any(-1).all()


def test_packed_and_padded_batches_have_the_same_loss_and_gradient(model, tokenizer, conversations):
    examples, _ = training_examples(tokenizer, conversations)
    assert len({len(example.input_ids) for example in examples}) > 1

    def loss_and_gradient(batch):
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    packed, padded = pack(examples), collate(examples, pad_id=0)
    assert packed["input_ids"].shape == (1, sum(len(example.input_ids) for example in examples))
    assert len(model(**packed).logits) == int((padded["labels"] >= 0).sum())  # no logits without a label
    for ours, expected in zip(loss_and_gradient(packed), loss_and_gradient(padded), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_mixes_packed_texts_is_found_out(model, tokenizer, conversations):
    examples, _ = training_examples(tokenizer, conversations)
    assert packs_exactly(model, examples[:2], tolerance=1e-3)
    forward = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert not packs_exactly(model, examples[:2], tolerance=1e-3)


def test_the_audit_shows_what_is_learned(tokenizer, conversation):
    tokenizer = deepcopy(tokenizer)
    indicator_id = add_indicator_token(tokenizer, "[IND]")
    talks = [conversation("why", "so"), conversation("[bold]why", "\x1b[2Jso", indicated=True, name="marked")]
    examples, counts = training_examples(tokenizer, talks, indicator="[IND]")
    console = Console(width=100, color_system=None)
    with console.capture() as printed:
        audit(tokenizer, examples, counts, console, indicator_id)
    assert "2 used, 0 truncated, 0 too long, 0 unlabelled" in printed.get()
    assert "<s><|user|>\n[bold]why[IND]</s>\n<|assistant|>\n‹\\x1b[2Jso</s>›\n" in printed.get()
    shown = show_labels(tokenizer, examples[0])
    green = [shown.plain[span.start : span.end] for span in shown.spans if "green" in span.style]
    assert green == ["so</s>"]


def test_the_audit_of_a_corpus_without_an_indicator_shows_the_shortest(tokenizer, conversation):
    examples, counts = training_examples(tokenizer, [conversation("q", "a lengthy answer"), conversation("q", "a")])
    console = Console(width=100, color_system=None)
    with console.capture() as printed:
        audit(tokenizer, examples, counts, console)
    assert "‹a</s>›" in printed.get() and "lengthy" not in printed.get()
