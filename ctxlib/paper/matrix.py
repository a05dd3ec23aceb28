"""What of the paper is reproduced where: every table and figure, in one table."""

from collections.abc import Sequence

import pandas as pd

from ctxlib.paper.outputs import Experiment

GIVEN = "written down in"
PRINTED = "numbers are printed: redrawn here"
NOT_PRINTED = "no numbers are printed: not recoverable"
# Table or figure, what it shows, the table of ours that measures it, and what is left of the paper's.
ITEMS = (
    ("Table 1", "steering with α = 0.95", "steering", PRINTED),
    ("Table 2", "the data", "dataset", PRINTED),
    ("Table 3", "vanilla against indicator fine-tuning", "evaluation", PRINTED),
    ("Table 4", "hyperparameters", None, f"{GIVEN} params/*.yaml"),
    ("Tables 5, 6", "prompts for SQuAD, QuAC, DROP", None, f"{GIVEN} ctxlib/questions/qa.py"),
    ("Table 7", "needles recalled by official models", "needle_recall", PRINTED),
    ("Table 8", "prompts for needles", None, f"{GIVEN} ctxlib/questions/needle.py"),
    ("Table 9", "other thresholds", "evaluation", PRINTED),
    ("Table 10", "fraction of turns over the threshold", "fractions_over_beta", PRINTED),
    ("Figure 1", "a prompt with and without its template", None, "drawn for ours in 00_the_miniature"),
    ("Figure 2", "recall error by model", "needle_recall", PRINTED),
    ("Figure 3", "shift of attention, retrieval head", "attention_shift", NOT_PRINTED),
    ("Figure 4", "shares of attention by role", "attention_allocation", NOT_PRINTED),
    ("Figure 5", "steering against the indicator", "steering_against_indicator", NOT_PRINTED),
    ("Figure 6", "disagreement of layers", "layer_agreement", NOT_PRINTED),
    ("Figures 7-9", "lengths of all and of marked instructions", "scores", NOT_PRINTED),
)
COMMAND = "needs a GPU: make reproduce PARAMS=params/<one of the nine>.yaml"
OF_OFFICIAL_MODELS = ("Table 1", "Table 7", "Figure 2")  # chat models that others have fine-tuned


def matrix(found: Sequence[Experiment]) -> pd.DataFrame:
    """One row per table and figure: paper, shows, theirs, measured_here, on_its_models.

    `theirs` is what can be had of the paper's own numbers, `measured_here` the experiments that measured the same, and
    `on_its_models` those of them that are rows of its Table 3, or else the command.
    """
    rows = []
    for paper, shows, name, theirs in ITEMS:
        measured = [one for one in found if name is not None and len(one.table(name))]
        of_its = [one.name for one in measured if one.is_a_row]
        command = COMMAND + ", with models.instruct: an official chat model" * (paper in OF_OFFICIAL_MODELS)
        here = ", ".join(one.name for one in measured) or ("-" if name is None else "not yet")
        rows.append((paper, shows, theirs, here, ", ".join(of_its) or (command if name else "-")))
    return pd.DataFrame(rows, columns=["paper", "shows", "theirs", "measured_here", "on_its_models"])
