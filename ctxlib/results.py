"""Tables and figures into `outputs/<experiment>/` and back: results move between notebooks only as files."""

import hashlib
import html
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from ctxlib.files import file_digest, to_json, write
from ctxlib.metrics import Side, holds, in_words
from ctxlib.params import InputError, Params

PACKAGE = Path(__file__).resolve().parent
MARKDOWN_ROWS = 500  # nobody reads more
SHOWN_ROWS = 12  # of a table, in the notebook that writes it
PREDICTION_COLUMNS = ["notebook", "prediction", "verdict", "found", "seed"]
CLAIM_COLUMNS = ["claim", "value", "ci_low", "ci_high", "threshold", "holds", "n", "seed"]
EVIDENCE_COLUMNS = "question condition metric value ci_low ci_high n unit seed experiment".split()


def open_results(params: Params, notebook: str) -> "Results":
    """The results of one notebook (its name without `.ipynb`) in the experiment's folder, which is made if need be."""
    return Results(params, notebook)


class Results:
    """Writes a notebook's tables and figures, each with a footer of provenance, each whole or not at all.

    `work` is a folder that git ignores, for files too big or too machine-bound to commit: adapters, caches, shards.
    Every file read or written through here is entered in `work/journal/<notebook>.json` with its sha256.
    """

    def __init__(self, params: Params, notebook: str) -> None:
        self.params = params
        self.notebook = notebook
        self.folder = params.output_dir
        self.work = self.folder / "work"
        self.provenance = provenance(params, notebook)
        self._claims: list[dict[str, Any]] = []
        self._predictions: list[dict[str, Any]] = []
        self._journal: dict[str, Any] = {"accelerator": _accelerator(), "inputs": {}, "outputs": {}}
        self._write_journal()

    def table(self, frame: pd.DataFrame, name: str, title: str) -> "Shown":
        """Writes `tables/<name>.csv` (6 significant digits, no index) and `.md` (4 digits, at most 500 rows).

        Returns the table as a notebook displays it: its first 12 rows, and a link to the whole of it if there are more.
        """
        self._table(frame, self.folder / "tables" / name, title, self.provenance)
        return self.show(frame, name)

    def show(self, frame: pd.DataFrame, whole: str, *, folded: str | None = None) -> "Shown":
        """A frame as a notebook displays it: its first 12 rows, and a link to the table `whole` if there are more.

        With `folded` only these words are seen until they are clicked.
        """
        return Shown(frame, f"tables/{whole}.csv", folded)

    def figure(self, figure: Figure, name: str, title: str) -> "Drawn":
        """Writes `figures/<name>.png` (150 dpi) and `.svg`, with the title above and the provenance below.

        Returns the PNG as a notebook displays it, with the title as its alternative text.
        """
        characters = int(figure.get_figwidth() * 12)
        lines = [part for line in title.split("\n") for part in textwrap.wrap(line, characters) or [""]]
        above = figure.text(0.5, 1.01, "\n".join(lines), ha="center", va="bottom", fontsize=11)
        below = figure.text(0.0, -0.01, self.provenance, ha="left", va="top", fontsize=5, color="0.5")
        pictures = {}
        with mpl.rc_context({"svg.hashsalt": name}):
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                content = io.BytesIO()
                figure.savefig(
                    content, format=suffix, dpi=150, bbox_inches="tight", metadata={"Title": title, **metadata}
                )
                pictures[suffix] = content.getvalue()
                self.record_output(write(self.folder / "figures" / f"{name}.{suffix}", pictures[suffix]))
        above.remove()
        below.remove()
        return Drawn(pictures["png"], title)

    def read_table(self, name: str) -> pd.DataFrame:
        """A table that this or an earlier notebook wrote; InputError if there is none.

        The columns `conversation` and `id` hold names, so they come back as text even if they look like numbers.
        """
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            raise InputError(f"{path}: no such table; first run the notebook that writes '{name}', or 'make reproduce'")
        self.record_input(path)
        names = dict.fromkeys(("conversation", "id"), str)
        return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names)

    def claim(
        self,
        claim: str,
        row: Any,
        threshold: int | float | None = None,
        *,
        side: Side = "above",
        margin: int | float | None = None,
    ) -> pd.DataFrame:
        """One row for `tables/claims.csv`; the claim's text begins with its number, by which the rows are ordered.

        row: value, ci_low, ci_high and n, as a row of `metrics.summarise` or a `metrics.Estimate`.
        threshold, side: the claim holds if the whole interval lies on that side of the threshold (`metrics.holds`).
        margin: instead of a threshold, for "no worse by more than `margin`": the lower limit must exceed -margin.

        This notebook's claims are in `tables/claims/<notebook>.csv`; `claims.csv` is assembled from those of all
        notebooks. Raises InputError unless exactly one of threshold and margin is given.
        """
        if (threshold is None) == (margin is None):
            raise InputError(f"claim {claim!r}: pass either a threshold or a margin")
        threshold = float(-margin if threshold is None else threshold)
        numbers = {"value": float(row.value), "ci_low": float(row.ci_low), "ci_high": float(row.ci_high)}
        verdict = {"threshold": threshold, "holds": holds(numbers["ci_low"], numbers["ci_high"], threshold, side)}
        entry = {"claim": claim, **numbers, **verdict, "n": int(row.n), "seed": self.params.seed}
        self._claims = [other for other in self._claims if other["claim"] != claim] + [entry]
        part = self.folder / "tables" / "claims" / f"{self.notebook}.csv"
        self.record_output(write(part, _csv(pd.DataFrame(self._claims, columns=CLAIM_COLUMNS))))
        gather_claims(self.params)
        return pd.DataFrame([entry], columns=CLAIM_COLUMNS)

    def verdict(self, prediction: str, came_true: bool | np.bool_, found: str) -> None:
        """Prints whether a prediction came true or failed, and writes it to `tables/predictions.csv`.

        came_true: decided from the data, by the rule that the prediction names.
        found: the numbers that decide it.
        """
        verdict = "came true" if came_true else "failed"
        entry = {"notebook": self.notebook, "prediction": prediction, "verdict": verdict, "found": found}
        entry["seed"] = self.params.seed
        self._predictions = [other for other in self._predictions if other["prediction"] != prediction] + [entry]
        part = self.folder / "tables" / "predictions" / f"{self.notebook}.csv"
        self.record_output(write(part, _csv(pd.DataFrame(self._predictions))))
        gather_predictions(self.params)
        print(f"{verdict.upper()}: {prediction} ({found})")

    def evidence(self, runs: pd.DataFrame, means: pd.DataFrame, unit: str = "questions") -> pd.DataFrame:
        """Writes this notebook's rows of `<outputs>/<experiment>.csv`, one tidy table of all evidence; returns them.

        runs: single runs: condition, metric, value, ci_low, ci_high, n, seed; `unit` says what n counts.
        means: over n seeds: the same columns without the seed.
        """
        rows = pd.concat([runs.assign(unit=unit), means.assign(unit="seeds", seed="all")], ignore_index=True)
        rows = rows.assign(question=self.notebook, experiment=self.params.experiment)[EVIDENCE_COLUMNS]
        self.record_output(write(self.folder / "tables" / "evidence" / f"{self.notebook}.csv", _csv(rows)))
        gather_evidence(self.params)
        return rows

    def record_input(self, path: str | Path) -> Path:
        """Records a file or folder that the notebook reads; InputError if there is none."""
        return self._record("inputs", Path(path))

    def record_output(self, path: str | Path) -> Path:
        """Records a file or folder that the notebook wrote by other means, such as an adapter."""
        return self._record("outputs", Path(path))

    def _table(self, frame: pd.DataFrame, stem: Path, title: str, footer: str) -> None:
        self.record_output(write(stem.with_suffix(".csv"), _csv(frame)))
        self.record_output(write(stem.with_suffix(".md"), _markdown(frame, title, footer)))

    def _record(self, kind: str, path: Path) -> Path:
        self._journal[kind][short_path(self.params, path)] = file_digest(path)
        self._write_journal()
        return path

    def _write_journal(self) -> None:
        write(self.work / "journal" / f"{self.notebook}.json", to_json(self._journal))


class Drawn:
    """A figure in a notebook: a PNG at two thirds of its pixels, and its title for those who do not see it."""

    def __init__(self, png: bytes, title: str) -> None:
        self.png, self.title = png, title

    def __repr__(self) -> str:
        return self.title

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        width = int.from_bytes(self.png[16:20], "big")  # pixels, in the header of every PNG
        return self.png, {"alt": " ".join(self.title.split()), "width": width * 2 // 3}


class Shown:
    """A table in a notebook: at most 12 rows, 4 digits, and a link to the whole table if it is longer."""

    def __init__(self, frame: pd.DataFrame, link: str, folded: str | None = None) -> None:
        self.frame, self.link, self.folded = frame, link, folded

    def __repr__(self) -> str:
        return _rows(self.frame, SHOWN_ROWS, f"[{self.link}]({self.link})")

    def _repr_markdown_(self) -> str:
        rows = repr(self)
        if self.folded is None:
            return rows
        return f"<details><summary>{html.escape(self.folded)}</summary>\n\n{rows}\n\n</details>"


def gather_claims(params: Params) -> list[Path]:
    """Assembles `tables/claims.csv` and `.md` from the notebooks' claims, in the order of their numbers."""
    tables = params.output_dir / "tables"
    parts = [pd.read_csv(part, dtype=str, keep_default_na=False) for part in sorted(tables.glob("claims/*.csv"))]
    claims = pd.concat([pd.DataFrame(columns=CLAIM_COLUMNS), *parts])
    claims = claims.sort_values("claim", key=lambda texts: texts.map(_claim_order), kind="stable")
    return [
        write(tables / "claims.csv", _csv(claims)),
        write(tables / "claims.md", _markdown(_to_read(claims), "Claims", provenance(params))),
    ]


def gather_predictions(params: Params) -> list[Path]:
    """Assembles `tables/predictions.csv` and `.md`, every prediction with its verdict, in the notebooks' order."""
    tables = params.output_dir / "tables"
    parts = [pd.read_csv(part, dtype=str, keep_default_na=False) for part in sorted(tables.glob("predictions/*.csv"))]
    predictions = pd.concat([pd.DataFrame(columns=PREDICTION_COLUMNS), *parts])
    title = f"Predictions: {(predictions.verdict == 'came true').sum()} of {len(predictions)} came true"
    return [
        write(tables / "predictions.csv", _csv(predictions)),
        write(tables / "predictions.md", _markdown(predictions, title, provenance(params))),
    ]


def _to_read(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims with two digits, and the value beside its interval; all digits are in claims.csv."""
    measured = ["value", "ci_low", "ci_high", "threshold"]
    numbers = claims[measured].replace("", np.nan).astype(float)
    interval = [in_words(row) for row in numbers.itertuples()]
    return pd.DataFrame(
        {
            "claim": claims["claim"],
            "value [95 % interval]": interval,
            "threshold": [f"{threshold:+.2f}" for threshold in numbers["threshold"]],
            "holds": claims["holds"].map({"True": "yes", "False": "no"}),
            "n": claims["n"],
        }
    )


def gather_evidence(params: Params) -> list[Path]:
    """Assembles `<outputs>/<experiment>.csv` from the notebooks' rows; means over seeds are also a Markdown table."""
    tables = params.output_dir / "tables"
    parts = [pd.read_csv(part, dtype={"seed": str}) for part in sorted(tables.glob("evidence/*.csv"))]
    rows = pd.concat(parts, ignore_index=True)[EVIDENCE_COLUMNS]
    over_all = rows[rows.unit == "seeds"].drop(columns=["unit", "seed", "experiment"])
    return [
        write(params.output_dir.with_name(f"{params.experiment}.csv"), _csv(rows)),
        write(tables / "evidence.md", _markdown(over_all, "Evidence: means over seeds", provenance(params))),
    ]


def provenance(params: Params, notebook: str | None = None) -> str:
    """One line that names the parameters and the code that made a result."""
    made_by = [notebook] if notebook else []
    facts = [f"params {params.digest}", f"code {code_version(notebook)}", f"seed {params.seed}"]
    return " · ".join([f"experiment {params.experiment}", *made_by, *facts])


def code_version(notebook: str | None = None) -> str:
    """12 hex digits of the package's Python files, and of the notebook's code cells (prose changes no result)."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    source = PACKAGE.parent / "notebooks" / f"{notebook}.ipynb"
    if source.is_file():
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        digest.update("\n".join("".join(lines) for lines in code).encode())
    return digest.hexdigest()[:12]


def short_path(params: Params, path: str | Path) -> str:
    """The path as it is written into records: relative to the root if it lies below, so the same on each machine."""
    path, root = Path(path).resolve(), params.root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _markdown(frame: pd.DataFrame, title: str, footer: str) -> str:
    return f"# {title}\n\n{_rows(frame, MARKDOWN_ROWS, 'the CSV file')}\n\n*{footer}*\n"


def _rows(frame: pd.DataFrame, most: int, whole: str) -> str:
    cells = [[_cell(value) for value in row] for row in frame.head(most).itertuples(index=False)]
    headers = [_cell(name) for name in frame.columns]
    alignment = ["right" if pd.api.types.is_numeric_dtype(kind) else "left" for kind in frame.dtypes]
    body = tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=alignment if cells else None)
    if len(cells) < len(frame):
        body += f"\n\nThe first {len(cells)} of {len(frame):,} rows; all are in {whole}."
    return body


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _claim_order(claim: str) -> tuple[float, str]:
    number = re.match(r"\d+", claim)
    return (float(number[0]) if number else math.inf, claim)


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
