"""One function per figure: tidy frame in, matplotlib Figure out. Only positions and colours are computed here.

Frames are those of `metrics.summarise`: value, ci_low, ci_high and n in addition to the columns that a figure names.
Whiskers and bands are the frame's intervals; titles are added by `results.figure`. Nothing global is changed.
"""

from ctxlib.figures.answers import (
    bars_with_intervals,
    needle_heatmap,
    needle_maps,
    recall_by_condition,
    steering_curve,
)
from ctxlib.figures.attention import allocation_by_role, allocation_shift, head_map
from ctxlib.figures.beside import pairs_beside, recall_errors
from ctxlib.figures.forest import forest
from ctxlib.figures.front import gain_against_price, on_front
from ctxlib.figures.scores import (
    fractions_over_beta,
    layer_agreement,
    layer_auc,
    length_histograms,
    roc_and_pr,
    score_histogram,
    scores_by_kind,
)
from ctxlib.figures.seeds import curves_over_seeds
from ctxlib.figures.style import ROLE_COLOURS
from ctxlib.figures.tokens import label_strip, role_strip, role_strip_html
from ctxlib.figures.training import loss_curves

__all__ = [
    "ROLE_COLOURS",
    "allocation_by_role",
    "allocation_shift",
    "bars_with_intervals",
    "curves_over_seeds",
    "forest",
    "fractions_over_beta",
    "gain_against_price",
    "head_map",
    "label_strip",
    "layer_agreement",
    "layer_auc",
    "length_histograms",
    "loss_curves",
    "needle_heatmap",
    "needle_maps",
    "on_front",
    "pairs_beside",
    "recall_by_condition",
    "recall_errors",
    "roc_and_pr",
    "role_strip",
    "role_strip_html",
    "score_histogram",
    "scores_by_kind",
    "steering_curve",
]
