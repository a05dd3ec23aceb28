"""The only door to tokenizers, models and adapters, and the indicator's rows."""

from ctxlib.models.door import (
    DTYPES,
    Subject,
    load_config,
    load_model,
    load_tokenizer,
    memory_advice,
    require_chat_template,
)
from ctxlib.models.embeddings import add_indicator, add_indicator_token, embedding_changes, set_indicator_row
from ctxlib.models.folders import (
    BASE_FROM_HERE,
    TOKENIZER_FILES,
    adapter_base,
    check_weights,
    is_adapter,
    is_local,
    model_hash,
    trained_over,
)
from ctxlib.models.gguf import convert_gguf

__all__ = [
    "BASE_FROM_HERE",
    "DTYPES",
    "TOKENIZER_FILES",
    "Subject",
    "adapter_base",
    "add_indicator",
    "add_indicator_token",
    "check_weights",
    "convert_gguf",
    "embedding_changes",
    "is_adapter",
    "is_local",
    "load_config",
    "load_model",
    "load_tokenizer",
    "memory_advice",
    "model_hash",
    "require_chat_template",
    "set_indicator_row",
    "trained_over",
]
