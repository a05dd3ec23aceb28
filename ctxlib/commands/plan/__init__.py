"""What an experiment needs before anything is run or downloaded: inputs, downloads, memory and time on one GPU.

No weights are loaded and the network is not used. Sizes of weights and optimiser states are exact; activations and
durations are estimates (`network`, `machines`). How often the notebooks ask a question is counted from a rehearsal.
"""

from ctxlib.commands.plan.display import print_plan
from ctxlib.commands.plan.planning import Plan, make_plan

__all__ = ["Plan", "make_plan", "print_plan"]
