"""A trial is what its parameters make of it, is computed once, and comes out as the rooms it is built from give it."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ctxlib import allocation, experiment, indicator, models, scoring
from ctxlib.conversations import Corpus
from ctxlib.evidence import trials
from ctxlib.evidence.trials import INDICATED, PRETRAINED, RAW, TEMPLATE, VANILLA, Asking, Plan, Trial, computing
from ctxlib.miniature.town import is_fact_sentence
from ctxlib.params import InputError, Params, Scoring

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
SMALL = Path(__file__).resolve().parents[1] / "params" / "smoke-evidence.yaml"
SCORE = Trial(marks="score", seed_model=VANILLA)
TINY = {
    "conversations.n": 24,
    "finetune.steps": 2,
    "finetune.batch_size": 4,
    "needle.lengths": [60],
    "needle.per_cell": 1,
    "qa.n": 2,
    "facts.n": 2,
    "instructions.n": 3,
    "allocation.prompts": 4,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Params:
    """An experiment whose trials the tests share."""
    return trials.open_evidence(SMALL, {"outputs": str(tmp_path_factory.mktemp("outputs")), **TINY})


@pytest.fixture
def params(tmp_path) -> Params:
    return trials.open_evidence(SMALL, {"outputs": str(tmp_path), **TINY})


def key(params: Params, trial: Trial) -> str:
    return Plan(params, trial).key


def indicated(corpus: Corpus) -> pd.DataFrame:
    return indicator.turn_table(corpus).query("indicated")


def test_a_trial_is_computed_once_and_read_ever_after(shared, monkeypatch):
    how = {"trials": {"vanilla": VANILLA, "score": SCORE}, "asked": {"on": TEMPLATE, "ind": INDICATED}, "seeds": [0, 1]}
    first = trials.run(shared, **how, progress=False)
    for name in ("finetune", "score_corpus", "_ask"):
        monkeypatch.setattr(computing, name, None)
    pd.testing.assert_frame_equal(trials.run(shared, **how, progress=False), first)
    assert set(first.condition) == {"vanilla, on", "score, on", "score, ind"}
    assert set(first.seed) == {0, 1}


def test_the_table_is_what_the_tuned_model_answers_and_attends_to(shared):
    trial = replace(SCORE, changes={"seed": 1})
    table = trials.answers(Plan(shared, trial), INDICATED)
    its = shared.changed({"seed": 1})
    subject = trials.tuned(Plan(shared, trial))
    questions = computing._questions(its, INDICATED)
    asking = {"template": True, "indicator": its.models.indicator}
    told = experiment.ask(its, subject, questions, condition="", cached=False, **asking)
    for family, metric in (("needle", "recalled"), ("qa", "containment"), ("instructions", "followed")):
        rows = table[(table.family == family) & (table.metric == metric)].set_index("id").value
        assert rows.to_dict() == told[told.family == family].set_index("id")[metric].to_dict()
    for family in ("needle", "qa", "facts"):
        rows = table[(table.family == family) & (table.metric == "one_sentence")].set_index("id").value
        says = told[told.family == family].set_index("id").answer.map(lambda answer: float(is_fact_sentence(answer)))
        assert rows.to_dict() == says.to_dict()
    needles = [question for question in questions if question.family == "needle"]
    maps = experiment.prompts(subject.tokenizer, needles, first_response_token="forced_prefix", **asking)
    pad_token_id = subject.tokenizer.pad_token_id
    frame = allocation.attention_allocation(subject.model, maps, batch_size=2, pad_token_id=pad_token_id)
    user = allocation.mean_over_heads(allocation.renormalise(frame)).query("role == 'user'")
    expected = user.set_index([user.example.map(lambda i: needles[i].id), "layer"]).attention_allocation.sort_index()
    ours = table[table.metric == "attention_to_user"].set_index(["id", "layer"]).value.sort_index()
    assert list(ours.index) == list(expected.index)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    passage = table[table.metric == "attention_to_passage"].set_index(["id", "layer"]).value.sort_index()
    assert (passage < ours).all()


def test_the_domains_are_asked_by_themselves_and_recall_is_what_the_text_holds(shared):
    its = shared.changed({"qa.n": 8})
    table = trials.answers(Plan(its, PRETRAINED), replace(RAW, questions="domains"))
    assert set(table.family) == {"code", "arithmetic"}
    subject = trials.tuned(Plan(its, PRETRAINED))
    questions = {question.id: question for question in experiment.domain_questions(its)}
    how = {"condition": "", "template": False, "cached": False, "progress": False}
    told = experiment.ask(its, subject, list(questions.values()), **how).set_index("id").answer
    for row in table[table.metric == "recalled"].itertuples():
        context, question = questions[row.id].messages[0].content.split("\n")
        held = dict(re.findall(r"(\w+) [:=] (\d)", context))
        asked = [word for word in question.split() if word in held]
        assert row.value == (str(sum(int(held[word]) for word in asked)) in told[row.id].strip(".").split())
    looked = table[table.layer.notna()].groupby(["family", "metric"])
    assert (looked.layer.nunique() == subject.model.config.num_hidden_layers).all() and len(looked) == 4
    assert (looked.id.nunique() == its.allocation.prompts).all()
    named = set(trials.named(table).metric)
    assert {"code recall", "arithmetic: attention to the user, layer 3", "code answered from memory"} <= named


@pytest.mark.parametrize(
    ("changes", "of"),
    [
        ({"seed": 5}, "all"),
        ({"conversations.n": 25}, "all"),
        ({"miniature.shares": {"memory_question": 1.0}}, "all"),
        ({"finetune.learning_rate": 1e-3}, "all"),
        ({"finetune.method": "qlora"}, "all"),
        ({"models.pretrained": "miniature:instruct"}, "all"),
        ({"scoring.layer": 2}, "score"),
        ({"scoring.threshold": 0.1}, "score"),
        ({"scoring.head_reduction": "max_then_mean"}, "score"),
        ({"finetune.save_every": 50}, "none"),
        ({"needle.per_cell": 3}, "none"),
        ({"steering.alphas": [0.5]}, "none"),
    ],
)
def test_the_key_follows_whatever_can_change_the_model_and_nothing_else(params, changes, of):
    for trial, depends in ((VANILLA, of == "all"), (SCORE, of != "none"), (Trial(marks="oracle"), of == "all")):
        changed = replace(trial, changes=changes, seed_model=trial.seed_model and replace(VANILLA, changes=changes))
        assert (key(params, changed) != key(params, trial)) == depends


def test_every_way_to_mark_is_a_trial_of_its_own(params):
    ways = [
        VANILLA,
        SCORE,
        replace(SCORE, marks="random"),
        replace(SCORE, marks="oracle"),
        replace(SCORE, marked_share=0.3),
        replace(SCORE, seed_model=None),
        replace(SCORE, seed_model=Trial({"seed": 8})),
        replace(SCORE, closing=""),
        replace(SCORE, closing="."),
        replace(SCORE, freeze_indicator=True),
        PRETRAINED,
        Trial(base=VANILLA),
        Trial({"seed": 7}, base=Trial({"seed": 0})),
        Trial(data_seed_offset=3),
    ]
    assert len({key(params, way) for way in ways}) == len(ways)
    assert key(params, Trial({"seed": 3}, trained=False)) == key(params, PRETRAINED)


def test_what_a_trial_is_made_of_takes_its_seed_unless_it_names_one(params):
    own = replace(SCORE, changes={"seed": 4})
    assert key(params, own) == key(params, replace(own, seed_model=Trial({"seed": 4})))
    assert key(params, own) != key(params, replace(own, seed_model=Trial({"seed": 0})))
    assert key(params, Trial({"seed": 4}, base=VANILLA)) == key(params, Trial({"seed": 4}, base=Trial({"seed": 4})))


def test_random_marks_are_as_many_as_the_scores_and_not_the_same(shared):
    by_score = indicated(trials.marked(Plan(shared, replace(SCORE, marked_share=0.4))))
    by_chance = indicated(trials.marked(Plan(shared, replace(SCORE, marked_share=0.4, marks="random"))))
    turns = ["conversation", "turn"]
    assert len(by_score) == len(by_chance) > 5
    assert set(map(tuple, by_score[turns].to_numpy())) != set(map(tuple, by_chance[turns].to_numpy()))


def test_the_marked_share_takes_the_turns_that_score_highest_and_the_oracle_the_truth(shared):
    trial = replace(SCORE, marked_share=0.25)
    found = trials.scores(Plan(shared, trial))
    found = found[found.layer == shared.scoring.layer]
    highest = found.nlargest(round(0.25 * len(found)), "score")
    picked = indicated(trials.marked(Plan(shared, trial)))
    turns = ["conversation", "turn"]
    assert set(map(tuple, picked[turns].to_numpy())) == set(map(tuple, highest[turns].to_numpy()))
    truth = indicator.turn_table(trials.marked(Plan(shared, Trial(marks="oracle"))))
    assert (truth.indicated == truth.depends_on_context).all()


def users_texts(corpus: Corpus) -> list[str]:
    return [m.content for conversation in corpus.conversations for m in conversation.messages if m.role == "user"]


def test_the_users_texts_end_as_the_trial_says_and_the_marks_stay(shared):
    """A full stop behind texts without a mark is what the authors' rule puts there."""
    trial = replace(SCORE, marked_share=0.3)
    plain, bare, stopped = (trials.marked(Plan(shared, replace(trial, closing=end))) for end in (None, "", "."))
    assert all(text[-1] in "?." for text in users_texts(plain))  # so that the authors' rule would do nothing
    assert users_texts(bare) == [text[:-1] for text in users_texts(plain)]
    by_rule = indicator.mark(
        bare, trials.scores(Plan(shared, trial)), 0.5, layer=shared.scoring.layer, variant="authors_code"
    )
    assert users_texts(stopped) == users_texts(by_rule)
    assert 0 < len(indicated(plain)) < len(indicator.turn_table(plain))
    for corpus in (bare, stopped):
        pd.testing.assert_frame_equal(indicated(corpus), indicated(plain))


def test_a_question_is_asked_with_the_end_that_the_asking_says(shared, monkeypatch):
    read = {}

    def ask(its, subject, questions, asking):
        read[asking.closing] = [question.messages[-1].content for question in questions]
        return pd.DataFrame({name: [] for name in trials.MEASURED_COLUMNS})

    monkeypatch.setattr(computing, "_ask", ask)
    for closing in (None, "", "."):
        trials.answers(Plan(shared, replace(PRETRAINED, changes={"facts.n": 3})), Asking(closing=closing))
    assert all(text[-1] in "?." for text in read[None])
    assert read[""] == [text[:-1] for text in read[None]]
    assert read["."] == [text + "." for text in read[""]]


def test_scored_turns_are_those_of_the_seed_model_beside_the_truth(shared):
    turns = trials.scored_turns(shared, {"score": SCORE, "again": SCORE}, [1])
    assert set(turns.condition) == {"score", "again"} and set(turns.seed) == {1}
    its = shared.changed({"seed": 1})
    corpus = experiment.conversations(its)
    scorer = trials.tuned(Plan(shared, Trial({"seed": 1})))
    settings = Scoring(head_reduction="mean")
    expected = scoring.score_corpus(scorer.model, scorer.tokenizer, corpus, settings, progress=False)
    ours = turns[turns.condition == "score"]
    keys = ["conversation", "turn", "layer"]
    assert ours[keys].to_numpy().tolist() == expected[keys].to_numpy().tolist()
    np.testing.assert_allclose(ours.score, expected.score, atol=1e-6)
    said = {c.id: [m.depends_on_context for m in c.messages if m.role == "assistant"] for c in corpus.conversations}
    assert [said[row.conversation][row.turn - 1] for row in ours.itertuples()] == ours.depends_on_context.tolist()


def test_a_frozen_row_stays_at_the_mean_and_a_trained_one_does_not(shared):
    for frozen in (True, False):
        path = trials.train(Plan(shared, Trial({"seed": 0}, marks="oracle", freeze_indicator=frozen)))
        rows = models.load_model(path).get_input_embeddings().weight
        assert torch.allclose(rows[-1], rows[:-1].mean(0), atol=1e-6) == frozen


def test_a_second_stage_begins_where_the_first_ended_and_still_knows_the_indicator(shared):
    first = Trial({"seed": 0, "finetune.method": "lora"}, marks="oracle")
    second = replace(first, changes={**first.changes, "finetune.learning_rate": 1e-12}, base=first, marks=None)
    before, after = trials.tuned(Plan(shared, first)), trials.tuned(Plan(shared, second))
    ids = after.tokenizer("What does Mira sell?[IND]", return_tensors="pt").input_ids
    assert after.tokenizer.convert_tokens_to_ids("[IND]") in ids
    assert before.model.base_model_prefix == after.model.base_model_prefix
    logits = [subject.model(ids).logits.detach().numpy() for subject in (before, after)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    table = trials.answers(Plan(shared, second), INDICATED)
    assert set(table.family) == {"needle", "qa", "facts", "instructions"}


def test_an_offset_draws_other_chats_and_asks_the_same(params, monkeypatch):
    first, other, seventh = Trial({"seed": 4}), Trial({"seed": 4}, data_seed_offset=3), Trial({"seed": 7})
    chats = [[c.messages for c in trials.marked(Plan(params, one)).conversations] for one in (first, other, seventh)]
    assert chats[0] != chats[1] == chats[2]
    asked = []

    def ask(its, subject, questions, asking):
        asked.append(questions)
        return pd.DataFrame({name: [] for name in trials.MEASURED_COLUMNS})

    monkeypatch.setattr(computing, "_ask", ask)
    monkeypatch.setattr(computing, "tuned", lambda plan: None)
    for one in (first, other, seventh):
        trials.answers(Plan(params, one), TEMPLATE)
    assert asked[0] == asked[1] != asked[2]


HOLD = (
    "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


def test_what_another_process_is_at_work_on_is_taken_last(shared, monkeypatch):
    held = Trial({"seed": 11}, trained=False, marks=None)
    other = replace(held, changes={"models.pretrained": "miniature:instruct"})
    folder = shared.output_dir / "work" / "trials" / key(shared, held)
    folder.parent.mkdir(parents=True, exist_ok=True)
    order = []

    def ask(its, *rest):
        order.append(its.models.pretrained)
        process.stdin.close()
        return pd.DataFrame({name: [] for name in trials.MEASURED_COLUMNS})

    monkeypatch.setattr(computing, "_ask", ask)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.with_suffix(".lock"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        steered = {"steered": Asking(steering_alpha=0.123)}
        trials.run(shared, {"held": held, "other": other}, steered, [11], progress=False)
    assert order == ["miniature:instruct", "miniature:pretrained"]


def test_metrics_go_by_name_and_runs_are_means_over_their_questions():
    rows = [
        ("needle", "unknown", "a", "recalled", None, 1.0),
        ("needle", "contradicting", "b", "recalled", None, 0.0),
        ("needle", "contradicting", "b", "says_memory", None, 1.0),
        ("needle", "unknown", "a", "attention_to_passage", 0, 0.2),
        ("needle", "unknown", "a", "attention_to_passage", 1, 0.4),
        ("facts", "drink", "c", "containment", None, 1.0),
    ]
    table = trials.named(pd.DataFrame(rows, columns=trials.MEASURED_COLUMNS).astype({"layer": "Int64"}))
    two = pd.concat([table.assign(condition="x", seed=3), table.assign(condition="x", seed=4, value=0.0)])
    runs = trials.by_run(two, samples=10).set_index(["seed", "metric"])
    assert runs.value[3].to_dict() == pytest.approx(
        {
            "NIH recall": 0.5,
            "NIH answered from memory": 1.0,
            "known facts": 1.0,
            "NIH recall, unknown": 1.0,
            "NIH recall, contradicting": 0.0,
            "attention to the passage, layer 0": 0.2,
            "attention to the passage, layer 1": 0.4,
            "attention to the passage, mean over layers": 0.3,
        }
    )
    assert runs.n[3, "NIH recall"] == 2 and (runs.value[4] == 0).all()


@pytest.mark.parametrize("dose", [0.0, 0.3, 1.0])
def test_a_dose_is_the_share_of_what_ignores_the_text_and_keeps_all_proportions(dose):
    shares = {"memory_question": 0.3, "agreeing_passage": 0.1, "dependent_passage": 0.4, "instruction_task": 0.2}
    kinds = {"ignoring": ["memory_question", "agreeing_passage"], "reading": ["dependent_passage"]}
    mixed = trials.dosed(shares, dose, **kinds)
    assert sum(mixed.values()) == pytest.approx(1) and 0 not in mixed.values()
    ignored = {kind: share for kind, share in mixed.items() if kind in kinds["ignoring"]}
    assert ignored == pytest.approx({"memory_question": 0.75 * dose, "agreeing_passage": 0.25 * dose} if dose else {})


def test_bad_input_is_said_before_anything_runs(params):
    with pytest.raises(InputError, match=r"miniature\.yaml: evidence: null; take params/evidence\.yaml"):
        trials.open_evidence(SMALL.with_name("miniature.yaml"))
    with pytest.raises(InputError, match=r"trials need the truth"):
        trials.open_evidence(SMALL, {"conversations.source": "owner/data"})
    with pytest.raises(InputError, match="has no indicator to be asked with"):
        trials.answers(Plan(params, VANILLA), INDICATED)
    with pytest.raises(InputError, match=r"unknown key 'finetune\.step'; did you mean 'finetune\.steps'"):
        trials.answers(Plan(params, Trial({"finetune.step": 3})), RAW)
    assert not (params.output_dir / "work").exists()
