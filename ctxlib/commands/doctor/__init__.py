"""What to know about a model before GPU hours go into it: can it be measured, and does it look where we look?

Each check is a line: a verdict (`ok`, `note` or `fail`), a finding in numbers, a remedy in words. What is measured is
compared with something that is computed in another way: the model's own eager attention, a closed form, transformers'
own rendering. The thresholds of the verdicts are ours; the paper has none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlib.commands.doctor.attention import attending_layers, check_padding, check_recording, check_steering
from ctxlib.commands.doctor.check import VERDICTS, Check
from ctxlib.commands.doctor.display import show
from ctxlib.commands.doctor.layer import check_layer, listed
from ctxlib.commands.doctor.model import check_indicator, check_model, check_tokenizer
from ctxlib.commands.doctor.talk import renders
from ctxlib.commands.doctor.template import TEMPLATE_CHECKS, check_no_template
from ctxlib.conversations import Corpus, load_conversations
from ctxlib.miniature import model_source, texts
from ctxlib.miniature.town import Town
from ctxlib.models import load_model, load_tokenizer
from ctxlib.paper import paper_layer
from ctxlib.params import InputError

__all__ = ["CONVERSATIONS", "Check", "examine", "open_patient", "show"]

# 12 passages, each with a question about it and one that is not
CONVERSATIONS = Path(__file__).with_name("conversations.json")


def open_patient(
    name: str,
    *,
    dtype: str = "float32",
    quantisation: str | None = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
) -> tuple[Any, Any, Corpus]:
    """Model, tokenizer and conversations to examine them with: plain English, or the town's for `miniature:<name>`.

    A model whose class does not take sdpa attention is loaded with eager. Raises InputError as `load_model` does.
    """
    source, corpus = model_source(name), load_conversations(CONVERSATIONS)
    if source != name:
        made = texts.chat_dataset(Town(), 48, {"contradicting_passage": 0.5, "dependent_passage": 0.5}, seed=0)
        corpus = Corpus(tuple(made), corpus.dropped, "miniature")
    tokenizer = load_tokenizer(source, chat_template=chat_template, revision=revision)
    options = {"dtype": dtype, "quantisation": quantisation, "revision": revision}
    try:
        return load_model(source, **options), tokenizer, corpus
    except InputError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load_model(source, attention="eager", **options), tokenizer, corpus


def examine(
    model: Any,
    tokenizer: Any,
    *,
    layer: int | None = None,
    indicator: str = "[IND]",
    corpus: Corpus | None = None,
) -> pd.DataFrame:
    """All checks of a causal language model as a tidy frame: check, verdict, finding, remedy; what fails stands first.

    layer: whose attention is to give the scores (from 0); by default the one at the paper's depth, or nearest to it of
    those with attention. Of a hybrid model only the layers with attention are examined; a note names the others.
    corpus: conversations of which it is known whether an answer depends on its context, by default 24 built-in ones.

    What goes wrong inside the model or its template is a finding. Raises InputError for a layer that does not exist.
    """
    depth = model.config.get_text_config().num_hidden_layers
    layers = _attending_layers(model, tokenizer, depth)
    layer = min(layers, key=lambda other: abs(other - paper_layer(depth))) if layer is None else layer
    if not 0 <= layer < depth:
        raise InputError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1}")
    corpus = load_conversations(CONVERSATIONS) if corpus is None else corpus
    rows = _examined("model", check_model, model)
    rows += _examined("tokenizer", check_tokenizer, model, tokenizer, corpus)
    recording = _examined("recording", check_recording, model, tokenizer, layers)
    rows += recording
    if without := [other for other in range(depth) if other not in layers]:
        finding = f"no attention that can be recorded in {listed(without)}, but in {listed(layers)}"
        rows.append(Check("layers", "note", finding, "choose among the latter for scoring.layer and allocation.layer"))
    for name, examination, *inputs in (
        ("steering", check_steering, model, tokenizer, layers),
        ("padding", check_padding, model, tokenizer, layers),
        (f"layer {layer}", check_layer, model, tokenizer, corpus, layer, layers),
    ):
        if recording[0].verdict == "fail":
            rows.append(Check(name, "note", "not examined, as the recording fails"))
        else:
            rows += _examined(name, examination, *inputs)
    if renders(tokenizer):
        for part, examination in TEMPLATE_CHECKS.items():
            rows += _examined(f"template: {part}", examination, tokenizer)
    else:
        rows += _examined("template", check_no_template, tokenizer)
    rows += _examined("indicator", check_indicator, model, tokenizer, indicator)
    frame = pd.DataFrame(rows, columns=list(Check._fields))
    return frame.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable", ignore_index=True)


def _attending_layers(model: Any, tokenizer: Any, depth: int) -> list[int]:
    """All layers where none is found: the check of the recording then says why."""
    try:
        return attending_layers(model, tokenizer) or list(range(depth))
    except Exception:  # models are foreign code: they can raise anything
        return list(range(depth))


def _examined(name: str, examination: Callable[..., list[Check]], *inputs: Any) -> list[Check]:
    try:
        return examination(*inputs)
    except InputError as error:
        finding, _, remedy = str(error).partition("; ")
        return [Check(name, "fail", finding, remedy)]
    except Exception as error:  # models and templates are foreign code: they can raise anything
        said = " ".join(str(error).split())[:200]
        return [Check(name, "fail", f"{type(error).__name__}: {said}", "use another model or template")]
