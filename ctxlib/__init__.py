"""Loss of context-awareness in instruction fine-tuning: measured, explained and cured (Wang et al. 2024)."""

import logging
import warnings

# Two notices of other packages that ask nothing of a user, and would stand in every executed notebook.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel that is not used here
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # peft 0.21
