"""Checks of the exercises: each compares a student's function with an oracle, and names the mistake it recognises.

The oracles are not the published solutions: loops over plain numbers, closed forms, scipy. A check prints one line when
the function is right, and raises AssertionError when it is not.
"""

import math
import re
from collections.abc import Callable, Mapping
from statistics import NormalDist, fmean, stdev
from typing import Any

import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor

from ctxlib.roles import Role

PERCENT = "this is a percentage; give a fraction between 0 and 1: drop the factor 100"


def check_pattern(pattern: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`pattern(q, k)`: softmax of q·k/√d over the keys that each query may see. q, k: "pos width"."""
    q, k = (2 * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    right = torch.zeros(5, 5)
    for i in range(5):
        likeness = [math.exp(sum(a * b for a, b in zip(q[i].tolist(), k[j].tolist(), strict=True)) / math.sqrt(8))
                    for j in range(i + 1)]  # fmt: skip
        right[i, : i + 1] = torch.tensor(likeness) / sum(likeness)
    scores = q @ k.T
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scaled = scores / math.sqrt(8)
    masked = scaled.masked_fill(future, -math.inf)
    wrong = {
        "the scores are not divided by √d, so the softmax is too sharp: divide q @ k.T by math.sqrt(width)":
            scores.masked_fill(future, -math.inf).softmax(-1),
        "the scores are divided by d and not by its square root: math.sqrt(width)":
            (scores / 8).masked_fill(future, -math.inf).softmax(-1),
        "the softmax runs over the queries, so columns sum to one: every row must, take softmax(dim=-1)":
            masked.softmax(0).nan_to_num(),
        "no mask: tokens attend to the future; set scores of keys behind the query to -inf before the softmax":
            scaled.softmax(-1),
        "masked after the softmax, so rows do not sum to one: set the scores to -inf before it":
            scaled.softmax(-1).masked_fill(future, 0),
        "masked with 0, which is a score like any other: use -inf": scaled.masked_fill(future, 0).softmax(-1),
        "the mask hides the past and shows the future: mask where the key lies behind the query, triu(1)":
            scaled.masked_fill(future.T, -math.inf).softmax(-1),
        "q and k are swapped: rows are the queries, q @ k.T":
            (scaled.T).masked_fill(future, -math.inf).softmax(-1),
        "these are scores, not shares: take the softmax over the keys": masked,
    }  # fmt: skip
    _compare("check_pattern", _asked("check_pattern", pattern, q, k), right, wrong)
    print("check_pattern: right. Each row is softmax(q·k/√d) over the past, and sums to one.")


def check_allocation(share: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`share(pattern, roles)`: the last token's attention on the user's tokens, by head. pattern: "head query key"."""
    generator = torch.Generator().manual_seed(3)
    pattern = torch.rand(3, 7, 7, generator=generator).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    roles = torch.tensor([0, 4, 2, 2, 2, 4, 3])  # bos, template, user ×3, template, assistant
    right = torch.tensor([sum(pattern[h, 6, key].item() for key in range(7) if roles[key] == 2) for h in range(3)])
    user, template, last = roles == Role.USER, roles == Role.TEMPLATE, pattern[:, -1]
    wrong = {
        "the template's tokens are counted as the user's: roles == Role.USER alone":
            last[:, user | template].sum(-1),
        "everything but the assistant's tokens is counted as the user's: roles == Role.USER alone":
            last[:, roles != Role.ASSISTANT].sum(-1),
        "this is the mean over the user's tokens; their shares add up: take the sum": last[:, user].mean(-1),
        "this is the largest share of one token; a role's share is the sum over its tokens": last[:, user].amax(-1),
        "this is the first token's attention; ask the last one, pattern[:, -1]": pattern[:, 0][:, user].sum(-1),
        "this is the mean over all queries; ask the last one, pattern[:, -1]": pattern[:, :, user].sum(-1).mean(-1),
        "queries and keys are swapped: the keys are the last axis": pattern[:, user, -1].sum(-1),
        "the heads are averaged; give one number a head": right.mean(),
    }  # fmt: skip
    _compare("check_allocation", _asked("check_allocation", share, pattern, roles), right, wrong)
    print("check_allocation: right. One share a head: the last token's attention on what the user wrote.")


def check_recall(recall: Callable[[list[str], list[tuple[str, ...]]], tuple[float, float, float]]) -> None:
    """`recall(answers, keywords)`: (fraction that say all of their keywords, Wilson's lower and upper limit)."""
    answers = ["Mira sells velvet mittens.", "Mira sells Velvet hats.", "Otto grows climbing berries.",
               "Ida grows Early Oats!", "Ada keeps blind ponies.", "Oats are early."]  # fmt: skip
    keywords = [("velvet", "mittens"), ("velvet", "mittens"), ("limbing", "berries"), ("early", "oats"),
                ("tame", "geese"), ("early", "oats")]  # fmt: skip
    whole = [[bool(re.search(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE)) for word in words]
             for text, words in zip(answers, keywords, strict=True)]  # fmt: skip
    plain = [[word in text for word in words] for text, words in zip(answers, keywords, strict=True)]
    folded = [[word in text.lower() for word in words] for text, words in zip(answers, keywords, strict=True)]
    split = [[word in text.lower().split() for word in words] for text, words in zip(answers, keywords, strict=True)]

    def counted(hits: list[bool]) -> tuple[float, float, float]:
        limits = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        return sum(hits) / len(hits), limits.low, limits.high

    k, n = sum(map(all, whole)), len(answers)
    right = counted([all(row) for row in whole])
    half = NormalDist().inv_cdf(0.975) * math.sqrt(k / n * (1 - k / n) / n)
    exact = binomtest(k, n).proportion_ci(method="exact")
    wrong = {
        "half a value counts: an answer must say all of its keywords, use all(), not any()":
            counted([any(row) for row in whole]),
        "capital letters count: compare in lower case, 'Early Oats' says early oats": counted([all(r) for r in plain]),
        "parts of words count: 'climbing' does not say 'limbing'; compare whole words": 
            counted([all(row) for row in folded]),
        "punctuation clings to the words: 'mittens.' says mittens; strip it before you compare":
            counted([all(row) for row in split]),
        "this is the mean share of keywords; count answers that say all of theirs":
            (fmean(fmean(row) for row in whole), *right[1:]),
        "this is the normal approximation, k/n ± 1.96 √(p(1-p)/n), which may leave [0, 1]: use Wilson's interval":
            (k / n, k / n - half, k / n + half),
        "this is the exact (Clopper-Pearson) interval, wider than Wilson's": (k / n, exact.low, exact.high),
    }  # fmt: skip
    _compare("check_recall", _asked("check_recall", recall, answers, keywords), torch.tensor(right),
             {said: torch.tensor(value) for said, value in wrong.items()})  # fmt: skip
    print("check_recall: right. Answers that say all of their keywords, with Wilson's 95 % interval.")


def check_score(score: Callable[[Tensor, Tensor], Any]) -> None:
    """`score(pattern, roles)`: the answer's mean over tokens of the best head's attention to the user's tokens."""
    generator = torch.Generator().manual_seed(5)
    pattern = torch.rand(4, 8, 8, generator=generator).pow(3).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    roles = torch.tensor([0, 4, 2, 2, 4, 3, 3, 3])  # bos, template, user ×2, template, assistant ×3
    best = [max(sum(pattern[h, row, key].item() for key in (2, 3)) for h in range(4)) for row in (5, 6, 7)]
    answer, user = roles == Role.ASSISTANT, roles == Role.USER
    to_user = pattern[:, :, user].sum(-1)  # head query_pos
    with_template = pattern[:, :, user | (roles == Role.TEMPLATE)].sum(-1)
    of_answer = pattern[:, answer]
    wrong = {
        "max after mean: one head is chosen for the whole answer; take the best head of every token, then the mean":
            to_user[:, answer].mean(-1).amax(),
        "the mean over heads and not the best one: take amax over heads before the mean over tokens":
            to_user[:, answer].mean(),
        "the template's tokens are counted as the user's: keys are roles == Role.USER alone":
            with_template[:, answer].amax(0).mean(),
        "all queries are averaged; only the answer's tokens count: roles == Role.ASSISTANT": to_user.amax(0).mean(),
        "this is the answer's last token alone; take the mean over all of its tokens": to_user[:, -1].amax(),
        "this is the largest weight on one token; sum over the user's tokens before you choose a head":
            of_answer[:, :, user].amax(-1).amax(0).mean(),
        "this is the sum over the answer's tokens, which grows with its length; take the mean":
            to_user[:, answer].amax(0).sum(),
    }  # fmt: skip
    _compare("check_score", _asked("check_score", score, pattern, roles), torch.tensor(fmean(best)), wrong)
    print("check_score: right. Best head for every token of the answer, then the mean: equation 1 of the paper.")


def check_paired(paired: Callable[[pd.Series, pd.Series], tuple[float, float, float]]) -> None:
    """`paired(after, before)`: mean change of the same questions, and mean ± 1.96 s/√n, s of the differences.

    Both are Series of 0 and 1 indexed by question id, in orders of their own.
    """
    ids = [f"q{i}" for i in range(12)]
    after = pd.Series([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1], ids, dtype=float)
    before = pd.Series([0, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1], ids, dtype=float)[ids[::-1]]
    changes = [after[key] - before[key] for key in ids]
    n, z = len(changes), NormalDist().inv_cdf(0.975)

    def around(mean: float, error: float) -> Tensor:
        return torch.tensor([mean, mean - z * error, mean + z * error])

    mean, error = fmean(changes), stdev(changes) / math.sqrt(n)
    shuffled = [a - b for a, b in zip(after, before, strict=True)]
    wrong = {
        "the sign is turned round: it is after minus before": around(-mean, error),
        "the questions are not paired by their id: the rows have different orders; subtract Series, not their values":
            around(fmean(shuffled), stdev(shuffled) / math.sqrt(n)),
        "this is the interval of two independent groups; take the spread of the differences, question by question":
            around(mean, math.sqrt((stdev(after) ** 2 + stdev(before) ** 2) / n)),
        "s is not divided by √n: this is the spread of single questions, not of their mean":
            around(mean, stdev(changes)),
        "s is divided by n and not by its square root": around(mean, stdev(changes) / n),
        "the interval is mean ± s/√n, which covers two thirds; 95 % need 1.96 times that": around(mean, error / z),
    }  # fmt: skip
    # 1.96 or the exact quantile, n or n - 1 in the spread: all of these are right
    got = _asked("check_paired", paired, after, before)
    _compare("check_paired", got, around(mean, error), wrong, tolerance=0.06 * z * error)
    print("check_paired: right. The same questions before and after, and the interval of their mean change.")


def _asked(name: str, function: Callable[..., Any], *inputs: Any) -> Tensor:
    """What the student's function returns for the inputs, as a tensor of floats."""
    try:
        got = function(*inputs)
    except NotImplementedError as error:
        raise AssertionError(f"{name}: {error or 'not written yet'}: write the function above, run it, and run this "
                             "cell again") from None  # fmt: skip
    if got is None:
        raise AssertionError(f"{name}: the function returns nothing; end it with return")
    try:
        return got.detach().float() if isinstance(got, Tensor) else torch.tensor(got, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{name}: returned {type(got).__name__}; expected numbers") from None


def _compare(name: str, got: Tensor, right: Tensor, wrong: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Raises AssertionError unless they agree, with the mistake whose values were got, if it is one of the known."""

    def same(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance)

    if same(got, right):
        return
    for said, value in wrong.items():
        if same(got, value):
            raise AssertionError(f"{name}: {said}")
    if same(got / 100, right):
        raise AssertionError(f"{name}: {PERCENT}")
    if got.shape != right.shape:
        raise AssertionError(f"{name}: returned shape {tuple(got.shape)}, expected {tuple(right.shape)}")
    if got.isnan().any():
        raise AssertionError(f"{name}: some values are not numbers (nan): a row without any key, or 0/0?")
    worst = (got - right).abs().flatten().argmax()
    raise AssertionError(
        f"{name}: not yet: expected {right.flatten()[worst]:.3f}, got {got.flatten()[worst]:.3f} "
        f"(value {int(worst) + 1} of {right.numel()})"
    )
