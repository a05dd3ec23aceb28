"""The checks of the class: a right answer passes, however it is written; typical wrong ones are named."""

import math
import re
import statistics

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxlib import teaching
from ctxlib.metrics import wilson_interval
from ctxlib.roles import Role


def causal(scores):
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)


def scaled(q, k):
    return q @ k.T / math.sqrt(q.shape[-1])


def words(answer):
    return re.sub(r"[^\w\s]", "", answer.lower()).split()


def all_said(answers, keywords):
    return sum(set(asked) <= set(words(answer)) for answer, asked in zip(answers, keywords, strict=True))


def counted(k, n):
    return (k / n, *wilson_interval(k, n))


def mean_and_reach(d, error):
    return d.mean(), d.mean() - 1.96 * error, d.mean() + 1.96 * error


ROLES_OF_USER = (Role.USER, Role.TEMPLATE)
RIGHT = {
    "pattern": [
        lambda q, k: causal(scaled(q, k)).softmax(-1),
        lambda q, k: torch.stack([torch.cat([(q[i] @ k[: i + 1].T / q.shape[1] ** 0.5).softmax(0),
                                             torch.zeros(len(k) - i - 1)]) for i in range(len(q))]),
    ],
    "allocation": [
        lambda p, roles: p[:, -1, roles == Role.USER].sum(-1),
        lambda p, roles: p[:, -1] @ (roles == 2).float(),
    ],
    "recall": [
        lambda a, w: counted(all_said(a, w), len(a)),
        lambda a, w: torch.tensor(counted(all_said(a, w), len(a))),
    ],
    "score": [
        lambda p, r: p[:, r == Role.ASSISTANT][:, :, r == Role.USER].sum(-1).amax(0).mean(),
        lambda p, r: statistics.fmean(
            max(float(p[h, y][r == 2].sum()) for h in range(len(p))) for y in range(len(r)) if r[y] == 3
        ),
    ],
    "paired": [
        lambda a, b: mean_and_reach(a - b, (a - b).std() / math.sqrt(len(a))),
        lambda a, b: mean_and_reach(a - b, (a - b).std(ddof=0) / math.sqrt(len(a))),
    ],
}  # fmt: skip
WRONG = {
    "pattern": {
        "not divided by √d": lambda q, k: causal(q @ k.T).softmax(-1),
        "divided by d and not": lambda q, k: causal(q @ k.T / q.shape[1]).softmax(-1),
        "runs over the queries": lambda q, k: causal(scaled(q, k)).softmax(0),
        "no mask": lambda q, k: scaled(q, k).softmax(-1),
        "masked after the softmax": lambda q, k: scaled(q, k).softmax(-1).tril(),
        "masked with 0": lambda q, k: scaled(q, k).tril().softmax(-1),
        "this is a percentage": lambda q, k: 100 * causal(scaled(q, k)).softmax(-1),
        "returned shape": lambda q, k: causal(scaled(q, k)).softmax(-1)[-1],
    },
    "allocation": {
        "template's tokens are counted": lambda p, r: p[:, -1, (r == Role.USER) | (r == Role.TEMPLATE)].sum(-1),
        "everything but the assistant's": lambda p, r: p[:, -1, r != Role.ASSISTANT].sum(-1),
        "this is the mean over the user's": lambda p, r: p[:, -1, r == Role.USER].mean(-1),
        "the first token's attention": lambda p, r: p[:, 0, r == Role.USER].sum(-1),
        "the mean over all queries": lambda p, r: p[:, :, r == Role.USER].sum(-1).mean(-1),
        "this is a percentage": lambda p, r: 100 * p[:, -1, r == Role.USER].sum(-1),
    },
    "recall": {
        "half a value counts": lambda a, w: counted(
            sum(bool(set(asked) & set(words(said))) for said, asked in zip(a, w, strict=True)), len(a)),
        "parts of words count": lambda a, w: counted(
            sum(all(one in said.lower() for one in asked) for said, asked in zip(a, w, strict=True)), len(a)),
        "punctuation clings": lambda a, w: counted(
            sum(all(one in said.lower().split() for one in asked) for said, asked in zip(a, w, strict=True)), len(a)),
        "normal approximation": lambda a, w: mean_and_reach(
            pd.Series([set(asked) <= set(words(said)) for said, asked in zip(a, w, strict=True)], dtype=float),
            math.sqrt(all_said(a, w) / len(a) * (1 - all_said(a, w) / len(a)) / len(a))),
        "this is a percentage": lambda a, w: [100 * value for value in counted(all_said(a, w), len(a))],
        "returned shape": lambda a, w: all_said(a, w) / len(a),
    },
    "score": {
        "max after mean": lambda p, r: p[:, r == 3][:, :, r == 2].sum(-1).mean(1).max(),
        "the mean over heads": lambda p, r: p[:, r == 3][:, :, r == 2].sum(-1).mean(),
        "template's tokens are counted": lambda p, r: p[:, r == 3][:, :, (r == 2) | (r == 4)].sum(-1).amax(0).mean(),
        "all queries are averaged": lambda p, r: p[:, :, r == 2].sum(-1).amax(0).mean(),
        "last token alone": lambda p, r: p[:, -1, r == 2].sum(-1).max(),
        "this is a percentage": lambda p, r: 100 * p[:, r == 3][:, :, r == 2].sum(-1).amax(0).mean(),
    },
    "paired": {
        "turned round": lambda a, b: mean_and_reach(b - a, (b - a).std() / math.sqrt(len(a))),
        "not paired by their id": lambda a, b: mean_and_reach(
            a.reset_index(drop=True) - b.reset_index(drop=True), (a.values - b.values).std(ddof=1) / math.sqrt(len(a))),
        "two independent groups": lambda a, b: mean_and_reach(a - b, math.sqrt((a.var() + b.var()) / len(a))),
        "not divided by √n": lambda a, b: mean_and_reach(a - b, (a - b).std()),
        "covers two thirds": lambda a, b: mean_and_reach(a - b, (a - b).std() / math.sqrt(len(a)) / 1.96),
        "this is a percentage": lambda a, b: [
            100 * one for one in mean_and_reach(a - b, (a - b).std() / len(a) ** 0.5)],
    },
}  # fmt: skip


def check(name):
    return getattr(teaching, f"check_{name}")


@pytest.mark.parametrize(("name", "answer"), [(name, one) for name, ones in RIGHT.items() for one in ones])
def test_a_right_answer_passes_with_one_line(name, answer, capsys):
    check(name)(answer)
    assert re.fullmatch(rf"check_{name}: right\. .*\n", capsys.readouterr().out)


@pytest.mark.parametrize(("name", "mistake"), [(name, one) for name, ones in WRONG.items() for one in ones])
def test_a_wrong_answer_is_refused_with_its_mistake(name, mistake):
    with pytest.raises(AssertionError, match=f"^check_{name}: .*{re.escape(mistake)}"):
        check(name)(WRONG[name][mistake])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_written_returns_nothing_or_is_no_number_is_said_so(name):
    def blank(*inputs):
        raise NotImplementedError("your turn")

    with pytest.raises(AssertionError, match=f"^check_{name}: your turn: write the function"):
        check(name)(blank)
    with pytest.raises(AssertionError, match="returns nothing; end it with return"):
        check(name)(lambda *inputs: None)
    with pytest.raises(AssertionError, match="expected numbers"):
        check(name)(lambda *inputs: "0.5")


@given(st.floats(-3, 3), st.sampled_from(list(RIGHT)))
def test_no_constant_passes(value, name):
    with pytest.raises(AssertionError):
        check(name)(lambda *inputs: value)


def test_the_queries_and_keys_of_every_head_give_the_models_own_pattern():
    subject = teaching.load("pretrained")
    tokens = teaching.prompt(subject, teaching.needles(1, tokens=60)[0], template=False)
    theirs = teaching.attention_of(subject, tokens.ids)
    for layer in range(theirs.shape[0]):
        for head in range(theirs.shape[1]):
            q, k = teaching.query_and_key(subject, tokens.ids, layer, head)
            assert (causal(scaled(q, k)).softmax(-1) - theirs[layer, head]).abs().max() < 1e-4
    assert subject.model.config._attn_implementation == "sdpa"


def test_the_scored_turns_are_those_of_the_committed_scores():
    turns = teaching.scored_turns()
    assert len(turns) == len(teaching.table("scores"))
    first = teaching.conversation(turns.iloc[0])
    assert len(first.messages[1].content.split()) == turns.words.iloc[0]
    with pytest.raises(Exception, match="no such table"):
        teaching.table("nothing")
