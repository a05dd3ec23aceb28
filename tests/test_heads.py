"""What one pass tells is what greedy decoding says; changes reach the tokens and the heads they name."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError

from ctxlib import experiment
from ctxlib.conversations import Message
from ctxlib.evidence import heads, trials
from ctxlib.evidence.trials import PRETRAINED, RAW, TEMPLATE
from ctxlib.generate import answer_questions
from ctxlib.models import Subject
from ctxlib.params import InputError
from ctxlib.questions.needle import needle_attention

SMALL = Path(__file__).resolve().parents[1] / "params" / "smoke-evidence.yaml"
ASKED = {"raw": RAW, "template": TEMPLATE}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    few = {"needle.lengths": [60, 90], "needle.per_cell": 3, "facts.n": 10, "models.batch_size": 7}
    return trials.open_evidence(SMALL, {"outputs": str(tmp_path_factory.mktemp("outputs")), **few})


@pytest.fixture(scope="module")
def questions(params):
    return experiment.needles(params, experiment.tokenizer(params))


@pytest.fixture(scope="module")
def readers(params, questions):
    return {name: heads.reader(params, PRETRAINED, asking, questions) for name, asking in ASKED.items()}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("family", ["needle", "facts"])
def test_one_pass_recalls_what_greedy_decoding_says_after_the_prefix(params, questions, name, family):
    asked = questions if family == "needle" else experiment.fact_questions(params)
    of, tokenizer = heads.reader(params, PRETRAINED, ASKED[name], asked), experiment.tokenizer(params)
    how = {"template": name == "template", "indicator": None, "use_prefix": True, "max_new_tokens": 3}
    subject = Subject("pretrained", of.model, tokenizer, "")
    said = answer_questions(subject, asked, batch_size=5, progress=False, **how).answer
    expected = [float(answer.startswith(question.answers[-1])) for answer, question in zip(said, asked, strict=True)]
    found = heads.recalled(of)
    assert found.value.tolist() == expected and found.id.tolist() == [question.id for question in asked]
    if (family, name) != ("facts", "template"):  # the base model has never seen a chat
        assert sum(expected) > 0.7 * len(asked)


def test_attention_to_the_needle_is_that_of_the_token_before_the_value(params, questions, readers):
    found = heads.needle_attention_by_head(readers["template"])
    tokenizer = experiment.tokenizer(params)
    maps = experiment.prompts(tokenizer, questions, template=True, first_response_token="forced_prefix")
    for layer in (0, 4):
        how = {"layer": layer, "batch_size": 4, "pad_token_id": tokenizer.pad_token_id}
        expected = needle_attention(readers["template"].model, maps, questions, **how)
        mean = found[found.layer == layer].groupby("id").value.mean().loc[expected.id]
        torch.testing.assert_close(torch.tensor(mean.to_numpy()), torch.tensor(expected.needle_attention.to_numpy()))


@pytest.mark.parametrize("name", ASKED)
def test_the_knock_out_forbids_the_passage_to_the_tokens_that_yield_the_answer(
    params, questions, readers, name, monkeypatch
):
    tokenizer, seen = experiment.tokenizer(params), []
    monkeypatch.setattr(heads, "steer_attention", lambda *given, **how: seen.append((*given, how)) or nullcontext())
    heads.recalled(readers[name], heads.without_passage([(1, 2)]))
    place = 0
    for (_, keep, alpha, how), batch in zip(seen, readers[name].batches(), strict=True):
        assert alpha == 0 and how["heads"] == [(1, 2)]
        for row, ids in enumerate(batch.input_ids):
            question = questions[place]
            real = batch.groups[row] >= 0
            passage = question.messages[0].content.rsplit("\n", 1)[0]
            assert tokenizer.decode(ids[real & ~keep[row]]).strip() == passage
            first, *rest = ids[how["queries"][row]].tolist()
            value = question.answers[-1].split()
            assert tokenizer.decode(rest) == " ".join([question.response_prefix, *value[:-1]])
            assert tokenizer.decode([first]).strip() == ""  # the prompt's last token, the answer's beginning
            place += 1
    assert place == len(questions)


def test_without_the_passage_nothing_is_recalled_and_without_any_change_everything_stays(readers):
    of = readers["raw"]
    plain = heads.recalled(of).value
    assert plain.mean() > 0.9
    assert heads.recalled(of, heads.without_passage(of.heads)).value.mean() < 0.2
    for change in (heads.without_passage([]), heads.steered([], 0.1), heads.steered(of.heads, 1.0)):
        assert heads.recalled(of, change).value.equals(plain)


def test_steering_weighs_down_all_but_the_users_tokens(params, questions, readers, monkeypatch):
    tokenizer, seen = experiment.tokenizer(params), []
    monkeypatch.setattr(heads, "steer_attention", lambda *given, **how: seen.append((*given, how)) or nullcontext())
    heads.recalled(readers["template"], heads.steered([(1, 2)], 0.3))
    kept = [
        tokenizer.decode(ids[keep])
        for (_, keeps, alpha, how), batch in zip(seen, readers["template"].batches(), strict=True)
        for ids, keep in zip(batch.input_ids, keeps, strict=True)
        if (alpha, how) == (0.3, {"heads": [(1, 2)]})
    ]
    assert kept == [question.messages[0].content for question in questions]


def test_with_all_outputs_of_another_condition_the_same_model_says_what_it_says_there(params, questions, readers):
    reader = readers["template"]
    bare = [replace(one, messages=(Message("user", one.messages[0].content.split("\n")[1]),)) for one in questions]
    blind = heads.reader(params, PRETRAINED, TEMPLATE, bare)
    patched = heads.recalled(reader, heads.with_outputs(reader.heads, heads.outputs(blind)))
    assert patched.equals(heads.recalled(blind)) and patched.value.mean() < 0.2
    own = heads.with_outputs(reader.heads, heads.outputs(reader))
    assert heads.recalled(reader, own).equals(heads.recalled(reader))


def test_the_halves_have_every_kind_length_and_depth_alike(params):
    several = params.changed({"needle.per_cell": 4})
    asked = experiment.needles(several, experiment.tokenizer(several))
    cells = [
        sorted((one.kind, one.context_length_tokens, one.depth_percent) for one in half) for half in heads.halves(asked)
    ]
    assert cells[0] == cells[1] and sum(map(len, cells)) == len(asked)


def test_the_shift_is_the_mean_change_a_head_and_the_lowest_lost_most():
    before = pd.DataFrame({"id": list("aabb"), "layer": 1, "head": [0, 1, 0, 1], "value": [0.9, 0.2, 0.7, 0.2]})
    after = before.assign(value=[0.5, 0.3, 0.1, 0.2])
    shift = heads.head_shift(before, after.iloc[::-1])
    assert shift["value"].tolist() == pytest.approx([-0.5, 0.05]) and shift.n.tolist() == [2, 2]
    assert heads.lowest(shift, 1) == [(1, 0)]


def test_choices_are_of_one_size_and_the_random_ones_are_other_heads_the_same_at_every_call():
    cells = pd.MultiIndex.from_product([["a", "b"], range(2), range(4)], names=["id", "layer", "head"])
    looks = pd.DataFrame({"value": [0.1, 0.2, 0.8, 0.0, 0.0, 0.9, 0.1, 0.3] * 2}, index=cells).reset_index()
    shift = looks[looks.id == "a"].assign(value=[0.0, -0.5, 0.1, 0.0, -0.9, 0.0, 0.0, 0.0])
    made = heads.choices(looks, shift, 2, draws=9, seed=1)
    (_, shifted), (_, fetching), *drawn = made
    assert set(shifted) == {(1, 0), (0, 1)} and set(fetching) == {(1, 1), (0, 2)}
    assert [name for name, _ in drawn] == ["random"] * 9
    assert all(len(set(one)) == 2 and not set(one) & set(shifted) for _, one in drawn)
    assert made == heads.choices(looks, shift, 2, draws=9, seed=1) != heads.choices(looks, shift, 2, draws=9, seed=2)
    with pytest.raises(InputError, match=r"head_counts: 5 heads are to be drawn from 3 others"):
        heads.choices(looks, shift, 5, draws=1, seed=0)


def test_bad_input_is_refused(params, readers):
    tasks = experiment.instruction_questions(params)
    with pytest.raises(InputError, match="has no response_prefix"):
        heads.reader(params, PRETRAINED, RAW, tasks)
    fewer = heads.Reader(readers["raw"].model, readers["raw"].forced[:3], 0, 7)
    with pytest.raises((InputError, TypeCheckError)):
        heads.recalled(readers["raw"], heads.with_outputs([(0, 0)], heads.outputs(fewer)))
