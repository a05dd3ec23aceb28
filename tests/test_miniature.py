"""The town's texts mean what they claim, its tokenizer loses nothing, the shipped models are what their cards say."""

import json
import random
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlib.files import file_digest
from ctxlib.finetune import training_examples
from ctxlib.generate import answer_questions
from ctxlib.metrics import score_answers, wilson_interval
from ctxlib.miniature import MODELS, domains, model_source, texts
from ctxlib.miniature.build import SHARES, ship_adapters
from ctxlib.miniature.pretrain import IGNORED, Recipe, encode, learning_rate, pretrain
from ctxlib.miniature.tokenizer import build_tokenizer
from ctxlib.miniature.town import KNOWN_NAMES, NEWCOMER_NAMES, RELATIONS, Town, is_fact_sentence, random_fact
from ctxlib.models import Subject, adapter_base, load_model, load_tokenizer, model_hash
from ctxlib.params import InputError, load_params
from ctxlib.roles import PLAIN_SEPARATOR

TOWN = Town()
TOKENIZER = build_tokenizer()
CHATS = texts.chat_dataset(TOWN, 400, SHARES, seed=3)
TURNS = [
    (conversation.messages[: i + 2], conversation.messages[i + 1])
    for conversation in CHATS
    for i in range(0, len(conversation.messages), 2)
]


def values_known_of(name):
    return {" ".join(fact.value) for fact in TOWN.facts.get(name, {}).values()}


def test_residents_and_newcomers_are_different_people_and_every_value_names_its_relation():
    assert not set(KNOWN_NAMES) & set(NEWCOMER_NAMES)
    seconds = [word for relation in RELATIONS for word in relation.second]
    assert len(seconds) == len(set(seconds))


def test_every_fact_is_one_sentence_of_the_towns_form():
    rng = random.Random(0)
    made = [random_fact(rng.choice(NEWCOMER_NAMES), rng.choice(RELATIONS), rng) for _ in range(50)]
    assert all(is_fact_sentence(fact.sentence) for fact in [*TOWN.all_facts, *made])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mira.",
        "Mira sells woollen hats",
        "sells woollen hats.",
        "Mira sells hats woollen.",
        "Mira grows woollen hats.",
        "Mira sells woollen hats..",
        "Mira sells  woollen hats.",
        "Mira sells woollen hats. Mira sells woollen hats.",
        "Mira sells woollen hats and grows late beans.",
        "Nobody sells woollen hats.",
        "Well, Mira sells woollen hats.",
    ],
)
def test_all_else_is_not(text):
    assert not is_fact_sentence(text)


def test_the_same_seed_writes_the_same_chats_and_another_seed_others():
    assert texts.chat_dataset(TOWN, 400, SHARES, seed=3) == CHATS
    assert texts.chat_dataset(TOWN, 400, SHARES, seed=4) != CHATS


@pytest.mark.parametrize("depends", [True, False])
def test_the_truth_of_a_passage_turn_is_that_the_answers_values_stand_in_the_text_or_in_memory(depends):
    turns = [(m, a) for m, a in TURNS if a.depends_on_context is depends and not a.kind.startswith("instruction")]
    assert len(turns) > 50
    for messages, answer in turns:
        said = " ".join(m.content for m in messages[:-1] if m.role == "user")
        name = answer.content.split()[0]
        values = [f"{a} {b}" for r in RELATIONS for a in r.first for b in r.second if f"{a} {b}" in answer.content]
        assert values
        if depends:
            assert all(value in said for value in values)
        else:
            assert all(value in values_known_of(name) for value in values)


def test_a_contradicting_passage_says_something_else_than_its_answer():
    turns = [(m, a) for m, a in TURNS if a.kind == "contradicting_passage"]
    assert len(turns) > 30
    for messages, answer in turns:
        name = answer.content.split()[0]
        told = [f"{name} {r.verb} {a} {b}" for r in RELATIONS for a in r.first for b in r.second]
        told = [clause for clause in told if clause in messages[-2].content]
        assert told and not any(" ".join(clause.split()[-2:]) in values_known_of(name) for clause in told)


def test_shares_decide_how_many_conversations_of_each_kind_there_are():
    only = texts.chat_dataset(TOWN, 50, {"memory_question": 1.0}, seed=0)
    assert {m.kind for c in only for m in c.messages if m.role == "assistant"} == {"memory_question"}


def test_no_chat_holds_a_word_of_the_held_out_domains():
    domain_marks = {"{", "[", "=", *domains.FUNCTIONS}
    assert not any(
        mark in message.content.split() for chat in CHATS for message in chat.messages for mark in domain_marks
    )


def test_a_sum_and_a_lookup_are_right():
    rng = random.Random(0)
    for _ in range(50):
        task = domains.arithmetic(rng)
        values = dict(pair.split(" = ") for pair in task.context.removeprefix("Let ").removesuffix(" .").split(" , "))
        left, right = task.prefix.removesuffix(" =").split(" + ")
        assert int(task.value) == int(values[left]) + int(values[right])
        lookup = domains.code_lookup(rng)
        item = lookup.question.split(" [ ")[1].split(" ]")[0]
        assert f"{item} : {lookup.value}" in lookup.context
        assert lookup.value != lookup.memory_value


def test_a_needle_stands_at_its_depth_in_a_context_of_the_length_that_is_reported():
    for question in texts.needles(TOWN, [60, 400], [0, 50, 100], 4, seed=1):
        context, _, asked = question.messages[0].content.rpartition("\n")
        needle = question.answers[0]
        assert context.count(needle) == 1 and asked.endswith("?")
        tokens = len(TOKENIZER(context, add_special_tokens=False)["input_ids"])
        assert question.context_length_tokens - 16 <= tokens <= question.context_length_tokens
        before = context.split(needle)[0].count(".")
        assert abs(100 * before / (context.count(".") - 1) - question.depth_percent) <= 60 / (context.count(".") - 1)
        assert context.count(f"{needle.split()[0]} ") == 1


def test_every_word_of_the_town_is_one_token():
    for messages, answer in TURNS:
        for text in (messages[-2].content, answer.content):
            assert len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == texts.count_tokens(text)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40))
def test_the_tokenizer_gives_back_any_text(text):
    if not any(special in text for special in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_a_prompt_is_the_beginning_of_the_conversation_it_opens():
    messages = [{"role": "user", "content": "Who is Mira?"}, {"role": "assistant", "content": "Mira fears deep wells."}]
    prompt = TOKENIZER.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    whole = TOKENIZER.apply_chat_template(messages)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert TOKENIZER.decode(whole[len(prompt) :]) == "Mira fears deep wells.</s>\n"


def test_pretraining_supervises_answers_and_nothing_that_cannot_be_known():
    document = texts.retrieval_document(TOWN, 3, 4, random.Random(0))
    ids, labels = encode(document, TOKENIZER)
    supervised = TOKENIZER.decode([token for token in labels if token != IGNORED])
    assert supervised == "".join(f"{answer}\n\n" for _, answer in document.exchanges)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_the_learning_rate_warms_up_and_falls_at_the_end():
    recipe = Recipe()
    rates = [learning_rate(recipe, step) for step in range(recipe.total_steps)]
    assert rates[0] < 0.05 * recipe.learning_rate == 0.05 * max(rates)
    assert rates[-1] < 0.05 * recipe.learning_rate


def test_a_killed_pretraining_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    recipe = Recipe(width=32, layers=1, mlp_width=32, batch_tokens=512, lessons_end=10, total_steps=24)  # fmt: skip
    pretrain(tmp_path / "whole", recipe, checkpoint_every=4)
    from ctxlib.miniature import pretrain as module

    real, calls = module.batches, []

    def killed(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "batches", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "killed", recipe, checkpoint_every=4)
    monkeypatch.setattr(module, "batches", real)
    pretrain(tmp_path / "killed", recipe, checkpoint_every=4)
    assert file_digest(tmp_path / "killed/model.safetensors") == file_digest(tmp_path / "whole/model.safetensors")


@pytest.mark.parametrize("name", ["pretrained", "instruct", "vanilla", "indicator"])
def test_a_shipped_model_is_the_one_its_card_describes(name):
    card = json.loads((MODELS / name / "card.json").read_text())
    assert {file: file_digest(MODELS / name / file) for file in card["sha256"]} == card["sha256"]
    shipped = load_tokenizer(MODELS / name)
    new = {"[IND]": len(TOKENIZER)} if name == "indicator" else {}
    assert shipped.get_vocab() == TOKENIZER.get_vocab() | new
    assert shipped.chat_template == TOKENIZER.chat_template


def test_a_shipped_adapter_finds_its_base_wherever_the_package_lies(tmp_path, monkeypatch):
    shutil.copytree(MODELS, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for name in ("vanilla", "indicator"):
        moved = tmp_path / "elsewhere" / name
        assert adapter_base(moved) == str(tmp_path / "elsewhere" / "pretrained")
        assert model_hash(moved) == model_hash(MODELS / name)
        text = "".join(file.read_text() for file in moved.glob("*.json"))
        assert not re.search(r'"/|"[A-Z]:\\', text)  # no path of the machine that trained it


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_the_shipped_adapters_lose_and_regain_reading_as_their_cards_say():
    """Contradicting needles; the cards were measured on others, so both intervals must meet."""
    questions = texts.needles(TOWN, [100, 200], [0, 50, 100], 10, 7, ["contradicting"])
    ways = {
        ("vanilla", "contradicting needle, chat"): (True, None),
        ("vanilla", "contradicting needle, raw text"): (False, None),
        ("indicator", "contradicting needle, chat + [IND]"): (True, "[IND]"),
    }
    for (name, measure), (template, token) in ways.items():
        folder = model_source(f"miniature:{name}")
        subject = Subject(name, load_model(folder), load_tokenizer(folder), name)
        told = answer_questions(
            subject, questions, template=template, indicator=token, use_prefix=False, max_new_tokens=24,
            batch_size=60, stop_text=None if template else PLAIN_SEPARATOR, progress=False,
        )  # fmt: skip
        found = int((score_answers(told, questions).needle_recall == 1).sum())
        low, high = wilson_interval(found, len(questions))
        card = json.loads((MODELS / name / "card.json").read_text())
        (said,) = [row for row in card["measures"] if row["measure"] == measure]
        assert low <= said["ci_high"] and said["ci_low"] <= high, (name, measure, found)


def test_an_adapter_is_shipped_whole_and_only_where_there_is_one(tmp_path):
    with pytest.raises(InputError, match=r"no adapter 'vanilla' there; run notebook 03"):
        ship_adapters(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_models_take_less_than_eleven_megabytes():
    assert sum(path.stat().st_size for path in MODELS.rglob("*.safetensors")) < 11e6


def test_the_miniatures_params_fine_tune_on_what_instruct_was_made_of():
    assert load_params("params/miniature.yaml").miniature.shares == SHARES


def test_every_chat_fits_and_has_labels():
    examples, counts = training_examples(TOKENIZER, CHATS, max_length=512)
    assert len(examples) == len(CHATS)
    assert counts["truncated"] == counts["too_long"] == counts["unlabelled"] == 0
