"""From a folder of scores to marked data: read back, checked against the data, and written whole."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlib.commands.score import Settings, data_digests
from ctxlib.conversations import Corpus, data_files, save_conversations
from ctxlib.files import file_digest
from ctxlib.indicator import mark, threshold_for_fraction, turn_table
from ctxlib.params import InputError, Variant, expanded, locate, nowhere
from ctxlib.scoring import (
    corpus_hash,
)


@dataclass(frozen=True)
class Marked:
    """Marked conversations, and the layer, threshold and variant that they were marked by."""

    corpus: Corpus
    layer: int
    threshold: float
    variant: Variant

    def summary(self) -> str:
        turns = turn_table(self.corpus)
        return (
            f"marked {int(turns['indicated'].sum()):,} of {len(turns):,} turns (score at layer {self.layer} over "
            f"{self.threshold:.6g}); without a score, so unmarked: {int(turns['score'].isna().sum()):,}"
        )


def read_scores(folder: str | Path) -> tuple[pd.DataFrame, Settings, dict[str, Any]]:
    """Scores, their settings and the whole manifest of a folder.

    Raises InputError if they are missing, unreadable or do not belong together.
    """
    folder = expanded(folder)
    again = f"run 'ctxlib score … --out {folder}' (again)"
    if not (folder / "scores.json").is_file() or not (folder / "scores.parquet").is_file():
        raise InputError(f"{folder}: no complete scores (scores.json and scores.parquet); {again}")
    try:
        manifest = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        settings, scores_sha256 = Settings(**manifest["settings"]), manifest["scores_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'scores.json'}: not a manifest of scores; {again}") from error
    if file_digest(folder / "scores.parquet") != scores_sha256:
        raise InputError(f"{folder}: scores.parquet is not the file that scores.json describes; {again}")
    return pd.read_parquet(folder / "scores.parquet"), settings, manifest


def mark_data(
    folder: str | Path,
    out: str | Path,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    layer: int | None = None,
    variant: Variant | None = None,
    data: str | None = None,
) -> Marked:
    """Writes the data of a folder of scores to `out` (.jsonl, .json, .parquet), marked if a score is over threshold.

    threshold: in [0, 1]; or fraction: the top share of scored turns, in [0, 1]. One of the two.
    layer: may be left out if only one was scored. variant: of `indicator.mark`; by default that of the scores.
    data: where the data are now, if they were moved; they must be the same, byte by byte.

    Raises InputError as `read_scores`, `load_conversations`, `mark` and `save_conversations` do, for data that are not
    those scored, and for an `out` that would overwrite the scores or the data.
    """
    scores, settings, manifest = read_scores(folder)
    if (threshold is None) == (fraction is None):
        raise InputError("give a threshold or a fraction, one of the two")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold}: scores lie between 0 and 1, give a number there")
    if layer is None and len(settings.layers) > 1:
        raise InputError(f"{folder}: layers {', '.join(map(str, settings.layers))} were scored; name one (layer)")
    layer = settings.layers[0] if layer is None else layer
    if layer not in settings.layers:
        raise InputError(f"{folder}: layer {layer} was not scored; there is {', '.join(map(str, settings.layers))}")
    if fraction is not None:
        threshold = threshold_for_fraction(scores, fraction, layer=layer)
    settings = settings.changed(data=data or settings.data)
    place = locate(settings.data)
    if place == "nowhere":
        remedy = f"{folder} holds the scores of these data: give their new place (data)"
        raise InputError(nowhere(settings.data, remedy))
    changed = f"{settings.data}: not the data that {folder} holds scores of; bring these back, or score the new data"
    if sorted(data_digests(settings.data).values()) != sorted(manifest["data_sha256"].values()):
        raise InputError(changed)
    sources = [] if place == "hub" else data_files(settings.data)
    if expanded(out).resolve() in [path.resolve() for path in (expanded(folder) / "scores.parquet", *sources)]:
        raise InputError(f"{out}: the marks are made from this file; choose another name")
    corpus = settings.load_data()
    if corpus_hash(corpus) != manifest["identity"]["conversations"]:
        raise InputError(changed)
    variant = variant or settings.variant
    marked = mark(corpus, scores, threshold, layer=layer, variant=variant)
    save_conversations(marked, out)
    return Marked(marked, layer, threshold, variant)
