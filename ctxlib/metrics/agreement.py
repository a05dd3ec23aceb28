"""How far layers, or seed models, agree on which turns depend on their context."""

import itertools

import pandas as pd

from ctxlib.metrics.intervals import CHANGE, FRACTION
from ctxlib.params import InputError, Variant

AGREEMENT = {"rank correlation": CHANGE, "top share in common": FRACTION}  # ranges of `score_agreement`


def layer_agreement(frame: pd.DataFrame, top: float = 0.1, variant: Variant = "standard") -> pd.DataFrame:
    """How far two layers agree on which turns depend on their context most.

    One row per ordered pair of layers: layer, other_layer, overlap (fraction of the layer's top turns that are also the
    other's, in [0, 1]), disagreement = 1 - overlap, by_chance (the overlap of two random choices), n (turns).
    `standard` takes the fraction `top` of turns with the highest scores, as the paper's text says; `authors_code`
    drops the fraction `top` with the lowest and keeps the other 90 %, as the authors' script does, so that the
    disagreement cannot exceed 0.11. Equal scores are taken in the frame's order.

    Raises InputError when the layers were not scored on the same turns.
    Reference: Wang et al. 2024, figure 6; official script `compute_layer_agreement.py`.
    """
    scores = frame.pivot(index=["conversation", "turn"], columns="layer", values="score")
    if scores.isna().to_numpy().any():
        raise InputError("layer agreement: some turns have no score at some layer; score all layers on the same turns")
    n = len(scores)
    cut = max(1, int(n * top + 1e-9))
    kept = slice(cut, None) if variant == "authors_code" else slice(-cut, None)
    chosen = {layer: set(scores[layer].sort_values(kind="stable").index[kept]) for layer in scores.columns}
    rows = []
    for layer, ours in chosen.items():
        for other_layer, theirs in chosen.items():
            overlap = len(ours & theirs) / len(ours)
            rows.append((layer, other_layer, overlap, 1 - overlap, len(ours) / n, n))
    return pd.DataFrame(rows, columns=["layer", "other_layer", "overlap", "disagreement", "by_chance", "n"])


def score_agreement(frame: pd.DataFrame, by: str, *, top: float) -> pd.DataFrame:
    """How far two conditions agree on the same turns, pair by pair within each group of `by`.

    frame: condition, `by`, conversation, turn, score. One row per group, ordered pair and metric: `by`, condition,
    other, metric, value, n (turns). The metrics (AGREEMENT) are the `rank correlation` of the scores (Spearman, in
    [-1, 1]; NaN if all scores of a condition are equal) and the `top share in common`: among the turns in the fraction
    `top` with the highest scores under either condition, the share in it under both (Jaccard, in [0, 1]; two random
    choices have about top / (2 - top) in common). Equal scores are taken in the order of conversation and turn.

    Raises InputError if two conditions of a group were not scored on the same turns.
    """
    rows = []
    for key, group in frame.groupby(by, sort=False):
        scores = group.pivot(index=["conversation", "turn"], columns="condition", values="score")
        if scores.isna().to_numpy().any():
            raise InputError(f"score agreement: {by} {key}: the conditions must be scored on the same turns")
        n, ranks = len(scores), scores.corr("spearman")
        chosen = {name: set(scores[name].nlargest(max(1, round(top * n))).index) for name in scores.columns}
        for one, other in itertools.permutations(group["condition"].unique(), 2):
            common = len(chosen[one] & chosen[other]) / len(chosen[one] | chosen[other])
            rows.append((key, one, other, "rank correlation", ranks.loc[one, other], n))
            rows.append((key, one, other, "top share in common", common, n))
    return pd.DataFrame(rows, columns=[by, "condition", "other", "metric", "value", "n"])
