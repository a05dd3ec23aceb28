"""Messages and conversations, and the loaders of datasets. Text, never tokens; every dropped row counted."""

from ctxlib.conversations.loading import (
    REFUSALS,
    data_files,
    hub_rows,
    is_hub_dataset,
    load_conversations,
    save_conversations,
)
from ctxlib.conversations.types import Conversation, Corpus, Message, Question, Rule

__all__ = [
    "REFUSALS",
    "Conversation",
    "Corpus",
    "Message",
    "Question",
    "Rule",
    "data_files",
    "hub_rows",
    "is_hub_dataset",
    "load_conversations",
    "save_conversations",
]
