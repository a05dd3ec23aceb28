"""Two experiments against each other, paired by question."""

from pathlib import Path

import pandas as pd

from ctxlib import metrics
from ctxlib.params import InputError, expanded

QUESTIONS = Path("work") / "questions.parquet"  # of an experiment, written by notebook 15


def compare(a: str | Path, b: str | Path, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean difference A - B over the questions that both answered: the groups, a, b, value, ci_low, ci_high, n.

    a, b: experiments' folders, or CSV or Parquet files, with one row per question and measurement: id, value and any
    columns that say what was measured (cure, seed, kind, metric, condition …), which are the groups. The column `seed`
    pairs but does not group. The interval is a bootstrap over pairs, so it describes these trained models on other
    questions; for other trainings compare seeds. `attrs["unpaired"]` counts the rows that only one side has.

    Raises InputError for files without id and value, with different columns, with a question twice, or without a pair.
    """
    left, right = _rows(a), _rows(b)
    if set(left) != set(right):
        raise InputError(
            f"{a} and {b} have different columns, {', '.join(sorted(set(left) ^ set(right)))}; compare alike"
        )
    keys = [column for column in left if column != "value"]
    for name, part in ((a, left), (b, right)):
        if part.duplicated(keys).any():
            raise InputError(
                f"{name}: question {part.id[part.duplicated(keys)].iloc[0]!r} is there twice; make it one row"
            )
    paired = left.merge(right, on=keys, suffixes=("_a", "_b"))
    if not len(paired):
        raise InputError(f"{a} and {b} share no question; ask both the same, with the same seed")
    groups = [column for column in keys if column not in ("id", "seed")]
    rows = []
    for key, part in paired.groupby(groups, sort=False, dropna=False) if groups else [((), paired)]:
        change = metrics.paired_difference(part.value_a, part.value_b, samples, seed)
        rows.append((*key, part.value_a.mean(), part.value_b.mean(), *change, len(part)))
    table = pd.DataFrame(rows, columns=[*groups, "a", "b", "value", "ci_low", "ci_high", "n"])
    table.attrs["unpaired"] = len(left) + len(right) - 2 * len(paired)
    return table


def _rows(place: str | Path) -> pd.DataFrame:
    path = expanded(place)
    file = path / QUESTIONS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; run the experiment first, or give a CSV or Parquet file")
    frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file, dtype={"id": str})
    if missing := {"id", "value"} - set(frame.columns):
        raise InputError(f"{file}: no column {min(missing)!r}; one row per question needs id and value")
    return frame
