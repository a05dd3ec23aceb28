"""Checks of the chosen layer: does it agree with other layers, do its heads agree, does it find dependent answers?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import bootstrap, rankdata
from torch import Tensor

from ctxlib.attention import record_allocation
from ctxlib.commands.doctor.check import Check
from ctxlib.commands.doctor.talk import renders
from ctxlib.conversations import Corpus
from ctxlib.metrics import auc
from ctxlib.params import InputError
from ctxlib.roles import Role, role_map
from ctxlib.scoring import answered_turns, reduce_heads

REPRESENTATIVE = 0.7  # rank correlation from which on a layer, or a head, stands for the others
DOMINANT = 0.5  # share of the answer's tokens from which on one busiest head is the whole layer's score


def check_layer(
    model: Any, tokenizer: Any, corpus: Corpus, layer: int, layers: Sequence[int] | None = None
) -> list[Check]:
    """Does it rank answers as other layers do, do its heads agree, does it find the answers that need their context?

    layers: those with attention, by default all. Raises InputError where `layer` is none of them.
    """
    layers = list(range(model.config.get_text_config().num_hidden_layers)) if layers is None else list(layers)
    if layer not in layers:
        raise InputError(f"it has no attention that can be recorded; choose one of {listed(layers)}")
    answers = answer_attention(model, tokenizer, corpus, layers)
    scores = np.stack([reduce_heads(answer.to_user, "max_then_mean").double().numpy() for answer in answers])
    return [
        _beside_other_layers(scores, layer, layers),
        _heads([answer.to_user[layers.index(layer)] for answer in answers], layer),
        _separation(scores, answers, layer, layers),
    ]


class Answer(NamedTuple):
    """Attention of an answer's tokens to the user's: by layer and head, and if it were equal for all tokens before."""

    to_user: Float[Tensor, "layer head answer_pos"]
    uniform: Float[Tensor, " answer_pos"]
    depends_on_context: bool


def answer_attention(model: Any, tokenizer: Any, corpus: Corpus, layers: Sequence[int] | None = None) -> list[Answer]:
    """The share of attention, in [0, 1], that each token of an answer pays to the user's tokens, turn by turn.

    Of these layers, by default of all. The maximum over heads and then the mean over tokens is the turn's
    context-dependency score (`clean` reading). Answers that the template leaves out are left out. Raises InputError
    where the truth of an answer is not known.
    """
    answers, rendered = [], renders(tokenizer)
    for conversation in corpus.conversations:
        role_of = role_map(tokenizer, conversation.messages, template=rendered)
        roles = role_of.roles[None].to(model.device)
        with torch.inference_mode(), record_allocation(model, roles, "all", layers, precision="exact") as recording:
            model(role_of.ids[None].to(model.device), use_cache=False)
        to_user = recording.allocation[:, 0, :, :, Role.USER].cpu()
        uniform = (role_of.roles == Role.USER).float().cumsum(0) / torch.arange(1, len(role_of) + 1)
        for turn, _, answer in answered_turns(conversation):
            depends = conversation.messages[answer].depends_on_context
            if depends is None:
                raise InputError(f"conversation {conversation.id!r}, turn {turn}: no truth; give depends_on_context")
            rows = (role_of.roles == Role.ASSISTANT) & (role_of.turns == turn)
            if rows.any():
                answers.append(Answer(to_user[:, :, rows], uniform[rows], depends))
    return answers


def _beside_other_layers(
    scores: Float[np.ndarray, "turn layer"], layer: int, layers: Sequence[int] | None = None
) -> Check:
    """layers: the numbers of the columns, by default from 0 on."""
    name, (turns, depth) = f"layer {layer}: others", scores.shape
    layers = list(range(depth)) if layers is None else layers
    place = layers.index(layer)
    others = [other for other in range(depth) if other != place]
    if not others:
        return Check(name, "ok", "it is the only layer")
    middle = [other for other in others if depth // 3 <= other < depth - depth // 3] or others
    ours, theirs = scores[:, place], scores[:, middle].mean(axis=1)
    value, each = rank_correlation(ours, theirs), rank_correlation(ours[:, None], scores[:, others], axis=0)
    interval = bootstrap((ours, theirs), rank_correlation, paired=True, method="percentile", n_resamples=2000, rng=0)
    low, high = interval.confidence_interval
    chosen = [layers[other] for other in middle]
    finding = (
        f"its scores rank {turns} answers as {_mean_of(chosen, layer, layers)}: {value:.2f} "
        f"({low:.2f} to {high:.2f}); least like layer {layers[others[int(np.nanargmin(each))]]}: {np.nanmin(each):.2f}"
    )
    if value >= REPRESENTATIVE:
        return Check(name, "ok", finding)
    fitting = layers[others[int(np.nanargmax([rank_correlation(scores[:, o], theirs) for o in others]))]]
    remedy = f"score some of your own conversations at all layers before you choose; nearest to the middle: {fitting}"
    return Check(name, "note", finding, remedy)


def _mean_of(chosen: Sequence[int], without: int, layers: Sequence[int]) -> str:
    if len(chosen) == 1:
        return f"layer {chosen[0]}"
    if len(layers) <= layers[-1]:  # some are without attention
        return f"the mean of layers {listed(chosen)}"
    inside = f" but {without}" if chosen[0] < without < chosen[-1] else ""
    return f"the mean of layers {chosen[0]} to {chosen[-1]}{inside}"


def listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _heads(attention: Sequence[Float[Tensor, "head _"]], layer: int) -> Check:
    name, heads = f"layer {layer}: heads", attention[0].shape[0]
    by_head = torch.stack([of_one.mean(dim=1) for of_one in attention]).double().numpy()
    agreement = rank_correlation(by_head, by_head.mean(axis=1, keepdims=True), axis=0)
    tokens = torch.cat(list(attention), dim=1)
    busiest = torch.bincount(tokens.argmax(dim=0), minlength=heads) / tokens.shape[1]
    share, head = busiest.max().item(), int(busiest.argmax())
    median = float(np.median(agreement))
    finding = (
        f"head {head} is the busiest at {share:.0%} of {tokens.shape[1]} answer tokens (by chance {1 / heads:.0%}); a "
        f"head ranks answers as the mean of {heads} heads: median {median:.2f}, lowest {agreement.min():.2f}"
    )
    remedies = []
    if heads > 1 and share > DOMINANT:
        remedies.append("its score is mostly that of one head: compare head_reduction: mean")
    if median < REPRESENTATIVE:
        remedies.append("its heads disagree: compare head_reduction: mean, or another layer")
    return Check(name, "note" if remedies else "ok", finding, "; ".join(remedies))


def _separation(
    scores: Float[np.ndarray, "turn layer"], answers: Sequence[Answer], layer: int, layers: Sequence[int] | None = None
) -> Check:
    """Lengths alone separate a little, too: equal attention to all tokens is reported for comparison.

    layers: the numbers of the columns, by default from 0 on.
    """
    layers = list(range(scores.shape[1])) if layers is None else layers
    place = layers.index(layer)
    truth = [answer.depends_on_context for answer in answers]
    value, low, high = auc(truth, scores[:, place])
    others = {
        "mean over heads": [answer.to_user[place].mean().item() for answer in answers],
        "equal attention": [answer.uniform.mean().item() for answer in answers],
    }
    beside = [f"{name} {auc(truth, of_it)[0]:.2f}" for name, of_it in others.items()]
    areas = [auc(truth, scores[:, other])[0] for other in range(scores.shape[1])]
    best = int(np.argmax(areas))
    finding = (
        f"AUC {value:.2f} ({low:.2f} to {high:.2f}), {sum(truth)} of {len(truth)} answers need their passage; "
        f"{', '.join(beside)}, best layer {layers[best]}: {areas[best]:.2f}"
    )
    if low > 0.5:
        return Check(f"layer {layer}: separation", "ok", finding)
    remedy = "these answers do not show that it finds them: score a sample of your own conversations at all layers"
    if auc(truth, others["mean over heads"])[1] > 0.5:
        remedy += ", also with head_reduction: mean"
    return Check(f"layer {layer}: separation", "note", finding, remedy)


def rank_correlation(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray | np.float64:
    """Spearman's rank correlation along an axis, the others broadcast, in [-1, 1]; 0 if all of one side is equal."""
    a, b = (rankdata(side, axis=axis) for side in np.broadcast_arrays(a, b))
    a, b = (side - side.mean(axis=axis, keepdims=True) for side in (a, b))
    spread = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
    return (a * b).sum(axis=axis) / np.where(spread > 0, spread, np.inf)
