"""Checks a model before GPU hours are spent on it: can its attention be measured, and is the chosen layer typical?

One line per check: a verdict (`ok`, `note` or `fail`), a finding in numbers, a remedy in words. Every measurement is
compared with an independent computation: the model's own eager attention, a closed form, or transformers' own
rendering. The thresholds of the verdicts are ours; the paper has none.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlib.commands.doctor.attention import attending_layers, check_padding, check_recording, check_steering
from ctxlib.commands.doctor.check import VERDICTS, Check
from ctxlib.commands.doctor.display import print_examination
from ctxlib.commands.doctor.layer import check_layer, listed
from ctxlib.commands.doctor.model import check_indicator, check_model, check_tokenizer
from ctxlib.commands.doctor.talk import renders
from ctxlib.commands.doctor.template import TEMPLATE_CHECKS, check_no_template
from ctxlib.commands.doctor.templates import VERDICTS as TEMPLATE_VERDICTS
from ctxlib.commands.doctor.templates import examine_template, examine_templates
from ctxlib.conversations import Corpus, load_conversations
from ctxlib.miniature import model_source, texts
from ctxlib.miniature.town import Town
from ctxlib.models import load_model, load_tokenizer
from ctxlib.paper import paper_layer
from ctxlib.params import InputError

__all__ = [
    "CONVERSATIONS",
    "Check",
    "examine",
    "examine_template",
    "examine_templates",
    "open_patient",
    "print_examination",
    "print_templates",
]

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
    """Model, tokenizer and the conversations for the checks: plain English, or the town's for `miniature:<name>`.

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
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """All checks of a causal language model as a tidy frame: check, verdict, finding, remedy; failures first.

    layer: whose attention is scored (0-based); by default the one at the paper's relative depth, or the nearest with
    attention. In a hybrid model only the layers with attention are examined; a note names the others.
    corpus: conversations with known context dependence of each answer, by default 24 built-in ones.
    progress: called with the name of each check as it starts.

    Errors inside the model or its template are findings. Raises InputError for a layer that does not exist.
    """
    depth = model.config.get_text_config().num_hidden_layers
    layers = _attending_layers(model, tokenizer, depth)
    layer = min(layers, key=lambda other: abs(other - paper_layer(depth))) if layer is None else layer
    if not 0 <= layer < depth:
        raise InputError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1}")
    corpus = load_conversations(CONVERSATIONS) if corpus is None else corpus
    run = partial(_run_check, progress or (lambda name: None))
    rows = run("model", check_model, model)
    rows += run("tokenizer", check_tokenizer, model, tokenizer, corpus)
    recording = run("recording", check_recording, model, tokenizer, layers)
    rows += recording
    if without := [other for other in range(depth) if other not in layers]:
        finding = f"no attention that can be recorded in {listed(without)}, but in {listed(layers)}"
        rows.append(Check("layers", "note", finding, "choose scoring.layer and allocation.layer among the latter"))
    for name, examination, *inputs in (
        ("steering", check_steering, model, tokenizer, layers),
        ("padding", check_padding, model, tokenizer, layers),
        (f"layer {layer}", check_layer, model, tokenizer, corpus, layer, layers),
    ):
        if recording[0].verdict == "fail":
            rows.append(Check(name, "note", "not examined, as the recording fails"))
        else:
            rows += run(name, examination, *inputs)
    if renders(tokenizer):
        for part, examination in TEMPLATE_CHECKS.items():
            rows += run(f"template: {part}", examination, tokenizer)
    else:
        rows += run("template", check_no_template, tokenizer)
    rows += run("indicator", check_indicator, model, tokenizer, indicator)
    frame = pd.DataFrame(rows, columns=list(Check._fields))
    return frame.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable", ignore_index=True)


def print_templates(folder: str | Path, *, as_json: bool = False) -> int:
    """Prints a verdict per .jinja file of a folder, and the counts; returns 1 if one is wrong, else 0.

    They are rendered for the miniature's tokenizer. Raises InputError as `examine_templates` does.
    """
    frame = examine_templates(folder, load_tokenizer(model_source("miniature:instruct")))
    if as_json:
        print(frame.to_json(orient="records", indent=2, force_ascii=False))
    else:
        for name, verdict, finding in frame.itertuples(index=False):
            print(f"{verdict:9}  {name}: {finding}")
        counts = frame["verdict"].value_counts()
        print(", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in reversed(TEMPLATE_VERDICTS)))
    return int((frame["verdict"] == "wrong").any())


def _attending_layers(model: Any, tokenizer: Any, depth: int) -> list[int]:
    """All layers if none is found: the check of the recording then gives the reason."""
    try:
        return attending_layers(model, tokenizer) or list(range(depth))
    except Exception:  # models are foreign code: they can raise anything
        return list(range(depth))


def _run_check(
    progress: Callable[[str], None], name: str, examination: Callable[..., list[Check]], *inputs: Any
) -> list[Check]:
    progress(name)
    try:
        return examination(*inputs)
    except InputError as error:
        finding, _, remedy = str(error).partition("; ")
        return [Check(name, "fail", finding, remedy)]
    except Exception as error:  # models and templates are foreign code: they can raise anything
        said = " ".join(str(error).split())[:200]
        return [Check(name, "fail", f"{type(error).__name__}: {said}", "use another model or template")]
