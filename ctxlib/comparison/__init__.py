"""Our experiments beside the paper: in its rows where the same was measured, and in its directions elsewhere.

Reads only what the notebooks wrote: `manifest.json` and tables. An experiment of which some notebooks never ran has
fewer rows, nothing else.
"""

from ctxlib.comparison.cells import compare, dataset_counts, departures, ours_in, pairs
from ctxlib.comparison.directions import directions, minus, recall_errors
from ctxlib.comparison.outputs import Experiment, experiments, gather

__all__ = [
    "Experiment",
    "compare",
    "dataset_counts",
    "departures",
    "directions",
    "experiments",
    "gather",
    "minus",
    "ours_in",
    "pairs",
    "recall_errors",
]
