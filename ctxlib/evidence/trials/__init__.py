"""Trials: fine-tuning runs of the miniature on generated conversations, and their models' answers and attention.

A trial is an immutable description of one run. Its results are stored in `work/trials/<key>`, under a hash of
everything that can change them, and are computed once, by whichever notebook or process asks first. Code is not part
of that hash, except for `plan.VERSION`.
"""

from ctxlib.evidence.trials.computing import MEASURED_COLUMNS, answers, marked, scores, train, tuned
from ctxlib.evidence.trials.definition import (
    INDICATED,
    PRETRAINED,
    RAW,
    TEMPLATE,
    VANILLA,
    Asking,
    Trial,
    open_evidence,
)
from ctxlib.evidence.trials.plan import Plan
from ctxlib.evidence.trials.tables import by_marks, by_run, dosed, named, run, scored_turns

__all__ = [
    "INDICATED",
    "MEASURED_COLUMNS",
    "PRETRAINED",
    "RAW",
    "TEMPLATE",
    "VANILLA",
    "Asking",
    "Plan",
    "Trial",
    "answers",
    "by_marks",
    "by_run",
    "dosed",
    "marked",
    "named",
    "open_evidence",
    "run",
    "scored_turns",
    "scores",
    "train",
    "tuned",
]
