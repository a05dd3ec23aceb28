"""The class: what its exercises ask models with, checks that name the mistake, their forms, the view and the site."""

from ctxlib.teaching.asking import (
    answers,
    attention_of,
    conversation,
    instructions,
    load,
    needles,
    prompt,
    query_and_key,
    scored_turns,
    table,
)
from ctxlib.teaching.checks import check_allocation, check_paired, check_pattern, check_recall, check_score

__all__ = [
    "answers",
    "attention_of",
    "check_allocation",
    "check_paired",
    "check_pattern",
    "check_recall",
    "check_score",
    "conversation",
    "instructions",
    "load",
    "needles",
    "prompt",
    "query_and_key",
    "scored_turns",
    "table",
]
