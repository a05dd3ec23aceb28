"""The chat template of the paper's models (facts of their recipes), against renderings written by hand."""

from pathlib import Path

import pytest
from transformers import LlamaTokenizer

from ctxlib.conversations import Message
from ctxlib.models import load_tokenizer
from ctxlib.roles import Role, role_map

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "params" / "templates" / "tinyllama-chat.jinja"
LLAMA_2 = ROOT.parent / "shared" / "data" / "tokenizers" / "llama-2" / "tokenizer.model"
QUESTION, ANSWER = Message("user", " What <|assistant|>\nis {{ it }}? "), Message("assistant", "A </s> thing.\n")
TURN = "<|user|>\n What <|assistant|>\nis {{ it }}? </s>\n"


@pytest.fixture
def theirs(model_folder):
    return load_tokenizer(model_folder, chat_template=TEMPLATE)


def rendered(tokenizer, messages, **how):
    contents = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(contents, tokenize=False, **how)


def test_it_renders_as_the_recipes_do(theirs):
    system = Message("system", "Be brief.")
    assert (
        rendered(theirs, [system, QUESTION, ANSWER])
        == f"<|system|>\nBe brief.</s>\n{TURN}<|assistant|>\nA </s> thing.\n</s>\n"
    )
    assert rendered(theirs, [QUESTION]) == f"<|system|>\n</s>\n{TURN}"  # an empty system text where there is none
    assert rendered(theirs, [QUESTION], add_generation_prompt=True) == f"<|system|>\n</s>\n{TURN}<|assistant|>\n"


def check_roles(tokenizer):
    messages = [Message("system", "Be brief."), QUESTION, ANSWER, QUESTION]
    found = role_map(tokenizer, messages, generation_prompt=True)
    assert found.roles[0] == Role.BOS and found.ids.tolist().count(tokenizer.bos_token_id) == 1
    text = {role: tokenizer.decode(found.ids[found.roles == role]).strip() for role in (Role.SYSTEM, Role.ASSISTANT)}
    assert text == {Role.SYSTEM: "Be brief.", Role.ASSISTANT: "A </s> thing."}
    assert tokenizer.decode(found.ids[found.roles == Role.USER]).count("<|assistant|>") == 2  # a forged marker is text
    closing = (found.ids == tokenizer.eos_token_id) & (found.roles == Role.TEMPLATE)
    assert closing.sum() == 4 == (found.ids == tokenizer.eos_token_id).sum()
    without = role_map(tokenizer, [QUESTION])
    assert Role.SYSTEM not in without.roles and Role.USER in without.roles


def test_every_token_has_its_role(theirs):
    check_roles(theirs)


def test_every_token_of_llama_2_has_its_role(tmp_path):
    if not LLAMA_2.is_file():
        pytest.skip("the tokenizer of Llama-2 is not in ../shared/data")
    (tmp_path / "tokenizer.model").write_bytes(LLAMA_2.read_bytes())
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "fast")
    check_roles(load_tokenizer(tmp_path / "fast", chat_template=TEMPLATE))
