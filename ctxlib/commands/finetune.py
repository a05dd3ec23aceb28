"""`ctxlib finetune`: the data checked and described, the model trained, the adapter merged on request."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ctxlib.conversations import load_conversations, load_raw_texts
from ctxlib.files import check_writable
from ctxlib.finetune import export_merged, finetune, is_main_process
from ctxlib.miniature import model_source
from ctxlib.models import load_tokenizer
from ctxlib.params import Finetune, InputError, expanded


def train(
    name: str,
    data: str,
    out: Path,
    settings: Finetune,
    merged: Path | None,
    indicator: str | None,
    seed: int,
    *,
    raw_text: str | None = None,
    on_bad_row: str = "error",
    chat_template: str | None = None,
    revision: str | None = None,
    **more: Any,
) -> None:
    """Trains on conversations and prints what it does; `more` are further arguments of `finetune.finetune`.

    Raises InputError for data without a mark if there is an indicator, for a `merged` that is impossible or exists
    already, and as `load_conversations`, `load_tokenizer` and `finetune` do.
    """
    check_writable(expanded(out).parent)
    merged = merged and expanded(merged)
    if merged:
        check_writable(merged.parent)
    model = model_source(name)
    if bool(settings.raw_text_share) != bool(raw_text):
        raise InputError("--raw-text and --raw-text-share: one needs the other; give both, or neither")
    corpus = load_conversations(data, on_bad_row=on_bad_row)
    raw_texts = load_raw_texts(raw_text) if raw_text else []
    marks = sum(message.indicated for conversation in corpus.conversations for message in conversation.messages)
    if indicator and not marks:
        raise InputError(f"{data}: no user message is marked, {indicator} would learn nothing; first: ctxlib mark")
    if merged and (settings.method == "full" or merged.exists()):
        remedy = (
            "full makes no adapter, leave it out" if settings.method == "full" else "exists already, choose another"
        )
        raise InputError(f"--merged {merged}: {remedy}")
    if is_main_process():
        print(f"{data}: {len(corpus):,} conversations, {marks:,} marked user messages")
        for reason, n in corpus.dropped.itertuples(index=False):
            print(f"  {n:,} × {reason}")
        if marks and not indicator:
            print("  the marks are ignored; to use them: --indicator '[IND]'")
    log = finetune(
        model,
        load_tokenizer(model, chat_template=chat_template, revision=revision),
        corpus.conversations,
        settings,
        raw_texts=raw_texts,
        out_dir=out,
        indicator=indicator,
        seed=seed,
        revision=revision,
        console=Console(highlight=False),
        **more,
    )
    if is_main_process():
        if merged:
            export_merged(out, merged)
        print(f"loss {log.loss.iloc[0]:.3f} → {log.loss.iloc[-1]:.3f} nats per supervised token; written to {out}")
