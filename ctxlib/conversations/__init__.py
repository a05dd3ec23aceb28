"""Messages and conversations, and the loaders of datasets. Text, never tokens; every dropped row counted."""

from ctxlib.conversations.loading import (
    REFUSALS,
    Ledger,
    iter_conversations,
    load_conversations,
    open_conversations,
    save_conversations,
)
from ctxlib.conversations.raw_text import load_raw_texts
from ctxlib.conversations.sources import BadRow, data_files, file_rows, hub_rows, is_hub_dataset
from ctxlib.conversations.types import Conversation, Corpus, Message, Question, Rule

__all__ = [
    "REFUSALS",
    "BadRow",
    "Conversation",
    "Corpus",
    "Ledger",
    "Message",
    "Question",
    "Rule",
    "data_files",
    "file_rows",
    "hub_rows",
    "is_hub_dataset",
    "iter_conversations",
    "load_conversations",
    "load_raw_texts",
    "open_conversations",
    "save_conversations",
]
