"""What an experiment would take, told before anything runs: its steps, downloads, memory, time, and what is there.

Nothing is downloaded and no weight is loaded. What is counted and what is estimated says so in the printed plan; how,
in `questions` (rows and lengths), `network` (bytes and operations) and `machines` (time).
"""

from ctxlib.commands.plan.display import show
from ctxlib.commands.plan.planning import Plan, fits, hours, make_plan

__all__ = ["Plan", "fits", "hours", "make_plan", "show"]
