"""Loss of context-awareness in instruction fine-tuning: measured, explained and cured (Wang et al. 2024).

The rooms, in reading order: each imports only from those above it. What notebooks import is a room of this folder; what
only one room needs lies inside it.

    params         one YAML file is one experiment: its settings, read and checked
    files          whole or not at all: written, fetched, hashed
    conversations  messages, conversations, questions: text, never tokens
    roles          token ids of any chat template, and exactly one role for every token
    models         the only door to tokenizers, models, adapters
    attention      record it by role, steer it, patch what heads put out: without the S×S matrix
    allocation     attention of the last token by role, and its shift under a chat template
    scoring        context-dependency scores of a corpus
    indicator      from scores to a marked dataset
    finetune       labels, LoRA / QLoRA / full fine-tuning, resumable
    generate       batched greedy answers, cached
    metrics        answers, intervals, separation, agreement
    questions      needles, passages, instructions
    results        tables, figures and claims into outputs/
    paper          the paper's printed tables, and ours beside them
    figures        one call a figure: tidy frame in, figure out
    miniature      the invented town and its models
    experiment     what one experiment reads: from the miniature or from your files
    cures          what can be done against the loss of context: each one class with three optional hooks

Three wings, which the story's notebooks do without:

    evidence       many fine-tunings at several seeds, for the notebooks from 06 on
    teaching       the class: checks of its exercises, their forms, the attention view, the site
    commands       the command line: run, reproduce, cures, verify, plan, doctor, rehearse, score, finetune, class, …
"""

import logging
import warnings

# Two notices from other packages that need no action and would otherwise be stored in every executed notebook.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional kernel that is not used here
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # peft 0.21
