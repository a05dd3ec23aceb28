"""Experiments in a folder of outputs: their parameters, and the tables that their notebooks wrote."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ctxlib.paper import printed
from ctxlib.params import InputError

VALUES = ("value", "ci_low", "ci_high", "n")
TABLES = {  # tables read of an experiment, and their required columns
    "dataset": ("dataset", "metric", "value"),
    "needle_recall": ("condition", "kind", "prefix", "metric", *VALUES),
    "attention_allocation": ("condition", "layer", "role", *VALUES),
    "attention_shift": ("condition", "layer", "role", *VALUES),
    "steering": ("steering_alpha", "task", *VALUES),
    "scores": ("score", "user_tokens"),
    "fractions_over_beta": ("layer", "threshold", "fraction", "low", "high", "n"),
    "layer_agreement": ("layer", "other_layer", "disagreement", "n", "variant"),
    "evaluation": ("condition", "template", "task", "metric", *VALUES),
    "evaluation_changes": ("template", "task", "after", "before", "metric", *VALUES),
    "passages": ("condition", "template", "dataset", "metric", *VALUES),
    "steering_against_indicator": ("treatment", "heads", "layer", *VALUES),
    "seeds": ("condition", "metric", *VALUES),
    "threshold": ("condition", "metric", *VALUES),
}


@dataclass(frozen=True)
class Experiment:
    """An experiment's parameters (by their dotted names) and those of `TABLES` that its notebooks wrote."""

    folder: Path
    name: str
    params: dict[str, Any]
    tables: dict[str, pd.DataFrame]

    def table(self, name: str) -> pd.DataFrame:
        """One of `TABLES`; without rows if its notebook has not run."""
        return self.tables[name] if name in self.tables else pd.DataFrame(columns=TABLES[name])

    def setting(self, key: str) -> Any:
        """The value of a parameter such as "scoring.threshold"; InputError if the manifest lacks it."""
        if key not in self.params:
            raise InputError(f"{self.folder / 'manifest.json'}: params: no key '{key}'; run the experiment again")
        return self.params[key]

    @property
    def files(self) -> list[Path]:
        return [csv_path(self.folder, name) for name in self.tables]

    @property
    def base(self) -> str:
        """The paper's name of the model that was fine-tuned, or ours."""
        name = self.setting("models.pretrained")
        return printed.BASES.get(name, name)

    @property
    def dataset(self) -> str:
        """The paper's name of the conversations, or ours."""
        name = self.setting("conversations.source")
        return printed.DATASETS.get(name, name)

    @property
    def is_a_row(self) -> bool:
        """Whether it fine-tuned one of the paper's models on one of its datasets: a row of table 3."""
        return self.base in printed.BASES.values() and self.dataset in printed.DATASETS.values()


def experiments(outputs: str | Path) -> list[Experiment]:
    """The experiments in a folder, by name: every folder in it that holds a `manifest.json`.

    Raises InputError, naming the file, for an invalid manifest and for a table that cannot be read or lacks a column.
    """
    return [_experiment(manifest) for manifest in sorted(Path(outputs).glob("*/manifest.json"))]


def _experiment(manifest: Path) -> Experiment:
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        name, params = content["experiment"], content["params"]
        sections = {key: value for key, value in params.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{manifest}: not a manifest as 'ctxlib run' writes it ({type(error).__name__}: {error}); "
            "run the experiment again, or remove the folder"
        ) from None
    dotted = {f"{section}.{key}": value for section, inner in sections.items() for key, value in inner.items()}
    folder = manifest.parent
    found = {
        name: _read(csv_path(folder, name), columns)
        for name, columns in TABLES.items()
        if csv_path(folder, name).is_file()
    }
    return Experiment(folder, name, params | dotted, found)


def csv_path(folder: Path, name: str) -> Path:
    return folder / "tables" / f"{name}.csv"


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: not a table: {str(error).splitlines()[0]}; run its notebook again") from None
    if missing := [column for column in columns if column not in frame]:
        raise InputError(f"{path}: no column '{missing[0]}'; run the notebook that writes it again")
    return frame


def gather(found: Sequence[Experiment], name: str, layer: str | None = None) -> pd.DataFrame:
    """One table of all experiments with the column `experiment`; of a layer only, if `layer` names its parameter."""
    frames = [one.table(name).assign(experiment=one.name) for one in found]
    if layer:
        frames = [frame[frame.layer == one.setting(layer)] for one, frame in zip(found, frames, strict=True)]
    return stack(frames, [*TABLES[name], "experiment"])


def stack(frames: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    rows = [frame for frame in frames if len(frame)]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def needle_rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """The rows with the paper's metric, the share of keywords, if there are any, else ours; and which of the two."""
    same = bool((frame.metric == "needle_recall").any())
    return frame[frame.metric == ("needle_recall" if same else "recalled")], same
