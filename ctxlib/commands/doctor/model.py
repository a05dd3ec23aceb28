"""Checks of the model's shape, its tokenizer, and room for the indicator."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ctxlib.commands.doctor.check import Check
from ctxlib.conversations import Corpus
from ctxlib.params import InputError
from ctxlib.scoring import rope_borders

UNKNOWN = 0.01  # fraction of unknown tokens above which the text is not in the tokenizer's language


def check_model(model: Any) -> list[Check]:
    config = model.config.get_text_config()
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = getattr(config, "max_position_embeddings", None)
    dtype = str(model.dtype).removeprefix("torch.")
    dtype += " over 4-bit weights" if getattr(model, "is_quantized", False) else ""
    shape = f"{config.model_type}: {depth} layers of {heads} heads ({kv_heads} kv), {positions or 'any'} positions"
    finding, remedies = f"{shape}, {dtype}, {config._attn_implementation}", []
    if config._attn_implementation == "eager":
        remedies.append(
            "it runs on eager attention, whole patterns in memory: attention: eager in params files, short prompts"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and positions and window < positions:
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
        finding += f"; {sum('sliding' in kind for kind in kinds)} layers see {window} tokens back"
        remedies.append(f"keep prompts under {window} tokens: such layers see no further, and decoding is not recorded")
    if borders := [border for border in rope_borders(config) if not positions or border < positions]:
        finding += f"; other rotary frequencies beyond {', '.join(map(str, borders))} tokens"
        remedies.append(
            "scores do not depend on it, as batches stay on one side; in batches of your own keep prompts of up to "
            f"{borders[0]} tokens and longer ones apart"
        )
    return [Check("model", "note" if remedies else "ok", finding, "; ".join(remedies))]


def check_tokenizer(model: Any, tokenizer: Any, corpus: Corpus) -> list[Check]:
    rows = model.get_input_embeddings().weight.shape[0]
    kind = "fast" if tokenizer.is_fast else "slow"
    named = [f"{name} {getattr(tokenizer, f'{name}_token')!r}" for name in ("bos", "eos", "pad")]
    finding = f"{kind}, {len(tokenizer)} tokens for {rows} embedding rows, {', '.join(named)}"
    fails, notes = [], []
    if len(tokenizer) > rows:
        fails.append("take the model's own tokenizer: ids without an embedding end in an index error")
    if tokenizer.eos_token_id is None:
        notes.append("give the tokenizer an eos token: nothing ends an answer")
    if _differs_from_its_file(tokenizer, corpus):
        finding += "; gives other ids than its tokenizer.json"
        fails.append("load it with ctxlib.models.load_tokenizer, which keeps the file's pipeline, or save it anew")
    if not tokenizer.is_fast:
        notes.append("save it as tokenizer.json: a slow tokenizer that normalises text is refused")
    if tokenizer.unk_token_id is not None:
        messages = [message.content for conversation in corpus.conversations for message in conversation.messages]
        ids = np.concatenate([tokenizer(text, add_special_tokens=False).input_ids for text in messages])
        unknown = float((ids == tokenizer.unk_token_id).mean())
        if unknown > UNKNOWN:
            finding += f"; {unknown:.0%} of the conversations' tokens are unknown to it"
            notes.append("examine it with conversations in its own language: the layer's numbers mean little")
    verdict = "fail" if fails else "note" if notes else "ok"
    return [Check("tokenizer", verdict, finding, "; ".join(fails + notes))]


def _differs_from_its_file(tokenizer: Any, corpus: Corpus) -> bool:
    """Whether a chat has other ids by the pipeline of the folder's tokenizer.json, with which the model was trained."""
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    if not tokenizer.is_fast or not file.is_file():
        return False
    as_saved = Tokenizer.from_file(str(file))
    as_saved.no_padding()
    as_saved.no_truncation()
    eos = tokenizer.eos_token or ""
    chats = ["".join(f"{m.content}{eos}\n" for m in c.messages) for c in corpus.conversations]
    return any(
        as_saved.encode(chat, add_special_tokens=False).ids != tokenizer(chat, add_special_tokens=False).input_ids
        for chat in chats
    )


def check_indicator(model: Any, tokenizer: Any, indicator: str) -> list[Check]:
    vocabulary = tokenizer.get_vocab()
    if not indicator.strip():
        raise InputError("the indicator is blank; give a text such as '[IND]'")
    if indicator in vocabulary:
        added = tokenizer.added_tokens_decoder.get(vocabulary[indicator])
        kind = "of the vocabulary" if added is None else "added as special" if added.special else "added as ordinary"
        finding = f"{indicator!r} is token {vocabulary[indicator]} already, {kind}"
        remedy = "fine-tune from the base model's own tokenizer, or choose another indicator"
        return [Check("indicator", "fail", finding, remedy)]
    pieces = tokenizer.tokenize(indicator)
    holding = sorted(token for token in vocabulary if indicator in token)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    rows, new_id = inputs.shape[0], max(vocabulary.values()) + 1
    room = f"row {new_id} of {rows} is free" if new_id < rows else f"embeddings grow from {rows} to {new_id + 1} rows"
    tied = "tied" if outputs is None or outputs.weight is inputs else "not tied"
    finding = f"{indicator!r} is {len(pieces)} tokens now ({' '.join(pieces)}), will be token {new_id}: {room}, {tied}"
    if not holding:
        return [Check("indicator", "ok", finding)]
    finding += f"; {len(holding)} tokens contain it, such as {holding[0]!r}"
    remedy = "choose another indicator: once it is a token, it cuts through these wherever it is written"
    return [Check("indicator", "note", finding, remedy)]
