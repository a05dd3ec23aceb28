"""Plain text among the conversations: read from files, rendered without a template, trained on in its share."""

import random

import pytest
import torch

from ctxlib.conversations import load_raw_texts
from ctxlib.finetune import finetune
from ctxlib.finetune.labels import IGNORED, raw_text_examples
from ctxlib.miniature import texts
from ctxlib.miniature.pretrain import encode
from ctxlib.miniature.tokenizer import build_tokenizer
from ctxlib.miniature.town import Town
from ctxlib.params import Finetune, InputError
from ctxlib.roles import Role

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_text_is_one_answer_and_all_of_it_is_trained_on(tokenizer, tmp_path):
    raw = load_raw_texts(written(tmp_path / "a.txt", "Thea drinks <s> tea."))
    example = raw_text_examples(tokenizer, raw, 1)[0]
    assert example.input_ids.tolist() == tokenizer("Thea drinks ", add_special_tokens=True)["input_ids"] + [
        tokenizer.convert_tokens_to_ids(c if c != " " else "Ġ") for c in "<s> tea."
    ] + [tokenizer.eos_token_id]
    assert example.labels[0] == IGNORED and (example.labels[1:] == example.input_ids[1:]).all()
    assert set(example.roles.tolist()) == {Role.BOS, Role.ASSISTANT, Role.TEMPLATE}


def test_a_long_text_goes_on_in_the_next_piece_and_nothing_of_it_is_lost(tokenizer, tmp_path):
    raw = load_raw_texts(written(tmp_path / "a.txt", "word " * 30))
    whole = raw_text_examples(tokenizer, raw, 1, max_length=10_000)[0]
    pieces = raw_text_examples(tokenizer, raw, 8, max_length=20)
    assert max(len(piece.input_ids) for piece in pieces) == 20
    assert torch.equal(torch.cat([piece.input_ids for piece in pieces]), whole.input_ids)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
    with pytest.raises(InputError, match="8 pieces of at most 20 tokens, 9 are needed"):
        raw_text_examples(tokenizer, raw, 9, max_length=20)


def test_a_folder_is_read_in_the_order_of_its_names_and_rows_by_their_text(tmp_path):
    written(tmp_path / "b.txt", "second")
    written(tmp_path / "a.TXT", "first")
    written(tmp_path / "c.txt", " \n")
    assert [one.messages[0].content for one in load_raw_texts(tmp_path)] == ["first", "second"]
    rows = written(tmp_path / "rows.jsonl", '{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert [one.messages[0].content for one in load_raw_texts(rows)] == ["one", "two"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("rows.jsonl", '{"body": "one"}\n', "line 1: no key 'text' with a text, found: body; rename"),
        ("rows.jsonl", '{"text": "one"}\n{"text": 2}\n', "line 2: no key 'text' with a text"),
        ("blank.txt", " \n ", "holds no text; name a .txt file"),
        ("bytes.txt", "\udcff", "not UTF-8 at byte 0"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=said):
        load_raw_texts(tmp_path / name)


def test_the_towns_raw_texts_are_the_documents_of_pretraining():
    """The same ids and labels as pretraining gives, but for the end: eos in place of an empty line."""
    town, tokenizer = Town(), build_tokenizer()
    raw = texts.raw_texts(town, 40, seed=3)
    rng = random.Random(f"raw-{town.seed}-3")
    kinds = rng.choices(list(texts.RAW_TEXT_SHARES), list(texts.RAW_TEXT_SHARES.values()), k=40)
    for kind, conversation in zip(kinds, raw, strict=True):
        ids, labels = encode(texts.RAW_TEXT_KINDS[kind](town, rng), tokenizer)
        example = raw_text_examples(tokenizer, [conversation], 1, max_length=4096)[0]
        assert example.input_ids.tolist() == [*ids[:-1], tokenizer.eos_token_id]
        assert example.labels.tolist() == [*labels[:-1], tokenizer.eos_token_id]


def test_the_share_of_raw_text_lengthens_training_and_leaves_the_conversations_as_many(
    tokenizer, model_folder, conversations, tmp_path
):
    raw = load_raw_texts(written(tmp_path / "a.txt", "word " * 200))
    steps = {}
    for share, given in ((0.0, raw), (0.25, raw), (0.25, [])):
        settings = Finetune(steps=6, batch_size=2, gradient_accumulation=1, raw_text_share=share, lora_rank=2)
        out = tmp_path / f"share-{share}-{len(given)}"
        log = finetune(
            model_folder,
            tokenizer,
            conversations,
            settings,
            out_dir=out,
            raw_texts=given,
            max_length=64,
            progress=False,
        )
        steps[share, len(given)] = log.step.max(), log.attrs["raw_text"]
    assert steps == {(0.0, 1): (6, 0), (0.25, 1): (8, round(len(conversations) / 3)), (0.25, 0): (6, 0)}
