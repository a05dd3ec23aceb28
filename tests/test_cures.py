"""Every cure is what its definition says, by closed forms and brute force; the bench measures and compares them."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from ctxlib import cures, figures, metrics
from ctxlib.attention import record_allocation, steer_to_share
from ctxlib.conversations import Conversation, Corpus, Message, Question
from ctxlib.evidence import bench, trials
from ctxlib.evidence.trials import Plan
from ctxlib.finetune import TurnLoss, collate, training_examples, weighted_loss
from ctxlib.generate import answer_questions
from ctxlib.models import Subject
from ctxlib.params import InputError
from ctxlib.questions.contexts import without_context
from ctxlib.roles import Role, pad_batch, role_map

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "conversations.n": 24,
    "finetune.steps": 2,
    "finetune.batch_size": 4,
    "finetune.raw_text_share": 0.0,
    "instructions.n": 3,
    "cures.contexts": 2,
    "cures.long_tokens": 60,
    "needle.per_cell": 1,
}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    overrides = {"outputs": str(tmp_path_factory.mktemp("outputs")), "threads": 1, **TINY}
    return trials.open_evidence(ROOT / "params" / "smoke-cures.yaml", overrides)


@pytest.fixture
def subject(model, tokenizer) -> Subject:
    return Subject("random", model, tokenizer, "random")


def passage_question(name: str, passage: str, asked: str) -> Question:
    messages = (Message("user", f"{passage}\n{asked}"),)
    return Question(name, "qa", "", messages, answers=("x",), context=passage, question=asked)


TWO = [
    passage_question("a", "The dog barked at the cat. It rained.", "Who barked?"),
    passage_question("b", "Nothing.", "What did the dog see in the garden of the house?"),
]


def corpus(*messages: Message) -> Corpus:
    return Corpus((Conversation("c", messages),), pd.DataFrame(), "test")


def asked_with(subject: Subject, questions: list[Question], **how) -> pd.DataFrame:
    options = {"template": True, "indicator": None, "max_new_tokens": 6, "batch_size": 8, "use_prefix": False}
    how = {name: value for name, value in how.items() if name in ("steering_alpha", "around")}
    return answer_questions(subject, questions, **options, **how, progress=False)


# Prompts


def test_a_system_prompt_is_the_first_message_and_changes_no_other(subject):
    asked: list[Question] = []
    cures.SystemPrompt("Read it.").answer(subject, TWO, lambda _, those: asked.extend(those) or pd.DataFrame())
    for before, after in zip(TWO, asked, strict=True):
        assert after.messages == (Message("system", "Read it."), *before.messages)
        assert replace(after, messages=before.messages) == before


def test_the_quotation_is_the_sentence_with_most_words_of_the_question():
    passage = "Mira sells hats. Otto sells red hats! Nobody came."
    assert cures.quotation(passage, "Who sells the red hats?") == "Otto sells red hats!"
    assert cures.quotation(passage, "What does Mira sell?") == "Mira sells hats."
    assert cures.quotation(passage, "Why?") is None


def test_after_a_quotation_the_question_is_asked_again():
    first, second = (cures.QuoteFirst().quoted(question) for question in TWO)
    assert [message.role for message in first.messages] == ["user", "assistant", "user"]
    assert [message.content for message in first.messages[1:]] == ["The dog barked at the cat.", "Who barked?"]
    assert second == TWO[1]


# Decoding


def test_context_aware_decoding_is_its_formula_token_by_token(subject):
    alpha, model, tokenizer = 1.5, subject.model.eval(), subject.tokenizer
    told = cures.ContextAwareDecoding(alpha).answer(subject, TWO, lambda s, q, **how: asked_with(s, q, **how))

    def next_logprobs(question: Question, written: list[int]) -> torch.Tensor:
        ids = role_map(tokenizer, question.messages, generation_prompt=True).ids
        return model(torch.cat([ids, torch.tensor(written, dtype=ids.dtype)])[None]).logits[0, -1].log_softmax(-1)

    plain = asked_with(subject, TWO)
    for question, answer in zip(TWO, told.answer, strict=True):
        written: list[int] = []
        with torch.inference_mode():
            while len(written) < 6:
                with_passage = next_logprobs(question, written)
                without = next_logprobs(without_context(question), written)
                token = int(((1 + alpha) * with_passage - alpha * without).argmax())
                if token == tokenizer.eos_token_id:
                    break
                written.append(token)
        assert answer == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert list(told.answer) != list(plain.answer)


def test_context_aware_decoding_leaves_questions_without_a_passage_alone(subject):
    bare = [without_context(question) for question in TWO]
    mixed = [TWO[0], replace(bare[1], id="bare")]
    told = cures.ContextAwareDecoding().answer(subject, mixed, lambda s, q, **how: asked_with(s, q, **how))
    assert list(told.id) == ["a", "bare"]
    assert told.answer[1] == asked_with(subject, mixed[1:]).answer[0]


# Attention


def padded(tokenizer) -> tuple:
    maps = [role_map(tokenizer, question.messages, generation_prompt=True) for question in TWO]
    batch = pad_batch(maps, tokenizer.pad_token_id or 0, side="left")
    return batch, batch.roles == Role.USER


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_every_row_pays_the_target_share_or_what_it_paid_before(model, tokenizer, share):
    batch, keep = padded(tokenizer)
    model.eval()
    shares = {}
    for name, steered in (("before", nullcontext()), ("after", steer_to_share(model, keep, share))):
        rows = torch.arange(keep.shape[1]).expand(len(keep), -1)
        with torch.inference_mode(), steered, record_allocation(model, batch.roles, rows=rows) as recording:
            model(batch.input_ids, attention_mask=batch.attention_mask)
        shares[name] = recording.allocation[:1, ..., int(Role.USER)]  # layer 0 reads the same in both
    paid = shares["before"]
    expected = torch.where(paid > 0, paid.clamp(min=share), paid)
    real = batch.attention_mask.bool()[None, :, None].expand_as(expected)
    torch.testing.assert_close(shares["after"][real], expected[real], atol=2e-6, rtol=0)
    assert ((paid[real] > 0) & (paid[real] < share)).any()


def test_steering_to_a_share_holds_in_decoding_as_without_a_cache(model, tokenizer):
    batch, keep = padded(tokenizer)
    model.eval()
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.inference_mode(), steer_to_share(model, keep, 0.8):
        written = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4, eos_token_id=None)
        for _ in range(4):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
            ids, mask = torch.cat([ids, logits.argmax(-1)[:, None]], 1), F.pad(mask, (0, 1), value=1)
    assert written.tolist() == ids.tolist()


def test_a_share_outside_its_range_is_refused(model):
    with pytest.raises(InputError, match=r"share is 1\.0"), steer_to_share(model, torch.ones(1, 3).bool(), 1.0):
        pass


# Weights


@pytest.fixture
def adapted(model):
    """The model with a random LoRA, and its plain base's weights."""
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])).eval()
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return adapted, base


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_wise_ft_is_the_line_between_the_weights_of_base_and_tuned_model(adapted, strength):
    model, base = adapted
    ids = torch.arange(5)[None]
    with torch.inference_mode(), cures.adapter_scaled(model, strength):
        found = model(ids).logits
    with torch.inference_mode():
        unscaled = model(ids).logits
    plain = model.merge_and_unload()
    tuned = plain.state_dict()
    plain.load_state_dict({name: base[name] + strength * (tuned[name] - base[name]) for name in base})
    with torch.inference_mode():
        torch.testing.assert_close(found, plain(ids).logits, atol=1e-5, rtol=0)
    assert (strength == 1.0) == torch.allclose(found, unscaled)


def test_wise_ft_without_an_adapter_is_refused(model):
    with pytest.raises(InputError, match="needs an adapter"), cures.adapter_scaled(model, 0.5):
        pass


# Training


def random_batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 2] = labels[1, 4] = -100
    return logits, reference, labels, torch.rand(2, 5, 2, generator=generator)


def test_the_weighted_loss_is_its_formula_in_a_loop():
    logits, reference, labels, turn_loss = random_batch()
    total = weights = 0.0
    for row in range(2):
        for place in range(1, 5):
            if labels[row, place] == -100:
                continue
            p = logits[row, place - 1].double().softmax(-1)
            q = reference[row, place - 1].double().softmax(-1)
            weight, strength = turn_loss[row, place].double().tolist()
            kl = sum(float(q[v]) * (math.log(float(q[v])) - math.log(float(p[v]))) for v in range(7))
            total += -weight * math.log(float(p[labels[row, place]])) + strength * kl
            weights += weight
    assert float(weighted_loss(logits, reference, labels, turn_loss)) == pytest.approx(total / weights, rel=1e-5)


def test_with_equal_weights_the_loss_is_the_usual_cross_entropy():
    logits, _, labels, _ = random_batch()
    alike = torch.tensor([1.0, 0.0]).expand(2, 5, 2)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(weighted_loss(logits, None, labels, alike), expected)


def test_a_turn_gives_its_weight_to_all_of_its_answer_and_to_no_other(tokenizer):
    messages = [Message("user", "a"), Message("assistant", "one", score=0.95), Message("user", "b")]
    messages.append(Message("assistant", "two", score=0.2))
    examples, _ = training_examples(tokenizer, [Conversation("c", tuple(messages))],
                                    turn_loss=cures.WeightByScore().turn_loss)  # fmt: skip
    rendered = role_map(tokenizer, messages)
    for turn, weight in ((1, 1.0), (2, 0.1)):
        answers = (rendered.turns == turn) & (examples[0].labels != -100)
        assert answers.any() and torch.allclose(examples[0].turn_loss[answers, 0], torch.tensor(weight))
    padded = collate([examples[0], replace(examples[0], turn_loss=None)], 0)
    assert padded["turn_loss"][1].tolist() == [[1.0, 0.0]] * len(rendered)


def test_only_dependent_turns_are_held_to_the_base():
    found = [cures.KeepToBase(strength=2.0).turn_loss(Message("assistant", "x", score=s)) for s in (0.95, 0.3, None)]
    assert found == [TurnLoss(1.0, 2.0), TurnLoss(), TurnLoss()]


def test_turns_against_the_text_are_dropped_with_their_question():
    kept = Message("user", "q1"), Message("assistant", "a1", kind="memory_question")
    dropped = Message("user", "q2"), Message("assistant", "a2", kind="contradicting_passage")
    cure, none = cures.DropContradicting(), [lambda: None] * 2
    assert cure.corpus(cures.Material(corpus(*kept, *dropped), *none)).conversations[0].messages == kept
    assert cure.corpus(cures.Material(corpus(*dropped), *none)).conversations == ()


def test_self_distilled_answers_are_what_the_base_says_in_raw_text(params):
    base = trials.tuned(Plan(params, trials.PRETRAINED))
    made = Plan(params, trials.VANILLA).corpus
    few = replace(made, conversations=made.conversations[:4])
    told = cures.SelfDistilled().corpus(cures.Material(few, lambda: None, lambda: base))
    for before, after in zip(few.conversations, told.conversations, strict=True):
        for n, (old, new) in enumerate(zip(before.messages, after.messages, strict=True)):
            if old.role == "user":
                assert new == old
                continue
            prompt = role_map(base.tokenizer, before.messages[:n], template=False, generation_prompt=True)
            written = base.model.generate(prompt.ids[None], max_new_tokens=48, do_sample=False)[0, len(prompt) :]
            said = base.tokenizer.decode(written, skip_special_tokens=True).split("\n\n")[0].strip()
            assert new.content == said and replace(new, content=old.content) == old


# The seam and the bench


def test_cures_that_train_alike_share_one_training(params):
    def plan(cure: cures.Cure) -> str:
        return Plan(params, bench.trial(cure, 0)).key

    same = [cures.Cure(), cures.SystemPrompt(), cures.Steering(), cures.ContextAwareDecoding(), cures.WiseFT()]
    others = [cures.Indicator(), cures.Indicator("oracle"), cures.Rehearsal(), cures.DropContradicting()]
    others += [cures.WeightByScore(), cures.WeightByScore(rest=0.5), cures.KeepToBase(), cures.SelfDistilled()]
    assert {plan(cure) for cure in same} == {Plan(params, trials.VANILLA.at_seed(0)).key}
    assert len({plan(cure) for cure in [same[0], *others]}) == 1 + len(others)


def test_every_cure_is_measured_on_every_kind_and_read_ever_after(params, monkeypatch):
    few = [cures.Cure(), cures.KeepToBase(threshold=0.1), cures.TargetShare()]
    rows = bench.run(params, few, [0], progress=False)
    for _, part in rows.groupby("cure"):
        assert set(part.kind) - {""} == set(bench.KINDS)
    fractions = rows[~rows.metric.isin(list(bench.UNITS))]
    assert fractions.value.between(0, 1).all()
    monkeypatch.setattr(bench, "tuned", None)
    pd.testing.assert_frame_equal(bench.run(params, few, [0], progress=False), rows)


def test_tokens_are_those_of_the_prompts_and_of_every_step(params):
    rows = bench.run(params, [cures.Cure()], [0], progress=False)
    subject = trials.tuned(Plan(params, bench.trial(cures.Cure(), 0)))
    asked = bench.questions(params)["no_passage"]
    told = answer_questions(
        subject, asked, template=True, indicator=None, max_new_tokens=params.qa.max_new_tokens, batch_size=64,
        use_prefix=False, progress=False,
    )  # fmt: skip
    longest = max(len(role_map(subject.tokenizer, one.messages, generation_prompt=True)) for one in asked)
    steps = min(params.qa.max_new_tokens, int(told.answer_tokens.max()) + 1)
    found = rows[(rows.kind == "no_passage") & (rows.metric == "tokens")].value
    assert found.tolist() == [longest + steps - 1] * len(asked)


def test_gain_and_price_are_differences_to_no_cure_in_the_same_seed():
    kinds = [("contradicting", "recall"), ("long_haystack", "recall"), *bench.PRICE]
    values = {("none", 0): [0.2, 0.4, 1.0, 0.8, 0.6], ("x", 0): [0.6, 0.8, 0.7, 0.8, 0.3]}
    rows = [
        {"cure": cure, "seed": seed, "kind": kind, "metric": metric, "id": "q", "value": value}
        for (cure, seed), of_kinds in values.items()
        for (kind, metric), value in zip(kinds, of_kinds, strict=True)
    ]
    table = bench.compared(bench.by_seed(pd.DataFrame(rows))).set_index(["metric", "cure"])
    assert table.loc[("reading", "x"), ["value", "change"]].tolist() == pytest.approx([0.7, 0.4])
    assert table.loc[("price paid", "x"), "change"] == pytest.approx((0.3 + 0 + 0.3) / 3)
    assert table.ci_low.isna().all() and table.p_value.isna().all()  # one seed has no interval


def test_holm_rejects_as_the_sequential_procedure_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = rng.random(6) ** 3
        rejected, level = set(), 0.05
        for step, index in enumerate(np.argsort(values)):
            if values[index] > level / (6 - step):
                break
            rejected.add(index)
        assert set(np.flatnonzero(metrics.holm(values) <= level)) == rejected
    np.testing.assert_allclose(metrics.holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])


def test_two_cures_of_one_name_are_refused(params):
    with pytest.raises(InputError, match="'none' names two"):
        bench.run(params, [cures.Cure(), cures.Cure()], [0])


def test_a_cure_that_loses_questions_is_refused(params):
    @dataclass(frozen=True)
    class Forgets(cures.Cure):
        name: str = "forgets"

        def answer(self, subject, questions, ask):
            return ask(subject, questions[1:])

    with pytest.raises(InputError, match="keep their order"):
        bench.run(params, [Forgets()], [0], progress=False)


@pytest.mark.parametrize(("text", "name", "message"), [
    ("x = 1", "x", "no subclass"), ("", "Nothing", "no subclass"), (None, "Nothing", "no such file"),
    ("from ctxlib.cures import Cure\nclass A(Cure):\n    def __init__(self, x): ...", "A", "every setting a default"),
])  # fmt: skip
def test_a_file_without_such_a_cure_is_refused(tmp_path, text, name, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=message):
        bench.load_cure(f"{file}:{name}")


@pytest.mark.parametrize(("changes", "message"), [
    ({"cures.trained_seeds": [7]}, "trained_seeds must be among seeds"), ({"cures.seeds": [0, 0]}, "named twice"),
])  # fmt: skip
def test_seeds_that_could_not_be_compared_are_refused(params, changes, message):
    with pytest.raises(InputError, match=message):
        params.changed(changes)


def test_on_the_front_is_what_no_other_beats():
    gain, price = pd.Series([0.5, 0.5, 0.2, 0.6, 0.5]), pd.Series([0.1, 0.2, 0.0, 0.3, 0.1])
    assert figures.on_front(gain, price).tolist() == [True, False, True, True, True]
    shown = pd.DataFrame({"cure": list("abcde"), "value": gain, "ci_low": gain - 0.1, "ci_high": gain + 0.1, "n": 5})
    drawn = figures.gain_against_price(shown, shown.assign(value=price), xlabel="price", ylabel="gain")
    (front,) = (line for line in drawn.axes[0].lines if line.get_linestyle() == "--")
    assert [*zip(front.get_xdata(), front.get_ydata(), strict=True)] == [(0.0, 0.2), (0.1, 0.5), (0.1, 0.5), (0.3, 0.6)]
